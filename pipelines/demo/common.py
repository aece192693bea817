"""What the scripts that build the demo's models share: tokenizers, the optimiser, and the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from curate.demo.world import Plan, draw


def save_tokenizer(folder: Path, words: Sequence[str], *, template: str, config: dict[str, object]) -> None:
    """Write a word-level tokenizer in lower case; punctuation and line ends are words of their own.

    words: id = position; holds every special token that `config` names. template: e.g. "$A <eos>".
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(words)}
    assert len(ids) == len(words)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    blank, mark = Regex(r"[ \t\r]+"), Regex(r"\n|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(blank, "removed"), pre_tokenizers.Split(mark, "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words by single spaces
    specials = [word for word in words if word.startswith("<") and word.endswith(">") and len(word) > 2]
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, ids[word]) for word in specials]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class MuonAdamW:
    """Muon on the matrices inside the blocks, AdamW on the rest, under one warm-up and cosine schedule.

    Muon is what makes a few hundred steps enough: with AdamW alone the same steps left both models far behind.
    """

    def __init__(self, model: nn.Module, blocks: str, *, lr: float, steps: int, weight_decay: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if blocks in name and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.optimisers = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimiser, lambda step: min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
            for optimiser in self.optimisers
        ]

    def step(self, loss: torch.Tensor) -> None:
        """Back-propagate and move every weight."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser, schedule in zip(self.optimisers, self.schedules, strict=True):
            optimiser.step()
            schedule.step()


def draw_all(planned: Plan, rng: np.random.Generator, *, label: bool = False) -> NDArray[np.uint8]:
    """Draw a planned pool: u8 [n, 64, 64, 3]."""
    return np.stack([draw(scene, rng, label=label) for scene in planned.shown])


def auc(higher: NDArray[np.floating], lower: NDArray[np.floating]) -> float:
    """Return the probability that a value of `higher` exceeds one of `lower`."""
    order = np.argsort(np.concatenate([lower, higher]), kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    n, m = len(higher), len(lower)
    return float((ranks[m:].sum() - n * (n + 1) / 2) / (n * m))
