"""What a GPU does with this code: every CUDA path once, the card's ceilings, and each stage against them, in 8 minutes.

    python tests/bench/gpu.py [--parts tests,ceilings,…] [--minutes 8] [--json results/gpu.json] [--rehearse]

The parts run one after the other, the most important first, each in a process of its own with a time limit. What a part
measures is written to the JSON at once, so that a run that is cut short still counts:

    tests      the tests marked `gpu`: every CUDA path once
    ceilings   copies and products of this card, which nothing below can beat
    training   Bunny-3B at full size, fresh weights, texts as long as the 695K's: align, LoRA; tokens/s, MFU, memory
    embedding  ViT-L/14 and B/32, fresh weights, drawn JPEGs: rows/s against the bare forwards, --decode full and gpu
    numerics   assign, near-duplicate pairs and the k-means fit, beside the card's products and FAISS on the same card
    published  the same training with the published scripts' semantics: padded rows, logits everywhere, recomputation
    shards     ViT-B/32 over shards of 500 rows, by one worker and by two that share the card
    switches   the finetune step with each of the trainer's switches turned

Needs torch with CUDA, and what the package itself needs; a part whose libraries are missing says so in a line.
`--rehearse` does all of it at toy size on a processor, so that it cannot rot. gpu.md says how to run it on a bare
machine.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULT = "RESULT "
LIMITS_S = {
    "tests": 110,
    "ceilings": 20,
    "training": 110,
    "embedding": 90,
    "numerics": 60,
    "published": 80,
    "shards": 70,
    "switches": 140,
}
Found = Iterator[dict[str, Any]]


def clock(work: Callable[[], Any], on: str, least_s: float = 0.5, most: int = 50) -> float:
    """Time a function on a device: the shortest of several runs, in seconds, after a warm-up run."""
    import torch

    def once() -> float:
        begun = time.perf_counter()
        work()
        if on == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    once()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least_s and len(times) < most):
        times.append(once())
    return min(times)


FIRST = ("test_on_gpu.py", "test_embed_on_gpu.py", "test_jpegs.py", "test_on_device.py")  # of the files of tests
ENDED = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")


def tests(on: str, rehearse: bool) -> Found:
    """Run the tests that need a GPU and report how each ends; with `rehearse` those of one file, on the processor.

    Only files with such tests are read; one that fails to import, for want of a package, does not stop the others.
    """
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    marked.sort(key=lambda path: FIRST.index(path.name) if path.name in FIRST else len(FIRST))
    where = [str(path.relative_to(ROOT)) for path in marked if not rehearse or path.name == "test_on_device.py"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *where]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"REHEARSE_GPU": "1"} if rehearse else {})}
    ran = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert ran.stdout is not None
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "bad": []}
    said: list[str] = []
    for line in ran.stdout:
        said.append(line)
        if ended := ENDED.match(line):
            if ended[2] in ("FAILED", "ERROR"):
                found["bad"].append(ended[1])
            else:
                found[ended[2].lower()] += 1
            yield found
    code = ran.wait()
    yield {**found, **({"failed": f"pytest ended with {code}"} if code else {}), "output": "".join(said)[-7000:]}


def ceilings(on: str, rehearse: bool) -> Found:
    """Measure copies (GB/s) and products (TFLOP/s)."""
    import torch

    from curate.vectors.on_device import half_products

    size, side = (1 << 20, 256) if rehearse else (1 << 30, 8192)
    block = torch.empty(size, dtype=torch.uint8, device=on)
    other = torch.empty_like(block)
    found: dict[str, float] = {"copy_gb_s": 2 * size / clock(lambda: other.copy_(block), on) / 1e9}
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on == "cuda")
    found["from_pinned_host_gb_s"] = size / clock(lambda: block.copy_(host, non_blocking=True), on) / 1e9
    yield found
    operations = 2 * side**3
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        a, b = (torch.randn(side, side, device=on).to(dtype) for _ in range(2))
        found[f"{name}_tflops"] = operations / clock(partial(torch.mm, a, b), on) / 1e12
        if dtype == torch.float16:
            found["f16_to_f32_tflops"] = operations / clock(partial(half_products, a, b), on) / 1e12
        yield found


def _trained(kind: str, rehearse: bool, settings: list[str], stages: tuple[str, ...], steps: int) -> Found:
    from train import config as configuration
    from train.bench.step import one_stage

    config = configuration.load(ROOT / "pipelines" / "bunny.toml", settings)
    found: dict[str, Any] = {}
    for stage in stages:
        began = time.perf_counter()
        size = {"steps": 2 if rehearse else steps, "batch_size": 2 if rehearse else 0, "small": rehearse}
        for summary in one_stage(config, stage, kind, **size):
            found[stage] = {**summary, "seconds_with_setting_up": round(time.perf_counter() - began, 1)}
            yield found


def training(on: str, rehearse: bool) -> Found:
    """Train both stages of Bunny-3B ten steps each."""
    yield from _trained("ours", rehearse, ["align.batch_size=64", "finetune.batch_size=64"], ("align", "finetune"), 10)


def published(on: str, rehearse: bool) -> Found:
    """Train both stages with the published scripts' semantics, a few steps each."""
    settings = ["align.batch_size=64", "finetune.batch_size=64"]
    yield from _trained("reference", rehearse, settings, ("align", "finetune"), 4)


