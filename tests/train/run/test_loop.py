"""Whole stages through their front door: equal however they are split, packed, interrupted or decoded."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from promises import write_lm
from ranks import on_two_ranks
from safetensors.torch import load_file
from toys import add, picture, write_mixed

from train import config as configuration
from train.__main__ import main
from train.config import Stage
from train.data.prompts import Turn
from train.dist import Runtime
from train.errors import CheckpointError, DataError, TrainError, UsageError
from train.eval.generate import load_speaker
from train.folder import held, open_run
from train.publish.export import export
from train.run import sharding
from train.run.checkpoint import OPTIMIZER, WEIGHTS, latest, load_trained, save
from train.run.memory import out_of_memory
from train.run.optimizer import schedule
from train.run.stage import run_stage

REPO = Path(__file__).parents[3]


def run(world, out, *settings, stage="finetune", data="mixed", **more):
    options = configuration.load(str(world / "config.toml"), settings)
    return run_stage(stage, options, str(world / data), out, **more)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a, b, atol=0.0):
    first, second = load_trained(a), load_trained(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """A fine-tuning of six steps, undisturbed: packed, in one micro-batch, with dropout."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(world, out, "finetune.save_every=2")
    return out


@pytest.fixture(scope="module")
def steady(world, tmp_path_factory):
    """The same without dropout, which follows the micro-batches."""
    out = tmp_path_factory.mktemp("steady") / "run"
    run(world, out, "finetune.lora_dropout=0.0")
    return out


def test_a_stage_learns_and_leaves_its_files(world, tmp_path):
    manifest = run(world, tmp_path / "run", "align.steps=40", stage="align", data="captions")
    result = manifest["result"]
    assert result["last_loss"] < result["first_loss"] - 0.1 and result["steps"] == 40
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "manifest.json",
        "metrics.jsonl",
        "projector.safetensors",
        "skipped.jsonl",
        "tensorboard",
    ]
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "lr", "tokens_per_s", "supervised_per_s", "padding", "data_wait_s", "eta_s"} <= row.keys()
    assert str(tmp_path) not in (tmp_path / "run" / "manifest.json").read_text()


def test_the_loss_is_transformers_own(world, tmp_path):
    """The first loss, recomputed with the native class, padded batch and labels at every position."""
    run(world, tmp_path / "run", "align.steps=1", stage="align", data="captions")
    from train.data.batches import Collator, Plan
    from train.data.measuring import measure
    from train.data.sources import encode, open_source
    from train.model.compose import compose
    from train.model.forward import normalise
    from train.model.tower import make_image_processor
    from train.run.stage import make_encoder

    options = configuration.load(str(world / "config.toml"), ["align.steps=1"])
    composed = compose(options.model)
    encoder = make_encoder(composed, options.model, options.align)
    source = open_source(str(world / "captions"))
    plan = Plan(measure(source, encoder, 64), options.align)
    collator = Collator(source, encoder, make_image_processor(composed.vision), 64)
    total, count = 0.0, 0
    for index in plan.samples(0):
        record, encoded = encode(source, encoder, index, 64)
        pixels = normalise(torch.stack(collator.pixels(record.images)), composed.vision, torch.float32)
        labels = torch.from_numpy(encoded.labels).long()[None]
        ids = torch.from_numpy(encoded.ids).long()[None]
        n = int((labels >= 0).sum())
        total += n * float(composed.model(input_ids=ids, pixel_values=pixels, labels=labels).loss)
        count += n
    assert losses(tmp_path / "run")[0] == pytest.approx(total / count, abs=1e-5)


def test_packed_equals_unpacked(world, tmp_path, steady):
    run(world, tmp_path / "run", "finetune.lora_dropout=0.0", "finetune.packing=false")
    assert losses(tmp_path / "run") == pytest.approx(losses(steady), abs=1e-5)


def test_micro_batches_change_nothing(world, tmp_path, steady):
    run(world, tmp_path / "run", "finetune.lora_dropout=0.0", "finetune.micro_tokens=70")
    assert losses(tmp_path / "run") == pytest.approx(losses(steady), abs=1e-5)
    assert_same_weights(tmp_path / "run", steady, atol=1e-4)


