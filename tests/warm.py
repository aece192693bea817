"""Commands as processes of their own that need not start from nothing: forked off one that has imported it all.

As a program it reads requests from stdin, a JSON object a line, and answers each with the pid of its command and, once
that has ended, with the exit code. What a command does is what `python -m PROGRAM …` or `python FILE …` does, but for
the imports, and for the end of the interpreter, which would touch all of the memory that is shared.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import warm_workers

ROOT = Path(__file__).parent.parent
PROGRAMS = ("curate", "train")
# What the commands import when they need it, beside all of both programs. None of it makes forking unsafe.
LIBRARIES = "faiss jinja2 open_clip peft pyarrow.parquet scipy.sparse.csgraph sklearn.cluster transformers webdataset"


def one_worker():
    """Let verbs take one worker where none are asked for: each of several would import everything anew."""
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


def serve():
    """Fork for each request, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[0] = str(ROOT)  # as it stands, `train` would be the folder of that name beside this file
    parts = [path.relative_to(ROOT).with_suffix("").parts for name in PROGRAMS for path in (ROOT / name).rglob("*.py")]
    for name in (*LIBRARIES.split(), *(".".join(each) for each in parts if each[-1][:2] != "__")):
        try:
            importlib.import_module(name)
        except ImportError as error:  # of what is not installed
            if (error.name or name).split(".")[0] in PROGRAMS:
                raise
    one_worker()
    gc.freeze()
    if folder := os.environ.get("WARM_WORKERS"):
        warm_workers.begin(folder)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
    os._exit(0)


class Command:
    """A command at work. pid: of its process, which leads a group; returncode: None until it is known to have ended."""

    idle: list = []  # the servers that wait for a command: one, where none runs beside another

    def __init__(self, *words, cwd, env=None, limits=None):
        """words: the program, `curate` or `train` or a .py file, and its arguments. limits: of resources, by names."""
        if not self.idle:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.idle.append(subprocess.Popen([sys.executable, __file__], text=True, cwd=ROOT, **pipes))
        self.server = self.idle.pop()
        self.returncode, self.files = None, [tempfile.NamedTemporaryFile() for _ in range(2)]
        request = {"words": list(map(str, words)), "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        request |= {"limits": limits or {}, "to": [file.name for file in self.files]}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        self.pid = int(self.server.stdout.readline())

    def poll(self):
        """Return the exit code of a command that has ended."""
        if self.returncode is None and select.select([self.server.stdout], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self):
        """Wait for the end; returns the exit code, below zero where a signal ended it."""
        if self.returncode is None:
            self.returncode = int(self.server.stdout.readline())
            self.idle.append(self.server)
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
    serve()
