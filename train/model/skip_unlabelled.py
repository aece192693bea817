"""Training without the work that no label needs. Results change by rounding only.

Only positions with a label enter the loss. Logits are computed only at those (forward.py). The last layer's keys and
values are needed at every position, since labelled positions attend to them; but its queries, its attention output and
its MLP are functions of one position each, so they are computed at labelled positions only. If a layer has 12 d^2
weights, that skips 10 d^2 of them at every unlabelled position of one layer: 1/38 of Phi-2's forward and backward pass.

How: hooks around those modules. Before a module, the row [1, L, d] is narrowed to the labelled positions [1, s, d];
after it, the row is widened again with zeros, which no label sees. The positions come with the packed documents
(attention.py).

In addition, transformers writes GPT-2's GELU as eight operations, each of which keeps its result for the backward pass;
it is replaced by torch's single operation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.model.attention import Documents

LAST_PARTS = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.dense", "mlp")  # each a function of one position


class _LabelledPositions:
    """Hooks that narrow a row to its labelled positions before a module, and widen it with zeros after it."""

    learnt_s: Tensor | None = None
    length = 0  # length of the row that was narrowed last

    def look(self, _layer: nn.Module, _args: Any, options: dict[str, Any]) -> None:
        # Read at every run: with recomputation, the backward pass runs the layer again, outside packed_documents.
        mask = options.get("attention_mask")
        self.learnt_s = mask.learnt_s if isinstance(mask, Documents) else None

    def narrow(self, _module: nn.Module, given: tuple[Tensor, ...]) -> Tensor | None:
        if self.learnt_s is None:
            return None
        self.length = given[0].shape[1]
        return given[0].index_select(1, self.learnt_s)

    def widen(self, _module: nn.Module, _given: Any, out_bsd: Tensor) -> Tensor | None:
        if self.learnt_s is None:
            return None
        whole = out_bsd.new_zeros(len(out_bsd), self.length, out_bsd.shape[2])
        return whole.index_copy(1, self.learnt_s, out_bsd)


def skip_unlabelled(language_model: Any) -> None:
    """Change a language model that is prepared for a stage so that it skips work that no label needs.

    It does so in packed rows whose labelled positions are known (`attention.packed_documents`); others run in full.
    """
    from transformers.activations import NewGELUActivation

    for module in list(language_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    labelled, parts = _LabelledPositions(), last_parts(language_model)
    if parts:
        language_model.layers[-1].register_forward_pre_hook(labelled.look, with_kwargs=True)
    for part in parts:
        part.register_forward_pre_hook(labelled.narrow)
        part.register_forward_hook(labelled.widen)


def last_parts(language_model: Any) -> list[nn.Module]:
    """Return the modules of the last layer that only labelled positions need; none if they cannot be identified.

    A mixture of experts is left alone: it may look at all positions, or return more than a tensor.
    """
    layers = getattr(language_model, "layers", None)
    found = [part for name, part in layers[-1].named_modules() if name in LAST_PARTS] if layers else []
    return [part for part in found if not any("experts" in name for name, _ in part.named_modules())]
