"""The inputs of public bug reports (../shared/cases, where they are): what each comes to, and that nothing goes unsaid.

The kinds themselves are tested where they belong, on inputs made there; here the very inputs of the reports.
"""

import json
import shutil

import pytest
import tiny_clip

from curate.embed.embed import EmbedOptions, embed
from curate.engine import Job
from curate.errors import UsageError
from curate.ingest.options import ImportOptions, PackOptions
from curate.ingest.pack import pack
from curate.ingest.published import import_layout
from curate.mix.mix import mix
from house import REAL_DATA
from train.data.sources import open_source

CASES = REAL_DATA.parent / "cases"
QUIET = Job(quiet=True, workers=1)
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("model") / "clip")


POOLS = {  # rows by status, and a word of each fault
    "avif_never_decodes/pool": ({"ok": 4}, []),
    "bom_captions/pool": ({"ok": 4}, []),
    "caption_names/pool": ({"ok": 16, "no_caption": 21, "bad_caption": 2}, ["not UTF-8", "--caption FIELD"]),
    "dots_in_keys/mixed": ({"ok": 4, "no_image": 6}, ["first dot of its name"]),
    "gz_shards/mixed": ({"ok": 8}, []),
    "tar_after_end_unsaid/concat": ({"ok": 8}, ["several archives"]),
    "tar_after_end_unsaid/truncated": ({"ok": 3}, ["truncated"]),
    "empty_tar_fails_for_ever/*.tar": ({"ok": 60}, ["holds no member"]),
    "empty_tar_fails_for_ever/hidden": ({"ok": 3}, ["macOS"]),
}


@pytest.mark.parametrize("pool", POOLS)
def test_pools(tmp_path, model, pool):
    made = embed(str(CASES / pool), str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    statuses, words = POOLS[pool]
    assert {name: count for name, count in made["counts"].items() if name != "rows"} == statuses
    told = " ".join(made.get("faults", {}))
    assert all(word in told for word in words) and bool(told) == bool(words), told


def test_grey_pictures_of_16_bits_are_not_alike(tmp_path, model):
    from curate.storage import sidecar

    embed(str(CASES / "grey16_alpha_collapse" / "grey16"), str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    rows = sidecar.table(str(tmp_path / "emb" / "a.arrow"), ["phash", "image_embedding"]).to_pylist()
    assert len({tuple(row["image_embedding"]) for row in rows}) == len(rows) == 100


IMPORTS = {
    "import_int_ids/nemo_int": ("nemo", 5, ""),
    "import_int_ids/clip_int": ("clip-retrieval", 5, ""),
    "import_part_lacks_table/text_one_missing": ("clip-retrieval", 15, "without text vectors"),
    "nemo_parts/empty_part": ("nemo", 5, ""),
    "nemo_parts/embeddings": ("nemo", 5, ""),
}


@pytest.mark.parametrize("source", IMPORTS)
def test_published_embeddings(tmp_path, source):
    layout, rows, word = IMPORTS[source]
    made = import_layout(str(CASES / source), str(tmp_path / "emb"), ImportOptions(layout), QUIET)
    assert made["counts"] == {"ok": rows} and "failed" not in made
    assert word in " ".join(made.get("faults", {}))


def test_a_part_without_its_table_fails_by_name(tmp_path):
    source = str(CASES / "import_part_lacks_table" / "meta_one_missing")
    made = import_layout(source, str(tmp_path / "emb"), ImportOptions("clip-retrieval"), QUIET)
    assert list(made["failed"]) == ["1"] and "no table beside it" in made["failed"]["1"]


@pytest.mark.parametrize("forms", ["paths pool", "ints pool", "keys poolfold", "paths poolfold", "url_slash pool"])
def test_joins(tmp_path, forms):
    source, pool = (str(CASES / "join_key_forms" / "join" / each) for each in forms.split())
    join = "url" if forms.startswith("url") else "key"
    options = ImportOptions("clip-retrieval", pool=pool, join=join)
    assert import_layout(source, str(tmp_path / "emb"), options, QUIET)["joined"]["matched"] == 5


def test_a_join_by_other_urls_shows_both(tmp_path):
    source, pool = (str(CASES / "join_key_forms" / "join" / each) for each in ("url_https", "pool"))
    options = ImportOptions("clip-retrieval", pool=pool, join="url")
    with pytest.raises(UsageError, match="'http://.*'https://"):
        import_layout(source, str(tmp_path / "emb"), options, QUIET)


RECORDS = {  # records with one picture each at least, all that the file has
    **{f"mix_empty_no_reason/{name}.json": 4 for name in ("abs_paths", "dict_top", "image_list1", "image_list2")},
    **{f"mix_empty_no_reason/{name}.json": 3 for name in ("capital_roles", "openai", "swift")},
    "mix_images_elsewhere/llamafactory.json": 4,
    "mix_images_elsewhere/openai_path.json": 3,
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_read_alike_by_the_mix_and_the_trainer(tmp_path, name):
    file, images = tmp_path / "records.json", CASES / name.split("/")[0] / "images"
    file.write_text((CASES / name).read_text().replace("@HERE@", str(images.parent)))
    made = mix({"sources": {"a": {"path": str(file), "images": str(images)}}}, str(tmp_path / "mix"), QUIET)
    assert made["counts"]["rows"] == RECORDS[name] and not made["faults"] and not made["counts"]["text_only"]
    source = open_source(str(file), str(images))
    assert len(source) == RECORDS[name] and all(source.record(n).images for n in range(len(source)))


def test_records_that_are_lost_are_counted(tmp_path):
    folder = CASES / "mix_losses_unsaid"
    counts = {}
    for name in ("missing_images.json", "cut.jsonl"):
        source = {"path": str(folder / name), "images": str(folder / "images")}
        counts[name] = mix({"sources": {"a": source}}, str(tmp_path / name), QUIET)["faults"]
    assert sum(counts["missing_images.json"].values()) == 10 and sum(counts["cut.jsonl"].values()) == 1


def test_folders(tmp_path):
    made = {}
    for name in ("dotted", "suffixes", "all_dotted"):
        shutil.copytree(CASES / "pack_passes_over_unsaid" / name, tmp_path / name)
        made[name] = pack(str(tmp_path / name), str(tmp_path / f"{name}_pool"), PackOptions(), QUIET)
    assert {name: each["counts"]["rows"] for name, each in made.items()} == {
        "dotted": 8,
        "suffixes": 5,
        "all_dotted": 4,
    }
    assert ".caption" in json.dumps(made["suffixes"]["faults"]) and "with dots" in json.dumps(made["dotted"]["faults"])


def test_the_trainer_reads_a_whole_joined_tar():
    source = open_source(str(CASES / "tar_after_end_unsaid" / "concat"))
    assert len(source) == 8 and "several archives" in source.notes[0]
