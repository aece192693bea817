"""Workers that are forked off a process that has imported everything, as `warm` does with commands.

Python's fork server does it, made of a process that stands ready instead of one that begins with nothing. All else is
as where workers are spawned: a pipe is held by its two ends alone, a worker has the environment and the outputs of who
started it, and notes its death. A file of the folder, `started`, tells who started whom, `PARENT CHILD` a line.
"""

import os
import sys
from multiprocessing import context, forkserver, popen_forkserver, resource_tracker, spawn
from pathlib import Path

KNOWN = sys.version_info < (3, 14)  # the insides of whose fork server are these; on others workers are spawned
SPAWN = context._concrete_contexts["spawn"]


def address(folder):
    return str(Path(folder, "workers"))


def begin(folder, listener):
    """Fork the process that forks workers, and have them asked of it from what is forked off here."""
    if not KNOWN:
        listener.close()
        return
    alive, held = os.pipe()  # it ends when nobody holds that any more
    ready = spawn.prepare

    def prepare(data):
        for number, file in enumerate(forkserver.get_inherited_fds()[:2], 1):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(data.pop("environ"))
        ready(data)

    spawn.prepare = prepare
    use(folder, held)
    forker = os.fork()
    if forker == 0:
        os.close(held)
        try:
            forkserver.main(listener.detach(), alive, [])
        finally:
            os._exit(0)
    os.close(alive)
    listener.close()
    note(folder, 0, forker)


def use(folder, held, before=lambda: None):
    """Have workers of this process, and of its forks, forked instead of spawned. before: is called ahead of each."""
    if not KNOWN:
        return
    launch, given = popen_forkserver.Popen._launch, spawn.get_preparation_data

    def launch_and_note(self, process):
        before()
        self._fds += [1, 2]
        launch(self, process)
        note(folder, os.getpid(), self.pid)

    popen_forkserver.Popen._launch = launch_and_note
    spawn.get_preparation_data = lambda name: {**given(name), "environ": dict(os.environ)}
    context._concrete_contexts["spawn"] = context._concrete_contexts["forkserver"]
    forkserver.ForkServer.ensure_running = lambda self: resource_tracker.ensure_running()  # it runs, and is no child
    forkserver._forkserver._forkserver_address, forkserver._forkserver._forkserver_alive_fd = address(folder), held


def note(folder, parent, child):
    with open(Path(folder, "started"), "a") as file:
        file.write(f"{parent} {child}\n")


def started(folder):
    """Say who started whom: {pid: pid of who asked for it}, of the process that forks 0. Many have ended by now."""
    noted = Path(folder, "started")
    lines = noted.read_text().splitlines() if noted.exists() else []
    return {child: parent for parent, child in (map(int, line.split()) for line in lines)}