SWITCHES = {
    "sdpa": ["model.attention=sdpa"],
    "recomputed": ["model.gradient_checkpointing=true"],
    "8,192 tokens": ["finetune.micro_tokens=8192"],
    "unpacked": ["finetune.packing=false"],
    "compiled layers": ["model.compile=layers"],
}


def switches(on: str, rehearse: bool) -> Found:
    """Train the finetune stage with each switch turned, four steps each."""
    from train.errors import TrainError

    found: dict[str, Any] = {}
    for name, settings in SWITCHES.items():
        if rehearse and name == "compiled layers":  # it takes a compiler, and minutes
            continue
        try:
            for summary in _trained("ours", rehearse, ["finetune.batch_size=64", *settings], ("finetune",), 4):
                found[name] = summary["finetune"]
        except TrainError as error:
            found[name] = {"refused": str(error)}
        yield found


def embedding(on: str, rehearse: bool) -> Found:
    """Embed drawn pictures with both models, each decoder in turn, beside the bare forwards; and decode on one core."""
    from bench.drawn import drawn_pool  # type: ignore[import-not-found]
    from bench.embed import random_weights  # type: ignore[import-not-found]

    from curate import engine
    from curate.embed import embed, encoder, jpegs, weights
    from curate.embed.images import MAX_PIXELS
    from curate.embed.reader import Reader
    from curate.storage.tar import list_pool, read_index

    found: dict[str, Any] = {}
    models = ("ViT-B-32",) if rehearse else ("ViT-L-14", "ViT-B-32")
    refused = "" if rehearse else jpegs.reason_against(on)
    with tempfile.TemporaryDirectory() as folder:
        pool = drawn_pool(Path(folder), 2 if rehearse else 4, 8 if rehearse else 1024)
        pooled = {shard.stem: shard for shard in list_pool(str(pool))}
        first = next(iter(pooled.values()))
        for model in models:
            checkpoint = str(_small_clip(Path(folder))) if rehearse else random_weights(model, folder)
            source = weights.find(checkpoint if rehearse else model, "" if rehearse else checkpoint)
            precision, _ = encoder.choose_precision("auto", on, source)
            batch = embed.GPU_BATCH if on == "cuda" else embed.CPU_BATCH
            cores = engine.cores()
            decoders = cores if on == "cuda" else 0
            found[model] = {"precision": precision, "decoders": decoders}
            for decode in ("full", "gpu"):
                if decode == "gpu" and refused:
                    found[model][decode] = {"refused": refused}
                    continue
                task = embed.EmbedShard(source, precision, on, batch, MAX_PIXELS, cores, decoders, folder, pooled)
                task.decode = decode
                task.setup()
                if "decode_images_per_s_and_core" not in found:
                    reader = Reader(source, task.encoder.preprocess, MAX_PIXELS)
                    with open(first.location, "rb") as file:
                        samples = read_index(file).samples[:128]
                    seconds = clock(partial(reader, first.location, samples), "cpu", 0.1)
                    found["decode_images_per_s_and_core"] = len(samples) / seconds
                if "bare_rows_per_s" not in found[model]:
                    found[model]["bare_rows_per_s"] = _bare_rows(task, on)
                    yield found
                found[model][decode] = _embedded(task, found[model]["bare_rows_per_s"])
                task.close()
                yield found


def _bare_rows(task: Any, on: str) -> float:
    """Time both towers alone, on a batch of pixels and captions that are on the device: pairs per second."""
    import numpy as np

    from curate.embed.encoder import Tokenizer, pair

    count, (height, width) = task.batch_size, pair(task.encoder.preprocess["size"])
    tokens = Tokenizer(task.source)([f"word{n} and nine more words of a caption" for n in range(count)])
    pixels = task.encoder.put(np.zeros((count, height, width, 3), np.uint8))
    return float(
        count / (clock(lambda: task.encoder.images(pixels), on) + clock(lambda: task.encoder.texts(tokens), on))
    )


