"""Embedding against the bare model: rows/s of the real task on real shards, and of the forwards that it needs.

    python tests/bench/embed.py [--pool POOL] [--model ViT-B-32] [--precision auto] [--shards N] [--peer PROGRAM]

Weights are drawn at random (speed does not depend on them), unless the model is a folder. Shard by shard, the bare
forwards run on tensors ready in memory, in two ways (torch's own threads, and a thread per batch), of which the
faster counts; then the task runs on the tar: reading, decoding, hashing, both towers, writing. Loading the model is
left out of both. CPU seconds are given beside wall seconds: on a busy machine only they are steady.

`--peer` is the `clip-retrieval` program of an environment of its own (`pip install clip-retrieval`). In place of the
bare forwards, its `inference` runs on the same tars with the same weights: at our batch size, where it is fastest, and
at its default, 256. On a CPU it only has fp32, so the task also runs in fp32. It is timed by the statistics that it
keeps itself, which leave out loading and warming up; the first half of the rows, while its helper processes start, is
left out as well where that is to its advantage. Its whole run, which a user waits for, is given as well. Writes
results/embed_peer.json.
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
PEER_BATCH = 256  # clip-retrieval's default
sys.path.insert(0, str(ROOT))

from curate import engine  # noqa: E402
from curate.embed import weights  # noqa: E402
from curate.embed.embed import (  # noqa: E402
    CPU_BATCH,  # noqa: E402
    GPU_BATCH,  # noqa: E402
    TEXTS_PER_IMAGE,  # noqa: E402
    EmbedShard,  # noqa: E402
)
from curate.embed.encoder import (  # noqa: E402
    choose_device,  # noqa: E402
    choose_precision,  # noqa: E402
    describe_device,  # noqa: E402
    pair,  # noqa: E402
    single_threaded,  # noqa: E402
)
from curate.embed.images import MAX_PIXELS  # noqa: E402
from curate.embed.reader import Reader  # noqa: E402
from curate.storage import manifest  # noqa: E402
from curate.storage.tar import (  # noqa: E402
    Shard,  # noqa: E402
    TarWriter,  # noqa: E402
    list_pool,  # noqa: E402
    read_index,  # noqa: E402
    read_member,  # noqa: E402
)
from pipelines import memory  # noqa: E402

memory.one_arena()  # as the command line does


def random_weights(model, folder):
    """Write a model's random weights as a checkpoint."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = str(Path(folder) / f"{model}.safetensors")
    state = open_clip.create_model(model, pretrained_text=False).state_dict()
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    return path


def head(shard, folder, count):
    """Copy a shard's first samples into a tar of their own."""
    target = f"{folder}/{shard.stem}.tar"
    with open(shard.location, "rb") as file, open(target, "wb") as sink, TarWriter(sink) as tar:
        for sample in read_index(file).samples[:count]:
            for member in sample.members:
                tar.add(member.name, read_member(file, member))
    return Shard(shard.stem, target, Path(target).stat().st_size)


