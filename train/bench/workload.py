"""Synthetic samples with the lengths of the published ones, for `bench`: words of one token each, and real JPEGs.

The instruction mix has the 12 parts of LLaVA-1.5's 665K with their published sizes (arXiv:2310.03744, table 7). Rounds
are questions over images of the source sets (VQAv2 443,757 over 82,783, GQA 943,000 over 72,140, …; LLaVA-Instruct as
arXiv:2304.08485 describes its three kinds). Tokens of questions and answers are our estimates, and so are ShareGPT's
lengths (cut at 2,048, as in the mix). Captions have the lengths of 1,760 BLIP captions of LLaVA's pretraining set under
Phi-2's tokenizer (5, 25, 50, 75, 95 %: 6, 9, 12, 16, 22 tokens). An image is 576 tokens there; with another number, all
texts are scaled alike, so that the mix keeps its proportions.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_TOKENS = 576
CAPTION_TOKENS = (6, 9, 12, 16, 22)
NUM_WORDS, NUM_IMAGES = 500, 32


@dataclass(frozen=True)
class Part:
    """Samples of one kind: number in thousands; average rounds, tokens per question and tokens per answer."""

    thousands: int
    rounds: float
    question: float
    answer: float
    image: bool = True


MIX = {
    "llava conversations": Part(58, 3, 12, 40),
    "llava descriptions": Part(23, 1, 12, 110),
    "llava reasoning": Part(77, 1, 18, 130),
    "sharegpt": Part(40, 4, 60, 300, image=False),
    "vqav2": Part(83, 5.4, 10, 2),
    "gqa": Part(72, 13, 11, 2),
    "okvqa": Part(9, 1, 11, 2),
    "ocrvqa": Part(80, 5, 10, 5),
    "aokvqa": Part(66, 1, 50, 2),
    "textcaps": Part(22, 1, 20, 14),
    "refcoco": Part(48, 6, 15, 15),
    "vg": Part(86, 8, 15, 15),
}


def write_instructions(folder: Path, num: int, image_tokens: int, seed: int = 0) -> Path:
    """Write conversations of the mix as a LLaVA JSON with its images; lengths vary around each part's averages."""
    rng = np.random.default_rng(seed)
    scale = image_tokens / IMAGE_TOKENS
    parts = list(MIX.values())
    weights = np.array([part.thousands for part in parts], float)
    records = []
    for i, kind in enumerate(rng.choice(len(parts), num, p=weights / weights.sum())):
        part = parts[kind]
        turns = []
        for _ in range(1 + rng.poisson(part.rounds - 1)):
            turns += [_turn(rng, "human", part.question * scale), _turn(rng, "gpt", part.answer * scale)]
        records.append(_record(i, turns, rng, image=part.image))
    return _write(folder, records, rng)


def write_captions(folder: Path, num: int, image_tokens: int, seed: int = 0) -> Path:
    """Write captions as a LLaVA JSON with its images."""
    rng = np.random.default_rng(seed)
    scale = image_tokens / IMAGE_TOKENS
    lengths = np.interp(rng.random(num), (0.05, 0.25, 0.5, 0.75, 0.95), CAPTION_TOKENS) * scale
    records = []
    for i, length in enumerate(lengths):
        turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": _words(rng, round(length))}]
        records.append(_record(i, turns, rng, image=True))
    return _write(folder, records, rng)


def tokenizer(folder: Path) -> Path:
    """Write a whole-word tokenizer with the special tokens of all our templates."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from train.data.prompts import TEMPLATES

    written = {token for template in TEMPLATES.values() for token in template.special_tokens}
    special = ["<unk>", "<eos>", "<image>", *sorted(written)]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(NUM_WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    made.save_pretrained(folder)
    return folder


def _turn(rng: np.random.Generator, role: str, tokens: float) -> dict[str, str]:
    return {"from": role, "value": _words(rng, round(rng.gamma(4.0, tokens / 4)))}


def _words(rng: np.random.Generator, num: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, NUM_WORDS, max(1, num)))


def _record(i: int, turns: list[dict[str, str]], rng: np.random.Generator, *, image: bool) -> dict[str, Any]:
    if not image:
        return {"id": str(i), "conversations": turns}
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"id": str(i), "image": f"{rng.integers(NUM_IMAGES)}.jpg", "conversations": turns}


def _write(folder: Path, records: list[dict[str, Any]], rng: np.random.Generator) -> Path:
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    for i in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((512, 384), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        (folder / "images" / f"{i}.jpg").write_bytes(out.getvalue())
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"
