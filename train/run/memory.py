"""How many tokens of a pass fit into a GPU, from the model's shapes; and the advice when a pass did not fit.

    bytes = fixed + tokens * per_token

fixed      weights at the run's precision; 20 bytes per trained weight (fp32 weight, gradient, AdamW's two moments and
           a temporary copy); three slices of logits in fp32.
per_token  what each layer of the language model keeps for the backward pass, with s bytes per element. A norm of width
           d: 6 d. Attention of q query and kv key features: s (2 q + 4 kv), before and after rotation, and s q for its
           output. An MLP of width f: s f before its activation, 3 s f if it is gated. LoRA: s + 1 for each input of an
           adapter (a copy and a dropout mask). Full tuning: s for each distinct input of a linear layer. A mixture,
           for each expert that a token uses: s for its tensors' inputs and outputs. With checkpointing only s d per
           layer, and one whole layer while it is recomputed.

QLoRA (`quantize`): a frozen linear layer of the language model takes QUANTISED bytes per weight, plus an unpacked copy
of the largest one. Sharded over n ranks (`shard`): all but a frozen tower is divided by n. In full come in addition
embedding, head and projector, the running layer and the next one (s bytes per weight), and the gradients of one layer
and, if they are trained, of those three (4 bytes).

Images are not counted separately: a frozen tower keeps nothing, and the reserve covers its pass. Compared with
simulations at full size (figures in tests/train/run/test_memory.py), the formula is right within an eighth.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from train.config import Stage
from train.errors import TrainError, is_out_of_memory
from train.model.forward import LOGIT_CHUNK
from train.model.tower import blocks_of
from train.run.flops import mixture

SHARE, RESERVE = 0.9, 2e9  # usable share of the free memory; bytes for the context, fragments and the tower's pass
QUANTISED = 0.52  # bytes per weight: 4 bits, and a quantised constant for every 64 weights
STEP = 256  # sizes are rounded down to a multiple of this many tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step: a fixed part, and a part per token of its largest pass."""

    fixed: float
    per_token: float

    @classmethod
    def of(cls, model: Any, stage: Stage, itemsize: int, *, checkpointing: bool, world: int = 1) -> Self:
        """Estimate for a composed model that is prepared for a stage, from shapes alone; works on the meta device, too.

        itemsize: bytes per element at the run's precision.  world: number of ranks that a sharded model is split over.
        For QLoRA the model may be prepared without quantisation, so that bitsandbytes is not needed.
        """
        layers, width = model.model.language_model.layers, model.config.text_config.hidden_size
        fixed = _weights(model, itemsize)
        if stage.quantize:
            packed = [m.weight.numel() for m in layers.modules() if _is_frozen_linear(m)]
            fixed += itemsize * max(packed, default=0) - (itemsize - QUANTISED) * sum(packed)
        if stage.shard and world > 1:
            fixed = _sharded(model, fixed, itemsize, world)
        kept = [_layer(layer, model.config.text_config, stage, itemsize) for layer in layers]
        per_token = itemsize * width * len(kept) + max(kept) if checkpointing else sum(kept)
        per_token += _tower(model, itemsize) if stage.tune_tower else 0.0
        return cls(fixed + 3 * 4.0 * LOGIT_CHUNK, per_token + 4.0 * width)

    def bytes(self, tokens: int) -> float:
        """Return the bytes of a step whose largest pass holds this many tokens."""
        return self.fixed + tokens * self.per_token

    def tokens(self, free: float) -> int:
        """Return how many tokens fit into this many free bytes, with headroom; at least STEP."""
        fit = (SHARE * free - RESERVE - self.fixed) / self.per_token
        return max(STEP, int(fit) // STEP * STEP)


def _weights(module: nn.Module, itemsize: float) -> float:
    """Return the bytes of weights, and of what AdamW keeps for trained ones."""
    return float(sum(p.numel() * (20 if p.requires_grad else itemsize) for p in module.parameters()))


def _is_frozen_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and not weight.requires_grad


def _sharded(model: nn.Module, fixed: float, itemsize: int, world: int) -> float:
    """Return what one rank holds of a model's `fixed` bytes, plus what is gathered while it runs."""
    inner: Any = model.model
    layers = list(inner.language_model.layers)
    whole = (
        0.0 if any(p.requires_grad for p in inner.vision_tower.parameters()) else _weights(inner.vision_tower, itemsize)
    )
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    apart = in_layers | ({id(p) for p in inner.vision_tower.parameters()} if whole else set())
    root = [p for p in model.parameters() if id(p) not in apart]
    layer = max(layers, key=lambda layer: sum(p.numel() for p in layer.parameters()))
    gathered = float(sum(itemsize * p.numel() + (4 if p.requires_grad else 0) * p.numel() for p in root))
    gathered += sum(2 * itemsize * p.numel() + (4 if p.requires_grad else 0) * p.numel() for p in layer.parameters())
    return float((fixed - whole) / world + whole + gathered)


def _layer(layer: nn.Module, config: Any, stage: Stage, itemsize: int) -> float:
    names = dict(layer.named_modules())
    linears = {name: m for name, m in names.items() if isinstance(m, nn.Linear) and "lora_" not in name}
    norms = sum(m.weight.numel() for n, m in names.items() if "norm" in n.rsplit(".", 1)[-1] and hasattr(m, "weight"))
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = heads * head
    kv = head * (getattr(config, "num_key_value_heads", None) or heads)
    mlp = [m.out_features for n, m in linears.items() if "mlp" in n and m.out_features > config.hidden_size]
    inner = sum(mlp[:1]) * (3 if len(mlp) > 1 else 1)  # gated: gate and up both widen
    chosen, experts = mixture(layer, config)
    inner += chosen * sum(p.shape[1] + p.shape[2] for p in experts)
    kept: float = 6.0 * norms + itemsize * (3 * q + 4 * kv + inner)
    if stage.tune == "lora":
        mask = 1 if stage.lora_dropout else 0
        kept += (itemsize + mask) * sum(m.in_features for m in linears.values())
        # DoRA multiplies two products of each layer by a trained vector, and keeps them for its gradient.
        kept += 2 * itemsize * sum(m.out_features for m in linears.values()) if stage.dora else 0
    elif stage.tune == "full":
        # Queries, keys and values share one input, gate and up another; attention's output is counted above.
        kept += itemsize * (2 * config.hidden_size + sum(mlp[:1]))
    return float(kept)


def _tower(model: Any, itemsize: int) -> float:
    """Return what a pass keeps of a trained tower, per position of an image; it is never recomputed."""
    tower = model.model.vision_tower
    if not len(blocks_of(tower)):  # timm's networks differ in form: left to `RESERVE` and to halving
        return 0.0
    one = getattr(tower.config, "tower_config", tower.config)
    width, inner = one.hidden_size, getattr(one, "intermediate_size", 4 * one.hidden_size)
    places = (one.image_size // one.patch_size) ** 2 * getattr(tower.config, "num_tiles", 1)
    kept = len(blocks_of(tower)) * places * (12 * width + itemsize * (6 * width + 2 * inner))
    return float(kept / model.config.image_seq_length)


def size_pass(
    model: Any, stage: Stage, device: torch.device, dtype: torch.dtype, *, checkpointing: bool, world: int = 1
) -> int:
    """Return the `micro_tokens` of a run: on a GPU the default is lowered to what its free memory holds."""
    if device.type != "cuda" or stage.micro_tokens != Stage.micro_tokens:
        return stage.micro_tokens
    gc.collect()  # from an earlier run of this process: compiled layers are reference cycles
    torch.cuda.empty_cache()  # what was freed is still held by torch's allocator
    free = float(torch.cuda.mem_get_info(device)[0])
    memory = Memory.of(model, stage, dtype.itemsize, checkpointing=checkpointing, world=world)
    return min(stage.micro_tokens, memory.tokens(free))


class OutOfMemory(TrainError):
    """A pass does not fit."""


@contextmanager
def out_of_memory(stage: Stage) -> Iterator[None]:
    """Turn running out of memory into an error that names the settings to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        more = {
            "full": "shard = true (under torchrun)",
            "lora": 'quantize = "nf4"',
            "projector": f"micro_images (now {stage.micro_images})",
        }
        raise OutOfMemory(
            f"out of memory; lower micro_tokens (now {stage.micro_tokens:,}), or set model.gradient_checkpointing = "
            f"true, or {more[stage.tune]}; the same command with --set resumes from the last checkpoint"
        ) from None
