"""Worker processes, each with its own pipe, so that any of them may die without harm to the others.

Python's pools share one queue among their processes. A process that is killed breaks the whole pool, or worse: killed
in the middle of a write, it leaves the reader of that queue waiting for ever, since the others still hold its end open.
Here each pipe has one writer, so the reader sees its end as soon as the process dies. A new process then repeats the
call, up to TRIES times in all. A thread in this process waits for each of the others.
"""

import atexit
import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from pipelines import memory

TRIES = 3
NOTE_INTERVAL_S = 0.5
JOIN_S = 5.0  # how long a process may take to end by itself once its pipe is closed
Start = Callable[..., None]
Note = Callable[[Any], None]


class WorkerDied(Exception):
    """The process that made a call died, and so did those that repeated it."""


class Processes(Executor):
    """A pool of processes. Each first calls `start(*arguments)`; if that raises, so does every call it is given.

    arguments: one tuple for each process to be started.
    """

    def __init__(self, start: Start, arguments: Sequence[tuple[Any, ...]]) -> None:
        self._all = [_Seat(start, each) for each in arguments]
        self._free: queue.SimpleQueue[_Seat] = queue.SimpleQueue()
        for seat in self._all:
            self._free.put(seat)
        self._threads = ThreadPoolExecutor(len(self._all))
        atexit.register(self.shutdown, cancel_futures=True)  # without this, a crash here would wait for them for ever

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Call work(*arguments) in a process; all of it is pickled. The future raises WorkerDied, or what it raised."""
        return self._threads.submit(self._call, None, work, arguments, named)

    def submit_noted(self, note: Note, work: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Submit, and call `note`, in another thread, with the progress that the call reports by `tell`."""
        return self._threads.submit(self._call, note, work, arguments, {})

    def _call(self, note: Note | None, work: Callable[..., Any], arguments: Any, named: Any) -> Any:
        seat = self._free.get()
        try:
            return seat.call(note, work, arguments, named)
        finally:
            self._free.put(seat)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: once they have done what was submitted, or with cancel_futures at once."""
        if cancel_futures:
            for seat in self._all:
                seat.kill()
        self._threads.shutdown(wait=True, cancel_futures=cancel_futures)
        for seat in self._all:
            seat.close()
        atexit.unregister(self.shutdown)


class _Seat:
    """Holds one process at a time: when it dies, the next one takes its place."""

    def __init__(self, start: Start, arguments: tuple[Any, ...]) -> None:
        self.start, self.arguments = start, arguments
        self.process: Any = None
        self.pipe: Connection | None = None
        self.ending = False

    def call(self, note: Note | None, work: Callable[..., Any], arguments: Any, named: Any) -> Any:
        why = "killed, or out of memory?"
        for _ in range(TRIES):
            if self.ending:
                break
            if self.process is not None and not self.process.is_alive():
                self.close()  # it died between two calls, so neither loses a try
            try:
                if self.process is None:
                    self._begin()
                assert self.pipe is not None
                self.pipe.send((work, arguments, named))
                kind, value = self.pipe.recv()
                while kind == "note":
                    if note is not None:
                        note(value)
                    kind, value = self.pipe.recv()
            except (EOFError, OSError) as error:  # the other end is closed, or no process could be started
                if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                    why = str(error)
                self.close()
                continue
            if kind == "raised":
                raise value
            return value
        raise WorkerDied(f"its worker process died {TRIES} times ({why})")

    def _begin(self) -> None:
        import multiprocessing
        from multiprocessing import resource_tracker

        context = multiprocessing.get_context("spawn")  # forked children of a threaded process deadlock
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        try:
            # What is sent to start a process must fit into a pipe's buffer, or else the death of that process blocks
            # the starting thread for ever. So the arguments, which may be large, go through our own pipe.
            resource_tracker.ensure_running()  # if it started later, it would unblock Ctrl-C again
            signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # the new process inherits it
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        finally:
            theirs.close()
        if self.ending:
            self.kill()
        self.pipe.send((self.start, self.arguments))

    def kill(self) -> None:
        """End the process at once, and start no other in its place."""
        self.ending = True
        with contextlib.suppress(AttributeError, ValueError):  # not started, or already closed
            self.process.kill()

    def close(self) -> None:
        """End the process, which is waiting for its next call, or is dead."""
        if self.pipe is not None:
            self.pipe.close()
        if self.process is not None and self.process.pid is not None:
            self.process.join(JOIN_S)
            if self.process.is_alive():
                self.process.kill()
            self.process.join()
            with contextlib.suppress(ValueError):  # another thread, starting a process, has just reaped it
                self.process.close()
        self.process = self.pipe = None


def _serve(pipe: Connection) -> None:
    """Make the calls that come through the pipe until it closes."""
    global _teller
    memory.one_arena()  # before the first thread
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the main one decides
    trouble: BaseException | None = None
    _teller = _Teller(pipe)
    try:
        start, given = pipe.recv()
        try:
            start(*given)
        except Exception as error:
            trouble = error
        while True:
            work, arguments, named = pipe.recv()
            _teller.total = 0
            try:
                if trouble is not None:
                    raise trouble
                answer = "value", work(*arguments, **named)
            except Exception as error:
                answer = "raised", _portable(error)
            try:
                _teller.send(answer)
            except (TypeError, AttributeError, ValueError) as error:  # pickle's
                _teller.send(("raised", RuntimeError(f"the result of a worker process cannot be pickled: {error}")))
    except (EOFError, OSError):
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # its own helpers end with it, whereas an ordinary exit would wait for them


def _portable(error: Exception) -> Exception:
    """Make the exception safe to send through the pipe, with its traceback as a note."""
    import pickle

    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class whose constructor does not take the arguments that it stores
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(told)
    return error


class _Teller:
    """Sends the progress that a call reports, at intervals, and then its result."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.lock = pipe, threading.Lock()
        self.total, self.sent_at = 0, 0.0

    def add(self, rows: int) -> None:
        with self.lock:
            self.total += rows
            if time.monotonic() - self.sent_at >= NOTE_INTERVAL_S:
                self.sent_at = time.monotonic()
                self.pipe.send(("note", self.total))

    def send(self, answer: Any) -> None:
        with self.lock:
            self.pipe.send(answer)


_teller: _Teller | None = None


def tell(rows: int) -> bool:
    """Report that the call in this process has done `rows` more rows. Returns whether anyone is listening."""
    if _teller is None:
        return False
    _teller.add(rows)
    return True


def _end_with_parent() -> None:
    """Let this process end when the one that started it is gone; a run that is killed cannot end its processes."""
    import multiprocessing
    import multiprocessing.connection

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
