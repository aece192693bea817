"""Mix LLaVA's 665,298 records at full count, with stub images, against the shortest script that does the same work.

    python tests/bench/mix.py [--scale 1] [--workers 2] [--out tests/bench/results/mix.json]

A file with the published one's schema, counts by folder and length (about 1 GB) is generated over 350,000 image files
(links to a few stubs), and `curate mix mix_665k` makes shards of it in a process of its own, its memory watched. The
baseline script loads the whole list, reads each image and writes the same members into tars in the order of the file:
no sampling, no shuffle, no account, no resume.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "mix")]

from artefacts import picture  # noqa: E402
from test_shipped_mixes import MIX_665K, PREFIX  # noqa: E402

from curate.storage import manifest  # noqa: E402
from curate.storage.tar import TarWriter  # noqa: E402

IMAGES = {"coco": 118_000, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 86_417}  # distinct, at scale 1
ROUNDS = {"coco": (1, 12), "gqa": (5, 15), "ocr_vqa": (4, 6), "textvqa": (1, 1), "vg": (5, 15), "text": (1, 6)}
WORDS = [f"word{n:03d}" for n in range(997)]
MAX_LINKS = 30_000


def generate(folder, scale):
    """Write the list and its images. Returns the counts by folder."""
    rng, counts = random.Random(0), {}
    (folder / "data").mkdir()
    stubs = itertools.cycle([picture(seed, side=16) for seed in range(8)])
    with open(folder / "data" / "llava_v1_5_mix665k.json", "w") as file:
        for where, number in MIX_665K.items():
            counts[where] = round(number * scale)
            images = (
                link(folder / "data" / "images", where, round(IMAGES[where] * scale), stubs) if where in IMAGES else []
            )
            for index in range(counts[where]):
                record = {"id": index if where == "vg" else f"{where}{index:08d}"}
                record |= {"image": images[index % len(images)]} if images else {"model": ""}
                record["conversations"] = talk(rng, where)
                file.write((",\n" if where != "coco" or index else "[") + json.dumps(record))
        file.write("]")
    return counts


def link(root, where, number, stubs):
    """Make image files as links to a stub; a new stub where one has as many links as a file may have."""
    names = [PREFIX[where].format(index) for index in range(max(1, number))]
    (root / names[0]).parent.mkdir(parents=True)
    for index, name in enumerate(names):
        if index % MAX_LINKS == 0:
            stub = root / name
            stub.write_bytes(next(stubs))
        else:
            os.link(stub, root / name)
    return names


def talk(rng, where):
    turns = []
    long = 120 if where == "text" else 14
    for _ in range(rng.randint(*ROUNDS[where])):
        turns.append({"from": "human", "value": " ".join(rng.choices(WORDS, k=rng.randint(5, 16)))})
        turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(1, long)))})
    if where != "text":
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


def watched(words, folder):
    """Run a command; returns ((wall, cpu seconds), highest resident and private bytes of all its processes, stderr)."""
    started, peaks, running = time.perf_counter(), [0, 0], True
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(folder / "stderr", "w+") as said:
        child = subprocess.Popen(words, cwd=folder, stderr=said, stdout=subprocess.DEVNULL)

        def watch():
            while running:
                found = [memory(pid) for pid in family(child.pid)]
                for place in (0, 1):
                    peaks[place] = max(peaks[place], sum(each[place] for each in found))
                time.sleep(0.5)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = child.wait()
        running = False
        wall = time.perf_counter() - started
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        watcher.join()
        said.seek(0)
        text = said.read()
    assert code == 0, text[-2000:]
    return (wall, cpu), peaks, text


def family(pid):
    """List a process and its descendants."""
    found = [pid]
    for child in found:
        try:
            tasks = Path(f"/proc/{child}/task").iterdir()
            found += [int(each) for task in tasks for each in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def memory(pid):
    """Read a process's resident bytes, and those of them that no file backs."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    held = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return held.get("VmRSS", 0), held.get("RssAnon", 0)


def plain_script(folder, shard_size=5_000):
    """Do what one would write by hand. Returns its wall and processor seconds."""
    started = time.perf_counter(), time.process_time()
    with open(folder / "data" / "llava_v1_5_mix665k.json") as file:
        records = json.load(file)
    (folder / "plain").mkdir()
    for start in range(0, len(records), shard_size):
        with open(folder / "plain" / f"{start // shard_size:06d}.tar", "wb") as out, TarWriter(out) as tar:
            for number, record in enumerate(records[start : start + shard_size], start):
                if "image" in record:
                    tar.add(f"{number:09d}.jpg", (folder / "data" / "images" / record["image"]).read_bytes())
                tar.add(f"{number:09d}.json", json.dumps({**record, "source": "llava"}).encode())
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mix.json")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        counts = generate(folder, chosen.scale)
        size = (folder / "data" / "llava_v1_5_mix665k.json").stat().st_size
        words = [sys.executable, "-m", "curate", "mix", str(ROOT / "pipelines" / "mix_665k.toml"), "mix"]
        words += [f"--workers={chosen.workers}"]
        words += [f"--set=mix.sources.llava.expect.{where}={number}" for where, number in counts.items()]
        os.environ["PYTHONPATH"] = str(ROOT)
        (wall, cpu), (resident, private), said = watched(words, folder)
        made = json.loads((folder / "mix" / "manifest.json").read_text())
        assert made["counts"]["rows"] == sum(counts.values()) and made["counts"]["text_only"] == counts["text"]
        stages = [json.loads(line) for line in (folder / "mix" / "log.jsonl").read_text().splitlines()]
        shutil.rmtree(folder / "mix")
        plain_wall, plain_cpu = plain_script(folder)
    finally:
        shutil.rmtree(folder)
    found = {
        "records": sum(counts.values()),
        "text_only": counts["text"],
        "images": made["counts"]["images"],
        "json_mb": round(size / 1e6),
        "workers": chosen.workers,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "records_per_s": round(sum(counts.values()) / wall),
        "stages_s": {each["stage"]: each["seconds"] for each in stages},
        "peak_resident_gb": round(resident / 1e9, 2),
        "peak_private_gb": round(private / 1e9, 2),
        "progress_lines": len(said.replace("\r", "\n").splitlines()),
        "plain_script_wall_s": round(plain_wall, 1),
        "plain_script_cpu_s": round(plain_cpu, 1),
        "cpu_to_plain_script": round(cpu / plain_cpu, 2),
        "load_average": round(os.getloadavg()[1], 1),
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "versions": manifest.versions("pyarrow", "numpy"),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.scale == 1:
        chosen.out.parent.mkdir(exist_ok=True)
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
