"""Kill the whole pipeline at random moments, let it resume, and compare every byte with an undisturbed run.

    python tests/bench/kills.py [--kills 50] [--rows 600] [--workers 2] [--seed 0]

embed, cluster, select and emit run as one `curate run` over a small rendered pool. A round starts from nothing; in each
stage the process group gets SIGKILL, often several times, after a random share of the time that the stage took
undisturbed, and is started again; then all files are compared. Rounds go on until there were enough kills. The suite
has a version with three (tests/test_end_to_end.py). Writes results/kills.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from curate.demo.render import render  # noqa: E402
from house import CLIP, fingerprint  # noqa: E402

STAGES = ("embeddings", "clusters", "selection", "coreset")
PIPELINE = f"""
[embed]
model = "{CLIP}"
[cluster]
k = 12
[select]
recipe = "balanced"
n = "20%"
[emit]
shard_size = 20
"""


def start(home, out, workers):
    """Start the pipeline over home/pool, into home/out."""
    words = ["run", str(home / "kills.toml"), "--pool", str(home / "pool"), "--out", str(home / out)]
    command = [sys.executable, "-m", "curate", *words, "--workers", str(workers)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)


def standing(out):
    """Name the stage that a run has come to."""
    done = [stage for stage in STAGES if (out / stage / "manifest.json").exists()]
    begun = [stage for stage in STAGES if (out / stage).exists()]
    return "before" if not begun else f"in {begun[-1]}" if len(begun) > len(done) else f"after {begun[-1]}"


def undisturbed(home, workers):
    """Run to the end; returns the seconds that each stage took, from its directory's appearance on."""
    process, seen, began = start(home, "whole", workers), {}, time.monotonic()
    while process.poll() is None:
        for stage in STAGES:
            if stage not in seen and (home / "whole" / stage).exists():
                seen[stage] = time.monotonic()
        time.sleep(0.01)
    assert process.returncode == 0
    moments = [began, *(seen[stage] for stage in STAGES), time.monotonic()]
    return dict(zip(("", *STAGES), [b - a for a, b in zip(moments[:-1], moments[1:], strict=True)], strict=True))


def disturb(home, out, workers, seconds, rng):
    """Run to the end through kills at random moments of stages drawn at random; returns where each kill met it."""
    met = []
    for stage in STAGES:
        while rng.random() < 0.7:
            process = start(home, out, workers)
            while process.poll() is None and not (home / out / stage).exists():
                time.sleep(0.005)
            try:
                process.wait(rng.random() * seconds[stage])
            except subprocess.TimeoutExpired:
                met.append(standing(home / out))
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert start(home, out, workers).wait() == 0, "a resumed run failed"
    return met


def main():
    """Kill and compare until there were enough kills; exit code 1 at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("kills", 50), ("rows", 600), ("workers", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    home, rng, met = Path(tempfile.mkdtemp()), random.Random(given.seed), []
    try:
        render(home / "demo", rows=given.rows, seed=11, shards=6, dirt="dirty", instruct=60, tests=1)
        (home / "demo" / "pool").rename(home / "pool")
        (home / "kills.toml").write_text(PIPELINE)
        seconds = undisturbed(home, given.workers)
        expected = fingerprint(*(home / "whole" / stage for stage in STAGES))
        print(f"undisturbed: {sum(seconds.values()):.1f} s, {len(expected)} files", flush=True)
        rounds = 0
        while len(met) < given.kills:
            rounds += 1
            met += disturb(home, "out", given.workers, seconds, rng)
            found = fingerprint(*(home / "out" / stage for stage in STAGES))
            assert found == expected, sorted(name for name in found | expected if found.get(name) != expected.get(name))
            assert not list((home / "out").rglob("*.tmp"))
            print(f"round {rounds}: {len(met)} kills so far, every byte equal", flush=True)
            shutil.rmtree(home / "out")
        where = dict(sorted(Counter(met).items()))
        print(f"{len(met)} kills in {rounds} rounds: {', '.join(f'{count} {place}' for place, count in where.items())}")
        result = {"command": "python " + " ".join(["tests/bench/kills.py", *sys.argv[1:]]), "date": str(date.today())}
        result |= {"kills": len(met), "rounds": rounds, "where": where, "files": len(expected), "differences": 0}
        (ROOT / "tests" / "bench" / "results" / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
