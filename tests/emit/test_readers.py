"""What others' readers find in the shards that are emitted and mixed: the same samples, in the same order."""

import io
import json
import subprocess
import sys

import pytest
from artefacts import members, write_embeddings, write_pool, write_selection
from PIL import Image

from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.mix.mix import mix

QUIET = Job(workers=1, quiet=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A coreset of two shards, and a mix of its samples with records of text alone."""
    home = tmp_path_factory.mktemp("readers")
    emb = write_embeddings(home / "emb", write_pool(home / "pool", ["a", "b"], 5))
    sel = write_selection(home / "sel", emb, lambda stem, row, key: row != 2 or "sample(9)")
    emit(sel, str(home / "coreset"), EmitOptions(shard_size=5), QUIET)
    texts = [{"instruction": f"say {n}", "input": "", "output": f"{n}"} for n in range(4)]
    (home / "texts.json").write_text(json.dumps(texts))
    sources = {
        "coreset": {"path": str(home / "coreset"), "prompt": "Say."},
        "texts": {"path": str(home / "texts.json")},
    }
    mix({"shard_size": 6, "sources": sources}, str(home / "mix"), QUIET)
    return home


def in_tars(folder):
    """Read samples in the order of the tars by the first dot of their names, as the format says."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        for name, data in members(path):
            key, _, suffix = name.partition(".")
            found.setdefault(key, {})[suffix] = data
    return found


def test_webdataset_reads_a_coreset(shards):
    import webdataset

    pipeline = webdataset.WebDataset(str(shards / "coreset" / "{000000..000001}.tar"), shardshuffle=False)
    found = list(pipeline.decode("pilrgb"))
    expected = in_tars(shards / "coreset")
    assert [sample["__key__"] for sample in found] == list(expected) and len(found) == 8
    for sample, raw in zip(found, expected.values(), strict=True):
        with Image.open(io.BytesIO(raw["jpg"])) as image:
            assert sample["jpg"].tobytes() == image.convert("RGB").tobytes()
        assert sample["txt"] == raw["txt"].decode() and sample["json"] == json.loads(raw["json"])


def test_webdataset_reads_a_mix(shards):
    import webdataset

    found = list(
        webdataset.WebDataset(str(shards / "mix" / "{000000..000001}.tar"), shardshuffle=False).decode("pilrgb")
    )
    expected = in_tars(shards / "mix")
    assert [sample["__key__"] for sample in found] == list(expected) and len(found) == 12
    for sample, raw in zip(found, expected.values(), strict=True):
        assert sample["json"] == json.loads(raw["json"]) and ("jpg" in sample) == ("jpg" in raw)
    assert sum("jpg" in sample for sample in found) == 8


def test_energon_reads_a_coreset(shards):
    energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    words = ["prepare", "--non-interactive", "--force-overwrite", "--split-ratio", "1,0,0"]
    words += ["--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}']
    program = [sys.executable, "-c", "from megatron.energon.cli.main import main; main()"]
    subprocess.run([*program, *words, str(shards / "coreset")], check=True, capture_output=True)
    alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_val_dataset(shards / "coreset", split_part="train", worker_config=alone, batch_size=1)
    found = [
        sample for batch in energon.get_loader(dataset) for sample in zip(batch.__key__, batch.caption, strict=True)
    ]
    expected = in_tars(shards / "coreset")
    assert [key.rpartition("/")[2] for key, _ in found] == list(expected)
    assert [caption for _, caption in found] == [raw["txt"].decode() for raw in expected.values()]
