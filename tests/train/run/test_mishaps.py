"""What breaks on the way: shards that vanish or rot in mid-run, missing pictures, and losses that curation reads."""

import json
import os
import shutil
import tarfile

import pytest
import tiny_clip
from test_cli import call
from toys import add, picture, sample, write_captions, write_json

from train import config as configuration
from train.errors import DataError
from train.run.recorder import Recorder
from train.run.stage import run_stage


def vanish(shard):
    shard.unlink()


def truncate(shard):
    os.truncate(shard, 512)


def rot(shard):
    """Zeros in place of everything behind the first sample."""
    with shard.open("rb+") as file:
        file.seek(4096)
        file.write(bytes(shard.stat().st_size - 4096))


def break_in_mid_run(world, folder, monkeypatch, happen, *settings):
    """Align on eight shards of six; once the second step is written, something happens to the last three."""
    data = write_captions(folder / "pool", 48, shards=8)
    write = Recorder.write

    def written(self, row):
        write(self, row)
        if row["step"] == 2:
            for shard in sorted(data.glob("*.tar"))[5:]:
                happen(shard)

    settings = ("align.steps=8", "align.batch_size=4", "align.max_bad_share=0.5", *settings)
    options = configuration.load(str(world / "config.toml"), settings)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "write", written)
        manifest = run_stage("align", options, str(data), folder / "run")
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
    return manifest["result"], losses, skipped


@pytest.mark.parametrize(("happen", "reasons"), [(vanish, {"unreadable"}), (truncate, {"unreadable"}), (rot, None)])
def test_a_shard_that_breaks_in_mid_run_is_left_out_alike_counted_and_listed(
    world, tmp_path, monkeypatch, happen, reasons
):
    # A shard that is open already outlives its name; with one descriptor at a time none is.
    monkeypatch.setattr("train.data.reading.MAX_OPEN_FILES", 1)
    runs = [break_in_mid_run(world, tmp_path / name, monkeypatch, happen) for name in ("one", "two")]
    (result, losses, skipped), again = runs
    assert (result, losses, skipped) == again, "the same thing at the same step gives the same run"
    assert len(losses) == 8 and len(skipped) > 3
    assert sum(result["skipped"].values()) == len(skipped)
    assert {line["sample"].split("/")[0] for line in skipped} <= {f"{i:06d}.tar" for i in (5, 6, 7)}
    found = set(result["skipped"])
    assert found == (reasons or found) and found <= {"unreadable", "bad_image", "no_caption", "bad_json"}
    _, whole, none = break_in_mid_run(world, tmp_path / "whole", monkeypatch, lambda _: None)
    assert not none and whole[:2] == losses[:2] and whole != losses


def test_too_much_of_it_stops_the_run_with_examples(world, tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.reading.MAX_OPEN_FILES", 1)
    with pytest.raises(
        DataError, match=r"4 of 48 samples cannot be used: 4 unreadable. Examples: 00000\d.tar/\d+ .*; "
    ):
        break_in_mid_run(world, tmp_path, monkeypatch, vanish, "align.max_bad_share=0.001")


def test_half_of_the_pictures_missing_stops_before_the_first_step_and_mended_goes_on(world, tmp_path, capfd):
    data = write_json(tmp_path / "data", 20)
    pictures = sorted((tmp_path / "data" / "images").iterdir())
    for file in pictures[::2]:
        file.rename(tmp_path / file.name)
    words = ("finetune", "--config", world / "config.toml", "--data", data, "--out", tmp_path / "run", "--json")
    code, out, err = call(capfd, *words)
    said = (
        "error: 8 of 20 samples cannot be used: 8 missing_image. Examples: data.json/v0 (missing_image); data.json/v2"
    )
    assert code == 1 and out == "" and err.splitlines()[-1].startswith(said) and err.count("(missing_image)") == 3
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    for file in pictures[::2]:
        (tmp_path / file.name).rename(file)
    code, out, _ = call(capfd, *words)
    assert code == 0 and json.loads(out)["samples"] == 20


def test_a_changed_picture_folder_is_another_request_and_a_copy_is_not(world, tmp_path, capfd):
    data = write_json(tmp_path / "data", 10)
    words = ("finetune", "--config", world / "config.toml", "--data", data, "--set", "finetune.steps=1")
    assert call(capfd, *words, "--out", tmp_path / "run")[0] == 0
    folder = tmp_path / "data" / "images"
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "nobody's.jpg").write_bytes(b"x")
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    assert call(capfd, *words, "--out", tmp_path / "run")[0] == 0, "the pictures are the same"
    first = next(folder.iterdir())
    (folder / "000000.jpg").write_bytes(picture("blue", True, 99) + b"\0")
    code, _, err = call(capfd, *words, "--out", tmp_path / "run")
    assert code == 2 and "another state of its images" in err and "--overwrite" in err and first


def test_losses_of_a_run_select_the_pool_it_learnt_from(world, tmp_path, capfd):
    """train --losses, then `curate select` by what it wrote, through both command lines."""
    from typer.testing import CliRunner

    from curate.cli import app as curate

    pool = tmp_path / "pool"
    pool.mkdir()
    for shard in range(2):
        with tarfile.open(pool / f"{shard:06d}.tar", "w") as tar:
            for i in range(12):
                colour, big = sample(i)
                add(tar, f"{shard}{i:04d}.jpg", picture(colour, big, i))
                add(tar, f"{shard}{i:04d}.txt", f"a {'big' if big else 'small'} {colour} square".encode())
    words = ("align", "--config", world / "config.toml", "--data", pool, "--out", tmp_path / "run", "--losses")
    assert call(capfd, *words, "--set", "align.steps=6")[0] == 0

    def curated(*words):
        ended = CliRunner().invoke(curate, [str(word) for word in words])
        assert ended.exit_code == 0, ended.output

    clip = tiny_clip.write(tmp_path / "clip")
    curated("embed", pool, tmp_path / "emb", "--model", clip, "--precision", "fp32")
    step = "rank(loss, 0.5, 1.0)"
    curated("select", tmp_path / "emb", tmp_path / "sel", "--losses", tmp_path / "run" / "losses", "--step", step)
    import pyarrow as pa

    def column(path, name):
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()[name].to_pylist()

    loss, kept = (
        [value for shard in ("000000", "000001") for value in column(tmp_path / folder / f"{shard}.arrow", name)]
        for folder, name in (("run/losses", "loss"), ("sel", "kept"))
    )
    assert all(value is not None for value in loss) and sum(kept) == 12
    assert max(v for v, k in zip(loss, kept, strict=True) if k) <= min(
        v for v, k in zip(loss, kept, strict=True) if not k
    )
