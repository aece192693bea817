"""A pool changes, and the same commands again bring every stage up to date, to what they would make from nothing."""

import json
import time

import tiny_clip
from artefacts import members, write_pool

from curate.cli import app
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
