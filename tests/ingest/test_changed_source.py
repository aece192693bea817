"""`curate import` again on a source or a pool that has changed."""

import json
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artefacts import members, picture, write_pool
from test_layouts import write_source

from curate.cli import app
from house import fingerprint, manifest


@pytest.fixture
def call(capfd):
    def run(*words):
        capfd.readouterr()
        code = app([str(word) for word in words], standalone_mode=False)
        return code or 0, capfd.readouterr().err

    return run


def contents(folder):
    return {name.split("/", 1)[1]: value for name, value in fingerprint(folder).items()}


def test_parts_that_are_new_or_changed_are_imported_and_the_rest_kept(tmp_path, call):
    source, out = tmp_path / "source", tmp_path / "emb"
    write_source(source, "npy", [4, 3, 2])
    words = ["import", source, out, "--layout", "npy"]
    call(*words)
    kept = (out / "part0.arrow").stat().st_mtime_ns
    time.sleep(0.01)
    np.save(source / "part1.npy", np.load(source / "part0.npy")[:3] * 2)
    for end in (".npy", ".text.npy", ".parquet"):
        (source / f"part3{end}").write_bytes((source / f"part2{end}").read_bytes())
        (source / f"part2{end}").unlink()
    code, told = call(*words)
    assert code == 0 and "import: 1 new, 1 changed, 1 gone, 1 kept" in told.splitlines()
    assert (out / "part0.arrow").stat().st_mtime_ns == kept and not (out / "part2.arrow").exists()
    call("import", source, tmp_path / "whole", "--layout", "npy")
    assert contents(out) == contents(tmp_path / "whole")
    assert "kept" not in call(*words)[1]
    os.utime(source / "part0.npy", (1, 1))
    assert "import: 1 touched, same content" in call(*words)[1].splitlines() and "touched" not in call(*words)[1]
    flipped = bytearray((source / "part0.npy").read_bytes())
    flipped[-1] ^= 1
    (source / "part0.npy").write_bytes(flipped)
    os.utime(source / "part0.npy", (1, 1))
    assert "kept" not in call(*words)[1] and "1 changed, 2 kept" in call(*words, "--verify")[1]


def test_what_a_part_lacks_beside_others_is_seen_when_these_come(tmp_path, call):
    source, out = tmp_path / "source", tmp_path / "emb"
    write_source(source, "npy", [4, 3])
    for name in ("part0", "part1"):
        (source / f"{name}.text.npy").unlink()
    words = ["import", source, out, "--layout", "npy"]
    call(*words)
    np.save(source / "part2.npy", np.load(source / "part1.npy"))
    np.save(source / "part2.text.npy", np.load(source / "part1.npy"))
    (source / "part2.parquet").write_bytes((source / "part1.parquet").read_bytes())
    assert "1 new, 2 changed, 0 kept" in call(*words)[1]
    call("import", source, tmp_path / "whole", "--layout", "npy")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_changed_pool_is_joined_shard_by_shard_and_a_changed_source_altogether(tmp_path, call):
    source, pool, out = tmp_path / "source", tmp_path / "pool", tmp_path / "emb"
    write_source(source, "npy", [6, 6], key=lambda rows: [f"{row:09d}" for row in rows])
    write_pool(pool, ["a", "b", "c"], 2)
    words = ["import", source, out, "--layout", "npy", "--pool", pool, "--join", "key"]
    call(*words)
    (pool / "b.tar").unlink()
    write_pool(pool, ["d"], 2, first=2)
    assert "1 new, 1 gone, 2 kept" in call(*words)[1]
    assert manifest(out)["joined"]["matched"] == 6
    call("import", source, tmp_path / "whole", "--layout", "npy", "--pool", pool, "--join", "key")
    assert contents(out) == contents(tmp_path / "whole")
    write_source(source, "npy", [6, 6, 6], key=lambda rows: [f"{row:09d}" for row in rows])
    assert "3 changed, 0 kept" in call(*words)[1]


def test_vectors_that_are_made_anew_are_joined_to_a_pool_at_an_equal_size_too(tmp_path, call):
    source, pool, out = tmp_path / "source", tmp_path / "pool", tmp_path / "emb"
    write_source(source, "npy", [6, 6], key=lambda rows: [f"{row:09d}" for row in rows])
    write_pool(pool, ["a", "b"], 2)
    words = ["import", source, out, "--layout", "npy", "--pool", pool, "--join", "key"]
    call(*words)
    call("cluster", out, tmp_path / "clu", "--k", "2")
    seen = json.loads((out / ".seen.json").read_text())
    older = {stem: [size, stamp, rest.rpartition(" ")[0]] for stem, (size, stamp, rest) in seen["parts"].items()}
    (out / ".seen.json").write_text(json.dumps(seen | {"parts": older}))
    assert "kept" not in call(*words)[1], "an older version noted the sizes alone"
    (out / ".seen.json").write_text(json.dumps(seen))
    time.sleep(0.01)
    for path in source.glob("*.npy"):
        np.save(path, np.roll(np.load(path), 1, axis=1))
    assert "2 changed, 0 kept" in call(*words)[1]
    assert "2 changed, 0 kept" in call("cluster", out, tmp_path / "clu", "--k", "2")[1]
    call("import", source, tmp_path / "whole", "--layout", "npy", "--pool", pool, "--join", "key")
    assert contents(out) == contents(tmp_path / "whole")


def test_folders_that_are_new_or_changed_are_packed_and_the_rest_kept(tmp_path, call):
    source, out = tmp_path / "files", tmp_path / "pool"
    for number, folder in enumerate(("a", "b", "c")):
        (source / folder).mkdir(parents=True)
        (source / folder / "x.jpg").write_bytes(picture(number))
        (source / folder / "x.txt").write_text(f"words {number}")
    words = ["pack", source, out]
    call(*words)
    kept = (out / "a.tar").stat().st_mtime_ns
    time.sleep(0.01)
    (source / "b" / "x.txt").write_text("other 1")  # of the same size
    (source / "c").rename(source / "d")
    assert "pack: 1 new, 1 changed, 1 gone, 1 kept" in call(*words)[1].splitlines()
    assert (out / "a.tar").stat().st_mtime_ns == kept and ("x.txt", b"other 1") in members(out / "b.tar")
    call("pack", source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole") and "kept" not in call(*words)[1]


def test_a_parquet_file_that_has_changed_is_packed_again(tmp_path, call):
    source, out = tmp_path / "tables", tmp_path / "pool"
    source.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [picture(1), picture(2)], "key": ["x", "y"]}), source / f"{name}.parquet")
    words = ["pack", source, out, "--shard-size", 1]
    call(*words)
    time.sleep(0.01)
    pq.write_table(pa.table({"image": [picture(3)], "key": ["z"]}), source / "b.parquet")
    assert "1 new, 2 gone, 2 kept" in call(*words)[1]
    call("pack", source, tmp_path / "whole", "--shard-size", 1)
    assert contents(out) == contents(tmp_path / "whole")
