"""A pool of very many tiny shards: what each verb's own bookkeeping costs, apart from the rows.

    python tests/bench/many_shards.py [--shards 1000 10000] [--tars 10000] [--keep DIR]

Writes N embedding sidecars of four rows, and at most --tars tars of two members per row. Then, each in a process of its
own: `cluster` (its driver plans, finishes and joins; a few thousand rows would be nothing), `select`, `show`, `show
--key`, `emit --format keys` (which plans and reads every selection sidecar), `report`, and, where every shard has its
tar, `emit` of the members. Memory is the process's peak, mapped files included; processor time is that of the verb and
its workers, the only steady figure on a busy machine. The goal: 250,000 shards in 2 GiB and ten minutes per verb, and
at most 11 times the processor time for 10 times the shards.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.storage import members, sidecar  # noqa: E402
from curate.storage.manifest import open_output, versions  # noqa: E402
from curate.storage.schema import STATUSES, embedding_schema  # noqa: E402
from curate.storage.tar import read_index  # noqa: E402

ROWS, DIM, CLOUDS = 4, 8, 16
IMAGE = b"\xff\xd8\xff"
WORDS = ("car", "beach", "cat", "church")
LIMIT_S, LIMIT_MB, LIMIT_GROWTH = 600, 2048, 11


def write_pool(folder, shards, tars):
    """Write tars: one for each shard, or for the first `tars` shards where there are more."""
    folder.mkdir()
    for shard in range(min(shards, tars)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for row in range(ROWS):
                for suffix, data in (("jpg", IMAGE), ("txt", WORDS[row].encode())):
                    member = tarfile.TarInfo(f"{shard * ROWS + row:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{shard:06d}.tar").write_bytes(buffer.getvalue())


def write_embeddings(folder, shards):
    """Write EMB as `embed` would, but without syncing each file to the disk, which would take most of the time."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLOUDS, DIM))
    status = sidecar.labels(["ok"] * ROWS, list(STATUSES))
    none, ok = pa.array([None] * ROWS, pa.string()), np.ones(ROWS, bool)
    output = open_output(str(folder), "embed", {"model": "none"}, {"pool": {"path": str(folder.parent / "pool")}})
    stems = {}
    tar = folder.parent / "pool" / "000000.tar"  # all are laid out alike
    size = tar.stat().st_size
    with open(tar, "rb") as file:
        places = members.column(read_index(file), size)
    schema = embedding_schema(DIM).with_metadata({"curate": json.dumps({"size": size})})
    for shard in range(shards):
        first = shard * ROWS
        keys = [f"{row:09d}" for row in range(first, first + ROWS)]
        x = centres[rng.integers(0, CLOUDS, ROWS)] + 0.3 * rng.normal(size=(ROWS, DIM))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
        columns = [
            pa.array(keys),
            pa.array([hashlib.blake2b(IMAGE, digest_size=16).digest()] * ROWS, pa.binary(16)),
            pa.array(rng.integers(0, 1 << 63, ROWS, dtype=np.uint64)),
            status,
            *[sidecar.vector_column(x, ok)] * 2,
            pa.array(rng.random(ROWS).astype(np.float32)),
            pa.array([f"a {WORDS[row % 4]}" for row in range(ROWS)]),
            *[pa.array([64] * ROWS, pa.int32())] * 2,
            none,
            pa.nulls(ROWS, schema.field("detail").type),
            pa.nulls(ROWS, pa.bool_()),
            places,
        ]
        with pa.OSFile(str(folder / f"{shard:06d}.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        stems[f"{shard:06d}"] = {"rows": ROWS}
    output.finish(shards=stems, counts={"ok": shards * ROWS})


def verbs(home, shards, tars):
    """List the verbs to run as (name, words)."""
    emb, clu, sel = (home / name for name in ("embeddings", "clusters", "selection"))
    steps = ['--step=dedup(0.999, keep="near")', "--step=rank(clip_score, 0, 0.5)", '--step=balance(cluster, "10%")']
    last = f"{shards * ROWS - 1:09d}"
    yield "cluster", ["cluster", emb, clu, "--k=32", "--iters=2", "--floor=0.999", "--workers=2"]
    yield "select", ["select", clu, sel, *steps]
    yield "show SEL", ["show", sel]
    yield "show SEL --key", ["show", sel, "--key", last]
    yield "show DIR", ["show", home]
    yield "emit --format keys", ["emit", sel, home / "keys", "--format=keys", "--workers=2"]
    yield "report", ["report", home, home / "report.html"]
    if tars >= shards:
        yield "emit", ["emit", sel, home / "coreset", "--workers=2"]


def measure(words):
    """Run a verb. Returns its seconds, processor seconds, peak memory in MB, exit code and last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        command = [sys.executable, "-m", "curate", *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:]
    cpu_s = round(usage.ru_utime + usage.ru_stime, 2)
    found = {"seconds": round(seconds, 2), "cpu_s": cpu_s, "mb": usage.ru_maxrss // 1024, "exit": process.returncode}
    return found | ({"last": last} if process.returncode else {})


def table(results):
    """Tabulate processor seconds and peak memory of each verb, a column for each number of shards, with the growth."""
    sizes = list(results)
    names = list(dict.fromkeys(name for size in sizes for name in results[size]))
    yield f"{'verb':<20}" + "".join(f"{size:>12,} shards" for size in sizes) + "   growth"
    for name in names:
        found = [results[size].get(name) for size in sizes]
        cells = "".join(f"{entry['cpu_s']:>9.1f} s {entry['mb']:>5} MB" if entry else f"{'–':>19}" for entry in found)
        growths = [
            b["cpu_s"] / a["cpu_s"] / (size_b / size_a) * 10
            for (size_a, a), (size_b, b) in zip(
                zip(sizes, found, strict=True), list(zip(sizes, found, strict=True))[1:], strict=False
            )
            if a and b
        ]
        yield f"{name:<20}{cells}   " + ", ".join(f"{growth:.1f} × for 10 ×" for growth in growths)


def main():
    """Measure every verb at every size; exits with 1 where one failed or missed the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--tars", type=int, default=10_000, help="write at most this many tars")
    parser.add_argument("--keep", help="write the pools here and keep them; what is already there is used")
    parser.add_argument("--json", default=str(ROOT / "tests" / "bench" / "results" / "many_shards.json"))
    given = parser.parse_args()
    results, failed = {}, False
    for shards in given.shards:
        home = Path(given.keep or tempfile.mkdtemp()) / f"shards-{shards}"
        if not (home / "embeddings" / "manifest.json").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            started = time.perf_counter()
            write_pool(home / "pool", shards, given.tars)
            write_embeddings(home / "embeddings", shards)
            sys.stdout.write(f"{shards:,} shards written in {time.perf_counter() - started:.0f} s\n")
        measured = home / "measured.json"  # what an interrupted run with --keep has measured is not measured again
        results[shards] = json.loads(measured.read_text()) if measured.exists() else {}
        for name, words in verbs(home, shards, given.tars):
            found = results[shards][name] = results[shards].get(name) or measure(words)
            measured.write_text(json.dumps(results[shards]))
            over = found["seconds"] > LIMIT_S or found["mb"] > LIMIT_MB
            failed |= bool(found["exit"]) or over
            note = f"  FAILED: {found['last']}" if found["exit"] else "  OVER THE GOAL" if over else ""
            took = f"{found['seconds']:>9.1f} s {found['cpu_s']:>9.1f} s of processors {found['mb']:>6} MB"
            sys.stdout.write(f"{shards:>9,}  {name:<20}{took}{note}\n")
            sys.stdout.flush()
        if not given.keep:
            shutil.rmtree(home.parent)
    sys.stdout.write("\n" + "\n".join(table(results)) + "\n")
    command = " ".join(["python tests/bench/many_shards.py", *(Path(word).name for word in sys.argv[1:])])
    facts = {"command": command, "date": date.today().isoformat(), "rows_a_shard": ROWS, "cores": os.cpu_count()}
    facts |= {"versions": versions("numpy", "pyarrow"), "results": results}
    Path(given.json).write_text(json.dumps(facts, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
