"""Commands as processes of their own that need not start from nothing: forked off one that has imported it all.

As a program it answers on a socket, for all workers of a test run, until none of them is there any more. On each link a
request is a JSON object a line, answered by the pid of its command and, once that has ended, by the exit code. What a
command does is what `python -m PROGRAM …` or `python FILE …` does, but for the imports, and for the end of the
interpreter, which would touch all of the memory that is shared.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import warm_workers

ROOT = Path(__file__).parent.parent
PROGRAMS = ("curate", "train")
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")[:12] or str(os.getpid())
HOME = Path(sys.argv[1] if __name__ == "__main__" else Path(tempfile.gettempdir(), f"warm-{RUN}"))
LOOK_S = 1.0  # between two looks at who is still there
# What the commands import when they need it, beside all of both programs. None of it makes forking unsafe.
LIBRARIES = "faiss jinja2 open_clip peft pyarrow.parquet scipy.sparse.csgraph sklearn.cluster transformers webdataset"


def one_worker():
    """Let verbs take one worker where none are asked for: several would only compete with the other tests."""
    from curate import command

    job = command._job
    command._job = lambda workers=0, **given: job(workers or 1, **given)


def prepare(request):
    """Make of this process the one that a request describes."""
    os.setsid()
    for name, most in request["limits"].items():
        which = getattr(resource, name)
        resource.setrlimit(which, (most, resource.getrlimit(which)[1]))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(request["to"], 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = request["words"]


def carry_out(program):
    """Run a program as Python's command line does; returns the exit code."""
    try:
        if program in PROGRAMS:
            sys.path[0] = os.getcwd()
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(program))
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def become(request):
    """Turn this process into a command, and end with it."""
    prepare(request)
    code = carry_out(request["words"][0])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def import_all():
    """Import both programs and what their commands import when they need it."""
    sys.path[0] = str(ROOT)  # as it stands, `train` would be the folder of that name beside this file
    parts = [path.relative_to(ROOT).with_suffix("").parts for name in PROGRAMS for path in (ROOT / name).rglob("*.py")]
    for name in (*LIBRARIES.split(), *(".".join(each) for each in parts if each[-1][:2] != "__")):
        try:
            importlib.import_module(name)
        except ImportError as error:  # of what is not installed
            if (error.name or name).split(".")[0] in PROGRAMS:
                raise


def serve(listener, for_workers):
    """Fork for each link that is asked for, until all have ended."""
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_all()
    one_worker()
    gc.freeze()
    warm_workers.begin(HOME, for_workers)
    parent, links = os.getppid(), set()
    while links or os.getppid() == parent:
        if select.select([listener], [], [], LOOK_S)[0]:
            link, _ = listener.accept()
            pid = os.fork()
            if pid == 0:
                listener.close()
                answer(link)
            link.close()
            links.add(pid)
        links -= (ended := {pid for pid in links if os.waitpid(pid, os.WNOHANG)[0]})
        if ended and not links:
            with locked():  # nobody asks just now
                if not select.select([listener], [], [], 0)[0]:
                    shutil.rmtree(HOME, ignore_errors=True)
                    os.unlink(f"{HOME}.lock")
                    break
    os._exit(0)


def answer(link):
    """Fork for each request on a link, until it ends."""
    with link.makefile("rwb", buffering=0) as talk:
        while line := talk.readline():
            pid = os.fork()
            if pid == 0:
                become(json.loads(line))
            talk.write(b"%d\n" % pid)
            talk.write(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def listen(place):
    """Take questions at a place from now on, be it that they are answered later."""
    Path(place).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    return listener


@contextlib.contextmanager
def locked():
    """Keep others from asking for a link."""
    with open(f"{HOME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def reach():
    """Have a link to the process that has imported everything, which the first who asks starts: a file of bytes."""
    place = str(HOME / "commands")
    link = socket.socket(socket.AF_UNIX)
    with locked():
        HOME.mkdir(mode=0o700, exist_ok=True)
        try:
            link.connect(place)
        except OSError:
            (HOME / "started").unlink(missing_ok=True)
            listeners = [listen(place), listen(warm_workers.address(HOME))]
            files = [each.detach() for each in listeners]
            words = [sys.executable, __file__, HOME, *map(str, files)]
            begun.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=ROOT, pass_fds=files))
            for file in files:
                os.close(file)
            link.connect(place)
    return link.makefile("rwb", buffering=0)


def warm_up():
    """Have workers of this process forked, too."""

    def there():
        if not Command.idle:
            Command.idle.append(reach())

    warm_workers.use(HOME, os.open(os.devnull, os.O_RDONLY), there)


begun: list = []  # the process, where this one has started it


class Command:
    """A command at work. pid: of its process, which leads a group; returncode: None until it is known to have ended."""

    idle: list = []  # the links that wait for a command: one, where none runs beside another

    def __init__(self, *words, cwd, env=None, limits=None):
        """words: the program, `curate` or `train` or a .py file, and its arguments. limits: of resources, by names."""
        self.link = self.idle.pop() if self.idle else reach()
        self.returncode, self.files = None, [tempfile.NamedTemporaryFile() for _ in range(2)]
        request = {"words": list(map(str, words)), "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        request |= {"limits": limits or {}, "to": [file.name for file in self.files]}
        self.link.write(json.dumps(request).encode() + b"\n")
        self.pid = int(self.link.readline())

    def poll(self):
        """Return the exit code of a command that has ended."""
        if self.returncode is None and select.select([self.link], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self):
        """Wait for the end; returns the exit code, below zero where a signal ended it."""
        if self.returncode is None:
            self.returncode = int(self.link.readline())
            self.idle.append(self.link)
        return self.returncode

    def kill(self):
        """Kill the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    @property
    def stdout(self):
        return self._text(0)

    @property
    def stderr(self):
        return self._text(1)

    def _text(self, number):
        return Path(self.files[number].name).read_text(encoding="utf-8")


if __name__ == "__main__":
    serve(*(socket.socket(fileno=int(file)) for file in sys.argv[2:]))
