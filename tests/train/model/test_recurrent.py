"""Hybrid language models: a packed document is computed as if it were alone, in the recurrent layers, too."""

import pytest
import torch
import transformers as tf
from test_attention import FEWER, LENGTHS, enlarge

from train.model.attention import NAME, packed_documents, register
from train.model.recurrent import for_recurrent, isolate_documents

LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
FOUR = {**FEWER, "num_hidden_layers": 4}
HYBRIDS = {
    "lfm2": tf.Lfm2Config(**FOUR, layer_types=["conv", "full_attention"] * 2),
    "falcon_h1": tf.FalconH1Config(**FEWER, **MAMBA, mamba_chunk_size=8),
    "qwen3_5": tf.Qwen3_5TextConfig(**FOUR, **LINEAR, head_dim=8),
}


def body_of(family):
    register()
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(HYBRIDS[family], attn_implementation=NAME)
    enlarge(model)
    return model.get_decoder()


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_document_is_as_if_alone(family, checkpointing):
    embeds = torch.randn(1, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(0))
    outs = []
    for packed in (False, True):
        body = body_of(family)
        isolate_documents(body)
        body.train()
        if checkpointing:
            body.activation_checkpointing_enable({"use_reentrant": False})
        leaf = embeds.clone().requires_grad_()
        if packed:
            positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
            with packed_documents(LENGTHS, leaf.device) as documents:
                more = for_recurrent(body, documents)
                hidden = body(inputs_embeds=leaf, position_ids=positions, use_cache=False, **more).last_hidden_state
        else:
            parts = [body(inputs_embeds=part, use_cache=False).last_hidden_state for part in leaf.split(LENGTHS, 1)]
            hidden = torch.cat(parts, 1)
        (hidden * torch.arange(32)).square().mean().backward()
        outs.append((hidden.detach(), leaf.grad, {name: p.grad for name, p in body.named_parameters()}))
    (alone, alone_embeds, alone_grads), (packed, packed_embeds, packed_grads) = outs
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_embeds, alone_embeds, rtol=1e-4, atol=1e-5 * float(alone_embeds.abs().max()))
    for name, there in alone_grads.items():
        if there is not None:
            here, largest = packed_grads[name], float(there.abs().max())
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_lora_on_the_last_projection_of_a_recurrent_layer_is_not_passed_over(monkeypatch):
    """Falcon-H1's fused kernel, where it is installed, takes the projection's own weight and no adapter."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.models.falcon_h1 import modeling_falcon_h1

    def fused(*_given, **_options):
        raise AssertionError("the fused kernel was asked")

    monkeypatch.setattr(modeling_falcon_h1, "mamba2_split_conv1d_scan_combined", fused)
    body = body_of("falcon_h1")
    isolate_documents(body)
    whole = torch.nn.ModuleDict({"language_model": body})  # as the trainer adapts it, inside of another model
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False), whole)
    body.train()
    body(inputs_embeds=torch.randn(1, 6, 32), use_cache=False).last_hidden_state.square().sum().backward()
    learnt = {name: p.grad for name, p in body.named_parameters() if "lora_" in name}
    assert learnt and all(gradient is not None and gradient.any() for gradient in learnt.values())
    assert body.layers[0].mamba.training


def test_a_model_without_recurrent_layers_is_given_nothing_more():
    register()
    body = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**FEWER), attn_implementation=NAME).get_decoder()
    isolate_documents(body)
    with packed_documents(LENGTHS, torch.device("cpu")) as documents:
        assert documents is not None and for_recurrent(body, documents) == {}
