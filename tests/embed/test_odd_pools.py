"""Pools as they come out of broken downloads, other tools and other systems: nothing is lost without a word."""

import gzip
import os
import random

import pytest
import tiny_clip
from artefacts import picture
from test_embed import make_tar, table_of

from curate.storage.tar import survey_pool
from house import close_folders, curate, manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("model") / "clip")


def tar_bytes(folder, keys):
    make_tar(folder / "made.tar", [(f"{key}.{end}", data) for key in keys for end, data in sample(key)])
    return (folder / "made.tar").read_bytes()


def sample(key):
    return [("jpg", picture(sum(key.encode()))), ("txt", f"words of {key}".encode())]


def test_joined_packed_torn_and_empty_tars_end_well_and_say_what_they_were(tmp_path, model):
    pool = tmp_path / "pool"
    pool.mkdir()
    one, two = tar_bytes(tmp_path, "ab"), tar_bytes(tmp_path, "cd")
    (pool / "00000.tar").write_bytes(one + two)
    (pool / "00001.tar.gz").write_bytes(gzip.compress(tar_bytes(tmp_path, "ef")))
    (pool / "00002.tar").write_bytes(gzip.compress(tar_bytes(tmp_path, "g")))
    (pool / "00003.TAR").write_bytes(tar_bytes(tmp_path, "h"))
    (pool / "00004.tar").write_bytes(tar_bytes(tmp_path, "ijklmno")[:6_000])
    (pool / "00005.tar").write_bytes(tar_bytes(tmp_path, ""))
    (pool / "00006.tar.zst").write_bytes(random.Random(0).randbytes(300))
    (pool / "._00000.tar").write_bytes(b"\0\5\x16\7")
    ended = curate("embed", pool, tmp_path / "emb", "--model", model)
    made = manifest(tmp_path / "emb")
    rows = {stem: [row["key"] for row in table_of(tmp_path / "emb", stem)] for stem in made["shards"]}
    torn = rows.pop("00004")
    assert rows == {"00000": list("abcd"), "00001": list("ef"), "00002": ["g"], "00003": ["h"], "00005": []}
    assert torn == list("ijklmno")[: len(torn)]
    assert 2 <= len(torn) < 7 and made["counts"]["ok"] >= 9 and "failed" not in made
    for words in ("several archives", "truncated", "holds no member", "00006.tar.zst", "._00000.tar"):
        assert words in ended.stderr, (words, ended.stderr)
        assert any(words in kind + fault["example"] for kind, fault in made["faults"].items())
    again = curate("embed", pool, tmp_path / "emb", "--model", model)
    assert again.stdout == ended.stdout


def test_an_archive_that_is_not_read_is_named_and_the_others_go_on(tmp_path, model):
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "00000.tar").write_bytes(tar_bytes(tmp_path, "ab"))
    (pool / "00001.tar").write_bytes(b"\x28\xb5\x2f\xfd" + random.Random(0).randbytes(3000))
    ended = curate("embed", pool, tmp_path / "emb", "--model", model, check=False)
    assert ended.returncode == 1 and "zstd: unpack it first (unzstd)" in ended.stderr


def test_an_empty_pool_goes_through_every_stage(tmp_path, model):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "0.tar").write_bytes(bytes(10240))
    curate("embed", tmp_path / "pool", tmp_path / "emb", "--model", model)
    assert manifest(tmp_path / "emb")["shards"]["0"]["rows"] == 0


def test_names_that_are_no_utf_8_and_links_that_lead_nowhere_stop_nothing(tmp_path, model):
    pool = tmp_path / "pool"
    pool.mkdir()
    make_tar(pool / "a.tar", [("a.jpg", picture(1)), ("a.txt", b"words")])
    (tmp_path / "files").mkdir()
    for folder in (pool, tmp_path / "files"):
        with open(os.path.join(os.fsencode(folder), b"caf\xe9.zip"), "wb") as file:
            file.write(b"x")
    (tmp_path / "files" / "a.jpg").write_bytes(picture(1))
    (pool / "lock").symlink_to("nowhere")
    (tmp_path / "files" / "lock").symlink_to("nowhere")
    for words in (("embed", pool, tmp_path / "emb", "--model", model), ("pack", tmp_path / "files", tmp_path / "made")):
        ended = curate(*words)
        assert "Traceback" not in ended.stderr and "caf\\udce9.zip" in ended.stderr
        assert any("caf" in fault["example"] for fault in manifest(words[2])["faults"].values())


def test_tars_in_a_folder_below_and_what_is_no_pool_are_told(tmp_path, model):
    (tmp_path / "pool" / "more").mkdir(parents=True)
    make_tar(tmp_path / "pool" / "more" / "b.tar", [("b.jpg", picture(2)), ("b.txt", b"words")])
    refused = curate("embed", tmp_path / "pool", tmp_path / "no", "--model", model, check=False)
    assert f"give '{tmp_path}/pool/*/*.tar*'" in refused.stderr and refused.returncode == 2
    make_tar(tmp_path / "pool" / "a.tar", [("a.jpg", picture(1)), ("a.txt", b"words")])
    ended = curate("embed", tmp_path / "pool", tmp_path / "emb", "--model", model)
    assert (
        f"1 × folders of tars passed over: to include them, give '{tmp_path}/pool/**/*.tar*' (e.g. more)"
        in ended.stderr
    )
    curate("embed", f"{tmp_path}/pool/**/*.tar", tmp_path / "both", "--model", model)
    assert [row["key"] for stem in ("a", "b") for row in table_of(tmp_path / "both", stem)] == ["a", "b"]
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.JPG").write_bytes(picture(1))
    refused = curate("embed", tmp_path / "loose", tmp_path / "no", "--model", model, check=False)
    assert f"curate pack {tmp_path}/loose SHARDS" in refused.stderr


def test_a_folder_that_cannot_be_listed_stops_no_pool(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    make_tar(tmp_path / "a.tar", [("a.jpg", picture(1))])
    close_folders(monkeypatch, "lost+found")
    assert [shard.stem for shard in survey_pool(str(tmp_path)).shards] == ["a"]