def clock(work, device):
    """Time a function: (wall seconds, CPU seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare_forwards(task, shard):
    """Prepare the forwards of one shard on tensors in memory: a function per part."""
    encoder, size = task.encoder, task.batch_size
    reader = Reader(task.source, encoder.preprocess, MAX_PIXELS)
    with open(shard.location, "rb") as file:
        samples = read_index(file).samples
    read = reader(shard.location, samples)
    mean, std = (torch.tensor(encoder.preprocess[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    pixels = torch.from_numpy(read.pixels).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
    images = pixels.to(encoder.device, encoder.dtype).contiguous().split(size)
    tokens = torch.from_numpy(read.tokens).long().to(encoder.device)
    lengths = encoder.lengths(read.tokens)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cut = [read.tokens[order[at : at + TEXTS_PER_IMAGE * size]] for at in range(0, len(order), TEXTS_PER_IMAGE * size)]

    def forward(encode, batch):
        with torch.inference_mode():
            encode(batch)

    def own_threads(encode, batches):
        for batch in batches:
            forward(encode, batch)

    def thread_per_batch(encode, batches):
        with single_threaded(), ThreadPoolExecutor(task.threads) as pool:
            list(pool.map(lambda batch: forward(encode, batch), batches))

    parts = {
        "image": (encoder.model.encode_image, images),
        "text, full context": (encoder.model.encode_text, tokens.split(TEXTS_PER_IMAGE * size)),
        "text, real length": (encoder.texts, cut),
    }
    return len(samples), {
        name: [partial(own_threads, *part), *([partial(thread_per_batch, *part)] if task.device == "cpu" else [])]
        for name, part in parts.items()
    }


def peer(program, task, folder, batch):
    """Run clip-retrieval's inference on the shards. Returns the rows, and three speeds."""
    target, found = Path(folder) / f"peer-{batch}", task.found
    names = ",".join(shard.location for shard in found.values())
    words = [program, "inference", "--input_dataset", f"{{{names}}}" if len(found) > 1 else names]
    words += ["--output_folder", target, "--input_format", "webdataset", "--enable_metadata", "True"]
    words += ["--clip_model", f"open_clip:{task.source.model}/{task.source.checkpoint}", "--batch_size", batch]
    words += ["--num_prepro_workers", min(engine.cores(), len(found))]  # more than the number of tars is an error
    started, told = time.perf_counter(), {}
    with open(Path(folder) / f"peer-{batch}.log", "w+") as log:
        process = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log)
        while (code := process.poll()) is None:
            time.sleep(0.2)
            told |= _told(target)
        whole = time.perf_counter() - started
        if code:
            raise SystemExit(f"{program} ended with {code}:\n{Path(log.name).read_text()[-2000:]}")
    told |= _told(target)
    rows_done = max(told)
    first = max((each for each in told if each <= rows_done / 2), default=min(told))
    later = (rows_done - first) / (told[rows_done] - told[first]) if first < rows_done else 0
    shown = {"its clock": rows_done / told[rows_done], "later half": later, "whole run": rows_done / whole}
    return rows_done, shown


def _told(target):
    """Read the peer's record of its progress: seconds by rows."""
    found = {}
    for path in (target / "stats").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            stats = json.loads(path.read_text())
            found[stats["sample_count"]] = stats["total_duration"]
    return found


def beside_peer(program, task, folder):
    """Run the task, the task in fp32 and the peer on the same tars. Returns what to store."""
    rates, rows_done = {}, 0
    for precision in dict.fromkeys((task.precision, "fp32")):
        one = dataclasses.replace(task, precision=precision)
        one.setup()
        told = []
        seconds = clock(lambda run=one, told=told: told.extend(map(run, run.found)), one.device)[0]
        one.close()
        rows_done = sum(each["rows"] for each in told)
        rates[f"embed, {precision}"] = rows_done / seconds
    for batch in (task.batch_size, PEER_BATCH):
        count, shown = peer(program, task, folder, batch)
        assert count == rows_done, f"clip-retrieval embedded {count} of {rows_done} rows"
        rates |= {f"clip-retrieval, batch {batch}, {name}": rate for name, rate in shown.items()}
    print(f"{rows_done:,} rows{'':34} {'rows/s':>9}")
    for name, rate in rates.items():
        print(f"{name:44} {rate:9.1f}")
    best = max(rate for name, rate in rates.items() if name.startswith("clip-retrieval") and "whole" not in name)
    print(f"embed is {rates[f'embed, {task.precision}'] / best:.2f} x as fast as the peer at its fastest")
    return {"rows": rows_done, "rows_per_s": rates, "peer": "clip-retrieval " + version(program)}


def version(program):
    """Read the peer's version where it is installed."""
    found = next(Path(program).parent.parent.glob("lib/python3*/site-packages/clip_retrieval-*.dist-info"))
    return found.name.removeprefix("clip_retrieval-").removesuffix(".dist-info")


