"""Run a task over items on one or many processes: the only room that knows processes.

A task is picklable, is set up once per worker and turns one item into a small dict; what it makes it writes to files.
An exception becomes the item's error and the others go on. Every engine and worker count leaves the same files, since
items are whole shards or buckets, and nothing passes between them.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

from curate.errors import CurateError, UsageError, unknown

log = logging.getLogger("curate")
IN_FLIGHT_PER_WORKER = 2
PLAIN_INTERVAL_S = 10.0
ENGINES = ("local", "ray")
RAY_TRIES = 3  # of an item whose worker dies


class Task(Protocol):
    """Work on one kind of item."""

    def setup(self) -> None:
        """Prepare a worker: load the model, open the index. Called once per process."""

    def __call__(self, item: Any, /) -> dict[str, Any]:
        """Work one item. Returns counts for the report (`rows`, `bad`) and whatever the driver needs."""
        ...


@dataclass(frozen=True)
class Report:
    """What became of one item. Exactly one of value and error is set."""

    item: Any
    value: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """How a stage runs; never what it makes. workers 0: one per GPU, else one per core. Raises: UsageError."""

    workers: int = 0
    engine: str = "local"
    gpus: int = 0
    overwrite: bool = False
    quiet: bool = False
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if self.workers < 0:
            raise UsageError(f"workers={self.workers} is negative.", "0 takes one per GPU, else one per core")

    def share(self, items: Sequence[Any]) -> list[Any]:
        """Take the items of this slice: every WORLD-th from RANK on, or all."""
        return list(items) if self.part is None else list(items[self.part[0] :: self.part[1]])


def cores() -> int:
    """Count the processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    task: Task, items: Sequence[Any], *, engine: str = "local", workers: int = 1, gpus: int = 0
) -> Iterator[Report]:
    """Work all items and yield a report for each, in the order in which they end.

    gpus: with more than zero, each local worker sees one of them.
    """
    if engine == "ray":
        yield from _run_ray(task, items, max(1, workers), gpus)
    elif workers <= 1 or len(items) <= 1:
        task.setup()
        yield from (_attempt(task, item) for item in items)
    else:
        yield from _run_pool(task, items, min(workers, len(items)), gpus)


def _attempt(task: Task, item: Any) -> Report:
    try:
        return Report(item, value=task(item))
    except Exception as error:
        return Report(item, error=_words(error))


def _words(error: Exception) -> str:
    """Put an exception into one line; what is not ours keeps its traceback for the debug log."""
    if isinstance(error, CurateError):
        return str(error)
    log.debug("%s", traceback.format_exc())
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


_task: Task | None = None
_trouble = ""


def _start_worker(task: Task, devices: Any) -> None:
    """Begin a pool worker: claim a GPU where there are any, then set up its copy of the task."""
    global _task, _trouble
    _end_with_parent()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    try:
        task.setup()
    except Exception as error:  # raised here, it would break the pool without a word of what it was
        _trouble = _words(error)
    _task = task


def _end_with_parent() -> None:
    """Let this process die with the one that started it, which a killed run could not ask for."""
    import multiprocessing
    import multiprocessing.connection
    import threading

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def helpers(count: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> ProcessPoolExecutor:
    """Start processes that serve a worker, each begun by `start(*arguments)`; they end with it."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_start_helper, initargs=(start, arguments))


def _start_helper(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _end_with_parent()
    start(*arguments)


def _work(item: Any) -> Report:
    assert _task is not None
    return Report(item, error=_trouble) if _trouble else _attempt(_task, item)


def _run_pool(task: Task, items: Sequence[Any], workers: int, gpus: int) -> Iterator[Report]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # forked children of a threaded process deadlock
    devices = None
    if gpus > 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")
        devices = context.Queue()
        for index in range(workers):
            devices.put(names[index % len(names)])
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // workers))}
    saved = {name: os.environ.get(name) for name in threads}
    os.environ.update({name: value for name, value in threads.items() if saved[name] is None})
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(task, devices))
        try:
            yield from _drain(pool, items, workers * IN_FLIGHT_PER_WORKER)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)


def _drain(pool: ProcessPoolExecutor, items: Sequence[Any], in_flight: int) -> Iterator[Report]:
    """Keep a bounded number of items in the pool and yield what ends; a dead worker fails what is left by name."""
    waiting: dict[Future[Report], Any] = {}
    queue = iter(items)
    broken = ""
    while True:
        while not broken and len(waiting) < in_flight:
            item = next(queue, None)
            if item is None:
                break
            try:
                waiting[pool.submit(_work, item)] = item
            except BrokenProcessPool:
                broken = "a worker process died (out of memory?)"
                yield Report(item, error=broken)
        if not waiting:
            break
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            item = waiting.pop(future)
            try:
                yield future.result()
            except BrokenProcessPool:
                broken = "a worker process died (out of memory?)"
                yield Report(item, error=broken)
    for item in queue:
        yield Report(item, error=broken)


def _run_ray(task: Task, items: Sequence[Any], workers: int, gpus: int) -> Iterator[Report]:
    """Schedule items on Ray actors; Ray carries shard names, never data.

    When an actor or its node dies, a new one does the item again. Actors without further work are let go, so that there
    is room for the new one even where the lost node had the last free core.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray", "pip install 'data-curate[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    here = os.getcwd()

    class Worker:
        def __init__(self) -> None:
            self.trouble = ""
            try:
                os.chdir(here)  # relative locations mean the same on every node, of a shared file system
                task.setup()
            except Exception as error:  # raised here, it would be lost among Ray's own
                self.trouble = _words(error)

        def work(self, item: Any) -> Report:
            return Report(item, error=self.trouble) if self.trouble else _attempt(task, item)

    actor = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1)(Worker)
    idle = [actor.remote() for _ in range(min(workers, len(items)))]
    running: dict[Any, tuple[Any, Any]] = {}
    queue, tries = list(reversed(items)), dict.fromkeys(items, 0)
    while queue or running:
        while queue and idle:
            worker, item = idle.pop(), queue.pop()
            running[worker.work.remote(item)] = worker, item
        if not queue:
            idle.clear()
        [done], _ = ray.wait(list(running), num_returns=1)
        worker, item = running.pop(done)
        try:
            report = ray.get(done)
        except ray.exceptions.RayError as error:  # Ray's own retries are spent before it knows that a node is dead
            tries[item] += 1
            worker, report = actor.remote(), Report(item, error=f"its worker died {RAY_TRIES} times ({_words(error)})")
            if tries[item] < RAY_TRIES:
                queue.append(item)
                report = None
        idle.append(worker)
        if report is not None:
            yield report


