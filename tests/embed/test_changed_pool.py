"""`curate embed` again on a pool that has changed, as a user types it: what is made, kept and dropped."""

import os
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_clip
from artefacts import members, write_pool

from curate.cli import app
from curate.embed.embed import EmbedOptions, embed
from curate.engine import Job
from curate.storage import renewal, sidecar
from curate.storage.manifest import open_input
from house import ROOT, Command, fingerprint, manifest, until

QUIET = Job(quiet=True, workers=1)
STEMS = ["00000", "00001", "00002", "00003"]


@pytest.fixture
def curate(capfd):
    """Run a verb in this process: exit code, what it printed, what it told on stderr."""

    def run(*words):
        capfd.readouterr()
        code = app([str(word) for word in words], standalone_mode=False)
        return code or 0, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("model") / "clip")


@pytest.fixture(scope="module")
def began(tmp_path_factory, model):
    """A pool of four shards, and its embeddings."""
    home = tmp_path_factory.mktemp("began")
    embed(write_pool(home / "pool", STEMS, 3), str(home / "emb"), EmbedOptions(model), QUIET)
    return home


@pytest.fixture
def home(began, tmp_path):
    """The same, to be changed: the folder is moved about, so that the pool stays the one that was embedded."""
    shutil.copytree(began, tmp_path / "home")
    where = tmp_path / "home" / "emb" / ".seen.json"
    seen = renewal.load_json(str(where))
    renewal.save_json(str(where), seen | {"place": renewal.paths.place(str(tmp_path / "home" / "pool"))})
    return tmp_path / "home"


def change(home):
    """Download one shard again, add two, remove one."""
    time.sleep(0.01)
    write_pool(home / "pool", ["00001"], 3, first=50)
    write_pool(home / "pool", ["00004", "00005"], 2, first=70)
    (home / "pool" / "00002.tar").unlink()


def arrows(folder):
    return {name.split("/", 1)[1]: value for name, value in fingerprint(folder).items()}


def afresh(home, model):
    """What embedding the pool as it is now leaves where nothing stood."""
    embed(str(home / "pool"), str(home / "whole"), EmbedOptions(model), QUIET)
    return arrows(home / "whole")


def test_a_changed_pool_is_taken_up_byte_for_byte(home, model, curate):
    before = {path.name: path.stat().st_mtime_ns for path in (home / "emb").glob("*.arrow")}
    change(home)
    words = ["embed", home / "pool", home / "emb", "--model", model]
    code, out, told = curate(*words)
    assert code == 0 and "embed: 2 new, 1 changed, 1 gone, 2 kept" in told.splitlines()
    assert "13 rows in 5 shards" in out
    assert arrows(home / "emb") == afresh(home, model)
    assert {path.name for path in (home / "emb").glob("*.arrow") if path.stat().st_mtime_ns in before.values()} == {
        "00000.arrow",
        "00003.arrow",
    }
    code, out, told = curate(*words)
    assert code == 0 and "kept" not in told and "13 rows in 5 shards" in out


def test_a_touched_shard_is_kept_by_its_content(home, model, curate):
    os.utime(home / "pool" / "00003.tar", (1, 1))
    words = ["embed", home / "pool", home / "emb", "--model", model]
    before = fingerprint(home / "emb")
    assert "embed: 1 touched, same content" in curate(*words)[2].splitlines()
    assert fingerprint(home / "emb") == before and "touched" not in curate(*words)[2], "read once"
    other = bytearray((home / "pool" / "00000.tar").read_bytes())
    stamp = (home / "pool" / "00000.tar").stat().st_mtime_ns
    other[-1] = 1  # in the padding behind the last member
    (home / "pool" / "00000.tar").write_bytes(other)
    os.utime(home / "pool" / "00000.tar", ns=(stamp, stamp))
    assert "kept" not in curate(*words)[2], "same size, same time"
    assert "embed: 1 changed, 3 kept" in curate(*words, "--verify")[2]
    os.utime(home / "pool" / "00003.tar", (2, 2))
    change(home)
    assert "embed: 2 new, 1 changed, 1 gone, 2 kept (1 touched, same content)" in curate(*words)[2].splitlines()
    assert arrows(home / "emb") == afresh(home, model)


