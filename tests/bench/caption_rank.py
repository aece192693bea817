"""Measure how well an exported model knows which caption belongs to a photograph; print captions that it writes.

    python tests/bench/caption_rank.py MODEL --data SHARDS_OR_JSON --candidates 20 --photographs 100

Ranks as `train eval` does (train/eval/ranking.py), and prints captions that the model writes next to the true ones.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from train.data.sources import open_source  # noqa: E402
from train.eval.evaluate import collect  # noqa: E402
from train.eval.generate import load_speaker  # noqa: E402
from train.eval.ranking import pairs_of, prompt, rank, summary  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--photographs", type=int, default=100)
    parser.add_argument("--show", type=int, default=10)
    given = parser.parse_args()
    speaker = load_speaker(given.model, torch.device("cpu"))
    source = open_source(given.data, given.images)
    questions = collect(source, 2 * given.photographs)[0]
    found = pairs_of(source, questions)[: given.photographs]
    for place, (show, caption) in found[: given.show]:
        asked = prompt(speaker, [show()])
        made = speaker.model.generate(**asked, max_new_tokens=24, do_sample=False)
        text = speaker.processor.tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{questions[place].key}\tsaid: {text.strip()}\tcaption: {caption}", flush=True)
    ranks = rank(lambda: speaker, [pair for _, pair in found], given.candidates)
    print(json.dumps({"candidates": given.candidates, **summary(ranks)}))


if __name__ == "__main__":
    main()