def test_cached_features_and_workers_change_nothing(world, tmp_path, plain):
    run(world, tmp_path / "run", "finetune.cache_features_mb=10", "finetune.workers=2")
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=1e-5)


def test_two_processes_equal_one(world, tmp_path, steady, caplog):
    """Without torchrun, which test_signals.py starts."""

    def work(rank):
        with caplog.at_level("INFO", "train"):
            run(world, tmp_path / "run", "finetune.lora_dropout=0.0")
        assert "2 process(es)" in caplog.text

    on_two_ranks(work)
    assert losses(tmp_path / "run") == pytest.approx(losses(steady), abs=1e-5)
    assert_same_weights(tmp_path / "run", steady, atol=1e-4)


def run_by_two(*arguments):
    """Run on two ranks; each process holds half of every weight."""

    def work(rank):
        shard, cut = sharding.shard, []
        handed = rank > 0  # the others hold no weight before they are handed their part

        def checked(*given):
            assert all(p.is_meta == handed for p in given[0].model.parameters())
            learnt = shard(*given)
            assert not any(p.is_meta for p in given[0].model.parameters())
            cut.extend(p.to_local().numel() <= -(-p.shape[0] // 2) * p[0].numel() for p in learnt.values())
            return learnt

        sharding.shard = checked
        run(*arguments)
        assert cut and all(cut)

    on_two_ranks(work)


def test_a_sharded_model_goes_on_with_a_whole_one_and_back(world, tmp_path):
    """FSDP2: full tuning, tower and all, with processes that have no work in some rounds."""
    settings = ("finetune.tune=full", "finetune.tune_tower=true", "finetune.lr=1e-3", "finetune.save_every=2")
    run(world, tmp_path / "one", *settings, "finetune.keep_last=3")
    out = unfinish(tmp_path / "one", tmp_path / "two")
    for step in (4, 6):
        shutil.rmtree(out / "checkpoints" / f"step-{step:06d}")
    more = ("finetune.shard=true", "finetune.micro_tokens=40", "model.gradient_checkpointing=true")
    run_by_two(world, out, *settings, *more)
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert_same_weights(out, tmp_path / "one", atol=1e-4)
    back = unfinish(out, tmp_path / "back")
    shutil.rmtree(back / "checkpoints" / "step-000006")
    run(world, back, *settings)
    assert losses(back) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert_same_weights(back, tmp_path / "one", atol=1e-4)
    from train.publish.export import export

    export(out, tmp_path / "model", dtype="fp32")
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_passes_of_text_alone_teach_the_projector_nothing(world, tmp_path):
    run(world, tmp_path / "run", "align.steps=5", "align.micro_tokens=8", stage="align", data="mixed")
    assert len(losses(tmp_path / "run")) == 5


LONG = ("finetune.steps=50", "finetune.save_every=7")


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(world, out, *LONG)
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_is_bit_equal(world, tmp_path, number, undisturbed):
    settings, out = LONG, tmp_path / "run"
    # A fork of this process, which has paid for its imports; it is killed like any other.
    process = multiprocessing.get_context("fork").Process(target=main, args=(lambda: run(world, out, *settings),))
    process.start()
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120

    def well_under_way():  # checkpoints are written in the background: the one of step 7 may come later
        return metrics.exists() and metrics.read_text().count("\n") >= 10 and latest(out / "checkpoints") is not None

    while not well_under_way() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (-9 if number == signal.SIGKILL else 143)
    assert not (out / "manifest.json").exists() and (out / ".plan.json").exists()
    saved = int(latest(out / "checkpoints").name.removeprefix("step-"))
    assert 0 < saved < 50 and (number == signal.SIGKILL or saved == metrics.read_text().count("\n"))
    run(world, out, *settings)
    assert losses(out) == losses(undisturbed)
    assert_same_weights(out, undisturbed)
    for name in ("manifest.json", "projector.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_the_last_checkpoints_and_the_best_are_kept_and_whole(tmp_path, plain):
    assert [p.name for p in sorted((plain / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
    (tmp_path / ".step-000007.partial").mkdir()  # a kill cut short what a stop wrote
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), 1):
        save(tmp_path, step, {WEIGHTS: {"a": torch.zeros(1)}, OPTIMIZER: {}}, {"loss": loss}, keep_last=1)
    assert {p.name for p in tmp_path.iterdir()} == {"step-000002", "step-000004"}
    assert latest(tmp_path).name == "step-000004", "a run goes on from the last"
    weights = load_file(plain / "checkpoints" / "step-000006" / "weights.safetensors")
    trained = load_trained(plain)
    assert weights.keys() == trained.keys() and all(torch.equal(weights[k], trained[k]) for k in weights)


def unfinish(out, copy):
    shutil.copytree(out, copy)
    request = json.loads((copy / "manifest.json").read_text())["request"]
    (copy / ".plan.json").write_text(json.dumps({"request": request}))
    (copy / "manifest.json").unlink()
    return copy


def test_a_corrupt_checkpoint_is_named_and_refused(world, tmp_path, plain):
    out = unfinish(plain, tmp_path / "run")
    file = out / "checkpoints" / "step-000006" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="optimizer.safetensors is corrupt"):
        run(world, out, "finetune.save_every=2")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    run(world, out, "finetune.save_every=2")
    assert losses(out) == losses(plain)


def test_a_foreign_checkpoint_is_refused(world, tmp_path, plain):
    out = unfinish(plain, tmp_path / "run")
    state = out / "checkpoints" / "step-000006" / "state.json"
    state.write_text(state.read_text().replace("q_proj", "x_proj"))
    with pytest.raises(CheckpointError, match="other parameters"):
        run(world, out, "finetune.save_every=2")


def test_samples_beyond_the_language_models_positions_are_warned_of(world, tmp_path, caplog):
    shutil.copytree(world / "lm", tmp_path / "lm")
    known = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**known, "max_position_embeddings": 20}))
    with caplog.at_level("WARNING", "train"):
        run(world, tmp_path / "run", "finetune.steps=1", f"model.lm={tmp_path / 'lm'}")
    assert "longer than the language model's 20 positions" in caplog.text and "model.max_length=20" in caplog.text


