"""Run a task over items on one or many processes.

A task is picklable, is set up once per worker and turns one item into a small dict; its output goes to files. An
exception becomes the item's error and the other items go on, unless it means that nothing can: a full disk, a lost
mount, a permission taken away. An item whose worker dies is done again by a new worker, up to TRIES times. Every engine
and every number of workers leave the same files, since items are whole shards or buckets that do not interact.
"""

import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from curate import faults, processes
from curate.attempts import Around, Grouped, attempt, failure
from curate.attempts import Report as Report
from curate.attempts import Task as Task
from curate.errors import CurateError, RunError, UsageError, unknown
from curate.processes import TRIES, Processes
from curate.progress import Progress
from pipelines.processor import cores as cores

log = logging.getLogger("curate")
ENGINES = ("local", "ray")
RAY_LOOK_S = 2.0  # between two requests for the progress of Ray's actors
RAY_ROOM_S = 10.0  # within which Ray, if it has room, has started an empty task
Note = Callable[[Any, int], None]  # (item, rows done of it)


@dataclass(frozen=True)
class Job:
    """How a stage runs; never what it makes. workers 0: one per core, or per GPU if the stage uses GPUs.

    passing: collects the items that failed for a reason that may pass, such as a network error.

    Raises: UsageError.
    """

    workers: int = 0
    engine: str = "local"
    gpus: int = 0
    overwrite: bool = False
    quiet: bool = False
    part: tuple[int, int] | None = None
    passing: set[Any] = field(default_factory=set, compare=False)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if self.workers < 0:
            raise UsageError(f"workers={self.workers} is negative.", "give 0 for one per core or GPU")

    def share(self, items: Sequence[Any]) -> list[Any]:
        """Take the items of this slice: every WORLD-th from RANK on, or all."""
        return list(items) if self.part is None else list(items[self.part[0] :: self.part[1]])


_sharing = 1  # how many workers share this machine's cores