def test_a_copied_pool_is_accepted_by_the_same_request(home, model, curate):
    shutil.copytree(home / "pool", home / "copy" / "pool", copy_function=shutil.copyfile)
    shutil.copytree(home / "emb", home / "copy" / "emb")
    _, out, told = curate("embed", home / "copy" / "pool", home / "copy" / "emb", "--model", model)
    assert "kept" not in told and "12 rows in 4 shards" in out


def test_a_copy_of_which_a_shard_is_another_of_equal_size_is_read(home, model, curate):
    shutil.copytree(home / "pool", home / "copy" / "pool", copy_function=shutil.copyfile)
    shutil.copytree(home / "pool", home / "other")
    write_pool(home / "other", STEMS, 3, first=90)
    assert [*map(os.path.getsize, (home / "other").iterdir())] == [*map(os.path.getsize, (home / "pool").iterdir())]
    code = Command("curate", "embed", home / "other", home / "emb", "--model", model, cwd=ROOT)
    assert code.wait() == 2 and "has none of its shards unchanged" in code.stderr
    shutil.copy(home / "other" / "00002.tar", home / "copy" / "pool")
    shutil.copytree(home / "emb", home / "copy" / "emb")
    words = ["embed", home / "copy" / "pool", home / "copy" / "emb", "--model", model]
    assert "embed: 1 changed, 3 kept (3 touched, same content)" in curate(*words)[2].splitlines()
    assert "kept" not in (told := curate(*words)[2]) and "verify" not in told


def test_a_repaired_shard_is_taken_up(home, model, curate):
    whole = (home / "pool" / "00001.tar").read_bytes()
    (home / "pool" / "00001.tar").write_bytes(b"\xff" * 5000)
    words = ["embed", home / "pool", home / "emb", "--model", model]
    code, _, told = curate(*words)
    assert code == 1 and "1 changed, 3 kept" in told and "1 shard(s) failed" in told
    assert list(manifest(home / "emb")["failed"]) == ["00001"] and not (home / "emb" / "00001.arrow").exists()
    assert "1 tried again, 3 kept" in curate(*words)[2]
    (home / "pool" / "00001.tar").write_bytes(whole)
    assert "1 changed, 3 kept" in curate(*words)[2]
    assert arrows(home / "emb") == afresh(home, model)


def test_slices_share_what_has_changed(home, model):
    change(home)
    for rank in (1, 0):
        made = embed(str(home / "pool"), str(home / "emb"), EmbedOptions(model), Job(quiet=True, part=(rank, 2)))
        assert open_input(str(home / "emb")).manifest == (made if rank == 0 else manifest(home / "emb"))
    assert arrows(home / "emb") == afresh(home, model)


def test_a_run_killed_between_two_states_leaves_one_and_the_next_goes_on(home, model):
    before = arrows(home / "emb")
    change(home)
    running = Command("curate", "embed", home / "pool", home / "emb", "--model", model, "--workers", "1", cwd=ROOT)
    until(lambda: list((home / "emb").glob(".next-*/*.arrow")) or running.poll() is not None, 0.002)
    running.kill()
    after = {name: value for name, value in arrows(home / "emb").items() if not name.startswith(".")}
    found = open_input(str(home / "emb"))
    assert after == before or "00004" in found.stems
    for stem in found.stems:
        assert found.table(stem).num_rows == found.rows[stem]
    embed(str(home / "pool"), str(home / "emb"), EmbedOptions(model), QUIET)
    assert arrows(home / "emb") == afresh(home, model)


def test_a_shard_that_changes_while_it_is_read_fails_by_name(home, model, monkeypatch):
    from curate.embed.embed import EmbedShard

    embed_texts = EmbedShard._embed_texts

    def meanwhile(*given):
        (home / "pool" / "00001.tar").touch()
        return embed_texts(*given)

    change(home)
    monkeypatch.setattr(EmbedShard, "_embed_texts", meanwhile)
    made = embed(str(home / "pool"), str(home / "emb"), EmbedOptions(model), QUIET)
    assert "00001" in made["failed"] and "has changed since this run began" in made["failed"]["00001"]
    monkeypatch.undo()
    assert "failed" not in embed(str(home / "pool"), str(home / "emb"), EmbedOptions(model), QUIET)
    assert arrows(home / "emb") == afresh(home, model)


