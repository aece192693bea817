"""The plan of steps: packing, grouping, order, and what a micro-batch holds."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import word_tokenizer

from train.config import Stage
from train.data import batches
from train.data.batches import (
    PREFETCH,
    Collator,
    Passes,
    Plan,
    group_by_length,
    pack,
    pack_evenly,
    shared_memory_advice,
)
from train.data.encoder import Encoder
from train.data.measuring import measure, spare_workers
from train.data.prompts import get_template
from train.data.sources import open_source
from train.data.workers import resolve
from train.dist import Runtime
from train.errors import TrainError

SAMPLES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=40)


def costs(groups, lengths, images):
    return [(sum(lengths[i] for i in g), sum(images[i] for i in g)) for g in groups]


@settings(max_examples=100, deadline=None)
@given(SAMPLES, st.integers(50, 120), st.integers(3, 12))
def test_packing_fits_each_sample_once_and_wastes_less_than_half(samples, capacity, most):
    lengths, images = zip(*samples, strict=True)
    groups = pack(lengths, images, capacity, most)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    sums = costs(groups, lengths, images)
    assert all(tokens <= capacity and shown <= most for tokens, shown in sums)
    for (a, m), (b, n) in itertools.combinations(sums, 2):
        assert a + b > capacity or m + n > most, "first fit leaves no two mergeable"
    assert pack(lengths, images, capacity, most) == groups


@settings(max_examples=100, deadline=None)
@given(
    SAMPLES,
    st.integers(50, 400),
    st.integers(3, 12),
    st.integers(1, 4),
    st.sampled_from([pack_evenly, group_by_length]),
)
def test_micro_batches_respect_the_limits_and_the_processes(samples, tokens, most, world, arrange):
    lengths, images = zip(*samples, strict=True)
    groups = arrange(lengths, images, Stage(micro_tokens=tokens, micro_images=most), world)
    assert len(groups) % world == 0
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group, (filled, shown) in zip(groups, costs(groups, lengths, images), strict=True):
        padded = len(group) * max((lengths[i] for i in group), default=0)
        assert (padded if arrange is group_by_length else filled) <= tokens and shown <= most
    if arrange is pack_evenly:
        fewest = len(pack(lengths, images, tokens, most))
        assert len(groups) == -(-fewest // world) * world


def test_micro_batches_are_even():
    lengths = np.random.default_rng(0).integers(20, 900, 128).tolist()
    groups = pack_evenly(lengths, [0] * 128, Stage(micro_tokens=16384), 4)
    filled = [tokens for tokens, _ in costs(groups, lengths, [0] * 128)]
    assert len(groups) == 4 and max(filled) < 1.03 * sum(filled) / 4


def plan_of(world, **stage):
    source = open_source(str(world / "mixed"))
    encoder = Encoder(word_tokenizer(), get_template("qa"), "<image>", 5)
    measured = measure(source, encoder, 64)
    options = Stage(**{"batch_size": 8, **stage})
    return Plan(measured, options), Collator(source, encoder, None, 64)


def test_each_epoch_visits_each_sample_once_in_its_own_order(world):
    plan, _ = plan_of(world, epochs=2.0)
    assert plan.steps == 10
    seen = [plan.samples(step) for step in range(10)]
    first, second = list(itertools.chain(*seen[:5])), list(itertools.chain(*seen[5:]))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    again, _ = plan_of(world, epochs=2.0)
    assert [again.samples(step) for step in reversed(range(10))] == seen[::-1], "any step, in any order"
    assert plan_of(world, epochs=2.0, seed=1)[0].samples(0) != seen[0]


def test_a_last_short_step_and_a_wrap_around(world):
    plan, _ = plan_of(world, batch_size=16)
    assert [len(plan.samples(step)) for step in range(plan.steps)] == [16, 16, 8]
    plan, _ = plan_of(world, batch_size=64, steps=3)
    assert [len(plan.samples(step)) for step in range(plan.steps)] == [64, 64, 64]


def test_processes_share_a_step_without_overlap(world):
    plan, _ = plan_of(world)
    for processes in (1, 2, 3):
        groups = plan.micro_batches(0, processes)
        assert sorted(i for g in groups for row in g for i in row) == sorted(plan.samples(0))
        assert len(groups) % processes == 0


def test_a_packed_batch_holds_each_document_in_its_place(world):
    plan, collator = plan_of(world)
    collator.decode = False
    (rows,) = plan.micro_batches(0, 1)
    batch = collator(rows)
    flat, positions = batch.ids_bl.flatten().numpy(), batch.positions_bl.flatten().numpy()
    for index in plan.samples(0):
        mine = batch.owners_s.numpy() == index
        where, targets = batch.supervised_s.numpy()[mine], batch.targets_s.numpy()[mine]
        assert (flat[where + 1] == targets).all() and len(targets) == plan.measured.supervised[index]
        assert (np.diff(positions[where]) > 0).all()
    assert batch.num_tokens == plan.measured.lengths[plan.samples(0)].sum()
    assert (batch.positions_bl == 0).sum() == len(plan.samples(0)) == len(batch.documents)
    assert batch.ids_bl.shape == (1, batch.num_tokens), "nothing is padded"


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_a_step_micro_batch_by_micro_batch(world, workers):
    """Each rank gets its micro-batches of each step, whole and in order, from whatever worker decoded them."""
    plan, collator = plan_of(world, steps=3, micro_tokens=64)
    collator.decode = False
    seen: list[int] = []
    for rank in range(2):
        steps = list(Passes(plan, collator, rank, 2).steps(1, 3, workers, False))
        assert [len(batches) for batches in steps] == [len(plan.micro_batches(step, 2)) // 2 for step in (1, 2)]
        seen += [int(index) for batches in steps for batch in batches for index in batch.owners_s.unique()]
    assert sorted(seen) == sorted(plan.samples(1) + plan.samples(2))


def test_too_little_shared_memory_is_said_beforehand(world):
    plan, size = plan_of(world)[0], 3 * 384 * 384
    most = max(sum(int(plan.measured.images[i]) for i in plan.samples(step)) for step in range(plan.steps))
    assert shared_memory_advice(plan, 2, 1, size, 2 * (PREFETCH + 1) * most * size) == ""
    assert "--shm-size" in shared_memory_advice(plan, 2, 1, size, size)
    assert shared_memory_advice(plan, 0, 1, size, 0) == ""


@pytest.mark.parametrize(
    "cores, ranks, gpu, free, expected",
    [(16, 1, True, 1 << 40, 8), (16, 4, True, 1 << 40, 3), (2, 4, True, 1 << 40, 1), (16, 1, False, 1 << 40, 1)],
)
def test_auto_workers_go_by_cores_and_shared_memory(world, monkeypatch, caplog, cores, ranks, gpu, free, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("os.path.isdir", lambda _: True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    plan, _ = plan_of(world)
    with caplog.at_level("INFO", "train"):
        assert resolve(plan.stage, plan, 100, ranks, gpu=gpu).num_workers == expected
        assert f"{expected} decoding process(es) per rank (auto: " in caplog.text
        most = max(sum(map(len, rows)) for rows in plan.micro_batches(0, ranks))
        monkeypatch.setattr(
            "shutil.disk_usage", lambda _: SimpleNamespace(free=2 * ranks * (PREFETCH + 1) * most * 100)
        )
        assert resolve(plan.stage, plan, 100, ranks, gpu=gpu).num_workers in (min(expected, 2), min(expected, 3))
        asked = resolve(replace(plan.stage, workers=5), plan, 100, ranks, gpu=gpu)
    assert asked.num_workers == 5 and "5 decoding process(es) per rank (as asked)" in caplog.text


def test_a_process_counts_the_cores_that_it_may_use_and_not_those_of_its_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    Runtime.detect("fp32", 0)
    assert threads == [1] and spare_workers() == 0


def test_decoding_processes_that_cannot_start_are_refused_in_one_line(monkeypatch):
    def refuse(*_args, **_more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("multiprocessing.synchronize.Lock.__init__", refuse)
    with pytest.raises(TrainError, match="need a writable /dev/shm.*Read-only file system; set workers = 0"):
        batches.load([1, 2], [0, 1], 1, pin=False)
    assert list(batches.load([1, 2], [0, 1], 0, pin=False)) == [1, 2]
