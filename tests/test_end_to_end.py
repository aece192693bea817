"""The main road as a user walks it: the command line, from raw shards to a coreset, undisturbed and disturbed."""

import json
import subprocess

import pyarrow as pa
import pytest

from house import CLIP, ROOT, Command, curate, fingerprint, manifest, until

STAGES = {
    "embed": lambda home: ["embed", home / "pool", home / "emb", "--model", CLIP],
    "cluster": lambda home: ["cluster", home / "emb", home / "clu", "--k", "12"],
    "select": lambda home: ["select", home / "clu", home / "sel", "--step", "dedup(0.9)", "--step", "sample(200)"],
    "emit": lambda home: ["emit", home / "sel", home / "out", "--shard-size", "40"],
}


def pool_in(tmp_path, demo):
    (tmp_path / "pool").symlink_to(demo / "pool")
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, demo):
    home = pool_in(tmp_path_factory.mktemp("undisturbed"), demo)
    for words in STAGES.values():
        curate(*words(home))
    return home


def artefacts(home):
    return fingerprint(*(home / name for name in ("emb", "clu", "sel", "out")))


def test_every_row_is_accounted_for_at_every_stage(undisturbed):
    embedded, selected = manifest(undisturbed / "emb"), manifest(undisturbed / "sel")
    rows = sum(shard["rows"] for shard in embedded["shards"].values())
    assert sum(embedded["counts"].values()) == rows and rows >= 598
    assert {"decode_error", "empty_image", "no_caption", "bad_caption"} <= set(embedded["counts"])
    assert any("truncated" in note for shard in embedded["shards"].values() for note in shard.get("notes", []))
    assert sum(selected["counts"].values()) == rows and selected["counts"]["kept"] == 200
    assert sum(shard["rows"] for shard in manifest(undisturbed / "out")["shards"].values()) == 200


def test_two_workers_leave_the_same_bytes_as_one(undisturbed, tmp_path, demo):
    home = pool_in(tmp_path, demo)
    subprocess.run(["cp", "-r", undisturbed / "emb", home], check=True)  # two that embed are in tests/embed
    for verb in ("cluster", "select", "emit"):
        curate(*STAGES[verb](home), "--workers", 2)
    assert artefacts(tmp_path) == artefacts(undisturbed)


@pytest.mark.parametrize("verb, made", [("embed", "emb"), ("cluster", "clu"), ("emit", "out")])
def test_a_killed_stage_resumes_to_the_same_bytes(verb, made, undisturbed, tmp_path, demo):
    home = pool_in(tmp_path, demo)
    for earlier in ("emb", "clu", "sel"):
        if earlier != made and list(STAGES).index(verb) > ("emb", "clu", "sel").index(earlier):
            subprocess.run(["cp", "-r", undisturbed / earlier, home / earlier], check=True)
    running = Command("curate", *STAGES[verb](home), "--workers", "1", cwd=ROOT)
    files = (home / made).glob
    until(lambda: running.poll() is not None or [*files("*.arrow"), *files("*.tar"), *files("*.npy")], 0.002)
    running.kill()
    curate(*STAGES[verb](home), "--workers", 1)
    assert fingerprint(home / made) == fingerprint(undisturbed / made)


def test_a_full_disk_leaves_no_half_file_and_a_rerun_finishes(undisturbed, tmp_path, demo):
    home = pool_in(tmp_path, demo)
    subprocess.run(["cp", "-r", undisturbed / "emb", undisturbed / "clu", undisturbed / "sel", home], check=True)

    limits = {"RLIMIT_FSIZE": 120_000}
    ended = curate(*STAGES["emit"](home), "--workers", 1, check=False, limits=limits)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and "File too large" in ended.stderr
    assert "could not be read from the pool" not in ended.stderr, "the samples are there, the disk is not"
    assert not list((home / "out").glob("*.tmp")) and not list((home / "out").glob("*.tar"))
    curate(*STAGES["emit"](home))
    assert fingerprint(home / "out") == fingerprint(undisturbed / "out")


