"""Let one of several processes do a piece of work while the others wait: on any file system, without locks.

A process that finds no claim file writes its name into one, waits longer than a write takes, and reads the file again:
the process whose name is in the file does the work (M. Fischer's algorithm for mutual exclusion). While it works, it
keeps increasing a number in the file. If the number does not change for a minute, another process takes the claim over;
it does so at once if the claim belongs to a process of this machine that has ended. So nobody waits for ever. Two
processes may both do the work if a write took longer than the wait, or if one was stopped for a minute and continues
later. What they make must therefore be the same, or show who made it, as a digest does.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from curate.storage import paths

SETTLE_S, REMOTE_SETTLE_S = 1.0, 4.0
POLL_S, BEAT_S = 0.5, 2.0
DEAD_S = 60.0  # time without a beat after which a claim is taken over


def once(location: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do `work` unless `done()`, in one of all processes that call this with the same location; return once it is done.

    If the process that does it dies or stalls, another one takes over. An exception of `work` is raised here, and
    another process tries.
    """
    name = f"{_machine()} {os.getpid()} {uuid.uuid4().hex}"
    settle_s = REMOTE_SETTLE_S if paths.is_remote(location) else SETTLE_S
    seen, since = "", time.monotonic()
    while not done():
        claim = _read(location)
        if claim != seen:
            seen, since = claim, time.monotonic()
        if claim and not _ended(claim) and time.monotonic() - since < DEAD_S:
            time.sleep(POLL_S)
            continue
        _write(location, f"{name} 0")
        time.sleep(settle_s)
        if _read(location) == f"{name} 0":
            with _beating(location, name):
                if not done():
                    work()


def _machine() -> str:
    """Name the scope in which process ids are unique: the machine's boot and process namespace, else the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}".replace(" ", "")
    except OSError:
        return socket.gethostname().replace(" ", "")


def _ended(claim: str) -> bool:
    """Say whether a claim's process is known to have ended: it ran on this machine, and no longer does."""
    machine, pid, *_ = claim.split(" ")
    if machine != _machine():
        return False
    try:
        os.kill(int(pid), 0)  # signal 0 only asks
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _read(location: str) -> str:
    try:
        return paths.read_text(location)
    except OSError:
        return ""


def _write(location: str, text: str) -> None:
    """Write a claim whole, and fast: unlike `paths.atomic_write` it does not wait for the disk."""
    if paths.is_remote(location):
        with paths.atomic_write(location) as file:
            file.write(text.encode())
        return
    temporary = f"{paths.local(location)}.{uuid.uuid4().hex}.tmp"
    Path(temporary).write_text(text, encoding="ascii")
    os.replace(temporary, paths.local(location))


@contextlib.contextmanager
def _beating(location: str, name: str) -> Iterator[None]:
    """Keep increasing a claim's number while the body runs, as long as it is ours; release it at the end."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT_S):
            if not _read(location).startswith(name):
                return  # taken over
            count += 1
            with contextlib.suppress(OSError):
                _write(location, f"{name} {count}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(location).startswith(name):
            paths.remove(location)
