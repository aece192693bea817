"""Train a tiny CLIP of the demo's world and write it as an open_clip `local-dir:` folder.

  python -m pipelines.demo.build_clip OUT [--seed 1000] [--steps 450] [--legible]

A ViT 64/16 (width 128, 4 layers) and a text tower (2 layers), 1.3 M weights, stored as f16. Its pool is disjoint from
every demo pool (a seed space of its own) and less dirty, as CLIP's own data are cleaner than a raw crawl. The result is
measured on a dirty pool of 6,000 and must pass GATES (exit 1 if not). `--legible`: many training pictures are printed
words, so that the model learns to read, and ranks such cheaters high.
The demo ships clip/ (the selector, seed 1000), tower/ (seed 2000: the eye of the model that is trained) and
clip_reader/ (seed 3000 --legible). About 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional as F

from curate.demo.words import NAMES, vocabulary
from curate.demo.world import DIRT, FAULTS, NUM_CONCEPTS, Dirt, Plan, plan, sample_scenes
from pipelines.demo.common import MuonAdamW, auc, draw_all, save_tokenizer

MILD = Dirt(copies=0.05, swapped=0.10, cheaters=0.05, underspecified=0.03, zipf=0.25)
READER = Dirt(copies=0.05, swapped=0.05, cheaters=0.35, underspecified=0.03, zipf=0.25, legible=True)
GATES = {"mismatch": 0.98, "duplicate": 0.97, "purity": 0.70, "zero_shot": 0.50}
MEAN, STD = 110 / 255, 70 / 255
BATCH = 256
SEED_SPACE = 7_000_000  # keeps these pools apart from those of `curate demo`, whatever the seed


def configure(num_words: int) -> dict[str, Any]:
    """Return the content of open_clip_config.json."""
    vision = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32}
    text = {"context_length": 18, "vocab_size": num_words, "width": 128, "heads": 4, "layers": 2}
    text["hf_tokenizer_name"] = "tokenizer.json"  # any name makes open_clip read the folder's own tokenizer
    look = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": look}


def prepare(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Turn u8 [n, 64, 64, 3] into what the tower takes: f32 [n, 3, 64, 64]."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def train(model: Any, tokens: torch.Tensor, pixels: NDArray[np.uint8], *, steps: int, seed: int) -> None:
    """Train contrastively, in place."""
    model.train()
    optimiser = MuonAdamW(model, "resblocks", lr=3e-3, steps=steps, weight_decay=0.05)
    rng = np.random.default_rng([SEED_SPACE, seed, 2])
    order = np.concatenate([rng.permutation(len(pixels)) for _ in range(1 + steps * BATCH // len(pixels))])
    target, started = torch.arange(BATCH), time.perf_counter()
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        image, text, scale = model(prepare(pixels[rows]), tokens[rows])
        logits = scale * image @ text.T
        optimiser.step((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.0)
        if step % 50 == 0 or step == steps - 1:
            loss = F.cross_entropy(logits.detach(), target).item()
            print(f"step {step} loss {loss:.3f} {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def embed_images(model: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return unit rows f32 [n, 64]."""
    parts = [model.encode_image(prepare(pixels[i : i + 512]), normalize=True) for i in range(0, len(pixels), 512)]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def embed_texts(model: Any, tokens: torch.Tensor) -> NDArray[np.float32]:
    """Return unit rows f32 [n, 64]."""
    return torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(1024)]).numpy()


def check(model: Any, tokenizer: Any, *, legible: bool) -> dict[str, float]:
    """Measure what curation needs of an embedder on a pool as dirty as the demo's; higher is better for all."""
    rng = np.random.default_rng([SEED_SPACE, 77])
    dirt = DIRT["legible" if legible else "dirty"]
    pool = plan(rng, 6000, dirt)
    image = embed_images(model, draw_all(pool, rng, label=legible))
    score = (image * embed_texts(model, tokenizer(pool.captions))).sum(1)
    sound = score[(pool.fault == 0)]
    found = {
        name: auc(sound, score[(pool.fault == FAULTS.index(fault)) & ~pool.is_copy])
        for name, fault in (("mismatch", "swapped"), ("underspecified", "underspecified"), ("cheater", "cheater"))
    }
    found["duplicate"] = _check_copies(image, pool)
    found["purity"] = _purity(image, pool.shown["concept"])
    scenes = sample_scenes(rng, np.repeat(np.arange(NUM_CONCEPTS), 10))
    clean = Plan(scenes, scenes, [""] * len(scenes), np.zeros(len(scenes), np.int8), np.arange(len(scenes)))
    words = embed_texts(model, tokenizer([f"a {name}" for name in NAMES]))
    guess = (embed_images(model, draw_all(clean, rng)) @ words.T).argmax(1)
    found["zero_shot"] = float((guess == scenes["concept"]).mean())
    return found


def _check_copies(image: NDArray[np.float32], pool: Plan) -> float:
    """AUC of (copy, its source) against (source, its nearest image that is not a copy), over pictures of shapes."""
    shapes = ~pool.shown["printed"]  # two labels with one word are one picture, copied or not
    copies = np.flatnonzero(pool.is_copy & shapes)
    origins = np.unique(pool.source[copies])
    cosine = image[origins] @ image[~pool.is_copy].T
    cosine[np.arange(len(origins)), np.searchsorted(np.flatnonzero(~pool.is_copy), origins)] = -1
    return auc((image[copies] * image[pool.source[copies]]).sum(1), cosine.max(1))


def _purity(image: NDArray[np.float32], concept: NDArray[np.integer], k: int = 200) -> float:
    """Share of images whose concept is the most common one of their k-means cluster."""
    from sklearn.cluster import KMeans

    label = KMeans(k, n_init=1, max_iter=30, random_state=0).fit_predict(image)
    return float(sum(np.bincount(concept[label == c]).max(initial=0) for c in range(k)) / len(concept))


def main() -> None:
    """Build one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--legible", action="store_true")
    given = parser.parse_args()
    words = ["<pad>", "<unk>", *vocabulary(), "<eos>"]  # open_clip pools the text at the highest id
    config = configure(len(words))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>", "model_max_length": 18}
    save_tokenizer(given.out, words, template="$A <eos>", config=names)
    (given.out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")

    rng = np.random.default_rng([SEED_SPACE, given.seed, 1])
    pool = plan(rng, given.rows, READER if given.legible else MILD)
    pixels = draw_all(pool, rng, label=given.legible)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{given.out}")
    torch.manual_seed(given.seed)
    model = open_clip.CLIP(**config["model_cfg"])
    train(model, tokenizer(pool.captions), pixels, steps=given.steps, seed=given.seed)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, given.out / "open_clip_model.safetensors", metadata={"format": "pt"})
    found = check(model, tokenizer, legible=given.legible)
    print("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    short = [f"{name} < {least}" for name, least in GATES.items() if found[name] < least]
    short += ["cheater > 0.3: it does not read"] if given.legible and found["cheater"] > 0.3 else []
    if short:
        raise SystemExit(f"written, but do not ship it: {', '.join(short)}")


if __name__ == "__main__":
    main()
