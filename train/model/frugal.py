"""Work of the language model that no label asks for, left out of its training; results change by rounding only.

Logits are formed at positions with a label alone, and behind the last attention positions no longer meet: the last
layer needs keys and values of every position, but queries, attention's output and the MLP only of those. That saves 10
of its 12 d² weights a position: 1/38 of Phi-2's forward and backward pass. Besides, GELU as GPT-2 wrote it is eight
operations in transformers, each of which keeps its result for the backward pass; torch has the same function as one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.model.attention import Documents

LAST_PARTS = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.dense", "mlp")  # each a function of one position


class _Learnt:
    """Hooks that narrow a row to its labelled positions before a module, and widen it with zeros behind."""

    learnt_s: Tensor | None = None
    length = 0

    def look(self, _layer: nn.Module, _args: Any, options: dict[str, Any]) -> None:
        # The mask comes again when a recomputing backward pass runs the layer once more.
        mask = options.get("attention_mask")
        self.learnt_s = None
        if isinstance(mask, Documents):
            self.learnt_s, self.length = mask.learnt_s, mask.edges[-1]

    def narrow(self, _module: nn.Module, given: tuple[Tensor, ...]) -> Tensor | None:
        return None if self.learnt_s is None else given[0].index_select(1, self.learnt_s)

    def widen(self, _module: nn.Module, _given: Any, out_bsd: Tensor) -> Tensor | None:
        if self.learnt_s is None:
            return None
        whole = out_bsd.new_zeros(len(out_bsd), self.length, out_bsd.shape[2])
        return whole.index_copy(1, self.learnt_s, out_bsd)


def spare(language_model: Any) -> None:
    """Let a language model that is prepared for a stage leave out what no label asks for (`attention.apart`)."""
    from transformers.activations import NewGELUActivation

    for module in list(language_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    learnt, parts = _Learnt(), last_parts(language_model)
    if parts:
        language_model.layers[-1].register_forward_pre_hook(learnt.look, with_kwargs=True)
    for part in parts:
        part.register_forward_pre_hook(learnt.narrow)
        part.register_forward_hook(learnt.widen)


def last_parts(language_model: Any) -> list[nn.Module]:
    """Return the modules of the last layer that only labelled positions need; none where they are not known.

    A mixture of experts is left alone: it may look at all positions, or give more than a tensor.
    """
    layers = getattr(language_model, "layers", None)
    found = [part for name, part in layers[-1].named_modules() if name in LAST_PARTS] if layers else []
    return [part for part in found if not any("experts" in name for name, _ in part.named_modules())]
