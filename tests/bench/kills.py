"""Disturb the main stages at random moments, start them again, and compare every byte with an undisturbed run.

    python tests/bench/kills.py [--disturbances 50] [--rows 240] [--shards 8] [--seed 0]
        [--ways whole,one,slices,disk,net,ray] [--json results/kills.json]

embed (two workers, each with a decoding process), cluster, select and emit run over a small rendered pool. A round
starts from nothing and is disturbed in one way:
    whole    all processes of a verb get SIGKILL
    one      one process of a verb gets it: worker, decoder, Python's resource tracker; one time in four the main one
    slices   the same, with two slices of each verb running in parallel
    ray      the same on Ray's actors, Ray's own processes included (left out where Ray is not installed)
    disk     the output is on a file system that fills up again and again, and grows (needs the right to mount)
    net      pool and output are on an S3 server that is out of reach for seconds at a time (needs s3fs and moto)
Each verb is started again until it ends with 0, which it must within a bound, with no half-written file and no
process left over. Rounds go on, the ways in turn, until there were enough disturbances. Verbs and workers, but not
Ray's, are forked off a process that has imported everything (tests/warm_workers.py). The suite has a short version
(tests/test_disturbed.py). Writes results/kills.json.
"""

import argparse
import hashlib
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
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from warm import HOME, Command  # noqa: E402
from warm_workers import started  # noqa: E402

from curate.demo.render import render  # noqa: E402
from house import BESIDE, CLIP, fingerprint, tree, until  # noqa: E402

STAGES = ("embeddings", "clusters", "selection", "coreset")
NAMING = ("manifest.json", ".plan.json", "fit.json")  # files that hold where their inputs lie
BOUND_S = 1800  # far beyond any verb's time here, even on a busy machine
DISK_STEP = 48 << 10
STRIKES = 3  # per verb, at most
OUTAGE_S = 12.0  # at most; a verb retries for some 8 s
PATIENCE = {"config_kwargs": {"read_timeout": 3, "connect_timeout": 3, "retries": {"max_attempts": 1}}}
NEEDS = {"ray": ["ray"], "net": ["s3fs", "moto", "flask_cors"]}  # packages of the ways


def words(pool, place, stage):
    """Write the verb that makes a stage. pool, place: directories or URLs."""
    engine = [] if stage == "selection" else ["--workers", 2]
    return {
        "embeddings": ["embed", pool, f"{place}/embeddings", "--model", CLIP, "--decoders", 1],
        "clusters": ["cluster", f"{place}/embeddings", f"{place}/clusters", "--k", 12],
        "selection": ["select", f"{place}/clusters", f"{place}/selection", "--recipe", "balanced", "--n", "20%"],
        "coreset": ["emit", f"{place}/selection", f"{place}/coreset", "--shard-size", 10],
    }[stage] + engine


def start(pool, place, stage, *more):
    """Start a verb in a session of its own."""
    return Command("curate", *words(pool, place, stage), *more, cwd=ROOT)


def finish(process):
    """Wait for a verb; returns its exit code. One that does not end within the bound is killed and reported."""
    begun = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - begun > BOUND_S:
            process.kill()
            raise AssertionError(f"it hangs: {process.stderr[-2000:]}")
        time.sleep(0.05)
    return process.returncode


def family(first):
    """List the processes of a verb, the main one included, and what each is."""
    noted, found = started(HOME), {first: "first"}
    for pid in tree(first):
        role = kind(pid) if pid not in noted else "worker" if noted[pid] == first else "decoder"
        if born(pid) is not None:
            found[pid] = role
    return found


def kind(pid):
    """Say what a process is that was not forked: Python's resource tracker, one of Ray's, or another."""
    try:
        told = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "ended"
    return "tracker" if "resource_tracker" in told else "Ray" if "ray" in told else "other"


