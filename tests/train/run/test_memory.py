"""The size of a pass: the formula against full-size simulations, and what a step does that runs out of memory."""

import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import on_two_ranks
from test_loop import losses, run, unfinish

from curate.run import pipeline
from train import config as configuration
from train.config import Stage
from train.console import describe_memory
from train.model.compose import blueprint
from train.model.forward import LOGIT_CHUNK
from train.model.learn import prepare
from train.run import loop, memory
from train.run.memory import STEP, Memory, size_pass


def estimate(name, stage, **options):
    model, _ = blueprint(configuration.load(str(pipeline.find(name))).model)
    prepare(SimpleNamespace(model=model), stage)
    return Memory.of(model, stage, 2, **{"checkpointing": False, **options})


@pytest.mark.parametrize(
    ("name", "tune", "tokens", "gigabytes"),
    [
        # Peak of live tensors under FakeTensor with CUDA's autocast.
        ("bunny", "lora", 15_200, 76),
        ("bunny", "lora", 7_600, 46),
        ("bunny_llama_3_8b", "lora", 16_384, 167),
        ("llava_gemma", "full", 16_384, 107),
    ],
)
def test_the_formula_agrees_with_full_size_simulations(name, tune, tokens, gigabytes):
    memory = estimate(name, Stage(tune=tune))
    assert memory.bytes(tokens) / 1e9 == pytest.approx(gigabytes, rel=0.12)
    fit = memory.tokens(80e9)
    assert fit % STEP == 0 and memory.bytes(fit) < 0.9 * 80e9 and memory.bytes(fit + 2 * STEP) > 0.9 * 80e9 - 3e9
    assert memory.tokens(1e9) == STEP


