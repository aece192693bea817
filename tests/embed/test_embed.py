import io
import json
import os

import numpy as np
import pyarrow as pa
import pytest
import tiny_clip
from artefacts import picture, write_pool
from PIL import Image
from test_encoder import FORMATS, cosines, reference

from curate.embed.decoding import map_ahead
from curate.embed.embed import EmbedOptions, embed
from curate.engine import Job, cores
from curate.errors import ContractError, UsageError
from curate.storage import sidecar
from curate.storage.schema import STATUSES, embedding_schema
from curate.storage.tar import MAX_TEXT_BYTES, TarWriter
from house import ROOT, Command, fingerprint, until

QUIET = Job(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("model") / "clip")


def make_tar(path, members):
    """Write a tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, TarWriter(file) as tar:
        for name, data in members:
            tar.add(name, data)
    return str(path.parent)


def table_of(directory, stem="00000"):
    return sidecar.table(f"{directory}/{stem}.arrow").to_pylist()


def vectors_of(directory, stem, column):
    batch = next(sidecar.batches(f"{directory}/{stem}.arrow"))
    return sidecar.vectors(batch.column(column)).astype(np.float32)


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "fine": ([("jpg", picture(1)), ("txt", b" a red thing\n"), ("json", b'{"url": "http://x/1"}')], "ok"),
    "json_caption": ([("png", picture(2, kind="PNG")), ("json", b'{"caption": "from json"}')], "ok"),
    "no_image": ([("txt", b"words"), ("json", b'{"url": "http://x/3"}')], "no_image"),
    "empty": ([("jpg", b""), ("txt", b"words")], "empty_image"),
    "cut": ([("jpg", picture(4)[:-90]), ("txt", b"words")], "decode_error"),
    "html": ([("jpg", b"<html>gone</html>"), ("txt", b"words")], "decode_error"),
    "bomb": ([("png", bomb()), ("txt", b"words")], "too_large"),
    "silent": ([("jpg", picture(5))], "no_caption"),
    "blank": ([("jpg", picture(6)), ("txt", b" \n")], "no_caption"),
    "odd_json": ([("jpg", picture(7)), ("json", b'{"caption": 7')], "no_caption"),
    "surrogate": ([("jpg", picture(7)), ("json", b'{"caption": "\\ud800", "url": "\\udfff"}')], "no_caption"),
    "latin": ([("jpg", picture(8)), ("txt", "caf\xe9".encode("latin-1"))], "bad_caption"),
    "endless": ([("jpg", picture(9)), ("txt", b"a" * (MAX_TEXT_BYTES + 1))], "bad_caption"),
    "../escape": ([("jpg", picture(10)), ("txt", b"words")], "unsafe_key"),
    "twice": ([("jpg", picture(11)), ("txt", b"first")], "ok"),
}


def test_every_bad_sample_keeps_its_row_and_says_why(tmp_path, model):
    members = [(f"{key}.{suffix}", data) for key, (parts, _) in BAD.items() for suffix, data in parts]
    members += [("twice.jpg", picture(12)), ("twice.txt", b"second"), ("fine.pkl", b"cos\nsystem\n(S'x'\ntR.")]
    pool = make_tar(tmp_path / "pool" / "00000.tar", members)
    manifest = embed(pool, str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    rows = table_of(tmp_path / "emb")
    expected = [(key, status) for key, (_, status) in BAD.items()] + [("twice", "duplicate_key")]
    assert [(row["key"], row["status"]) for row in rows] == expected
    counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    assert manifest["counts"] == {status: count for status, count in counts.items() if count}
    assert manifest["shards"]["00000"]["rows"] == len(rows) == sum(manifest["counts"].values())
    assert sidecar.table(f"{tmp_path}/emb/00000.arrow").schema.remove_metadata() == embedding_schema(48)
    for row in rows:
        for column in ("image_embedding", "text_embedding", "clip_score"):
            assert (row[column] is None) == (row["status"] != "ok")
    by_key = {row["key"]: row for row in rows[:-1]}
    assert by_key["fine"]["caption"] == "a red thing" and by_key["fine"]["url"] == "http://x/1"
    assert by_key["json_caption"]["caption"] == "from json"
    assert by_key["no_image"]["uid"] is None and by_key["no_image"]["url"] == "http://x/3"
    assert by_key["silent"]["uid"] and by_key["silent"]["phash"] is not None and by_key["silent"]["width"] == 24
    assert by_key["cut"]["uid"] and by_key["cut"]["phash"] is None and by_key["cut"]["width"] is None
    assert by_key["fine"]["uid"] == __import__("hashlib").blake2b(picture(1), digest_size=16).digest()


def test_vectors_are_open_clips_in_row_order_with_their_cosine(tmp_path, model):
    blobs = [make() for name, make in FORMATS.items()]
    captions = [f"{'very ' * (row % 7)}{name}" for row, name in enumerate(FORMATS)]
    members = []
    for row, (name, blob, caption) in enumerate(zip(FORMATS, blobs, captions, strict=True)):
        members += [(f"{row:03d}.{name.split('.')[1]}", blob), (f"{row:03d}.txt", caption.encode())]
    pool = make_tar(tmp_path / "pool" / "00000.tar", members)
    embed(pool, str(tmp_path / "emb"), EmbedOptions(model, batch_size=5, faithful=True), QUIET)
    image, text = (vectors_of(tmp_path / "emb", "00000", f"{kind}_embedding") for kind in ("image", "text"))
    expected_image, expected_text = reference(model, blobs, captions)
    assert cosines(image, expected_image).min() > 0.9999 and cosines(text, expected_text).min() > 0.9999
    scores = sidecar.table(f"{tmp_path}/emb/00000.arrow")["clip_score"].to_numpy()
    np.testing.assert_allclose(scores, cosines(image, text), atol=1e-6)
    np.testing.assert_allclose(scores, cosines(expected_image, expected_text), atol=2e-3)


def pool_of(folder):
    """Write three shards, one of them with holes."""
    pool = write_pool(folder, ["00000", "00001"], 70, caption=lambda row: "word " * (row * 7 % 23) + f"number {row}")
    holes = [
        (f"h{row:02d}.{suffix}", data)
        for row in range(40)
        for suffix, data in (("jpg", picture(row) if row % 3 else b"x"), ("txt", b"a hole" if row % 5 else b""))
    ]
    return make_tar(folder / "00002.tar", holes) and pool


def test_bytes_do_not_depend_on_workers_or_on_who_decodes(tmp_path, model):
    pool = pool_of(tmp_path / "pool")
    ways = {
        "one": (EmbedOptions(model), Job(workers=1, quiet=True)),
        "two": (EmbedOptions(model), Job(workers=2, quiet=True)),
        "apart": (EmbedOptions(model, decoders=1), Job(workers=1, quiet=True)),
    }
    made = []
    for name, (options, job) in ways.items():
        embed(pool, str(tmp_path / name / "emb"), options, job)
        made.append(fingerprint(tmp_path / name / "emb"))
    assert made[0] == made[1] == made[2] and len(made[0]) == 4
    logged = json.loads((tmp_path / "apart" / "emb" / "log.jsonl").read_text().splitlines()[-1])["spent"]
    assert [account["count"] for account in (logged["threads"], logged["decoders"])] == [cores(), 1]


def test_a_killed_run_is_finished_by_the_next_byte_for_byte(tmp_path, model):
    pool, out = pool_of(tmp_path / "pool"), tmp_path / "killed" / "emb"
    running = Command("curate", "embed", pool, out, "--model", model, "--workers", "1", cwd=ROOT)
    until(lambda: (out / "00000.arrow").exists() or running.poll() is not None, 0.005)
    running.kill()
    assert not (out / "manifest.json").exists(), "the kill came too late to show anything"
    (out / "00001.arrow.99.tmp").write_bytes(b"half a file")
    before = (out / "00000.arrow").stat().st_mtime_ns
    embed(pool, str(out), EmbedOptions(model), QUIET)
    assert (out / "00000.arrow").stat().st_mtime_ns == before, "a finished shard is kept"
    embed(pool, str(tmp_path / "whole" / "emb"), EmbedOptions(model), QUIET)
    assert fingerprint(out) == fingerprint(tmp_path / "whole" / "emb")


def test_a_finished_directory_is_recognised_and_another_request_refused(tmp_path, model):
    pool, out = write_pool(tmp_path / "pool", ["00000"], 3), str(tmp_path / "emb")
    first = embed(pool, out, EmbedOptions(model), QUIET)
    assert embed(pool, out, EmbedOptions(model), QUIET) == first
    assert not [name for name in os.listdir(out) if name.startswith(".plan")]
    with pytest.raises(ContractError, match="precision"):
        embed(pool, out, EmbedOptions(model, precision="bf16"), QUIET)
    other = tiny_clip.write(tmp_path / "other" / "clip", seed=1)
    with pytest.raises(ContractError, match="weights"):
        embed(pool, out, EmbedOptions(other), QUIET)
    elsewhere = write_pool(tmp_path / "elsewhere", ["00001"], 3, first=3)
    with pytest.raises(ContractError, match="none of its shards"):
        embed(elsewhere, out, EmbedOptions(model), QUIET)
    again = embed(elsewhere, out, EmbedOptions(model), Job(quiet=True, overwrite=True))
    assert list(again["shards"]) == ["00001"]
    assert str(tmp_path) not in json.dumps(again), "a manifest holds no absolute path"


def test_a_broken_shard_fails_by_name_and_alone_is_retried(tmp_path, model):
    pool, out = write_pool(tmp_path / "pool", ["00000", "00001", "00002"], 4), str(tmp_path / "emb")
    whole = (tmp_path / "pool" / "00001.tar").read_bytes()
    (tmp_path / "pool" / "00001.tar").write_bytes(b"\xff" * len(whole))
    manifest = embed(pool, out, EmbedOptions(model), QUIET)
    assert list(manifest["failed"]) == ["00001"] and "no sample can be read" in manifest["failed"]["00001"]
    assert list(manifest["shards"]) == ["00000", "00002"] and manifest["counts"] == {"ok": 8}
    kept = fingerprint(tmp_path / "emb")
    (tmp_path / "pool" / "00001.tar").write_bytes(whole)
    mended = embed(pool, out, EmbedOptions(model), QUIET)
    assert (
        "failed" not in mended and mended["counts"] == {"ok": 12} and list(mended["shards"]) == sorted(mended["shards"])
    )
    after = fingerprint(tmp_path / "emb")
    assert all(after[name] == kept[name] for name in kept if name.endswith(".arrow"))
    write_pool(tmp_path / "same", ["00000", "00001", "00002"], 4)
    embed(str(tmp_path / "same"), str(tmp_path / "unharmed" / "emb"), EmbedOptions(model), QUIET)
    arrows = {name: digest for name, digest in after.items() if name.endswith(".arrow")}
    assert arrows == {n: d for n, d in fingerprint(tmp_path / "unharmed" / "emb").items() if n.endswith(".arrow")}


def test_a_truncated_shard_gives_what_it_holds(tmp_path, model):
    pool = write_pool(tmp_path / "pool", ["00000"], 6)
    whole = (tmp_path / "pool" / "00000.tar").read_bytes()
    (tmp_path / "pool" / "00000.tar").write_bytes(whole[: len(whole) // 2])
    manifest = embed(pool, str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    assert 2 <= manifest["shards"]["00000"]["rows"] < 6
    assert "truncated" in manifest["shards"]["00000"]["notes"][0]


def test_slices_share_the_shards_and_the_last_one_finishes(tmp_path, model):
    pool, out = write_pool(tmp_path / "pool", ["00000", "00001", "00002"], 3), str(tmp_path / "emb")
    first = embed(pool, out, EmbedOptions(model), Job(quiet=True, part=(0, 2)))
    assert first["unfinished"] == ["00001"] and not os.path.exists(f"{out}/manifest.json")
    assert embed(pool, out, EmbedOptions(model), Job(quiet=True, part=(1, 2)))["counts"] == {"ok": 9}


def test_slices_end_where_each_has_a_shard_that_failed_for_good(tmp_path, model):
    stems = ["00000", "00001", "00002", "00003"]
    pool, out = write_pool(tmp_path / "pool", stems, 3), str(tmp_path / "emb")
    whole = {stem: (tmp_path / "pool" / f"{stem}.tar").read_bytes() for stem in stems[:2]}
    for stem, data in whole.items():
        (tmp_path / "pool" / f"{stem}.tar").write_bytes(b"\xff" * len(data))
    first = embed(pool, out, EmbedOptions(model), Job(quiet=True, part=(0, 2)))
    assert first["unfinished"] == ["00001", "00003"] and list(first["failed"]) == ["00000"]
    last = embed(pool, out, EmbedOptions(model), Job(quiet=True, part=(1, 2)))
    assert list(last["failed"]) == stems[:2] and list(last["shards"]) == stems[2:]
    assert not os.path.exists(f"{out}/.failed")
    (tmp_path / "pool" / "00001.tar").write_bytes(whole["00001"])
    half = embed(pool, out, EmbedOptions(model), Job(quiet=True, part=(1, 2)))
    assert half["unfinished"] == ["00000"], "the other slice may still mend its shard"
    again = embed(pool, out, EmbedOptions(model), Job(quiet=True, part=(0, 2)))
    assert list(again["failed"]) == ["00000"] and list(again["shards"]) == stems[1:]


def test_auto_takes_what_the_directory_was_made_with(tmp_path, model):
    pool, out = write_pool(tmp_path / "pool", ["00000", "00001"], 3), str(tmp_path / "emb")
    embed(pool, out, EmbedOptions(model, precision="bf16", batch_size=7), Job(quiet=True, part=(0, 2)))
    made = embed(pool, out, EmbedOptions(model), QUIET)
    assert made["options"]["precision"] == "bf16" and made["options"]["batch_size"] == 7
    assert embed(pool, out, EmbedOptions(model), QUIET) == made, "whatever this machine would choose by itself"
    with pytest.raises(ContractError, match="precision"):
        embed(pool, out, EmbedOptions(model, precision="fp32"), QUIET)
    anew = embed(pool, out, EmbedOptions(model), Job(quiet=True, overwrite=True))
    assert anew["options"]["precision"] == "fp32" and anew["options"]["batch_size"] == 32


def test_a_resume_with_other_versions_says_so_and_lists_what_made_which_shards(tmp_path, model, monkeypatch, capsys):
    from curate.embed import embed as stage

    pool, out = write_pool(tmp_path / "pool", ["00000", "00001", "00002"], 3), str(tmp_path / "emb")
    with monkeypatch.context() as other:
        other.setattr(stage.encoder, "describe_device", lambda device: "another processor")
        embed(pool, out, EmbedOptions(model), Job(quiet=True, part=(0, 2), workers=1))
    made = embed(pool, out, EmbedOptions(model), Job(workers=1))
    assert "another processor" in capsys.readouterr().err
    assert [(maker["device"], maker["shards"]) for maker in made["made_by"]][0] == (
        "another processor",
        ["00000", "00002"],
    )
    assert made["made_by"][1]["shards"] == ["00001"] and made["made_by"][1]["versions"]


@pytest.mark.parametrize(
    "members, words",
    [
        ([("a.jpg", picture(1)), ("b.jpg", picture(2))], ["no captions", "2 .jpg"]),
        ([("a.jpg", picture(1)), ("a.txt", b""), ("a.json", b"{}")], ["no captions", "1 .json", "1 .txt"]),
        ([("a.txt", b"words"), ("b.txt", b"more"), ("b.npy", b"x")], ["no images", "2 .txt", "1 .npy"]),
        ([("in/0.tar", b"x"), ("in/1.tar.gz", b"x")], ["no images", "1 .tar,", "unpack the outer ones"]),
    ],
)
def test_a_pool_without_captions_or_images_is_refused_with_what_it_holds(tmp_path, members, words):
    pool = make_tar(tmp_path / "pool" / "00000.tar", members)
    with pytest.raises(UsageError) as refused:
        embed(pool, str(tmp_path / "emb"), EmbedOptions("no-such-model-is-asked-for"), QUIET)
    said = f"{refused.value} {refused.value.hint}"
    assert all(word in said for word in words), said
    assert not (tmp_path / "emb").exists()


def test_an_empty_pool_and_odd_options_are_refused(tmp_path, model):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "notes.md").write_text("x")
    with pytest.raises(UsageError, match="notes.md"):
        embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    with pytest.raises(UsageError, match="batch_size"):
        embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model, batch_size=-1), QUIET)


def test_vectors_that_are_no_numbers_are_recorded(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_clip.write(tmp_path / "clip")
    weights = str(tmp_path / "clip" / "open_clip_model.safetensors")
    state = load_file(weights)
    state["token_embedding.weight"][49407] = float("nan")  # <end>: every caption
    save_file(state, weights)
    manifest = embed(write_pool(tmp_path / "pool", ["00000"], 3), str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    assert manifest["counts"] == {"bad_embedding": 3}
    rows = table_of(tmp_path / "emb")
    assert all(row["image_embedding"] is None and row["uid"] and row["caption"] for row in rows)


def test_names_that_are_not_utf8_and_long_names_keep_their_rows(tmp_path, model):
    import tarfile

    (tmp_path / "pool").mkdir()
    with tarfile.open(tmp_path / "pool" / "00000.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key in (b"caf\xe9".decode("utf-8", "surrogateescape"), "long/" + "x" * 300, "plain"):
            for suffix, data in (("jpg", picture(1)), ("txt", b"words")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    embed(str(tmp_path / "pool"), str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    rows = table_of(tmp_path / "emb")
    assert [row["key"] for row in rows] == ["caf\\udce9", "long/" + "x" * 300, "plain"]
    assert [row["status"] for row in rows] == ["unsafe_key", "ok", "ok"]


def test_sidecars_map_to_numpy_with_no_copy(tmp_path, model):
    pool = write_pool(tmp_path / "pool", ["00000"], 5)
    embed(pool, str(tmp_path / "emb"), EmbedOptions(model), QUIET)
    before = pa.total_allocated_bytes()
    view = sidecar.vectors(next(sidecar.batches(f"{tmp_path}/emb/00000.arrow")).column("image_embedding"))
    assert view.shape == (5, 48) and view.dtype == np.float16 and pa.total_allocated_bytes() == before


def test_work_runs_ahead_by_no_more_than_its_depth():
    from concurrent.futures import ThreadPoolExecutor

    taken = []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    with ThreadPoolExecutor(2) as pool:
        for result in map_ahead(pool, lambda item: item * item, items(), 4):
            assert len(taken) <= round(result**0.5) + 4
    assert len(taken) == 20