def _embedded(task: Any, bare: float) -> dict[str, Any]:
    """Run the task on its shards, the first to warm up: rows per second, and what the sidecars say of decoding."""
    from curate.embed.spent import shares
    from curate.storage import sidecar

    stems = list(task.found)
    task(stems[0])
    began = time.perf_counter()
    told = [task(stem) for stem in stems[1:]]
    rate = sum(each["rows"] for each in told) / (time.perf_counter() - began)
    facts = sidecar.facts(f"{task.out}/{stems[-1]}.arrow")
    spent = shares(each["spent"] for each in told)
    kept = {name: facts[name] for name in ("decoded", "deviation") if name in facts}
    return {"rows_per_s": rate, "ratio_to_bare": rate / bare, "time_in_percent": spent, **kept}


def _small_clip(folder: Path) -> str:
    import tiny_clip

    return str(tiny_clip.write(folder / "model"))


def shards(on: str, rehearse: bool) -> Found:
    """Embed small shards, whose last batch is half empty, by one and two workers; rows/s from the first shard's end."""
    from bench.drawn import drawn_pool
    from bench.embed import random_weights

    from curate.embed.embed import EmbedOptions, embed
    from curate.engine import Job

    count, rows = (3, 4) if rehearse else (24, 500)
    with tempfile.TemporaryDirectory() as folder:
        pool = drawn_pool(Path(folder), count, rows)
        model = _small_clip(Path(folder)) if rehearse else "ViT-B-32"
        weights = "" if rehearse else random_weights(model, folder)
        for workers in (1, 2):
            out = Path(folder) / str(workers)
            embed(
                str(pool),
                str(out),
                EmbedOptions(model, weights),
                Job(workers=workers, gpus=int(on == "cuda"), quiet=True),
            )
            ends = sorted(path.stat().st_mtime for path in out.glob("*.arrow"))
            log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            spent = next(each["spent"] for each in log if "spent" in each)
            rate = rows * (count - 1) / max(ends[-1] - ends[0], 1e-6)
            yield {f"{workers} at work": {"shard_rows": rows, "rows_per_s": rate, "time_in_percent": spent}}