@dataclass
class Outcome:
    """The reports of a stage, sorted by item, and its speed."""

    done: dict[Any, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Any, str] = field(default_factory=dict)
    rows: int = 0
    seconds: float = 0.0


def run_stage(
    label: str,
    task: Task,
    items: Sequence[Hashable],
    job: Job,
    *,
    workers: int | None = None,
    unit: str = "shards",
) -> Outcome:
    """Run a task over the items with a progress line on stderr (items, rows, rows/s, failed, ETA), and collect it.

    workers: overrides the job's number where the stage knows better.
    """
    outcome, started = Outcome(), time.perf_counter()
    count = workers if workers is not None else job.workers or (job.gpus or cores())
    line = Progress(label, len(items), unit=unit, quiet=job.quiet)
    for report in run(task, items, engine=job.engine, workers=count, gpus=job.gpus):
        if report.error is not None:
            outcome.failed[report.item] = report.error
            line.write(f"{label}: {report.item}: {report.error}")
        else:
            assert report.value is not None
            outcome.done[report.item] = report.value
            outcome.rows += int(report.value.get("rows", 0))
        line.update(len(outcome.done) + len(outcome.failed), outcome.rows, len(outcome.failed))
    outcome.seconds = time.perf_counter() - started
    line.close()
    order = {item: index for index, item in enumerate(items)}
    outcome.done = dict(sorted(outcome.done.items(), key=lambda pair: order[pair[0]]))
    outcome.failed = dict(sorted(outcome.failed.items(), key=lambda pair: order[pair[0]]))
    return outcome


class Progress:
    """One line per stage on stderr: rewritten in a terminal, every ten seconds and at the end elsewhere."""

    def __init__(self, label: str, total: int, *, unit: str = "shards", quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.live = sys.stderr.isatty()
        self.started = self.shown = time.perf_counter()
        self.text = ""

    def update(self, done: int, rows: int, failed: int = 0) -> None:
        """Note progress; prints only as often as a reader can follow."""
        now = time.perf_counter()
        elapsed = max(now - self.started, 1e-9)
        left = elapsed / done * (self.total - done) if done else 0.0
        timing = f"ETA {left:,.0f} s" if done < self.total else f"{elapsed:,.1f} s"
        speed = f"  {rows:,} rows  {rows / elapsed:,.0f} rows/s" if rows else ""
        trouble = f"  {failed} failed" if failed else ""
        self.text = f"{self.label:<8} {done:,}/{self.total:,} {self.unit}{speed}{trouble}  {timing}"
        if self.live and not self.quiet:
            sys.stderr.write(f"\r\x1b[K{self.text}")
            sys.stderr.flush()
        elif now - self.shown > PLAIN_INTERVAL_S:
            self.shown = now
            self.write(self.text)

    def write(self, text: str) -> None:
        """Print a line of its own."""
        if not self.quiet:
            sys.stderr.write(f"\r\x1b[K{text}\n" if self.live else f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the last state as a full line."""
        if self.text:
            self.write(self.text)
