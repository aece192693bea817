"""A pool changes, and the same commands again bring every stage up to date, to what they would make from nothing."""

import itertools
import json
import os
import shutil
import threading
import time
from functools import partial

import pytest
import tiny_clip
from artefacts import members, write_embeddings, write_pool

from curate.cli import app
from curate.emit.emit import emit
from curate.emit.options import EmitOptions
from curate.engine import Job
from curate.select.options import SelectOptions
from curate.select.select import select
from curate.storage import paths, whole_files
from curate.storage.manifest import open_input
from house import fingerprint


def test_the_same_commands_again_take_up_what_has_changed(tmp_path, capfd):
    model = tiny_clip.write(tmp_path / "clip")
    write_pool(tmp_path / "pool", ["a", "b", "c"], 6)

    def chain(home, *more):
        for words in (
            ["embed", tmp_path / "pool", home / "emb", "--model", model],
            ["cluster", home / "emb", home / "clu", "--floor", "0.5", *more],
            ["select", home / "clu", home / "sel", "--step", "sample(9)"],
            ["emit", home / "sel", home / "out"],
            ["emit", home / "sel", home / "keys", "--format", "keys"],
        ):
            app([*map(str, words)], standalone_mode=False)
        return capfd.readouterr().err

    chain(tmp_path)
    time.sleep(0.01)
    write_pool(tmp_path / "pool", ["b", "d"], 6, first=100)
    (tmp_path / "pool" / "c.tar").unlink()
    told = chain(tmp_path)
    assert told.count("1 new, 1 changed, 1 gone, 1 kept") == 2
    assert f"select: {tmp_path / 'clu'} has changed since: {tmp_path / 'sel'} is made anew in place" in told
    assert told.count(f"emit: {tmp_path / 'sel'} has changed since") == 2
    assert "kept" not in (quiet := chain(tmp_path)) and "anew" not in quiet
    (tmp_path / "fresh").mkdir()
    chain(tmp_path / "fresh", "--centroids", str(tmp_path / "clu" / "centroids.npy"))
    for place in ("emb", "clu", "sel", "out", "keys"):
        there, fresh = (fingerprint(home / place) for home in (tmp_path, tmp_path / "fresh"))
        differing = {name for name in there.keys() | fresh.keys() if there.get(name) != fresh.get(name)}
        assert differing <= {f"{place}/manifest.json", "clu/fit.json"}


RUN = """
[pool]
path = "POOL"
[embed]
model = "MODEL"
[cluster]
floor = 0.5
[select]
steps = ["sample(9)"]
[emit]
[report]
[mix.sources.chosen]
path = "{out}/selection"
"""


def test_a_run_takes_up_a_changed_pool_as_far_as_the_mix(tmp_path, capfd):
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a thing"}]
    model, records = tiny_clip.write(tmp_path / "clip"), {"conversations": said}
    write_pool(tmp_path / "pool", ["a", "b", "c"], 6, extra=records)
    (tmp_path / "p.toml").write_text(RUN.replace("POOL", f"{tmp_path}/pool").replace("MODEL", model))

    def run():
        app(["run", str(tmp_path / "p.toml"), "--out", str(out)], standalone_mode=False)
        return capfd.readouterr().err

    def mixed():
        found = [json.loads(data) for name, data in members(out / "mix" / "000000.tar") if name.endswith(".json")]
        return {int(record["key"]) for record in found}

    out = tmp_path / "out"
    run()
    assert len(mixed()) == 9
    time.sleep(0.01)
    (tmp_path / "pool" / "a.tar").write_bytes(b"torn")  # a shard breaks, one is removed, one comes
    (tmp_path / "pool" / "c.tar").unlink()
    write_pool(tmp_path / "pool", ["d"], 6, first=100, extra=records)
    assert "a: " in run() and all(6 <= key < 12 or 100 <= key < 106 for key in mixed())
    write_pool(tmp_path / "pool", ["a"], 6, first=200, extra=records)  # and is repaired
    told = run()
    for line in ("embed: ", "selection is made anew in place", "coreset is made anew in place", "mix is made anew"):
        assert line in told, told
    kept = mixed()
    assert len(kept) == 9 and all(6 <= key < 12 or 100 <= key for key in kept)
    assert "anew" not in run() and not [*out.rglob(".next*")]


@pytest.mark.parametrize("verb", ["select", "emit", "emit parquet"])
def test_a_run_that_an_equal_one_overtakes_takes_up_what_that_has_finished(tmp_path, monkeypatch, capfd, verb):
    place = {name: str(tmp_path / name) for name in ("pool", "emb", "sel", "out")}
    stages = {
        "select": partial(select, place["emb"], place["sel"], SelectOptions(steps=("sample(5)",))),
        "emit": partial(emit, place["sel"], place["out"], EmitOptions(shard_size=2)),
        "emit parquet": partial(emit, place["sel"], place["out"], EmitOptions(format="parquet")),
    }
    make, out, sync = (
        partial(stages[verb], Job(workers=1, quiet=True)),
        place["sel" if verb == "select" else "out"],
        whole_files._sync,
    )

    def upstream(state):
        shutil.rmtree(place["emb"], ignore_errors=True)
        write_embeddings(place["emb"], write_pool(tmp_path / "pool", ["a", "b"], 4 + state % 2))
        if verb != "select":
            stages["select"](Job(workers=1, quiet=True))

    upstream(0)
    make()
    for number in itertools.count(1):  # the other run is at work from its beginning to its end when this one syncs
        upstream(number)
        files = itertools.count(1)
        other = []

        def overtaken(written, files=files, other=other, number=number):
            if threading.current_thread() is threading.main_thread() and next(files) == number:
                thread = threading.Thread(target=lambda: other.append(make()))
                thread.start()
                thread.join()
            sync(written)

        monkeypatch.setattr(whole_files, "_sync", overtaken)
        capfd.readouterr()
        found = make()
        monkeypatch.setattr(whole_files, "_sync", sync)
        if not other:
            break
        assert found == other[0] == open_input(out, verb.split()[0]).manifest
        assert capfd.readouterr().err.strip() in (f"another run has finished {out} in the meantime", "")
        assert not [name for name in os.listdir(out) if name.startswith(".next")]
    assert number > 3


def test_a_folder_into_which_another_process_writes_goes_in_the_end(tmp_path, monkeypatch):
    (tmp_path / "next" / "table").mkdir(parents=True)
    late, rmdir = iter(["a", "b"]), os.rmdir

    def filled(place, *more, **named):
        if (name := next(late, "")) and os.path.exists(tmp_path / "next" / "table"):
            (tmp_path / "next" / "table" / name).touch()
        rmdir(place, *more, **named)

    monkeypatch.setattr(os, "rmdir", filled)
    paths.remove(str(tmp_path / "next"))
    assert not (tmp_path / "next").exists()