def test_embeddings_of_format_1_get_new_shards(home, model, curate):
    """Old sidecars lack columns that new ones beside them have, the first of all among these."""
    embedded = open_input(str(home / "emb"))
    for stem in STEMS:
        where = embedded.path(f"{stem}.arrow")
        table = sidecar.table(where).drop_columns(["members", "detail", "writing"]).combine_chunks()
        sidecar.write_table(where, table.schema, table.to_batches(), sidecar.facts(where))
    renewal.save_json(embedded.path("manifest.json"), {**embedded.manifest, "format": 1})
    write_pool(home / "pool", ["00000", "00009"], 7, first=90)
    code, _, told = curate("embed", home / "pool", home / "emb", "--model", model)
    assert code == 0 and "embed: 1 new, 1 changed, 3 kept" in told
    assert curate("cluster", home / "emb", home / "clu", "--k", "1", "--floor", "0")[0] == 0
    steps = ["--step", 'dedup("auto")', "--step", "balance(cluster, 20, contradicting_last=True)"]
    assert curate("select", home / "clu", home / "sel", *steps)[0] == 0
    assert curate("emit", home / "sel", home / "out")[0] == 0
    kept = {key for stem in open_input(str(home / "sel")).stems for key in kept_keys(home / "sel", stem)}
    written = {name.partition(".")[0] for name, _ in members(home / "out" / "000000.tar")}
    assert written == kept and {int(key) >= 90 for key in kept} == {True, False}
    for key in ("000000005", "000000091"):  # of an old shard, and of a new one
        assert key in curate("show", home / "sel", "--key", key)[1]


def kept_keys(selection, stem):
    table = sidecar.table(str(selection / f"{stem}.arrow"))
    return table["key"].filter(table["kept"]).to_pylist()


def test_a_table_beside_a_shard_that_is_mended_is_seen_at_an_equal_size_too(home, model, curate):
    def write_table(*ended):
        rows = {"key": [f"{key:09d}" for key in range(3)], "status": list(ended)}
        pq.write_table(pa.table(rows), home / "pool" / "00000.parquet", compression="none", use_dictionary=False)
        return (home / "pool" / "00000.parquet").stat().st_size

    words, seen_at = ["embed", home / "pool", home / "emb", "--model", model], str(home / "emb" / ".seen.json")
    size = write_table("success", "success", "success")
    assert "1 changed, 3 kept" in curate(*words)[2]
    seen = renewal.load_json(seen_at)
    older = {stem: [tar, stamp.split()[0], table] for stem, (tar, stamp, table) in seen["parts"].items()}
    renewal.save_json(seen_at, seen | {"parts": older})
    assert "verify" not in curate(*words)[2], "an older version noted the tar's time alone"
    renewal.save_json(seen_at, seen)
    time.sleep(0.01)
    assert write_table("success", "success", "failure") == size
    assert "embed: 1 changed, 3 kept" in curate(*words)[2]
    assert manifest(home / "emb")["downloads"] == {"failure": 1, "success": 2}


def test_fields_of_the_pool_stay_what_they_are_when_other_shards_come_first(tmp_path, model, curate):
    write_pool(tmp_path / "pool", ["00001"], 2, extra={"similarity": 0.3, "licence": None})
    write_pool(tmp_path / "pool", ["00002"], 2, first=2, extra={"similarity": 0.5, "licence": 4})
    words = ["embed", tmp_path / "pool", tmp_path / "emb", "--model", model, "--columns", "similarity,licence"]
    assert curate(*words)[0] == 0
    kinds = {"similarity": "number", "licence": "number"}
    assert manifest(tmp_path / "emb")["options"]["columns"] == kinds
    write_pool(tmp_path / "pool", ["00000"], 2, first=4, extra={"similarity": "high", "uid": "0" * 32})
    code, _, told = curate(*words)
    assert code == 0 and "embed: 1 new, 2 kept" in told.splitlines()
    assert manifest(tmp_path / "emb")["options"]["columns"] == kinds
    shutil.rmtree(tmp_path / "emb")
    assert curate(*words)[0] == 0, "a field that the first shard lacks is looked for in the next"
