"""Disturb the main road at random moments, let it go on, and compare every byte with an undisturbed run.

    python tests/bench/kills.py [--kills 50] [--rows 240] [--shards 8] [--seed 0] [--ways whole,one,slices,disk,ray]

embed (two workers, each with a decoding process), cluster, select and emit run over a small rendered pool. A round
starts from nothing and is disturbed in one way:
    whole    the process group of a verb gets SIGKILL
    one      one process of a verb's tree gets it: the first, a worker, a decoder, Python's resource tracker
    slices   the same, where two slices of each verb run beside each other
    ray      the same on Ray's actors, Ray's own processes among the tree (left out where Ray is not installed)
    disk     the output lies on a file system that is full again and again, and grows (needs the right to mount)
Each verb is started again until it ends with 0, which it must within a bound, with no file left half. Rounds go on,
the ways in turn, until there were enough kills. The suite has a short version (tests/test_disturbed.py). Writes
results/kills.json.
"""

import argparse
import importlib.util
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
from house import CLIP, fingerprint, tree  # noqa: E402

STAGES = ("embeddings", "clusters", "selection", "coreset")
BOUND_S = 900  # far beyond any verb's time here, on a busy machine, too
DISK_STEP = 48 << 10


def words(home, out, stage):
    """Write the verb that makes a stage."""
    place = home / out
    return {
        "embeddings": ["embed", home / "pool", place / "embeddings", "--model", CLIP, "--decoders", 1],
        "clusters": ["cluster", place / "embeddings", place / "clusters", "--k", 12],
        "selection": ["select", place / "clusters", place / "selection", "--recipe", "balanced", "--n", "20%"],
        "coreset": ["emit", place / "selection", place / "coreset", "--shard-size", 10],
    }[stage]


def start(home, out, stage, *more):
    """Start a verb in a session of its own."""
    engine = [] if stage == "selection" else ["--workers", 2]
    command = [sys.executable, "-m", "curate", *words(home, out, stage), *engine, *more]
    log = open(home / "log.txt", "ab")
    return subprocess.Popen([*map(str, command)], cwd=ROOT, start_new_session=True, stdout=log, stderr=log)


def role(pid, first):
    """Say what a process of a tree is."""
    if pid == first:
        return "first"
    try:
        told = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return "ended"
    if "resource_tracker" in told:
        return "tracker"
    if "spawn_main" in told:
        return "worker" if parent == first else "decoder"
    return "Ray" if "ray" in told else "other"


def strike(process, way, rng):
    """Send SIGKILL to one process of the tree, or in the way `whole` to all; returns what was met."""
    if way == "whole":
        os.killpg(process.pid, signal.SIGKILL)
        return "whole"
    victim = rng.choice([process.pid, *tree(process.pid)])
    met = role(victim, process.pid)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return "ended"
    return met


def clear_away(process):
    """End what a first process that was killed has left: on Ray, processes of other sessions, too."""
    left = tree(process.pid)
    for group in {process.pid, *left}:
        try:
            os.killpg(group, signal.SIGKILL) if group == process.pid else os.kill(group, signal.SIGKILL)
        except ProcessLookupError:
            pass


def carry_out(home, out, stage, way, rng, met, seconds):
    """Carry out a stage through strikes, until every part of it ends with 0."""
    slices = [f"{rank}/2" for rank in range(2)] if way == "slices" and stage != "selection" else [""]
    flags = ["--engine", "ray"] if way == "ray" and stage != "selection" else []
    parts = {each: ["--slice", each, *flags] if each else flags for each in slices}
    begun, quiet, strikes = time.monotonic(), 0.0, 0
    running = {each: start(home, out, stage, *more) for each, more in parts.items()}
    while running:
        assert time.monotonic() - begun < BOUND_S, f"{stage} waits without end ({way})"
        for each, process in list(running.items()):
            if process.poll() is None:
                if strikes < 3 and time.monotonic() > quiet:
                    quiet = time.monotonic() + rng.random() * seconds.get(stage, 4.0)
                    if rng.random() < 0.6:
                        met.append(f"{strike(process, way, rng)} in {stage}" + (f" ({way})" if way != "one" else ""))
                        strikes += 1
                continue
            assert process.returncode in (0, 1, -signal.SIGKILL), (stage, way, process.returncode)
            if process.returncode:
                clear_away(process)
                running[each] = start(home, out, stage, *parts[each])
            else:
                del running[each]
        time.sleep(0.02)
    if not (home / out / stage / "manifest.json").exists():  # of two slices, each may have ended before the other
        assert start(home, out, stage).wait(BOUND_S) == 0


def fill(home, out, met):
    """Walk the road on a file system that is full again and again; returns False where none may be mounted."""
    place, size = home / out, DISK_STEP
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True).returncode:
        return False
    for stage in STAGES:
        while (code := start(home, out, stage).wait(BOUND_S)) != 0:
            assert code == 1, f"a full disk ended {stage} with {code}"
            met.append(f"full disk in {stage}")
            size += DISK_STEP
            subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
    return True


def main():
    """Disturb and compare until there were enough kills; exit code 1 at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("kills", 50), ("rows", 240), ("shards", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ways", default="whole,one,slices,disk,ray")
    given = parser.parse_args()
    home, rng, met = Path(tempfile.mkdtemp()), random.Random(given.seed), []
    ways = [way for way in given.ways.split(",") if way != "ray" or importlib.util.find_spec("ray")]
    try:
        options = {"rows": given.rows, "shards": given.shards, "seed": 11, "dirt": "dirty"}
        render(home / "demo", **options, instruct=0, tests=0)
        (home / "demo" / "pool").rename(home / "pool")
        seconds = {}
        for stage in STAGES:
            begun = time.monotonic()
            assert start(home, "whole", stage).wait(BOUND_S) == 0
            seconds[stage] = time.monotonic() - begun
        expected = fingerprint(*(home / "whole" / stage for stage in STAGES))
        print(f"undisturbed: {sum(seconds.values()):.1f} s, {len(expected)} files", flush=True)
        rounds = Counter()
        while len(met) < given.kills and ways:
            way = ways[sum(rounds.values()) % len(ways)]
            out = f"round-{sum(rounds.values())}"
            if way == "disk":
                if not fill(home, out, met):
                    ways.remove(way)
                    shutil.rmtree(home / out)
                    continue
            else:
                for stage in STAGES:
                    carry_out(home, out, stage, way, rng, met, seconds)
            found = fingerprint(*(home / out / stage for stage in STAGES))
            assert found == expected, sorted(name for name in found | expected if found.get(name) != expected.get(name))
            assert not list((home / out).rglob("*.tmp"))
            rounds[way] += 1
            print(f"{way}: {len(met)} disturbances so far, every byte equal", flush=True)
            subprocess.run(["umount", "-l", home / out], capture_output=True)
            shutil.rmtree(home / out)
        where = dict(sorted(Counter(met).items()))
        print(f"{len(met)} disturbances in {dict(rounds)}: " + ", ".join(f"{n} {place}" for place, n in where.items()))
        result = {"command": "python " + " ".join(["tests/bench/kills.py", *sys.argv[1:]]), "date": str(date.today())}
        result |= {"disturbances": len(met), "rounds": rounds, "where": where, "files": len(expected), "differences": 0}
        (ROOT / "tests" / "bench" / "results" / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    finally:
        for place in home.glob("round-*"):
            subprocess.run(["umount", "-l", place], capture_output=True)
        if sys.exc_info()[0] is not None:
            print((home / "log.txt").read_text()[-4000:] if (home / "log.txt").exists() else "", file=sys.stderr)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