def test_check_says_what_a_pass_takes(monkeypatch):
    """In the README's words, of a card of 80 GB where there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = describe_memory(configuration.load(str(pipeline.find("bunny"))))["finetune_memory"]
    assert told == "13,056 tokens: 70 GB of 80"


def test_recomputing_keeps_little_of_a_layer():
    stage = Stage(tune="lora")
    assert estimate("bunny", stage, checkpointing=True).per_token < 0.1 * estimate("bunny", stage).per_token
    assert estimate("bunny", Stage(tune="projector")).per_token < estimate("bunny", stage).per_token


def test_only_a_gpu_lowers_the_default(monkeypatch):
    model, _ = blueprint(configuration.load(str(pipeline.find("bunny"))).model)
    stage = Stage(tune="lora")
    prepare(SimpleNamespace(model=model), stage)
    given = (torch.bfloat16,)
    assert size_pass(model, stage, torch.device("cpu"), *given, checkpointing=False) == 16_384
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80e9, 80e9))
    size = size_pass(model, stage, torch.device("cuda"), *given, checkpointing=False)
    assert 8_192 <= size < 15_200
    told = Stage(tune="lora", micro_tokens=20_000)
    assert size_pass(model, told, torch.device("cuda"), *given, checkpointing=False) == 20_000


@pytest.mark.parametrize("workers", [0, 1])
def test_out_of_memory_halves_the_passes_once_and_goes_on(world, tmp_path, monkeypatch, caplog, workers):
    settings = ("finetune.lora_dropout=0.0", f"finetune.workers={workers}", "finetune.micro_tokens=200")
    run(world, tmp_path / "whole", *settings)
    token_losses, sizes, held = loop.Training.token_losses, [], []

    def limited(self, batch):
        sizes.append(batch.num_tokens)
        assert not any(tensor() is not None for tensor in held), "what the failed pass held is free again"
        if len(sizes) > 2 and batch.num_tokens > 120:
            activations = torch.empty(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_losses(self, batch)

    monkeypatch.setattr(loop.Training, "token_losses", limited)
    with caplog.at_level("WARNING", "train"):
        run(world, tmp_path / "run", *settings)
    assert "continuing with micro_tokens = 100 instead of 200" in caplog.text
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    sizes.clear()
    monkeypatch.setattr(
        loop.Training, "token_losses", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(loop.OutOfMemory, match="lower micro_tokens .now 100"):
        run(world, tmp_path / "other", *settings)


def test_of_several_ranks_one_that_runs_out_of_memory_halves_the_passes_of_all(world, tmp_path, monkeypatch):
    settings = ("finetune.lora_dropout=0.0", "finetune.micro_tokens=120")
    run(world, tmp_path / "whole", *settings)
    token_losses, passes = loop.Training.token_losses, []

    def limited(rank):
        def lose(self, batch):
            passes.append(batch.num_tokens)
            if rank == 1 and len(passes) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return token_losses(self, batch)

        monkeypatch.setattr(loop.Training, "token_losses", lose)
        run(world, tmp_path / "run", *settings)
        (tmp_path / f"passes-{rank}").write_text(" ".join(map(str, passes)))

    on_two_ranks(limited)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    for rank in range(2):
        sizes = [int(size) for size in (tmp_path / f"passes-{rank}").read_text().split()]
        assert max(sizes) > 60 >= max(sizes[4:]), "behind the step that failed every pass is small"


def test_a_quantised_and_a_sharded_model_hold_what_the_formula_says():
    """By hand, of a model whose parts are counted apart."""
    model, _ = blueprint(configuration.load(str(pipeline.find("bunny"))).model)
    prepare(SimpleNamespace(model=model), stage := Stage(tune="lora"))
    whole = Memory.of(model, stage, 2, checkpointing=False)
    lm = model.model.language_model
    frozen = [n for n, m in lm.layers.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n]
    packed = [lm.layers.get_submodule(name).weight.numel() for name in frozen]
    assert len(packed) == 6 * len(lm.layers)
    small = Memory.of(model, replace(stage, quantize="nf4"), 2, checkpointing=False)
    assert small.per_token == whole.per_token
    assert whole.fixed - small.fixed == pytest.approx((2 - 0.52) * sum(packed) - 2 * max(packed))
    assert 1.2e9 < sum(p.numel() for p in lm.layers.parameters()) * 0.52 < small.fixed < 0.7 * whole.fixed

    full = Stage(tune="full", shard=True)
    model, _ = blueprint(configuration.load(str(pipeline.find("bunny"))).model)
    prepare(SimpleNamespace(model=model), full)
    lm, tower = model.model.language_model, model.model.vision_tower
    one, eight = (Memory.of(model, full, 2, checkpointing=False, world=world) for world in (1, 8))
    seen, layer = (sum(p.numel() for p in part.parameters()) for part in (tower, lm.layers[0]))
    everything = sum(p.numel() for p in model.parameters())
    root = everything - seen - len(lm.layers) * layer
    logits = 3 * 4 * LOGIT_CHUNK
    assert one.fixed == pytest.approx(20 * (everything - seen) + 2 * seen + logits)
    assert eight.fixed == pytest.approx(20 * (everything - seen) / 8 + 2 * seen + 6 * root + 8 * layer + logits)


def test_what_an_earlier_run_let_go_of_counts_as_free(monkeypatch):
    model, _ = blueprint(configuration.load(str(pipeline.find("bunny"))).model)
    prepare(SimpleNamespace(model=model), stage := Stage(tune="lora"))
    free = [10e9]  # 68 GB lie in torch's cache
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(79e9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[-1], 80e9))
    assert size_pass(model, stage, torch.device("cuda"), torch.bfloat16, checkpointing=False) > 12_000


def test_a_tower_that_learns_takes_memory_for_each_image():
    """SigLIP-SO400M keeps 33 MB a layer and image (saved tensors, counted); S2 sees 14 tiles."""
    for name, tiles in (("bunny_v1_0_4b_second", 1), ("bunny_v1_1_4b_second", 14)):
        config = configuration.load(str(pipeline.find(name)))
        model, vision = blueprint(config.model)
        prepare(SimpleNamespace(model=model), config.finetune)
        one, frozen = (
            Memory.of(model, replace(config.finetune, tune_tower=learns), 2, checkpointing=False).per_token
            for learns in (True, False)
        )
        assert (one - frozen) * vision.tokens_per_image == pytest.approx(tiles * 26 * 33e6, rel=0.12)


def test_out_of_memory_in_the_optimiser_is_not_tried_again(world, tmp_path, monkeypatch):
    """Some weights may have moved, and the other rank has gone on."""
    step = torch.optim.AdamW.step

    def work(rank):
        seen = []

        def limited(self, *args, **options):
            seen.append(1)
            if rank == 1 and len(seen) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(self, *args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", limited)
        run(world, tmp_path / "run")

    on_two_ranks(work, codes=(1, 1))


def test_a_run_goes_on_in_passes_of_the_size_that_it_began_with(world, tmp_path, monkeypatch):
    """With dropout a step depends on how it is split; the memory that is free is not the same every day."""
    monkeypatch.setattr("train.run.stage.size_pass", lambda *_, **__: 120)
    settings = ("finetune.lora_dropout=0.3", "finetune.save_every=2")
    run(world, tmp_path / "whole", *settings)
    unfinish(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    monkeypatch.setattr("train.run.stage.size_pass", lambda *_, **__: 64)
    run(world, tmp_path / "run", *settings)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    run(world, tmp_path / "other", *settings)
    assert losses(tmp_path / "other") != losses(tmp_path / "whole")


@pytest.mark.parametrize("tune", ["full", "projector"])
def test_what_the_experts_of_a_mixture_keep_is_counted(tune):
    """Against what torch keeps of a layer, in grouped products as on a GPU: .87 where all learns, 1.26 frozen."""
    import transformers as tf

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32}
    sizes |= {"experts_implementation": "grouped_mm", "attn_implementation": "sdpa"}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192}

    def keep_of(num_layers, num_tokens=512):
        config = tf.Qwen3MoeConfig(**sizes, **experts, num_hidden_layers=num_layers)
        model, kept = tf.Qwen3MoeModel(config).bfloat16().requires_grad_(tune == "full"), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        embeds = torch.randn(1, num_tokens, 256, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = model(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum()
        assert alive.requires_grad
        return model, sum(size for place, size in kept.items() if place not in weights) / num_tokens

    (model, two), (_, one) = keep_of(2), keep_of(1)
    assert memory._layer(model.layers[0], model.config, Stage(tune=tune), 2) == pytest.approx(two - one, rel=0.3)
