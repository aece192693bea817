"""How many tokens of a pass fit a GPU: the memory of a training step, from the model's shapes.

    bytes = fixed + tokens * per_token

fixed      weights at the run's precision; 20 bytes for each that learns (fp32 weight, gradient, AdamW's two moments and
           a temporary copy); three slices of logits in fp32.
per_token  what the backward pass keeps of each layer of the language model, with s bytes an element. A norm of width d:
           6 d. Attention of q query and kv key features: s (2 q + 4 kv), before and after rotation, and s q for its
           output. An MLP of width f: s f before its activation, 3 s f if it is gated. LoRA: s + 1 for each input of an
           adapter (a copy and a dropout mask). Full tuning: s for each distinct input of a linear layer. With
           checkpointing only s d a layer, and one whole layer while it is recomputed.

Images are not counted apart: a frozen tower keeps nothing, and the reserve covers its pass. Against simulations at full
size, with the figures of tests/train/run/test_memory.py, the formula is right within an eighth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from train.config import Stage
from train.model.forward import LOGIT_CHUNK

SHARE, RESERVE = 0.9, 2e9  # of the free memory; bytes for the context, fragments and the tower's pass
STEP = 256  # tokens, to which the size is rounded down


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, whatever its pass holds and for each token of the pass."""

    fixed: float
    per_token: float

    @classmethod
    def of(cls, model: Any, stage: Stage, itemsize: int, *, checkpointing: bool) -> Self:
        """Estimate for a composed model that is prepared for a stage; reads shapes alone, also on the meta device.

        itemsize: bytes of an element under the run's precision.
        """
        weights = list(model.parameters())
        learns = sum(p.numel() for p in weights if p.requires_grad)
        fixed = itemsize * sum(p.numel() for p in weights if not p.requires_grad) + 20.0 * learns
        layers, width = model.model.language_model.layers, model.config.text_config.hidden_size
        kept = [_layer(layer, model.config.text_config, stage, itemsize) for layer in layers]
        per_token = itemsize * width * len(kept) + max(kept) if checkpointing else sum(kept)
        return cls(fixed + 3 * 4.0 * LOGIT_CHUNK, per_token + 4.0 * width)

    def bytes(self, tokens: int) -> float:
        """Return the bytes of a step whose largest pass holds so many tokens."""
        return self.fixed + tokens * self.per_token

    def tokens(self, free: float) -> int:
        """Return how many tokens fit so many free bytes, with headroom; at least STEP."""
        fit = (SHARE * free - RESERVE - self.fixed) / self.per_token
        return max(STEP, int(fit) // STEP * STEP)


def _layer(layer: nn.Module, config: Any, stage: Stage, itemsize: int) -> float:
    names = dict(layer.named_modules())
    linears = {name: m for name, m in names.items() if isinstance(m, nn.Linear) and "lora_" not in name}
    norms = sum(m.weight.numel() for n, m in names.items() if "norm" in n.rsplit(".", 1)[-1] and hasattr(m, "weight"))
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = heads * head
    kv = head * (getattr(config, "num_key_value_heads", None) or heads)
    mlp = [m.out_features for n, m in linears.items() if "mlp" in n and m.out_features > config.hidden_size]
    inner = sum(mlp[:1]) * (3 if len(mlp) > 1 else 1)  # gate and up are two that widen
    kept: float = 6.0 * norms + itemsize * (3 * q + 4 * kv + inner)
    if stage.tune == "lora":
        mask = 1 if stage.lora_dropout else 0
        kept += (itemsize + mask) * sum(m.in_features for m in linears.values())
        # DoRA multiplies two products of each layer by a vector that learns, and keeps them for its gradient.
        kept += 2 * itemsize * sum(m.out_features for m in linears.values()) if stage.dora else 0
    elif stage.tune == "full":
        # One input serves queries, keys and values, one gate and up; attention's output is counted above.
        kept += itemsize * (2 * config.hidden_size + sum(mlp[:1]))
    return float(kept)


def size_pass(model: Any, stage: Stage, device: torch.device, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Return the `micro_tokens` of a run: on a GPU the default is lowered to what its free memory holds."""
    if device.type != "cuda" or stage.micro_tokens != Stage.micro_tokens:
        return stage.micro_tokens
    free = float(torch.cuda.mem_get_info(device)[0])
    return min(stage.micro_tokens, Memory.of(model, stage, dtype.itemsize, checkpointing=checkpointing).tokens(free))