def _answers_and_losses_are_each_ones_own(run_folder, folder):
    """Of questions of 10 to 22 tokens, of which the middle ones get beyond `far` while they are answered."""
    export(run_folder, folder, dtype="fp32")
    speaker = load_speaker(folder, torch.device("cpu"))
    turns = [[Turn("user", (" ".join(["red blue"] * half) + " ?",))] for half in (2, 3, 6, 7, 8, 9)]
    truths, none = ["green white"] * 6, [[]] * 6
    passes = []
    handle = speaker.model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["inputs_embeds"].shape[0]), with_kwargs=True
    )
    for more in (1, 8):
        alone = [speaker.answers([one], [[]], more)[0] for one in turns]
        assert speaker.answers(turns, none, more) == alone
    alone = [speaker.truth_losses([one], [[]], truths[:1])[0] for one in turns]
    passes.clear()
    assert [loss for loss, _ in speaker.truth_losses(turns, none, truths)] == pytest.approx([loss for loss, _ in alone])
    assert len(passes) == 2, "one for each side"
    handle.remove()


def test_a_sample_that_turns_rotary_angles_changes_none_beside_it(world, tmp_path):
    """Of 27 and 11 tokens: beyond `far` all angles are others, and those of a pass go by its longest sample."""
    from transformers import LlamaConfig, Phi3Config

    far = 20
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    reach = {"max_position_embeddings": 4 * far, "original_max_position_embeddings": far}
    angles = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0]}
    write_lm(Phi3Config(**sizes, **reach, rope_parameters=angles), tmp_path / "long")
    found = []
    for n, arranged in enumerate(("micro_tokens=1", "micro_tokens=16384", "packing=false")):
        settings = (f"model.lm={tmp_path / 'long'}", f"finetune.{arranged}", "finetune.lora_dropout=0.0")
        run(world, tmp_path / str(n), "finetune.steps=2", "finetune.batch_size=20", *settings)
        found.append(losses(tmp_path / str(n)))
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[2] == pytest.approx(found[0], rel=1e-6)
    _answers_and_losses_are_each_ones_own(tmp_path / "0", tmp_path / "model")

    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    write_lm(LlamaConfig(**sizes, max_position_embeddings=far, rope_parameters=dynamic), tmp_path / "dynamic")
    lm = f"model.lm={tmp_path / 'dynamic'}"
    with pytest.raises(UsageError, match=f"--set model.max_length={far} cuts such samples"):
        run(world, tmp_path / "run", "finetune.steps=1", lm)
    run(world, tmp_path / "run", "finetune.steps=1", lm, f"model.max_length={far}")


