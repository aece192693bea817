"""What several ranks share: the verbs of one process, answers, and the checkpoint that they go on from."""

import json
import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from test_loop import assert_same_weights, losses, run, unfinish
from toys import write_captions

from train.__main__ import app
from train.dist import Runtime
from train.errors import TrainError, UsageError
from train.run import checkpoint
from train.run.loop import Training


def call(*words):
    app([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    """An exported model, which two ranks have written."""
    folder = tmp_path_factory.mktemp("model")
    run(world, folder / "run", "finetune.steps=2")
    on_two_ranks(lambda _: call("export", folder / "run", "--out", folder / "model"))
    assert (folder / "model" / "model.safetensors").is_file()
    return folder / "model"


def pretend_gpus(monkeypatch, number):
    told_of = {"is_available": True, "set_device": None, "is_bf16_supported": True, "get_device_name": "GPU"}
    for name, told in told_of.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, told=told, **given: told)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_a_rank_without_a_gpu_is_told_how_many_there_are(monkeypatch):
    pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    for begin in (lambda: Runtime.detect("auto", 0), Runtime.for_inference):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert begin().device == torch.device("cuda", 1)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(UsageError, match="rank 2 of this machine has no GPU: only 2 .* --nproc-per-node 2$"):
            begin()


def test_a_gpus_memory_grows_in_segments_unless_the_environment_says_how(monkeypatch):
    pretend_gpus(monkeypatch, 1)
    for given, name in ((None, "PYTORCH_CUDA_ALLOC_CONF"), ("backend:native", "PYTORCH_ALLOC_CONF")):
        kept = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
        monkeypatch.setattr(os, "environ", kept | ({name: given} if given else {}))
        Runtime.detect("fp32", 0)
        expected = {name: given or "expandable_segments:True"}
        assert {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key} == expected


def test_two_ranks_answer_as_one(world, model, tmp_path):
    data = world / "llava" / "data.json"
    words = ("eval", model, "--data", data, "--set", "eval.batch_size=3", "--set", "eval.max_new_tokens=4")
    call(*words, "--out", tmp_path / "one.jsonl")
    on_two_ranks(lambda _: call(*words, "--out", tmp_path / "two.jsonl"))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert (tmp_path / "two.manifest.json").read_bytes() == (tmp_path / "one.manifest.json").read_bytes()
    on_two_ranks(lambda _: call(*words, "--out", tmp_path / "two.jsonl"))


def test_two_ranks_answer_a_benchmark_as_one_and_resume(world, model, tmp_path):
    root = tmp_path / "eval"
    (root / "images").mkdir(parents=True)
    rows = json.loads((world / "llava" / "data.json").read_text())
    shutil.copytree(world / "llava" / "images", root / "images", dirs_exist_ok=True)
    (root / "daquar_test.json").write_text(json.dumps([row for row in rows if "image" in row]))
    words = ("eval", model, "--tasks", "daquar", "--eval-root", root, "--set", "eval.batch_size=3")
    words += ("--set", "eval.max_new_tokens=4")
    call(*words, "--out", tmp_path / "one")
    on_two_ranks(lambda _: call(*words, "--out", tmp_path / "two"))
    answers = [tmp_path / out / "daquar" / "answers.jsonl" for out in ("one", "two")]
    assert answers[0].read_bytes() == answers[1].read_bytes() and answers[0].stat().st_size
    lines = answers[1].read_bytes().splitlines(keepends=True)
    answers[1].write_bytes(b"".join(lines[:4]))  # as killed within the second batch
    for name in ("manifest.json", ".plan.json"):
        (answers[1].parent / name).unlink(missing_ok=True)
    request = json.loads((answers[0].parent / "manifest.json").read_text())["request"]
    (answers[1].parent / ".plan.json").write_text(json.dumps({"request": request}))
    on_two_ranks(lambda _: call(*words, "--out", tmp_path / "two"))
    assert sorted(answers[1].read_bytes().splitlines()) == sorted(answers[0].read_bytes().splitlines())


def test_ranks_go_on_from_the_checkpoint_of_the_first(world, tmp_path, monkeypatch):
    """A rank whose file system shows an older state takes the first one's; one that cannot see it makes all refuse."""
    run(world, tmp_path / "whole", "finetune.lora_dropout=0.0", "finetune.save_every=2")
    out = unfinish(tmp_path / "whole", tmp_path / "late")
    latest = checkpoint.latest

    def late(rank):
        monkeypatch.setattr(checkpoint, "latest", lambda folder: latest(folder) if rank == 0 else None)
        run(world, out, "finetune.lora_dropout=0.0", "finetune.save_every=2")

    on_two_ranks(late)
    assert losses(out) == losses(tmp_path / "whole")
    blind = unfinish(tmp_path / "whole", tmp_path / "blind")
    is_dir = type(blind).is_dir

    def cannot_see(rank):
        if rank == 1:
            monkeypatch.setattr(type(blind), "is_dir", lambda path: not path.name.startswith("step-") and is_dir(path))
        run(world, blind, "finetune.lora_dropout=0.0", "finetune.save_every=2")

    on_two_ranks(cannot_see, codes=(1, 1))


def test_two_ranks_compute_each_cached_feature_once(world, tmp_path, monkeypatch):
    from train.run import cache

    monkeypatch.setattr(cache, "FEATURE_CHUNK", 4)
    settings = ("finetune.lora_dropout=0.0", "finetune.cache_features_mb=10")
    run(world, tmp_path / "one", *settings)
    compute = cache.FeatureCache._compute

    def noted(self, pixels):
        with (tmp_path / f"computed-{self.runtime.rank}").open("a") as file:
            file.writelines(f"{index}\n" for index in pixels)
        compute(self, pixels)

    monkeypatch.setattr(cache.FeatureCache, "_compute", noted)
    on_two_ranks(lambda _: run(world, tmp_path / "two", *settings))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    seen = [(tmp_path / f"computed-{rank}").read_text().split() for rank in range(2)]
    assert all(len(own) > 8 for own in seen) and not set(seen[0]) & set(seen[1])
    assert len(seen[0] + seen[1]) == 32, "of 40 samples each fifth has no image"


def test_each_rank_looks_at_its_share_of_the_shards_and_knows_all(world, tmp_path, monkeypatch):
    from train.data import tar_source

    data = write_captions(tmp_path / "pool", 24, shards=3)
    with (data / "000001.tar").open("rb+") as file:
        file.truncate(9000)  # torn
    alone = tar_source.TarSource(sorted(data.glob("*.tar")))
    look = tar_source.index_tar

    def work(rank):
        seen = []
        monkeypatch.setattr(tar_source, "index_tar", lambda path: seen.append(path.name) or look(path))
        source = tar_source.TarSource(sorted(data.glob("*.tar")), (), Runtime.detect("fp32", 0))
        assert seen == (["000000.tar", "000002.tar"], ["000001.tar"])[rank]
        assert list(source.keys) == list(alone.keys) and source.notes == alone.notes and len(alone.notes) == 1
        assert (source.rows == alone.rows).all() and list(source.extents()) == list(alone.extents())
        assert source.record(9) == alone.record(9)

    on_two_ranks(work)


def test_what_must_be_unpacked_is_unpacked_once_a_machine(tmp_path, monkeypatch):
    import gzip
    import tempfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    from train.data import scratch
    from train.data.sources import open_source

    data = write_captions(tmp_path / "pool", 12, shards=3)
    alone = open_source(str(data))
    expected = [alone.record(index).key for index in range(12)], alone.image_bytes(alone.record(0).images[0])
    for number in (0, 1):
        plain = data / f"{number:06d}.tar"
        (data / f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    records = [{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}] * 9
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "records.parquet")
    (tmp_path / "torn").mkdir()
    for number in (0, 1):
        (tmp_path / "torn" / f"{number}.tgz").write_bytes(gzip.compress(b"x" * 9999)[: -9 * number or None])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch.folder.cache_clear()
    fresh = scratch.fresh

    def work(rank):
        made = []
        monkeypatch.setattr(scratch, "fresh", lambda suffix: made.append(suffix) or fresh(suffix))
        runtime = Runtime.detect("fp32", 0)
        source = open_source(str(data), runtime=runtime)
        found = [source.record(index).key for index in range(12)], source.image_bytes(source.record(0).images[0])
        assert found == expected
        assert len(open_source(str(tmp_path / "records.parquet"), runtime=runtime).record(8).conversations) == 2
        assert made == ([".tar", ".arrow"], [".tar"])[rank]
        runtime.barrier()
        open_source(str(tmp_path / "torn"), runtime=runtime)

    on_two_ranks(work, codes=(2, 2))


def test_chunks_of_images_do_not_depend_on_the_ranks():
    from train.run.cache import FEATURE_CHUNK, chunks

    spans = [(3 * i, 3 * i + 3) for i in range(50)]
    cut = chunks(list(range(50)), spans)
    assert [i for chunk in cut for i in chunk] == list(range(50))
    assert all(FEATURE_CHUNK <= 3 * len(chunk) < FEATURE_CHUNK + 3 for chunk in cut[:-1])
    assert chunks([], []) == []


def test_ranks_measure_each_sample_once_and_the_next_run_none(world, tmp_path, monkeypatch):
    from train.data import measuring

    monkeypatch.setattr(measuring, "SPAN", 7)
    measure = measuring.Spans.__getitem__

    def noted(self, number):
        with (tmp_path / "spans").open("a") as file:
            file.write(f"{number}\n")
        return measure(self, number)

    monkeypatch.setattr(measuring.Spans, "__getitem__", noted)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    run(world, tmp_path / "alone" / "run", "finetune.steps=1")
    (tmp_path / "spans").unlink()
    on_two_ranks(lambda _: run(world, tmp_path / "one", "finetune.steps=1"))
    assert sorted((tmp_path / "spans").read_text().split()) == [str(number) for number in range(6)]
    (kept,) = (tmp_path / ".measured").iterdir()
    assert kept.read_bytes() == (tmp_path / "alone" / ".measured" / kept.name).read_bytes()
    on_two_ranks(lambda _: run(world, tmp_path / "two", "finetune.steps=2"))
    assert len((tmp_path / "spans").read_text().split()) == 6, "the second run reads what the first one measured"


def test_a_model_that_came_from_another_process_gives_its_hidden_states(world, monkeypatch):
    """What a rank that was started, not forked, has: classes of which it has built no model."""
    import pickle

    import torch
    from transformers.utils import output_capturing

    from train import config as configuration
    from train.model.compose import compose
    from train.model.layer import features
    from train.run import sharding

    options = configuration.load(str(world / "config.toml"), ())

    class Rank:
        def __init__(self, sent=None):
            self.sent = sent

        def first(self, function):
            self.sent = self.sent or pickle.dumps(function())
            return pickle.loads(self.sent)

    first = Rank()
    sharding.compose_once(first, lambda: compose(options.model))
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", type(output_capturing._CAN_RECORD_REGISTRY)())
    composed = sharding.compose_once(Rank(first.sent), lambda: None)
    tower, size = composed.model.model.vision_tower, composed.vision.image_size
    assert next(tower.parameters()).is_meta
    assert features(tower, torch.empty(1, 3, size, size, device="meta"), 1, "full").shape[0] == 1


@pytest.mark.parametrize("kind", [TrainError, RuntimeError])
def test_a_rank_that_fails_alone_says_so_and_ends(world, tmp_path, monkeypatch, capfd, kind):
    """NCCL's communicators end together: to destroy one is to wait for ranks that wait for this one."""
    step = Training._step

    def work(rank):
        def fails(self, number, *rest):
            if number == 2 and rank == 1:
                raise kind("the disk is full")
            return step(self, number, *rest)

        monkeypatch.setattr(Training, "_step", fails)
        monkeypatch.setattr(dist, "get_backend", lambda *_: "nccl")
        monkeypatch.setattr(dist, "destroy_process_group", lambda *_: time.sleep(900))
        run(world, tmp_path / "run")

    began = time.monotonic()
    on_two_ranks(work, codes=(1, 1))
    assert time.monotonic() - began < 600
    assert f"{'error' if kind is TrainError else 'RuntimeError'}: the disk is full" in capfd.readouterr().err


def test_a_sharded_pass_is_given_its_tokens_weights_as_they_are(world, tmp_path, monkeypatch):
    """FSDP casts what a module is given to the run's precision, which would leave weights eight bits."""
    seen, inner = [], Training._losses

    def noted(self, batch, weights_s):
        seen.append(str(weights_s.dtype))
        return inner(self, batch, weights_s)

    def work(rank):
        monkeypatch.setattr(Training, "_losses", noted)
        run(
            world,
            tmp_path / "run",
            *(f"finetune.{key}" for key in ("shard=true", "loss_norm=microbatch", "precision=bf16", "steps=1")),
        )
        (tmp_path / f"seen-{rank}").write_text(" ".join(set(seen)))

    on_two_ranks(work)
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(2)] == ["torch.float32"] * 2


def test_a_cut_model_aligns_where_one_rank_sees_text_alone(world, tmp_path):
    """A rank with images gathers each frozen layer again on its way back, so one without must do the same."""
    settings = ("align.steps=5", "align.micro_tokens=8", "align.lr=1e-2")
    run(world, tmp_path / "one", *settings, stage="align", data="mixed")
    cut = (*settings, "align.shard=true")
    on_two_ranks(lambda _: run(world, tmp_path / "two", *cut, stage="align", data="mixed"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-5)
