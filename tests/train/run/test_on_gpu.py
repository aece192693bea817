"""The trainer's CUDA paths, once each: on a GPU, or rehearsed at the same size on a processor (REHEARSE_GPU=1)."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_loop import REPO, assert_same_weights, losses, run

from house import GPU
from pipelines.processor import gpu_has_bf16

pytestmark = pytest.mark.gpu
STEADY = ("finetune.lora_dropout=0.0", "finetune.save_every=3")


def unfinished(run_folder, out):
    """A copy of a run as it stood before its last three steps."""
    shutil.copytree(run_folder, out)
    (out / "manifest.json").rename(out / ".plan.json")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    return out


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """Six steps in the precision that the device takes, from a projector that was aligned there."""
    folder = tmp_path_factory.mktemp("gpu")
    run(world, folder / "align", stage="align", data="captions")
    run(world, folder / "run", *STEADY, align=folder / "align")
    return folder / "run"


def test_it_learns_in_the_devices_precision_and_says_which(plain):
    told = json.loads((plain / "manifest.json").read_text())
    assert losses(plain)[-1] < losses(plain)[0]
    assert told["result"]["device"].startswith("cpu, fp32" if GPU == "cpu" else "cuda:0 ")
    assert GPU == "cpu" or not gpu_has_bf16() or "bf16" in told["result"]["device"]


def test_packed_rows_learn_what_samples_alone_learn(world, tmp_path):
    for name, packing in (("packed", "true"), ("alone", "false")):
        run(world, tmp_path / name, *STEADY, "finetune.precision=fp32", f"finetune.packing={packing}")
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert_same_weights(tmp_path / "packed", tmp_path / "alone", atol=5e-4)


def test_a_resumed_run_is_the_same_to_the_bit(world, plain, tmp_path):
    again, third = tmp_path / "again", tmp_path / "third"
    run(world, again, *STEADY, align=plain.parent / "align")
    assert losses(again) == losses(plain)
    run(world, unfinished(again, third), *STEADY, align=plain.parent / "align")
    assert losses(third) == losses(plain)
    assert_same_weights(third, plain)


def test_workers_pinned_loading_and_cached_features_change_nothing(world, plain, tmp_path):
    more = ("finetune.workers=1", "finetune.cache_features_mb=64")
    run(world, tmp_path / "run", *STEADY, *more, align=plain.parent / "align")
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=1e-2)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_recomputed_full_and_tower_tuning_run(world, tmp_path, tune):
    settings = ("finetune.steps=2", f"finetune.tune={tune}", "model.gradient_checkpointing=true")
    run(world, tmp_path / "run", *settings, "finetune.tune_tower=true")
    assert len(losses(tmp_path / "run")) == 2


def under_torchrun(world, plain, out, number, *more):
    """Repeat the plain run under torchrun, on so many ranks; its losses are the same."""
    words = [
        "finetune",
        "--config",
        world / "config.toml",
        "--data",
        world / "mixed",
        "--align",
        plain.parent / "align",
    ]
    sets = [word for setting in (*STEADY, *more) for word in ("--set", setting)]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m", "train"]
    command = [sys.executable, *command, *map(str, words), "--out", str(out), *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert losses(out) == pytest.approx(losses(plain), abs=2e-2)


def test_one_rank_under_torchrun_is_the_run_without(world, plain, tmp_path):
    under_torchrun(world, plain, tmp_path / "one", 1)


def test_two_ranks_cut_the_model(world, plain, tmp_path):
    if GPU != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("cutting a model among ranks needs two GPUs")
    under_torchrun(world, plain, tmp_path / "cut", 2, "finetune.shard=true")


def test_it_exports_answers_and_scores(world, plain, tmp_path):
    from train.eval.evaluate import evaluate
    from train.eval.generate import load_speaker
    from train.publish.export import export

    export(plain, tmp_path / "model", dtype="bf16")
    assert load_file(tmp_path / "model" / "model.safetensors")
    speaker = load_speaker(tmp_path / "model")
    assert speaker.model.device.type == GPU
    told = evaluate(tmp_path / "model", str(world / "llava" / "data.json"), tmp_path / "answers.jsonl")
    assert told and (tmp_path / "answers.jsonl").stat().st_size


def test_four_bits_learn(world, tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra `qlora`")
    run(world, tmp_path / "run", *STEADY, "finetune.quantize=nf4")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_attention_of_several_documents_is_each_ones_alone_forward_and_backward():
    from train.model.attention import Documents, attend

    module, dtype = torch.nn.Module(), torch.bfloat16 if GPU == "cuda" else torch.float32
    module.num_key_value_groups = 2
    shapes = [(1, 4, 300, 64), (1, 2, 300, 64), (1, 2, 300, 64)]
    lengths, weight = [150, 10, 140], torch.randn(1, 300, 4, 64, device=GPU)
    whole = [torch.randn(shape, device=GPU, dtype=dtype, requires_grad=True) for shape in shapes]
    out = attend(module, *whole, Documents.of(lengths, whole[0].device), scaling=0.125)[0]
    (out.float() * weight).sum().backward()
    alone = [each.detach().float().requires_grad_() for each in whole]
    at, parts = 0, []
    for length in lengths:
        q, k, v = (each[:, :, at : at + length] for each in alone)
        k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125))
        at += length
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    (expected * weight).sum().backward()
    near = {"rtol": 3e-2, "atol": 3e-2} if GPU == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.float(), expected, **near)
    for ours, theirs in zip(whole, alone, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, **near)
