"""One of several processes does a piece of work, the others wait for it: on any file system, without locks.

A process that finds no claim file writes its name into one, waits longer than a write takes, and reads the file again:
the one whose name stands there does the work (M. Fischer's algorithm for mutual exclusion). While it works, it counts
up a number in the file. A claim whose number has stood still for a minute is taken over, and so is, at once, one of a
process of this machine that has ended: nobody waits for ever. Two processes can both do the work where a write took
longer than the wait, or where one was stopped for a minute and goes on later. What they make must therefore be the
same, or show by whom it was made, as a digest does.
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
DEAD_S = 60.0  # without a beat


def once(location: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do `work` unless `done()`, in one process of all that call this with the same location; return when it is done.

    Where the process that does it dies or stands still, the next one takes over. An exception of `work` is raised here,
    and another process tries.
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
    """Name what process numbers are unique in: the boot of a machine and its process namespace, else the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}".replace(" ", "")
    except OSError:
        return socket.gethostname().replace(" ", "")


def _ended(claim: str) -> bool:
    """Say whether a claim's process is known to have ended: it ran on this machine, and is no more."""
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
    """Count up a claim while the body runs, as long as it is ours; give it back at the end."""
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