def born(pid):
    """Return when a process began, which tells a later process of the same number from it; None where it has ended."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if told[0] == "Z" else int(told[19])


def strike(way, rng, process):
    """Send SIGKILL to one process of a verb, or in the way `whole` to all; returns what was hit, if any."""
    known = family(process.pid)
    others = list(known)[1:]
    if way != "whole" and not others and rng.random() < 0.9:
        return ""  # later: its workers do not exist yet
    one = rng.choice(others) if others and rng.random() < 0.75 else process.pid
    for victim in known if way == "whole" else [one]:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            known[victim] = ""
    return "whole" if way == "whole" else known[victim]


def cut_off(proxy, rng, process):
    """Put the network out of reach for some seconds."""
    proxy.faults = lambda method, path: "down"
    until_then = time.monotonic() + rng.random() * OUTAGE_S
    while time.monotonic() < until_then and process.poll() is None:
        time.sleep(0.05)
    proxy.faults = lambda method, path: None
    return "network down"


def carry_out(pool, place, stage, way, rng, disturb, seconds):
    """Carry out a stage through disturbances, until every part of it ends with 0; returns what was hit."""
    slices = [f"{rank}/2" for rank in range(2)] if way == "slices" and stage != "selection" else [""]
    flags = ["--engine", "ray"] if way == "ray" and stage != "selection" else []
    parts = {each: ["--slice", each, *flags] if each else flags for each in slices}
    begun, met, seen = time.monotonic(), [], {}

    def pause():
        return time.monotonic() + rng.random() * seconds[stage] / 4

    running, quiet = {each: start(pool, place, stage, *more) for each, more in parts.items()}, pause()
    while running:
        for each, process in list(running.items()):
            if time.monotonic() - begun > BOUND_S:
                process.kill()
                raise AssertionError(f"{stage} hangs ({way}): {process.stderr[-2000:]}")
            if process.poll() is None:
                if len(met) < STRIKES and time.monotonic() > quiet:
                    seen |= {pid: born(pid) for pid in family(process.pid)}
                    met += [what] if (what := disturb(process)) else []
                    quiet = pause()
                continue
            assert process.returncode in (0, 1, -signal.SIGKILL), (stage, way, process.returncode, process.stderr)
            assert process.returncode != 1 or "Traceback" not in process.stderr, process.stderr
            if process.returncode:
                running[each] = start(pool, place, stage, *parts[each])
            else:
                del running[each]
        time.sleep(0.02)
    if way == "slices" and not Path(place, stage, "manifest.json").exists():  # each may have ended before the other
        assert finish(start(pool, place, stage)) == 0
    until(lambda: not any(began is not None and born(pid) == began for pid, began in seen.items()), 0.1)
    return [f"{what} in {stage} ({way})" for what in met]


def walk(pool, place, way, rng, seconds, disturb=None):
    """Run the stages, disturbed in one way; yields what was hit in each."""
    for stage in STAGES:
        yield carry_out(pool, place, stage, way, rng, disturb or partial(strike, way, rng), seconds)


def fill(pool, place):
    """Run the stages on a file system that fills up again and again; yields what each stage met."""
    size = DISK_STEP
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    for stage in STAGES:
        met = []
        while code := finish(process := start(pool, place, stage)):
            assert code == 1 and "No space left" in process.stderr and "Traceback" not in process.stderr, process.stderr
            met.append(f"full disk in {stage}")
            size += DISK_STEP
            subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
        yield met


def may_mount(home):
    """Say whether this process may mount a file system."""
    place = home / "mounted"
    place.mkdir()
    made = (
        shutil.which("mount")
        and not subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True).returncode
    )
    subprocess.run(["umount", place], capture_output=True)
    return bool(made)


class Bucket:
    """An S3 server on loopback with the pool in it, behind a proxy that can be cut off."""

    def __init__(self, pool):
        import logging

        from moto.server import ThreadedMotoServer
        from proxied import Proxy

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.proxy = Proxy(self.server.get_host_and_port())
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{self.proxy.server_port}"
        import s3fs

        self.files = s3fs.S3FileSystem(use_listings_cache=False)
        self.files.mkdir("road")
        self.files.put(str(pool), "road/pool", recursive=True)

    def walk(self, name, rng, seconds):
        """Run the stages there, and yield what each met."""
        return walk("s3://road/pool", f"s3://road/{name}", "net", rng, seconds, partial(cut_off, self.proxy, rng))

    def fingerprint(self, name):
        """Digest every object as `fingerprint` does files."""
        names = [each for each in self.files.find(f"road/{name}") if each.rsplit("/", 1)[1] not in BESIDE]
        return {each.split("/", 2)[2]: hashlib.sha256(self.files.cat_file(each)).hexdigest() for each in names}


def compare(found, expected, way):
    """Demand equal files. On S3, files that hold the places of their inputs differ and only have to exist."""
    if way == "net":
        found, expected = (
            {name: "" if name.rsplit("/", 1)[1] in NAMING else digest for name, digest in each.items()}
            for each in (found, expected)
        )
    assert found == expected, sorted(name for name in found | expected if found.get(name) != expected.get(name))


def account(met, rounds, files):
    """Merge what was met so far."""
    command = "python " + " ".join(["tests/bench/kills.py", *sys.argv[1:]])
    where = dict(sorted(Counter(met).items()))
    found = {"command": command, "date": str(date.today()), "disturbances": len(met), "rounds": rounds, "where": where}
    return {**found, "files": files, "differences": 0}


def main():
    """Disturb and compare until there were enough disturbances; exit code 1 at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("disturbances", 50), ("rows", 240), ("shards", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ways", default="whole,one,slices,disk,net,ray")
    parser.add_argument("--json", type=Path, default=ROOT / "tests" / "bench" / "results" / "kills.json")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "FSSPEC_S3": json.dumps(PATIENCE), "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none")
    os.environ["RAY_worker_niceness"] = "0"  # with Ray's own 15, actors do not start beside other work
    home, rng, met, rounds = Path(tempfile.mkdtemp()), random.Random(given.seed), [], Counter()
    ways = [way for way in given.ways.split(",") if all(map(importlib.util.find_spec, NEEDS.get(way, [])))]
    ways = [way for way in ways if way != "disk" or may_mount(home)]
    pool = home / "demo" / "pool"
    try:
        render(home / "demo", rows=given.rows, shards=given.shards, seed=11, dirt="dirty", instruct=0, tests=0)
        bucket = Bucket(pool) if "net" in ways else None
        seconds = {}
        assert finish(Command("curate", "--version", cwd=ROOT)) == 0  # the process that it is forked off is ready
        for stage in STAGES:
            begun = time.monotonic()
            process = start(pool, home / "whole", stage)
            assert finish(process) == 0, process.stderr
            seconds[stage] = time.monotonic() - begun
        expected = fingerprint(*(home / "whole" / stage for stage in STAGES))
        print(f"undisturbed: {sum(seconds.values()):.1f} s, {len(expected)} files", flush=True)
        while len(met) < given.disturbances or len(rounds) < len(ways):
            way, name = ways[sum(rounds.values()) % len(ways)], f"round-{sum(rounds.values())}"
            place = home / name
            if way == "net":
                road = bucket.walk(name, rng, seconds)
            else:
                road = fill(pool, place) if way == "disk" else walk(pool, place, way, rng, seconds)
            for more in road:
                met += more
                print(f"  {way}: {', '.join(more) or 'nothing met'}", flush=True)
            there = bucket.fingerprint(name) if way == "net" else fingerprint(*(place / stage for stage in STAGES))
            compare(there, expected, way)
            assert not list(place.rglob("*.tmp"))
            rounds[way] += 1
            print(f"{way}: {len(met)} disturbances so far, every byte equal", flush=True)
            given.json.write_text(json.dumps(account(met, rounds, len(expected)), indent=1) + "\n")
            if way != "net":
                subprocess.run(["umount", "-l", place], capture_output=True)
                shutil.rmtree(place)
    finally:
        for place in home.glob("round-*"):
            subprocess.run(["umount", "-l", place], capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