def test_finished_is_finished_and_other_options_are_refused(world, plain, caplog):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in plain.iterdir())
    assert run(world, plain, "finetune.save_every=1", "finetune.workers=1")["result"]["steps"] == 6
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in plain.iterdir())
    with pytest.raises(UsageError, match=r"stage.lr = 0.002, not 0.5; .*--overwrite"):
        run(world, plain, "finetune.lr=0.5")
    with pytest.raises(UsageError, match="inputs.data"):
        run(world, plain, data="captions")


def test_a_directory_is_one_process_alone(world, tmp_path):
    out = tmp_path / "run"
    script = "import sys, time; from pathlib import Path; from train.folder import held\n"
    script += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, out], stdout=subprocess.PIPE, cwd=REPO)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=rf"is being written by process {other.pid} on .*; wait for it"):
        run(world, out, "finetune.steps=1")
    other.kill()
    other.wait()
    other.stdout.close()
    assert run(world, out, "finetune.steps=1")["result"]["steps"] == 1  # what was killed holds nothing
    assert not (out / ".lock").exists()
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        run(world, out / "manifest.json" / "run")


def test_a_run_that_made_no_step_gives_way(tmp_path):
    with held(tmp_path / "run"):
        assert open_run(tmp_path / "run", {"lr": 1}) == "new"
        (tmp_path / "run" / "metrics.jsonl").touch()
        assert open_run(tmp_path / "run", {"lr": 2}) == "new"
        (tmp_path / "run" / "metrics.jsonl").write_text("{}")
        assert open_run(tmp_path / "run", {"lr": 2}) == "unfinished"
        with pytest.raises(UsageError, match="was made with lr = 2, not 1"):
            open_run(tmp_path / "run", {"lr": 1})


def test_what_other_data_made_is_neither_continued_nor_taken_for_finished(tmp_path):
    made = {"inputs": {"align": "../align", "data": "../d", "digest": "a"}}
    with held(tmp_path / "run"):
        open_run(tmp_path / "run", made)
        (tmp_path / "run" / "metrics.jsonl").write_text("{}")
        recorded = {"inputs": made["inputs"] | {"align_digest": "b"}}
        assert open_run(tmp_path / "run", recorded) == "unfinished"  # begun by a version that did not record it
        (tmp_path / "run" / ".plan.json").write_text(json.dumps({"request": recorded}))
        for key, what in (("digest", "its data"), ("align_digest", "the align run that it starts from")):
            changed = {"inputs": recorded["inputs"] | {key: "c"}}
            with pytest.raises(UsageError, match=f"another state of {what}; type --overwrite to train again"):
                open_run(tmp_path / "run", changed)