def beside_bare(task):
    """Run the bare forwards and the task, shard by shard. Returns what to store."""
    task.setup()
    measured, rows_done = {}, 0
    for stem, shard in task.found.items():
        count, bare = bare_forwards(task, shard)
        if not measured:  # the first batch allocates memory for all
            height, width = pair(task.encoder.preprocess["size"])
            task.runners.submit(task.encoder.images, np.zeros((task.batch_size, height, width, 3), np.uint8)).result()
        rows_done += count
        for name, ways in {**bare, "embed": [partial(task, stem)]}.items():
            measured.setdefault(name, []).append(min(clock(way, task.device) for way in ways))
    task.close()
    wall = {name: sum(part[0] for part in parts) for name, parts in measured.items()}
    cpu = {name: sum(part[1] for part in parts) for name, parts in measured.items()}
    print(f"{rows_done:,} rows{'':14} {'rows/s':>9} {'CPU ms/row':>11}")
    for name in measured:
        print(f"{name:24} {rows_done / wall[name]:9.1f} {1e3 * cpu[name] / rows_done:11.2f}")
    ratios = {}
    for floor in ("text, full context", "text, real length"):
        parts = zip(measured["image"], measured[floor], measured["embed"], strict=True)
        each = [(image[0] + text[0]) / whole[0] for image, text, whole in parts]
        ratios[floor] = {
            "wall": (wall["image"] + wall[floor]) / wall["embed"],
            "wall, median shard": statistics.median(each),
            "cpu": (cpu["image"] + cpu[floor]) / cpu["embed"],
        }
        shown = ", ".join(f"{kind} {value:.3f}" for kind, value in ratios[floor].items())
        print(f"embed ÷ bare (image + {floor}): {shown}")
    return {
        "rows": rows_done,
        "rows_per_s": {name: rows_done / seconds for name, seconds in wall.items()},
        "cpu_ms_per_row": {name: 1e3 * seconds / rows_done for name, seconds in cpu.items()},
        "ratio_to_bare": ratios,
    }


def main():
    """Measure, print one table and write results/embed.json or embed_peer.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", default=str(ROOT.parent / "shared" / "data" / "pairs"))
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--shards", type=int, default=0, help="only the first N shards")
    parser.add_argument("--rows", type=int, default=0, help="only the first N rows of each")
    parser.add_argument("--decoders", type=int, default=0, help="decode in this many processes")
    parser.add_argument("--fast", action="store_true", help="resize by torch, as --decode fast")
    parser.add_argument("--name", default="embed", help="name of the file in results")
    parser.add_argument("--peer", help="path of the program clip-retrieval, to compare with")
    given = parser.parse_args()
    found = {shard.stem: shard for shard in list_pool(given.pool)[: given.shards or None]}
    device, threads = choose_device(), engine.cores()
    decoders = given.decoders or (threads if device == "cuda" else 0)
    with tempfile.TemporaryDirectory() as folder:
        if given.rows:
            found = {stem: head(shard, folder, given.rows) for stem, shard in found.items()}
        own_weights = given.model.startswith("local-dir:")
        source = weights.find(given.model, "" if own_weights else random_weights(given.model, folder))
        precision, reason = choose_precision(given.precision, device, source)
        batch = GPU_BATCH if device == "cuda" else CPU_BATCH
        task = EmbedShard(source, precision, device, batch, MAX_PIXELS, threads, decoders, folder, found)
        task.decode = "fast" if given.fast else "full"
        hardware = f"{platform.machine()}, {threads} cores, {describe_device(device)}"
        print(f"{Path(given.model).name} {precision} ({reason}), {hardware}")
        told = beside_peer(given.peer, task, folder) if given.peer else beside_bare(task)
    result = {
        "command": "python tests/bench/embed.py "
        + " ".join(
            "local-dir:" * word.startswith("local-dir:") + Path(word).name if "/" in word else word
            for word in sys.argv[1:]
        ),
        "date": str(date.today()),
        "hardware": hardware,
        "versions": manifest.versions("torch", "open_clip_torch", "pillow"),
        "precision": precision,
        **told,
    }
    target = ROOT / "tests" / "bench" / "results" / f"{given.name}{'_peer' if given.peer else ''}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
