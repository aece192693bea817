"""Shards that number their samples alike: twins and marks are told by more than the key."""

import pytest
from artefacts import write_embeddings, write_pool

from curate.ask.probe import probe
from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.errors import UsageError
from curate.report import report
from curate.report.show_sample import show_key
from curate.select.select import SelectOptions, select
from curate.storage import sidecar

QUIET = Job(workers=1, quiet=True)


def test_a_twin_is_the_row_that_stayed_where_shards_use_a_key_again(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a"], 30)
    write_pool(tmp_path / "pool", ["b"], 30)  # other order of vectors, the same keys
    emb, clu, sel = (str(tmp_path / name) for name in ("embeddings", "clu", "sel"))
    write_embeddings(tmp_path / "embeddings", pool, dim=3)
    cluster(emb, clu, ClusterOptions(k=1, floor=0.5), QUIET)
    select(clu, sel, SelectOptions(steps=("dedup(0.95)",)), QUIET)
    tables = {stem: sidecar.table(f"{sel}/{stem}.arrow").to_pylist() for stem in "ab"}
    crossing = 0
    gallery, _ = report._gallery(report.discover(sel), 0)
    for card in gallery.twins(12):
        mine, twin = tables[card.stem][card.row], tables[card.twin.stem][card.twin.row]
        assert mine["twin"] == twin["key"] and mine["component"] == twin["component"] and twin["kept"]
        crossing += sum(row["key"] == twin["key"] for rows in tables.values() for row in rows) > 1
        story = "\n".join(show_key(sel, mine["key"]))
        assert f"row {card.twin.row} of {card.twin.stem}: cosine" in story
    assert crossing


def test_marks_on_keys_of_several_rows_are_left_out_and_told(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a"], 30)
    write_pool(tmp_path / "pool", ["b"], 60)  # the first 30 keys again
    write_embeddings(tmp_path / "embeddings", pool, dim=3)
    emb, marked = str(tmp_path / "embeddings"), tmp_path / "marked.tsv"
    keys = sidecar.table(f"{emb}/b.arrow")["key"].to_pylist()
    marked.write_text(
        "".join(f"{key}\t{'good' if n % 2 else 'bad'}\n" for n, key in enumerate(keys[20:])) + "gone\tbad\n"
    )
    told = probe(emb, str(marked), str(tmp_path / "head.safetensors"))
    assert told["labelled"] == {"bad": 15, "good": 15} and told["unknown_keys"] == 1 and told["repeated_keys"] == 10
    marked.write_text("".join(f"{key}\tgood\n" for key in keys[:30]))
    with pytest.raises(UsageError, match="30 keys left out, each in several rows"):
        probe(emb, str(marked), str(tmp_path / "head.safetensors"))