def cores_each() -> int:
    """Count the cores that this worker may use, an equal share of its machine's; called in the worker itself."""
    return max(1, cores() // _sharing)


def share_cores(workers: int) -> None:
    """Note how many workers share this machine's cores."""
    global _sharing
    _sharing = max(1, workers)


def gpus(job: Job) -> int:
    """Count the GPUs that the job's workers may use: this machine's, or those of Ray's cluster."""
    return int(_ray().cluster_resources().get("GPU", 0)) if job.engine == "ray" else job.gpus


def ask(question: Callable[[], Any], job: Job) -> Any:
    """Call `question` where the job's workers run, with a GPU if they have one: on Ray, not on the driver."""
    if job.engine != "ray":
        return question()
    ray, here = _ray(), os.getcwd()

    def answer() -> tuple[Any, CurateError | None]:
        os.chdir(here)  # a local model may be named by a path relative to it
        try:
            return question(), None
        except CurateError as error:  # if it were raised here, Ray would replace its message by a traceback
            return None, error

    _wait_for_room(job, 1 if gpus(job) else 0)
    gone = ("RaySystemError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")
    with faults.ending("Ray is gone", *(getattr(ray.exceptions, name) for name in gone)):
        found, refused = ray.get(ray.remote(num_gpus=1 if gpus(job) else 0, num_cpus=1)(answer).remote())
    if refused is not None:
        raise refused
    return found


def _wait_for_room(job: Job, gpu: float) -> None:
    """Wait until Ray has room for a worker with this share of a GPU; say so if other work takes all the room."""
    with faults.ending("Ray is gone", (ray := _ray()).exceptions.RayError):
        begun = [ray.remote(num_cpus=1, num_gpus=gpu)(lambda: None).remote()]
        if not ray.wait(begun, timeout=RAY_ROOM_S)[0] and not job.quiet:
            free, held = ray.available_resources(), ray.cluster_resources()
            kinds = ("CPU", "GPU") if gpu else ("CPU",)
            told = " and ".join(f"{free.get(kind, 0):g} of {held.get(kind, 0):g} {kind}s" for kind in kinds)
            sys.stderr.write(f"Ray has not started a worker yet, {told} are free: waiting until it does\n")
        ray.get(begun)


def advance(rows: int) -> None:
    """Report from within a task that `rows` more rows of its item are done; only the progress line uses it."""
    if not processes.tell(rows) and _here:
        _here[-1](rows)


_here: list[Callable[[int], None]] = []  # listeners to the progress of items in this very process, innermost last


def run(
    task: Task,
    items: Sequence[Any],
    *,
    engine: str = "local",
    workers: int = 1,
    gpus: int = 0,
    share: float = 1.0,
    note: Note = lambda item, rows: None,
) -> Generator[Report, None, None]:
    """Run the task on all items and yield a report for each, in the order in which they end.

    gpus: if above zero, each local worker sees one. share: of a GPU that a Ray actor takes. note: called with how many
    rows of an item in progress are done, possibly in another thread.
    """
    if engine == "ray":
        with faults.ending("Ray is gone", _ray().exceptions.RayError):
            yield from _run_ray(task, items, max(1, workers), share if gpus else 0, note)
    elif workers <= 1 or len(items) <= 1:
        if items:  # a model is not loaded for nothing
            task.setup()
        for item in items:
            done = 0

            def hear(rows: int, item: Any = item) -> None:
                nonlocal done
                done += rows
                note(item, done)

            yield _attempt_heard(task, item, hear)
    else:
        yield from _run_pool(task, items, min(workers, len(items)), gpus, note)


def _attempt_heard(task: Task, item: Any, hear: Callable[[int], None]) -> Report:
    """Attempt an item in this process. hear: called with the rows of it that are done, as they are done."""
    _here.append(hear)
    try:
        return attempt(task, item)
    finally:
        _here.pop()


def _run_grouped(
    task: Task, items: Sequence[Any], size: int, around: Around, note: Note, **how: Any
) -> Generator[Report, None, None]:
    """Run small items in groups of `size`. Items of a group that failed as a whole are run again one by one."""
    groups = [tuple(items[first : first + size]) for first in range(0, len(items), size)]
    left: list[Any] = []
    for report in run(Grouped(task, around), groups, note=lambda group, rows: note(group[0], rows), **how):
        if report.value is None:
            left += report.item
        else:
            yield from report.value["reports"]
    yield from run(task, left, note=note, **how)


_task: Task | None = None


def _start_worker(task: Task, device: str | None, workers: int) -> None:
    """Start one of `workers` workers: claim a GPU if there are any, then set up its copy of the task."""
    global _task
    share_cores(workers)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    task.setup()
    _task = task


def _work(item: Any) -> Report:
    assert _task is not None
    return attempt(_task, item)


def helpers(count: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> Processes:
    """Start processes that serve a worker, each set up by `start(*arguments)`; they end when it does."""
    return Processes(start, [arguments] * count)


def _run_pool(task: Task, items: Sequence[Any], workers: int, gpus: int, note: Note) -> Iterator[Report]:
    # CUDA ignores every name after the first invalid one, such as -1.
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")[: max(1, gpus)]
    devices = [names[index % len(names)] if gpus > 0 else None for index in range(workers)]
    saved = os.environ.get("OMP_NUM_THREADS")
    if saved is None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // workers))
    pool = Processes(_start_worker, [(task, device, workers) for device in devices])
    done = False
    try:
        yield from _drain(pool, items, workers, note)
        done = True
    finally:
        pool.shutdown(cancel_futures=not done)
        if saved is None:
            os.environ.pop("OMP_NUM_THREADS", None)


def _drain(pool: Processes, items: Sequence[Any], workers: int, note: Note) -> Iterator[Report]:
    """Keep every worker busy with an item, and yield each report as it comes."""
    waiting: dict[Future[Report], Any] = {}
    queue = iter(items)
    while True:
        for item in itertools.islice(queue, workers - len(waiting)):
            waiting[pool.submit_noted(partial(note, item), _work, item)] = item
        if not waiting:
            return
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            item = waiting.pop(future)
            try:
                report = future.result()
            except Exception as error:  # its worker died, or could not be set up
                report = failure(item, error)
            yield report


def _run_ray(task: Task, items: Sequence[Any], workers: int, gpu: float, note: Note) -> Iterator[Report]:
    """Schedule items on Ray actors, each with a share of a GPU; Ray transports only the names of items.

    When an actor or its node dies, a new one does the item again; idle actors are released to make room for it.
    """
    ray = _ray()
    actor = _actor(ray, task, gpu, workers)
    idle = [actor.remote() for _ in range(min(workers, len(items)))]
    running: dict[Any, tuple[Any, Any]] = {}
    queue, tries = list(reversed(items)), dict.fromkeys(items, 0)
    while queue or running:
        while queue and idle:
            worker, item = idle.pop(), queue.pop()
            running[worker.work.remote(item)] = worker, item
        if not queue:
            idle.clear()
        ended, _ = ray.wait(list(running), num_returns=1, timeout=RAY_LOOK_S)
        if not ended:
            _look(ray, running.values(), note)
            continue
        worker, item = running.pop(ended[0])
        try:
            report = ray.get(ended[0])
        except ray.exceptions.RayError as error:  # Ray uses up its own retries before it notices that a node is dead
            tries[item] += 1
            worker = actor.remote()
            report = Report(item, error=f"its worker died {TRIES} times ({faults.in_words(error)})", passes=True)
            if tries[item] < TRIES:
                queue.append(item)
                report = None
        idle.append(worker)
        if report is not None:
            yield report


def _ray() -> Any:
    """Connect to Ray's cluster, or start one here. Raises: UsageError without Ray, RunError if it does not start."""
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray", "pip install 'data-curate[ray]'") from None
    if not ray.is_initialized():
        with faults.ending("Ray does not start", Exception):
            ray.init(log_to_driver=False, include_dashboard=False)
    return ray


def _actor(ray: Any, task: Task, gpu: float, workers: int) -> Any:
    """Declare the actor that processes items; while it works it also answers how far it is."""
    here = os.getcwd()

    class Worker:
        def __init__(self) -> None:
            self.trouble: Exception | None = None
            self.done = 0
            try:
                os.chdir(here)  # on a shared file system, relative paths then mean the same on every node
                share_cores(_actors_here(gpu, workers))
                task.setup()
            except Exception as error:  # raised here, it would be lost among Ray's own errors
                self.trouble = error

        def work(self, item: Any) -> Report:
            self.done = 0
            return failure(item, self.trouble) if self.trouble else _attempt_heard(task, item, self.advance)

        def advance(self, rows: int) -> None:
            self.done += rows

        @ray.method(concurrency_group="looks")  # type: ignore[untyped-decorator]
        def look(self) -> int:
            return self.done

    return ray.remote(num_gpus=gpu, num_cpus=1, concurrency_groups={"looks": 1})(Worker)


def _actors_here(gpu: float, workers: int) -> int:
    """Count the actors that this node has room for: by their share of a GPU, or one per core."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    held = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == mine)
    return min(workers, int(held.get("GPU", 1) / gpu if gpu else held.get("CPU", 1)))


def _look(ray: Any, running: Any, note: Note) -> None:
    """Ask each actor how many rows of its item it has done; an actor that does not answer in time is passed over."""
    asked = {worker.look.remote(): item for worker, item in running}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=RAY_LOOK_S)
    for answer in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            note(asked[answer], ray.get(answer))


@dataclass
class Outcome:
    """The reports of a stage, in order of its items, and its speed. passing: the failed items that a retry may help."""

    done: dict[Any, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Any, str] = field(default_factory=dict)
    passing: set[Any] = field(default_factory=set)
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
    gpu: float = 0,
    places: Sequence[str] = (),
    group: int = 1,
    around: Around = contextlib.nullcontext,
) -> Outcome:
    """Run a task over the items, with its progress on stderr, and collect what became of them.

    workers: overrides the job's number where the stage knows better. gpu: the share of a GPU that a worker takes.
    places: the directories that all items need; if one is gone, the stage ends. group: this many small items are
    processed at a time, within `around`.

    Raises: RunError at the first error that every other item would meet, too.
    """
    outcome, started = Outcome(), time.perf_counter()
    num_gpus = gpus(job) if gpu else 0
    if job.engine == "ray" and items:
        _wait_for_room(job, gpu if num_gpus else 0)
    count = workers if workers is not None else job.workers or (int(num_gpus / gpu) if gpu else 0) or cores()
    line, standing = Progress(label, len(items), unit=unit, quiet=job.quiet), faults.Standing(places)
    how: dict[str, Any] = {"engine": job.engine, "workers": count, "gpus": num_gpus, "share": gpu, "note": line.within}
    reports = run(task, items, **how) if group == 1 else _run_grouped(task, items, group, around, **how)
    with contextlib.closing(line), contextlib.closing(reports):
        for report in reports:
            line.end(report.item)
            lost = standing.lost()
            if lost or report.ends:
                log.debug("%s", report.trace)
                told = lost or f"{label}: {report.item}: {report.error}"
                raise RunError(told, "fix that and run the same command again; it resumes from here")
            if report.error is not None:
                outcome.failed[report.item] = report.error
                outcome.passing |= {report.item} if report.passes else set()
                line.write(f"{label}: {report.item}: {report.error}")
                log.debug("%s", report.trace)
            else:
                assert report.value is not None
                outcome.done[report.item] = report.value
                outcome.rows += int(report.value.get("rows", 0))
            line.update(len(outcome.done) + len(outcome.failed), outcome.rows, len(outcome.failed))
    job.passing.update(outcome.passing)
    outcome.seconds = time.perf_counter() - started
    outcome.done = {item: outcome.done[item] for item in items if item in outcome.done}
    outcome.failed = {item: outcome.failed[item] for item in items if item in outcome.failed}
    return outcome
