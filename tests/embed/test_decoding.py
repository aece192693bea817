"""Decoding in processes: the rows of a plain reader, through shared memory or through the pipe."""

import os
from functools import partial

import numpy as np
import pytest
from artefacts import write_pool

from curate.embed import decoding, reader
from curate.embed.decoding import Decoders
from curate.storage import tar


class Fake:
    """Reads the place of each sample as an image of that shade; every seventh is none."""

    def __call__(self, path, samples):
        facts = [{"key": sample.key} for sample in samples]
        shades = [int(sample.key[-3:]) for sample in samples]
        good = [shade for shade in shades if shade % 7]
        pixels = np.array(good, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 4, 5, 3), np.uint8)
        return reader.Rows(facts, pixels, np.array(good, np.int32)[:, None])


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    pool = write_pool(folder / "pool", ["00000"], 230)
    path = tar.list_pool(pool)[0].location
    with open(path, "rb") as file:
        return path, tar.read_index(file).samples


@pytest.mark.parametrize("shared", [True, False])
def test_rows_come_in_order_and_are_the_readers(shard, shared, monkeypatch):
    path, samples = shard
    monkeypatch.setattr(decoding, "PART_ROWS", 8)
    if not shared:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    batches = [samples[at : at + 30] for at in range(0, len(samples), 30)]
    decoders = Decoders(2, Fake, (4, 5), 30)
    try:
        for _ in range(2):  # a board after another
            found = list(decoders(path, batches))
            assert len(found) == len(batches)
            for rows, batch in zip(found, batches, strict=True):
                expected = Fake()(path, batch)
                assert rows.facts == expected.facts and (rows.tokens == expected.tokens).all()
                assert rows.pixels.shape == expected.pixels.shape and (rows.pixels == expected.pixels).all()
        given_up = decoders(path, batches)
        next(given_up)
        given_up.close()  # parts on their way write to a board that nobody reads
        assert [len(rows.facts) for rows in decoders(path, batches[:2])] == [30, 30]
    finally:
        decoders.close()


def test_a_board_that_is_gone_is_no_other_board():
    first, second = decoding._Memory((1, 2, 3, 4, 3)), decoding._Memory((1, 2, 3, 4, 3))
    gone = first.board._replace(inode=0)
    with pytest.raises(FileNotFoundError):
        decoding._open(gone)
    decoding._open(second.board)[0] = 7
    assert (second.view == 7).all() and (first.view == 0).all()
    for memory in (first, second):
        memory.close()


def test_no_room_means_the_pipe(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert partial(Decoders._memory, type("", (), {"size": (4, 4)})())(3) is None
