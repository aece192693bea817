"""Run a command where torch sees GPUs that are not there: `python simulate.py [--gpus 2] COMMAND …`.

For CUDA paths on a machine without a GPU: `make test-gpu-simulated` runs the tests marked `gpu` so. It shows where
tensors lie, what is copied, which ranks wait for what; not what kernels compute, and no speed. It needs Linux, gcc and
a torch that is built for CUDA, whose headers come with it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = ("nvidia/cu13/include", "triton/backends/nvidia/include")  # in site-packages


def lacks() -> str:
    """Say why GPUs cannot be simulated here, or nothing."""
    import torch

    packages = Path(sysconfig.get_path("purelib"))
    if not sys.platform.startswith("linux") or not shutil.which("gcc"):
        return "simulating a GPU takes Linux and gcc"
    if torch.version.cuda is None or not all((packages / folder).is_dir() for folder in HEADERS):
        return "simulating a GPU takes a torch with CUDA 13"
    probe = subprocess.run(["gcc", "-fsyntax-only", "-xc", "-"], input=b"#include <pthread.h>\n", capture_output=True)
    if probe.returncode:
        return "simulating a GPU takes the C library's headers"
    return ""


def build(folder: Path) -> Path:
    """Compile runtime.c into a library that stands before CUDA's."""
    library = folder / "libcuda.so.1"
    packages = Path(sysconfig.get_path("purelib"))
    headers = [f"-I{packages / name}" for name in HEADERS]
    how = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *how, *headers, str(HERE / "runtime.c"), "-o", str(library), "-lpthread"], check=True)
    return library


def environment(library: Path, gpus: int) -> dict[str, str]:
    """Return the environment in which a process sees so many GPUs."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    shown = {"LD_PRELOAD": str(library), "PYTHONPATH": path, "SIMULATED_GPUS": str(gpus)}
    kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return {**kept, **shown}


def main() -> int:
    """Run the command line."""
    words, gpus = sys.argv[1:], 1
    if words[:1] == ["--gpus"]:
        gpus, words = int(words[1]), words[2:]
    if not words or (reason := lacks()):
        raise SystemExit(reason if words else __doc__)
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(words, env=environment(build(Path(folder)), gpus)).returncode


if __name__ == "__main__":
    sys.exit(main())