def test_overwrite_clears_only_a_run(world, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds other files"):
            run(world, tmp_path / "photos", overwrite=overwrite)
    assert (tmp_path / "photos" / "mine.jpg").exists()
    run(world, tmp_path / "run", "finetune.steps=2")
    assert run(world, tmp_path / "run", "finetune.steps=3", overwrite=True)["result"]["steps"] == 3


def test_broken_pixels_are_skipped_alike_and_listed(world, tmp_path):
    import tarfile

    data = write_mixed(tmp_path / "mixed", 20)
    with tarfile.open(data / "000001.tar", "w") as tar:
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red square"}]
        add(tar, "broken.jpg", picture("red", True, 0)[:200])
        add(tar, "broken.json", json.dumps({"conversations": turns}).encode())
    results = []
    for settings in (("finetune.workers=0",), ("finetune.workers=2",), ("finetune.cache_features_mb=10",)):
        out = tmp_path / f"run{len(results)}"
        manifest = run(world, out, "finetune.steps=6", *settings, data=data)
        assert manifest["result"]["skipped"] == {"bad_image": 1}
        assert json.loads((out / "skipped.jsonl").read_text()) == {
            "sample": "000001.tar/broken",
            "reason": "bad_image",
        }
        results.append(losses(out))
    assert results[0] == results[1] and results[2] == pytest.approx(results[0], abs=1e-5)


def test_nothing_to_learn_stops_before_the_first_step(world, tmp_path):
    path = tmp_path / "d.json"
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": ""}]
    path.write_text(json.dumps([{"id": i, "conversations": turns} for i in range(9)]))
    with pytest.raises(DataError, match="9 no_answer. Examples: d.json/0"):
        run(world, tmp_path / "run", data=path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(DataError, match="40 of 40 samples cannot be used"):  # whatever share is allowed
        run(world, tmp_path / "run", "model.max_length=1", "finetune.max_bad_share=1.0")


def test_a_share_of_an_epoch_is_a_sample_at_least(world, tmp_path):
    assert run(world, tmp_path, "finetune.steps=0", "finetune.epochs=0.001")["result"]["steps"] == 1


def test_a_loss_that_is_no_number_stops_with_its_samples(world, tmp_path):
    with pytest.raises(TrainError, match="step .* is nan.*its samples are listed in") as error:
        run(world, tmp_path / "run", "finetune.lr=1e30", "finetune.steps=9", "finetune.clip=0.0")
    path = str(error.value).split("listed in ")[1].split(";")[0]
    assert json.loads(Path(path).read_text())[0].startswith("000000.tar/")
    saved = load_file(Path(path).with_suffix(".safetensors"))
    assert {"0.ids_bl", "0.targets_s", "0.owners_s", "0.pixels_nchw"} <= saved.keys()


@pytest.mark.parametrize(
    ("tune", "error", "hint"),
    [
        ("lora", torch.OutOfMemoryError("CUDA out of memory"), "quantize"),
        ("full", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "shard = true"),
        ("projector", MemoryError(), "micro_images"),
        (
            "lora",
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "quantize",
        ),
        (
            "lora",
            torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
            "quantize",
        ),
        ("lora", RuntimeError("Triton Error [CUDA]: out of memory"), "quantize"),
    ],
)
def test_out_of_memory_names_what_to_change(tune, error, hint):
    with (
        pytest.raises(TrainError, match=f"lower micro_tokens .now 16,384.*gradient_checkpointing = true.*{hint}"),
        out_of_memory(Stage(tune=tune)),
    ):
        raise error
    with pytest.raises(RuntimeError, match="shape"), out_of_memory(Stage()):
        raise RuntimeError("shape mismatch")


def test_memory_that_cannot_be_had_ends_in_one_line(world, tmp_path, monkeypatch):
    """A real allocation fails: the tower's features of a batch would fill 2^62 bytes."""
    from train.run import loop

    monkeypatch.setattr(loop, "tower_features", lambda *_, **__: torch.empty(1 << 60))
    with pytest.raises(TrainError, match="out of memory; lower micro_tokens"):
        run(world, tmp_path / "run")


def test_a_smaller_micro_batch_may_go_on_with_a_run(world, tmp_path, steady):
    out = unfinish(steady, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    run(world, out, "finetune.lora_dropout=0.0", "finetune.micro_tokens=60", "model.gradient_checkpointing=true")
    assert losses(out) == pytest.approx(losses(steady), abs=1e-5)


def test_a_tracker_hears_of_every_step(world, tmp_path, monkeypatch):
    import types

    heard = []
    stub = types.ModuleType("trackio")
    stub.init = lambda **options: heard.append(options)
    stub.log = lambda row, step: heard.append((step, row["loss"]))
    stub.finish = lambda: heard.append("done")
    monkeypatch.setitem(sys.modules, "trackio", stub)
    run(world, tmp_path / "run", "finetune.tracker=trackio", "finetune.steps=2")
    assert heard[0]["config"]["batch_size"] == 8 and [step for step, _ in heard[1:3]] == [1, 2]
    assert [loss for _, loss in heard[1:3]] == pytest.approx(losses(tmp_path / "run")) and heard[3] == "done"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        run(world, tmp_path / "other", "finetune.tracker=wandb")


def test_sample_losses_are_a_sidecar_and_survive_a_restart(world, tmp_path, steady):
    import pyarrow as pa

    settings = ("finetune.lora_dropout=0.0", "finetune.losses=true", "finetune.save_every=2")
    run(world, tmp_path / "run", *settings)
    assert losses(tmp_path / "run") == losses(steady), "to note is not to disturb"
    path = tmp_path / "run" / "losses" / "000000.arrow"
    with pa.memory_map(str(path)) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    assert [row["key"] for row in rows] == [f"{i:06d}" for i in range(40)]
    for step in range(1, 6):  # five steps are an epoch
        own = [row for row in rows if row["step"] == step]
        mean = sum(row["loss"] * row["tokens"] for row in own) / max(1, sum(row["tokens"] for row in own))
        if len(own) == 8:
            assert mean == pytest.approx(losses(steady)[step - 1], abs=1e-5)
    assert sum(row["step"] == 6 for row in rows) == 8 and all(row["loss"] is not None for row in rows)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["shards"]["000000"]["rows"] == 40
    out = unfinish(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    shutil.rmtree(out / "losses")
    run(world, out, *settings)
    assert (out / "losses" / "000000.arrow").read_bytes() == path.read_bytes()


def test_finetune_starts_from_the_projector_of_align(world, tmp_path):
    run(world, tmp_path / "align", stage="align", data="captions")
    run(world, tmp_path / "tuned", "finetune.steps=1", "finetune.projector_lr=1e-12", align=tmp_path / "align")
    a, b = load_trained(tmp_path / "align"), load_trained(tmp_path / "tuned")
    name = "model.multi_modal_projector.linear_1.weight"
    torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9)
    with pytest.raises(UsageError, match="not an align run"):
        run(world, tmp_path / "other", align=tmp_path / "tuned")
    with pytest.raises(UsageError, match="another tower or language model"):
        run(world, tmp_path / "third", "model.shrink=tiny", align=tmp_path / "align")
    with pytest.raises(UsageError, match="was trained with model.feature_layer = -2, not -1"):
        run(world, tmp_path / "fourth", "model.feature_layer=-1", align=tmp_path / "align")


def test_the_schedule_rises_and_falls():
    factors = [schedule(step, 100, Stage(warmup=0.03)) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and factors[3] == 1.0
    assert all(a >= b for a, b in zip(factors[3:], factors[4:], strict=False)) and 0 < factors[-1] < 1e-3
    assert schedule(0, 1, Stage(warmup=0.0)) == 1.0
    stable = [schedule(step, 100, Stage(warmup=0.03, schedule="wsd")) for step in range(100)]
    assert stable[:3] == factors[:3] and set(stable[3:80]) == {1.0}
    assert stable[80:] == pytest.approx([1 - k / 20 for k in range(20)])
    assert schedule(0, 1, Stage(warmup=0.0, schedule="wsd", decay=0.0)) == 1.0


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_full_and_tower_tuning_run_and_resume(world, tmp_path, tune):
    settings = (f"finetune.tune={tune}", "finetune.tune_tower=true", "finetune.lr=1e-4", "finetune.save_every=3")
    run(world, tmp_path / "run", *settings)
    names = set(load_trained(tmp_path / "run"))
    assert any(name.startswith("model.vision_tower.") for name in names)
    out = unfinish(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    run(world, out, *settings)
    assert losses(out) == losses(tmp_path / "run")
    assert_same_weights(out, tmp_path / "run")


def test_the_faithful_switches_change_the_objective(world, tmp_path, steady):
    settings = ("finetune.lora_dropout=0.0", "finetune.packing=false", "finetune.micro_tokens=40")
    run(world, tmp_path / "run", *settings, "finetune.loss_norm=microbatch", "finetune.norm_samples=3")
    assert losses(tmp_path / "run")[0] != pytest.approx(losses(steady)[0], abs=1e-4)


def test_qlora_learns_on_four_bits_and_exports_into_all_of_them(world, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra `qlora`")
    from train.model.compose import compose
    from train.model.forward import hidden_states
    from train.model.learn import prepare
    from train.publish.export import export

    settings = ("finetune.quantize=nf4", "finetune.save_every=3")
    run(world, tmp_path / "run", *settings)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.02
    out = unfinish(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    run(world, out, *settings)
    assert losses(out) == losses(tmp_path / "run")
    assert_same_weights(out, tmp_path / "run")
    export(out, tmp_path / "model", dtype="fp32")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert sum("up_proj" in name for name in exported) == 2 and all(t.is_floating_point() for t in exported.values())

    options = configuration.load(str(world / "config.toml"), (*settings, "finetune.lora_dropout=0.0"))
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    four, whole = compose(options.model), compose(options.model)
    prepare(four, options.finetune)
    four.model.to("cpu")
    layers = {n: m for n, m in four.model.model.language_model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14 and all(layer.weight.dtype == torch.uint8 for layer in layers.values())
    for name, layer in layers.items():
        weight = whole.model.model.language_model.get_submodule(name.removesuffix(".base_layer")).weight
        weight.data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(
        hidden_states(four, ids, positions, None), hidden_states(whole, ids, positions, None), rtol=0, atol=1e-4
    )


def test_quantize_says_what_it_needs(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install 'data-curate\[qlora\]'"):
        run(world, tmp_path / "run", "finetune.quantize=nf4")
    with pytest.raises(UsageError, match="needs align.tune"):
        configuration.load(None, ["align.quantize=nf4"])


def test_a_fused_optimizer_differs_by_rounding_and_resumes(world, tmp_path):
    """GPUs take it; a processor has such a kernel, too, by which its steps and its restored state are tested."""
    from train.run.checkpoint import collect, restore
    from train.run.optimizer import make_optimizer

    start = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    stage, made = Stage(weight_decay=0.1, lr=1e-2), {}
    for fused in (False, True):
        trainable = {"model.language_model.x": torch.nn.Parameter(start.clone())}
        optimizer = make_optimizer(stage, trainable, fused=fused)
        for step in range(4):
            if step == 2:
                files = collect(trainable, optimizer, keep=True)
                path = save(tmp_path / str(fused), step, files, {"loss": 1.0}, 1)
                trainable = {"model.language_model.x": torch.nn.Parameter(torch.zeros(5, 7))}
                optimizer = make_optimizer(stage, trainable, fused=fused)
                restore(path, trainable, optimizer)
            [parameter] = trainable.values()
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
        made[fused] = parameter.detach()
    torch.testing.assert_close(made[True], made[False], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU chooses otherwise")
@pytest.mark.parametrize(("has", "told"), [((), "no GPU with bf16"), (("amx_tile", "avx512_bf16"), "no GPU; with amx")])
def test_a_processor_that_has_bf16_says_what_it_would_gain(has, told, monkeypatch):
    for kind in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{kind}_supported", lambda kind=kind: kind in has, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = Runtime.detect("auto", 0)
    assert found.dtype == torch.float32 and f"fp32 ({told}" in found.reason
    assert "(bf16 was asked for)" in Runtime.detect("bf16", 0).reason