def numerics(on: str, rehearse: bool) -> Found:
    """Assign, compare and fit, against the card's products and FAISS on the same card."""
    import numpy as np
    import torch
    from bench.drawn import unit_rows

    from curate.vectors import kmeans, on_device
    from curate.vectors.duplicate_forest import near_duplicate_forest
    from curate.vectors.exact import widen

    dim = 64 if rehearse else 768
    rows, k, group = (4_000, 50, 500) if rehearse else (1_000_000, 10_000, 10_000)
    x = unit_rows(rows, dim, group, on)
    side = torch.from_numpy(x[:8192]).to(on)
    ceiling = 2 * len(side) ** 2 * dim / clock(lambda: on_device.half_products(side, side), on)
    found: dict[str, Any] = {"rows": rows, "dim": dim, "product_tflops": ceiling / 1e12}
    yield found
    centroids = kmeans.unit_rows(x[:: rows // k][:k])
    find = kmeans.finder(centroids, on=on)
    seconds = clock(lambda: find(x), on, 1.0, 3)
    found["assign"] = {"k": k, "rows_per_s": rows / seconds, "of_product": 2 * rows * k * dim / seconds / ceiling}
    some = x[:: rows // 2000]
    expected = kmeans.assign(some, centroids)
    nearest, cosine = find(some)
    found["assign"]["unlike_the_processor"] = float((nearest != expected[0]).mean())
    found["assign"]["largest_difference"] = float(np.abs(cosine - expected[1]).max())
    yield found
    bounds = np.arange(0, rows + 1, group)
    seconds = clock(lambda: near_duplicate_forest(x, np.arange(rows), bounds, 0.9, product="gpu"), on, 1.0, 2)
    work = rows * group * dim
    found["pairs"] = {"cluster_rows": group, "rows_per_s": rows / seconds, "of_product": work / seconds / ceiling}
    few = slice(0, 2 * group)
    edges = [
        near_duplicate_forest(x[few], np.arange(2 * group), bounds[:3], 0.9, product=product)
        for product in ("gpu", None)
    ]
    found["pairs"]["same_bytes"] = all(a.tobytes() == b.tobytes() for a, b in zip(*edges, strict=True))
    yield found
    for backend, name in (("torch-gpu", "fit"), *((("kmeans-gpu", "fit_faiss"),) if _faiss_sees_a_gpu() else ())):
        began = time.perf_counter()
        fitted = kmeans.unit_rows(kmeans.BACKENDS[backend](x if backend == "torch-gpu" else widen(x), k, 10, 0))
        seconds = time.perf_counter() - began  # `kmeans.fit` would then have the processor assign FAISS's rows
        similarity = float(kmeans.finder(fitted, on=on)(x)[1].mean())
        found[name] = {"k": k, "iterations": 10, "seconds": seconds, "mean_similarity": similarity}
        found[name]["of_product"] = 2 * rows * k * dim * 10 / seconds / ceiling
        yield found


def _faiss_sees_a_gpu() -> bool:
    try:
        import faiss
    except ImportError:
        return False
    return bool(getattr(faiss, "get_num_gpus", int)() > 0)


PARTS = {each.__name__: each for each in (tests, ceilings, training, embedding, numerics, published, shards, switches)}


def one_part(name: str, rehearse: bool) -> None:
    """Run a part in this process, and print each finding as a line of JSON."""
    import torch

    on = "cuda" if torch.cuda.is_available() and not rehearse else "cpu"
    if name == "numerics" and rehearse:
        from curate.vectors import on_device

        on_device.device = lambda: "cpu"  # type: ignore[assignment]
        on_device.devices = lambda: ["cpu"]
    try:
        for found in PARTS[name](on, rehearse):
            print(RESULT + json.dumps(found), flush=True)
    except ImportError as error:
        print(RESULT + json.dumps({"left out": f"{error}"}), flush=True)


def run_part(name: str, rehearse: bool, limit_s: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Run a part in a process of its own, keep what it prints, and end it at its limit."""
    command = [sys.executable, str(Path(__file__)), "--part", name, *["--rehearse"] * rehearse]
    began = time.perf_counter()
    found: dict[str, Any] = {}
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {})}
    how: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **how)
        assert process.stdout is not None
        alarm = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        alarm.start()
        try:
            for line in process.stdout:
                if line.startswith(RESULT):
                    found |= json.loads(line.removeprefix(RESULT))
                    keep({**found, "seconds": round(time.perf_counter() - began, 1)})
            code = process.wait()
        finally:  # with its children, however this script ends: nothing stays on the card
            alarm.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if code == -signal.SIGKILL and time.perf_counter() - began >= limit_s:
            found["cut"] = f"at its limit of {limit_s:.0f} s"
        elif code:
            errors.seek(0)
            found["failed"] = f"ended with {code}: " + errors.read()[-2000:]
    keep({**found, "seconds": round(time.perf_counter() - began, 1)})


def machine() -> dict[str, Any]:
    """Name the card, the processor and the versions."""
    import torch

    from curate.storage.manifest import versions

    names = ("torch", "transformers", "peft", "open_clip_torch", "faiss-gpu", "numpy", "pillow")
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "card": f"{card.name}, {card.total_memory / 2**30:.0f} GiB" if card else "none: a processor",
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "cuda": torch.version.cuda,
        "versions": {**versions(*names), "python": platform.python_version()},
    }


def main() -> None:
    """Run the parts, keep what each finds, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, in this order")
    parser.add_argument(
        "--json", type=Path, help="where to write results (default results/gpu.json; with --rehearse a temporary file)"
    )
    parser.add_argument("--minutes", type=float, default=8, help="time limit in all; 12 allow every part its own")
    parser.add_argument("--rehearse", action="store_true", help="run everything at toy size, on the processor")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        one_part(given.part, given.rehearse)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import torch

    if not torch.cuda.is_available() and not given.rehearse:
        raise SystemExit("no CUDA device was found; --rehearse runs all parts at toy size on the processor")
    results = Path(__file__).parent / "results"
    target = given.json or (Path(tempfile.mkdtemp()) if given.rehearse else results) / "gpu.json"
    began = time.perf_counter()
    whole = {"command": " ".join(["python tests/bench/gpu.py", *sys.argv[1:]]), "date": str(date.today()), **machine()}
    for name in given.parts.split(","):

        def keep(found: dict[str, Any], name: str = name) -> None:
            whole[name] = found
            target.write_text(json.dumps(whole, indent=1) + "\n")

        left = 60 * given.minutes - (time.perf_counter() - began)
        if left < 5 and not given.rehearse:
            keep({"left out": "no time was left"})
            continue
        run_part(name, given.rehearse, 1e4 if given.rehearse else min(LIMITS_S[name], left), keep)
        print(
            f"== {name}\n{json.dumps({key: value for key, value in whole[name].items() if key != 'output'}, indent=1)}"
        )
    print(f"{time.perf_counter() - began:.0f} s; results in {target}")
    sys.exit(any("failed" in whole[name] for name in given.parts.split(",")))


if __name__ == "__main__":
    main()
