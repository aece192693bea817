"""Steps whose norms and LoRA inputs stay in bf16 (train/model/half.py) against steps without, in turns, in CPU seconds.

    python tests/bench/half.py [STAGE …] [--what half|lora] [--steps 6] [--batch-size 2] [--out FILE]

`--what lora` compares LoRA with and without its sums made within its products instead (train/model/lora.py).

The gain is a GPU's; roofline.py counts it. This shows what a processor in bf16 takes, that losses agree, and by
torch's profiler over one step how many casts are left, on the small Phi of `train bench`.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from training import processor  # noqa: E402

from curate.storage import manifest  # noqa: E402
from train.bench import step  # noqa: E402
from train.folder import write_json  # noqa: E402

WHAT = {"half": "train.bench.step.stay_half", "lora": "train.bench.step.fuse"}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=list(step.WRITERS))
    parser.add_argument("--what", choices=list(WHAT), default="half")
    parser.add_argument("--steps", type=int, default=6, help="timed steps; two untimed ones come before and after")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(__file__).parent / "results" / f"{given.what}.json"
    rows = [compare(name, given.what, given.steps, given.batch_size) for name in given.stages]
    head = {"command": " ".join(["python tests/bench/half.py", *sys.argv[1:]]), "date": date.today().isoformat()}
    head["hardware"] = f"{os.cpu_count()} cores, {processor()}"
    write_json(out, {**head, "versions": manifest.versions("torch", "transformers", "peft"), "rows": rows})


def compare(name: str, what: str, steps: int, batch_size: int) -> dict[str, object]:
    """Run a stage both ways in turns; return the median CPU seconds of a step, their ratio, casts and operations."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    kinds = ("without", what)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    found: dict[str, object] = {"stage": name, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        config, model = step._fresh(None, Path(folder))
        short = step._shortened(config, name, steps + 2, batch_size, small=True)
        stage = dataclasses.replace(short, precision="bf16", workers=0)
        out = Path(folder) / name
        runs = {}
        for kind in kinds:
            runs[kind] = step._run("ours", model, stage, step.WRITERS[name], out / kind, {})
            off = {what} if kind == "without" else set()
            with ExitStack() as stack:
                for switch in off | ({"lora"} if what == "half" else set()):  # LoRA as PEFT has it, on both sides
                    stack.enter_context(patch(WHAT[switch], lambda model: None))
                next(runs[kind])
        for _ in range(steps):
            for kind, run in runs.items():
                began = time.process_time()
                next(run)
                seconds[kind].append(time.process_time() - began)
        for kind, run in runs.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                next(run)
            counts = Counter(event.name for event in profiled.events() if event.name.startswith("aten::"))
            recorded = (out / kind / "ours" / "metrics.jsonl").read_text().splitlines()
            found[kind] = {
                "cpu_s_a_step": round(median(seconds[kind]), 3),
                "casts": counts["aten::_to_copy"],
                "operations": sum(counts.values()),
                "losses": [json.loads(line)["loss"] for line in recorded],
            }
            run.close()
    found["ratio"] = round(median(b / a for a, b in zip(*seconds.values(), strict=True)), 3)
    losses = [found[kind]["losses"] for kind in kinds]  # type: ignore[index]
    found["losses_differ_by"] = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    print({key: value for key, value in found.items() if key not in kinds}, flush=True)
    for kind in kinds:
        print("   ", kind, {k: v for k, v in found[kind].items() if k != "losses"}, flush=True)  # type: ignore[attr-defined]
    return found


if __name__ == "__main__":
    main()
