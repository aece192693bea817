"""How well an exported model knows which caption belongs to a photograph: ranks by likelihood, and captions of its own.

    python tests/bench/caption_rank.py MODEL --data SHARDS_OR_JSON --candidates 20 --photographs 100

Of each photograph, no two alike, its own caption and those of `candidates - 1` others, drawn by `seed`, are scored in
the form of the plain stage: image, then caption. Two scores: the mean log-likelihood a token, and what the image adds
to it (less the caption's own without the image), which no caption gets for being common. Chance is 1 / candidates.
Cost: the image once, its keys and values shared by all candidates.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from train.data.sources import decode_image, open_source  # noqa: E402
from train.eval.evaluate import collect  # noqa: E402
from train.eval.generate import load_speaker  # noqa: E402


def pairs(data, images, limit):
    """Return (key, image, caption) of the first records with one image; a photograph once."""
    source = open_source(data, images)
    found = {}
    for question in collect(source, 2 * limit)[0]:
        if len(question.images) == 1:
            content = source.image_bytes(question.images[0])
            found.setdefault(content, (question.key, decode_image(content), question.truth.strip()))
    return list(found.values())[:limit]


def prefix(speaker, image):
    """The ids and pixels of an image alone, or of nothing but the first token."""
    processor = speaker.processor
    bos = processor.tokenizer.bos_token or ""
    if image is None:
        token = processor.tokenizer.bos_token_id
        return {"input_ids": torch.tensor([[processor.tokenizer.eos_token_id if token is None else token]])}
    taken = processor(text=bos + processor.image_token, images=[image], return_tensors="pt", add_special_tokens=False)
    return {name: taken[name] for name in ("input_ids", "pixel_values")}


@torch.inference_mode()
def likelihoods(speaker, image, captions):
    """The mean log-likelihood a token of each caption behind an image (None: behind none)."""
    tokenizer = speaker.processor.tokenizer
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in captions]
    first = prefix(speaker, image)
    out = speaker.model(**first, use_cache=True, logits_to_keep=1)
    cache, length = out.past_key_values, first["input_ids"].shape[1]
    cache.batch_repeat_interleave(len(rows))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    kept = torch.tensor([[1] * (length + len(row)) + [0] * (longest - len(row)) for row in rows])
    behind = speaker.model(input_ids=ids, attention_mask=kept, past_key_values=cache).logits
    logits = torch.cat([out.logits.expand(len(rows), -1, -1), behind[:, :-1]], 1).float()
    said = torch.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0]
    return np.array([float(line[: len(row)].mean()) for line, row in zip(said, rows, strict=True)])


def rank(scores):
    """How many candidates score at least as well as the first, itself among them; 1 is best."""
    return int((scores >= scores[0]).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--photographs", type=int, default=100)
    parser.add_argument("--show", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    speaker = load_speaker(given.model, torch.device("cpu"))
    found = pairs(given.data, given.images, given.photographs)
    rng = np.random.default_rng(given.seed)
    alone = likelihoods(speaker, None, [caption for _, _, caption in found])
    ranks, gains = [], []
    for number, (_, image, _) in enumerate(found):
        others = rng.choice([i for i in range(len(found)) if i != number], given.candidates - 1, replace=False)
        chosen = [number, *map(int, others)]
        scores = likelihoods(speaker, image, [found[i][2] for i in chosen])
        ranks.append(rank(scores))
        gains.append(rank(scores - alone[chosen]))
    for key, image, caption in found[: given.show]:
        made = speaker.model.generate(**prefix(speaker, image), max_new_tokens=24, do_sample=False)
        text = speaker.processor.tokenizer.decode(made[0, prefix(speaker, image)["input_ids"].shape[1] :], True)
        print(f"{key}\tsaid: {text.strip()}\tcaption: {caption}")
    told = {"photographs": len(found), "candidates": given.candidates}
    for name, each in (("likelihood", ranks), ("with_less_without_image", gains)):
        told[name] = {"first": float(np.mean(np.array(each) == 1)), "mean_rank": float(np.mean(each))}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