def test_sidecars_whose_rows_do_not_line_up_are_refused(undisturbed, tmp_path, demo):
    home = pool_in(tmp_path, demo)
    subprocess.run(["cp", "-r", undisturbed / "emb", undisturbed / "clu", home], check=True)
    cut = pa.ipc.open_file(home / "clu" / "00001.arrow").read_all().slice(5)
    with pa.ipc.new_file(home / "clu" / "00001.arrow", cut.schema) as writer:
        writer.write_table(cut)
    refused = curate(*STAGES["select"](home), check=False)
    assert refused.returncode == 2 and "00001.arrow has" in refused.stderr and "--overwrite" in refused.stderr


def test_a_finished_stage_is_recognised_and_other_options_are_refused(undisturbed):
    before = artefacts(undisturbed)
    again = curate(*STAGES["select"](undisturbed))
    assert "kept" in again.stdout
    refused = curate("cluster", undisturbed / "emb", undisturbed / "clu", "--k", "13", check=False)
    assert refused.returncode == 2 and "k=12, now k=13" in refused.stderr and "--overwrite" in refused.stderr
    assert refused.stderr.count("\n") == 1 and artefacts(undisturbed) == before


def test_json_is_one_object_on_stdout(undisturbed):
    printed = json.loads(curate(*STAGES["select"](undisturbed), "--json").stdout)
    assert printed["counts"]["kept"] == 200


def test_show_tells_the_life_of_a_sample(undisturbed):
    assert "dedup(0.9)" in curate("show", undisturbed / "sel").stdout
    rows = pa.ipc.open_file(undisturbed / "sel" / "00001.arrow").read_all().to_pylist()
    dropped = next(row for row in rows if str(row["dropped_by"]).startswith("dedup"))
    life = curate("show", undisturbed / "out", "--key", dropped["key"]).stdout
    assert dropped["twin"] in life and "clip_score" in life and "centroid_similarity" in life


@pytest.mark.parametrize(
    "words, expected",
    [
        (["embed", "{}/nothing", "{}/e", "--model", CLIP], "does not exist"),
        (["embed", "{}/pool/*.zip", "{}/e", "--model", CLIP], "no .tar shards match"),
        (["embed", "{}/empty", "{}/e", "--model", CLIP], "no .tar shards match"),
        (["embed", "{}/pool", "{}/e", "--model", "ViT-B-23"], "unknown"),
        (["cluster", "{}/pool", "{}/c"], "expected a directory made by `curate embed`"),
        (["select", "{}/clu", "{}/s", "--step", "rnak(clip_score, 0, 1)"], "did you mean 'rank'"),
        (["select", "{}/clu", "{}/s", "--step", "rank(clip_scor, 0, 1)"], "clip_score"),
        (["select", "{}/clu", "{}/s", "--recipe", "buny"], "did you mean 'bunny'"),
        (["run", "demmo"], "unknown pipeline 'demmo'"),
        (["run", "demo", "--set", "embed.modl=x"], "did you mean 'model'"),
        (["run", "demo", "--set", "demo.seed=-1", "--only", "demo", "--out", "{}/x", "--json"], "seed=-1 is negative"),
        (["demo", "{}/d", "--rows", "5"], "holds 10 to 9,999"),
        (["embed", "{}/pool", "{}/e", "--model", CLIP, "--captions", "{}/empty"], "Is a directory"),
        (["demo", "{}/d", "--workers", "-1"], "workers=-1 is negative"),
        (["emit", "{}/sel", "{}/e", "--slice", "0/2", "--overwrite"], "would delete what the other slices have made"),
        (["embed", "{}/pool", "{}/e", "--model", "no/such/model"], "a local model is a folder with open_clip_config"),
        (["select", "{}/emb", "{}/s", "--losses", "{}/emb"], "made by `python -m train … --losses`"),
        (["select", "{}/clu", "{}/s", "--step", "placeholders(2, threshold=0.5)"], "below the floor"),
        (["select", "{}/clu", "{}/s", "--step", "placeholders(2, captions=2)"], "a share between 0 and 1"),
        (["select", "{}/clu", "{}/s", "--step", "sample(3, seed=-1)"], "0 or more"),
    ],
)
def test_a_wrong_request_gets_one_clear_line_and_exit_code_2(words, expected, undisturbed):
    (undisturbed / "empty").mkdir(exist_ok=True)
    ended = curate(*(word.replace("{}", str(undisturbed)) for word in words), check=False)
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr and ended.stderr.strip().count("\n") == 0 and "Traceback" not in ended.stderr
