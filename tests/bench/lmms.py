"""Run lmms-eval on DAQUAR, as a local task: `llava_hf` and our plugin against `train eval`, answer by answer.

    python3 -m venv lmms && lmms/bin/pip install -e . lmms-eval decord
    python tests/bench/lmms.py --python lmms/bin/python --model MODEL [--run RUN] --data DAQUAR [--limit 200]

MODEL is an exported folder, RUN the finished run it came from, DAQUAR holds daquar_test.json and images/. lmms-eval
lives in an environment of its own (decord is what its llava_hf imports for videos).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from train.eval import (  # noqa: E402
    scoring,  # noqa: E402
    tasks,  # noqa: E402
)

TASK = """task: daquar_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: prompt
doc_to_target: truth
generation_kwargs: {{max_new_tokens: 8}}
process_results: !function utils.judge
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""
UTILS = """from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def plain(text):
    return " ".join(text.lower().replace("_", " ").split()).removesuffix(".").rstrip()


def judge(doc, results):
    return {"accuracy": float(plain(results[0]) == plain(doc["truth"]))}
"""


def write_task(folder, items):
    folder.mkdir()
    rows = [{"id": str(item.id), "prompt": item.prompt, "image": item.image, "truth": item.truth} for item in items]
    (folder / "daquar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "daquar_local.yaml").write_text(TASK.format(data=folder / "daquar.jsonl"))
    (folder / "utils.py").write_text(UTILS)


def lmms_eval(python, folder, name, model, arguments, batch_size, limit):
    """Run lmms-eval; returns its score in percent and the answers by question."""
    words = [python, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", "daquar_local"]
    words += ["--include_path", str(folder / "task"), "--batch_size", str(batch_size), "--limit", str(limit)]
    words += ["--output_path", str(folder / name), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    print("$", " ".join(words), flush=True)
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    if not list((folder / name).rglob("*_results.json")):  # it exits with 0 even where it fails
        raise SystemExit((ended.stdout + ended.stderr)[-3000:])
    [scores] = (folder / name).rglob("*_results.json")
    [samples] = (folder / name).rglob("*_samples_daquar_local.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    said = {row["doc_id"]: row["filtered_resps"] for row in found}
    return 100 * json.loads(scores.read_text())["results"]["daquar_local"]["accuracy,none"], said


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    chosen = parser.parse_args()
    if not (chosen.python and chosen.model and chosen.data):
        print(__doc__)
        return
    items = tasks.load("daquar", chosen.data)[: chosen.limit]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_task(folder / "task", items)
        words = [sys.executable, "-m", "train", "eval", chosen.model, "--tasks", "daquar", "--eval-root", chosen.data]
        words += ["--out", folder / "ours", "--limit", chosen.limit, "--set", "eval.max_new_tokens=8"]
        subprocess.run([str(word) for word in words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        lines = (folder / "ours" / "daquar" / "answers.jsonl").read_text().splitlines()
        ours = [json.loads(line)["text"] for line in lines]
        print(f"train eval              {scoring.daquar(items, ours).metrics['accuracy']:6.2f}", flush=True)
        where = "cuda:0" if torch.cuda.is_available() else "cpu"
        where = f"device={where},device_map={where}" + (",dtype=float32" if where == "cpu" else "")
        ways = {"llava_hf": ("llava_hf", f"pretrained={chosen.model},{where}", 1)}
        ways["data_curate, exported"] = ("data_curate", f"pretrained={chosen.model}", 16)
        if chosen.run:
            ways["data_curate, the run"] = ("data_curate", f"pretrained={chosen.run}", 16)
        for number, (label, (model, arguments, batch_size)) in enumerate(ways.items()):
            score, said = lmms_eval(chosen.python, folder, f"out{number}", model, arguments, batch_size, len(items))
            differing = sum(said[n].strip() != text for n, text in enumerate(ours))  # llava_hf keeps a leading space
            print(f"lmms-eval {label:<22} {score:6.2f}   {differing} of {len(ours)} answers differ", flush=True)


if __name__ == "__main__":
    main()
