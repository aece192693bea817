"""Workers that are forked off a process that has imported everything, as `warm` does with commands.

Python's fork server does it, made of a process that stands ready instead of one that begins with nothing. All else is
as where workers are spawned: a pipe is held by its two ends alone, and a worker notes the death of who started it.
Begun by `warm` where WARM_WORKERS names a folder: its file `started` tells who started whom, `PARENT CHILD` a line.
"""

import os
import socket
from multiprocessing import context, forkserver, popen_forkserver, resource_tracker
from pathlib import Path


def begin(folder):
    """Fork the process that forks workers, and have them asked of it from here and from what is forked off here."""
    noted, launch = Path(folder, "started"), popen_forkserver.Popen._launch

    def launch_and_note(self, process):
        launch(self, process)
        with open(noted, "a") as file:
            file.write(f"{os.getpid()} {self.pid}\n")

    popen_forkserver.Popen._launch = launch_and_note
    context._concrete_contexts["spawn"] = context._concrete_contexts["forkserver"]
    forkserver.ForkServer.ensure_running = lambda self: resource_tracker.ensure_running()  # it runs, and is no child
    address = str(Path(folder, f"forks-{os.getpid()}"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive, held = os.pipe()  # it ends when nobody holds that any more
    if os.fork() == 0:
        os.close(held)
        try:
            forkserver.main(listener.detach(), alive, [])
        finally:
            os._exit(0)
    os.close(alive)
    listener.close()
    forkserver._forkserver._forkserver_address, forkserver._forkserver._forkserver_alive_fd = address, held


def started(folder):
    """List who started whom: {pid: [pids]}."""
    found = {}
    noted = Path(folder, "started")
    for line in noted.read_text().splitlines() if noted.exists() else []:
        parent, child = map(int, line.split())
        found.setdefault(parent, []).append(child)
    return found
