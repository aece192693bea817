"""What training leaves out, against the same model that leaves out nothing: equal losses and gradients, less work."""

import pytest
import torch
import transformers as tf
from test_attention import CONFIGS, FEWER, LENGTHS, NO_SDPA, SMALL
from torch.utils.flop_counter import FlopCounterMode

from train.model.attention import NAME, packed_documents, register
from train.model.skip_unlabelled import last_parts, skip_unlabelled

LEARNT = torch.tensor([1, 4, 5, 9, 18, 19, 20])  # of four documents; the second and the last teach nothing


def loss_and_gradients(family, lora, checkpointing, skipping, learnt=LEARNT):
    register()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=NAME)
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), model)
    body = model.get_decoder()
    body.train()
    if skipping:
        skip_unlabelled(body)
    if checkpointing:
        body.activation_checkpointing_enable({"use_reentrant": False})
    total = sum(LENGTHS)
    embeds = torch.randn(1, total, SMALL["hidden_size"]).requires_grad_()  # as image features: they learn in `align`
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with FlopCounterMode(display=False) as counter:
        with packed_documents(LENGTHS, embeds.device, learnt):
            hidden = body(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        targets = torch.arange(total) % SMALL["vocab_size"]
        losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[0, learnt]), targets[learnt], reduction="none")
        losses.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return losses.detach(), {**gradients, "embeds": embeds.grad}, counter.get_total_flops()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_model(family, lora, checkpointing):
    whole, there, work = loss_and_gradients(family, lora, checkpointing, False)
    skipped, here, less = loss_and_gradients(family, lora, checkpointing, True)
    torch.testing.assert_close(skipped, whole, rtol=0, atol=1e-6)
    assert here.keys() == there.keys() and less < work
    for name, gradient in there.items():
        torch.testing.assert_close(here[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in NO_SDPA])
def test_the_last_layer_works_for_labelled_positions_only(family):
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family])
    parts = last_parts(model.get_decoder())
    weights = sum(p.numel() for part in parts for name, p in part.named_parameters() if name.endswith("weight"))
    everything = sum(
        p.numel() for n, p in model.get_decoder().layers[-1].named_parameters() if "proj" in n or ".fc" in n
    )
    assert len(parts) == (2 if family == "phi3" else 3) and weights > everything / 2
    _, _, none = loss_and_gradients(family, False, False, True, torch.tensor([20]))
    _, _, all_ = loss_and_gradients(family, False, False, True, torch.arange(sum(LENGTHS)))
    head = SMALL["hidden_size"] * SMALL["vocab_size"]
    assert all_ - none == pytest.approx(6 * (weights + head) * (sum(LENGTHS) - 1), rel=1e-6)


def test_a_row_without_labels_and_a_model_that_serves_are_whole():
    losses, gradients, _ = loss_and_gradients("phi", False, True, True, torch.tensor([], dtype=torch.int64))
    assert len(losses) == 0 and all(not gradient.any() for gradient in gradients.values())
    torch.manual_seed(0)
    body = tf.AutoModelForCausalLM.from_config(CONFIGS["phi"], attn_implementation=NAME).get_decoder().eval()
    ids = torch.arange(3, 12).reshape(1, 9)
    before = body(input_ids=ids).last_hidden_state
    skip_unlabelled(body)
    torch.testing.assert_close(body(input_ids=ids).last_hidden_state, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), 0),
        (tf.Qwen2MoeConfig(**FEWER, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16), 2),
    ],
)
def test_what_is_not_known_is_left_alone(config, parts):
    body = tf.AutoModelForCausalLM.from_config(config).get_decoder().eval()
    ids = torch.arange(3, 12).reshape(1, 9)
    before = body(input_ids=ids).last_hidden_state
    skip_unlabelled(body)
    assert len(last_parts(body)) == parts
    torch.testing.assert_close(body(input_ids=ids).last_hidden_state, before, rtol=0, atol=1e-6)
