import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curate.demo import render
from curate.demo.words import NAMES, TASKS, text_task, vocabulary
from curate.demo.world import DIRT, FAULTS, NUM_CONCEPTS, Plan, caption, concept_weights, draw, plan, sample_scenes
from curate.errors import UsageError
from curate.storage.tar import read_index, read_json, read_member

MODELS = Path(__file__).parents[2] / "pipelines" / "demo"
SMALL = {"rows": 240, "shards": 3, "instruct": 12, "tests": 1}


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_truth(folder: Path) -> pa.Table:
    with pa.OSFile(str(folder / "truth.arrow")) as file:
        return pa.ipc.open_file(file).read_all()


def read_pool(folder: Path) -> dict[str, dict[str, bytes]]:
    rows = {}
    for path in sorted((folder / "pool").glob("*.tar")):
        with path.open("rb") as file:
            for sample in read_index(file).samples:
                rows[sample.key] = {member.suffix: read_member(file, member) for member in sample.members}
    return rows


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "dirty"
    render.render(out, seed=3, **SMALL)
    return out


def test_same_seed_same_bytes_for_any_worker_count(dirty, tmp_path):
    render.render(tmp_path / "two", seed=3, workers=2, **SMALL)
    render.render(tmp_path / "other", seed=4, **SMALL)
    assert digest(tmp_path / "two") == digest(dirty)
    assert digest(tmp_path / "other")["pool/00000.tar"] != digest(dirty)["pool/00000.tar"]


def test_pool_and_truth_agree_row_by_row(dirty):
    pool, truth = read_pool(dirty), read_truth(dirty).to_pylist()
    assert [row["key"] for row in truth if row["fault"] != "truncated"] == list(pool)
    by_key = {row["key"]: row for row in truth}
    for key, members in pool.items():
        row = by_key[key]
        assert row["shard"] == key[:5] and len(key) == 9
        described = read_json(members["json"])
        assert described is not None and described["key"] == key
        assert described["sha256"] == hashlib.sha256(members["jpg"]).hexdigest()
        if row["fault"] in FAULTS:
            words = members["txt"].decode().split()
            assert described["caption"] == members["txt"].decode()
            assert [word for word in words if word in NAMES] == [row["caption_concept"]] * bool(row["caption_concept"])
            assert (row["concept"] == row["caption_concept"]) == (row["fault"] not in ("swapped", "underspecified"))
            assert Image.open(io.BytesIO(members["jpg"])).convert("RGB").size == (64, 64)


def test_one_file_of_each_fault_is_planted(dirty):
    pool, truth = read_pool(dirty), read_truth(dirty).to_pylist()
    key = {row["fault"]: row["key"] for row in truth if row["fault"] in render.FILE_FAULTS}
    assert Counter(row["fault"] for row in truth if row["fault"] in render.FILE_FAULTS) == dict.fromkeys(
        render.FILE_FAULTS, 1
    )
    with pytest.raises(OSError):
        Image.open(io.BytesIO(pool[key["corrupt"]]["jpg"])).load()
    assert pool[key["empty"]]["jpg"] == b""
    assert "txt" not in pool[key["no_caption"]] and read_json(pool[key["no_caption"]]["json"])["caption"] is None
    with pytest.raises(UnicodeDecodeError):
        pool[key["not_utf8"]]["txt"].decode()
    assert key["truncated"] not in pool
    with (dirty / "pool" / "00002.tar").open("rb") as file:
        assert any("truncated" in note for note in read_index(file).notes)


def test_clean_pool_has_copies_and_nothing_else(tmp_path):
    counts = render.render(tmp_path / "clean", dirt="clean", **SMALL)
    assert counts == {"clean": 235, "duplicate": 5}


@pytest.mark.parametrize("name", list(DIRT))
def test_plan_keeps_its_shares(name):
    dirt, rows = DIRT[name], 6000
    made = plan(np.random.default_rng(1), rows, dirt)
    sources = ~made.is_copy
    assert sources.sum() == rows - round(dirt.copies * rows)
    shares = Counter(made.fault[sources].tolist())
    for fault, share in (
        ("swapped", dirt.swapped),
        ("cheater", dirt.cheaters),
        ("underspecified", dirt.underspecified),
    ):
        assert shares[FAULTS.index(fault)] == pytest.approx(share * sources.sum(), abs=1)
    check_copies(made)


def check_copies(made: Plan) -> None:
    origin = made.source[made.is_copy]
    assert not made.is_copy[origin].any()
    clean, duplicate = FAULTS.index("clean"), FAULTS.index("duplicate")
    expected = np.where(made.fault[origin] == clean, duplicate, made.fault[origin])
    assert (made.fault[made.is_copy] == expected).all()
    for field in ("concept", "size", "place", "x", "y"):
        assert (made.shown[made.is_copy][field] == made.shown[origin][field]).all()
    swapped = made.fault == FAULTS.index("swapped")
    assert (made.shown["concept"][swapped] != made.told["concept"][swapped]).all()
    assert (made.shown["concept"][~swapped] == made.told["concept"][~swapped]).all()


def test_copies_look_alike_and_others_do_not():
    rng = np.random.default_rng(5)
    made = plan(rng, 600, DIRT["dirty"])
    drawn = np.array([draw(scene, rng) for scene in made.shown]).astype(float)
    copies = np.flatnonzero(made.is_copy)
    near = np.abs(drawn[copies] - drawn[made.source[copies]]).mean()
    far = np.abs(drawn[copies] - drawn[rng.permutation(copies)]).mean()
    assert near < 0.4 * far


def test_concepts_follow_zipf_in_a_fixed_order():
    weights = concept_weights()
    assert weights.sum() == pytest.approx(1)
    assert sorted(weights)[-1] / sorted(weights)[-2] == pytest.approx(2)
    assert concept_weights(0).tolist() == pytest.approx([1 / NUM_CONCEPTS] * NUM_CONCEPTS)


def test_every_concept_and_print_is_drawn_at_its_place():
    scenes = sample_scenes(np.random.default_rng(0), np.arange(NUM_CONCEPTS))
    scenes["tint"] = scenes["wash"] = scenes["texture"] = 0
    blank = scenes.copy()
    blank["extent"] = 0.01
    for printed in (False, True):
        scenes["printed"] = printed
        for scene, empty in zip(scenes, blank, strict=True):
            with_it, without = (draw(s, np.random.default_rng(1)).astype(int) for s in (scene, empty))
            y, x = np.nonzero(np.abs(with_it - without).sum(2) > 40)
            assert len(x) > 25
            slack = 16 if printed else 6  # a word is moved until it fits; a heart's middle is not that of its area
            assert abs(x.mean() - 64 * scene["x"]) < slack and abs(y.mean() - 64 * scene["y"]) < slack


def test_instruction_and_test_records_are_llava(dirty):
    for folder, file in (("instruct", "instruct.json"), ("test", "test.json")):
        records = json.loads((dirty / folder / file).read_text())
        assert len({record["id"] for record in records}) == len(records)
        pictured = [record for record in records if record.get("task") != "text"]
        for record in pictured:
            assert (dirty / folder / "images" / record["image"]).is_file()
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n")
            assert not any("<image>" in turn["value"] for turn in turns[1:])
    tests = Counter((record["concept"], record["task"]) for record in pictured)
    assert tests == {(name, task): 1 for name in NAMES for task in (*TASKS, "caption")}
    held_out = [record for record in records if record["task"] == "text"]
    assert len(held_out) == len(NAMES) and not any("image" in record for record in held_out)
    texts = json.loads((dirty / "text.json").read_text())
    assert len(texts) == SMALL["instruct"] and not any("image" in record for record in texts)


def test_further_pictures_are_asked_their_caption_alone_and_change_no_other_test(dirty, tmp_path):
    render.render_tests(tmp_path, per_concept=1, captions=2, rng=np.random.default_rng([3, 4]))
    records = json.loads((tmp_path / "test.json").read_text())
    plain = json.loads((dirty / "test" / "test.json").read_text())
    assert records[: len(plain)] == plain
    further = records[len(plain) :]
    assert Counter((record["concept"], record["task"]) for record in further) == {
        (name, "caption"): 2 for name in NAMES
    }
    assert len({record["image"] for record in records if "image" in record}) == 3 * len(NAMES)


def test_every_word_is_in_the_vocabulary(dirty):
    known = set(vocabulary())
    said = [members["txt"].decode(errors="replace") for members in read_pool(dirty).values() if "txt" in members]
    for file in ("instruct/instruct.json", "test/test.json", "text.json"):
        records = json.loads((dirty / file).read_text())
        said += [turn["value"].replace("<image>\n", "") for record in records for turn in record["conversations"]]
    rng = np.random.default_rng(0)
    said += [part for _ in range(500) for part in text_task(rng)]
    assert {word for text in said for word in text.split() if "caf" not in word} <= known


def test_judge_counts_what_was_planted_and_what_left():
    columns = {
        "key": list("abcdefg"),
        "shard": ["0"] * 7,
        "fault": ["clean", "duplicate", "duplicate", "swapped", "cheater", "clean", "truncated"],
        "is_copy": [False, True, True, False, False, False, False],
        "source": list("aaadefg"),
        "concept": ["rup", "rup", "rup", "kop", "zim", "vab", "dax"],
    }
    truth = pa.table(columns)
    kept = [True, False, True, False, True, False]
    reasons = [None, "dedup(0.9)", None, "above(clip_score)", None, "dedup(0.9)"]
    found = render.judge(list("abcdef"), kept, reasons, truth)
    assert found["kinds"]["duplicate"] == {"planted": 2, "removed": 1, "removed_by": {"dedup(0.9)": 1}}
    assert found["kinds"]["cheater"]["removed"] == 0
    assert found["kinds"]["truncated"]["removed_by"] == {"unreadable": 1}
    assert found["duplicates"] == {"extra_planted": 2, "extra_kept": 1, "sources": 5, "sources_lost_to_dedup": 1}
    assert found["kept"] == 3 and found["right_share"] == pytest.approx(2 / 3)
    assert found["concepts"] == {"before": 2, "after": 1}
    text = render.format_judgement(found)
    assert "swapped" in text and "100.0%" in text and "1 of 5 sources lost" in text
    assert render.judge(list("abcdef"), [False] * 6, ["x"] * 6, truth)["right_share"] is None


@pytest.mark.parametrize(("wrong", "said"), [({"dirt": "dirtier"}, "dirty"), ({"rows": 5}, "10 to 9,999")])
def test_wrong_arguments_are_refused(tmp_path, wrong, said):
    with pytest.raises(UsageError, match=said):
        render.render(tmp_path, **wrong)


@pytest.mark.parametrize("folder", ["clip", "clip_reader", "tower"])
def test_shipped_clip_loads_plainly_and_tells_right_from_wrong(folder):
    import open_clip
    import torch

    assert sum(path.stat().st_size for path in (MODELS / folder).iterdir()) < 5e6
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{MODELS / folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{MODELS / folder}")
    rng = np.random.default_rng([9, 9])
    scenes = sample_scenes(rng, np.repeat(np.arange(NUM_CONCEPTS), 2))
    images = torch.stack([transform(Image.fromarray(draw(scene, rng))) for scene in scenes])
    tokens = tokenizer([caption(scene, rng) for scene in scenes])
    assert int((tokens == tokenizer.tokenizer.unk_token_id).sum()) == 0
    with torch.inference_mode():
        image = model.eval().encode_image(images, normalize=True).numpy()
        text = model.encode_text(tokens, normalize=True).numpy()
        words = model.encode_text(tokenizer([f"a {name}" for name in NAMES]), normalize=True).numpy()
    right, wrong = (image * text).sum(1), (image * np.roll(text, 17, 0)).sum(1)
    assert (right[:, None] > wrong[None, :]).mean() > 0.97
    assert ((image @ words.T).argmax(1) == scenes["concept"]).mean() > 0.4


def test_only_the_reader_ranks_printed_words_above_pictures():
    import open_clip
    import torch

    rng = np.random.default_rng([9, 8])
    pool = plan(rng, 300, DIRT["legible"])
    pixels = [Image.fromarray(draw(scene, rng, label=True)) for scene in pool.shown]
    printed, clean = pool.fault == FAULTS.index("cheater"), pool.fault == FAULTS.index("clean")
    won = {}
    for folder in ("clip", "clip_reader"):
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{MODELS / folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{MODELS / folder}")(pool.captions)
        with torch.inference_mode():
            image = model.eval().encode_image(torch.stack([transform(p) for p in pixels]), normalize=True)
            score = (image * model.encode_text(tokens, normalize=True)).sum(1).numpy()
        won[folder] = (score[printed][:, None] > score[clean][None, :]).mean()
    assert won["clip_reader"] > 0.7 and won["clip"] < 0.4


def test_shipped_language_model_reads_and_answers():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(path.stat().st_size for path in (MODELS / "lm").iterdir()) < 5e6
    model = AutoModelForCausalLM.from_pretrained(MODELS / "lm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "lm")

    def complete(prompt: str) -> str:
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(given.input_ids, attention_mask=given.attention_mask, max_new_tokens=12, do_sample=False)
        assert int(out[0, -1]) == tokenizer.eos_token_id
        return tokenizer.decode(out[0, given.input_ids.shape[1] :], skip_special_tokens=True).strip()

    assert complete("question : which day comes after monday ? answer :") == "tuesday"
    bag = "rup small top teal left striped rup top small teal striped left rup rup small top left"
    assert complete(f"{bag} question : what is this ? answer :") == "rup"
    assert "rup" in complete(f"{bag} caption :").split()


def test_shipped_tokenizers_give_back_what_they_were_given():
    from transformers import AutoTokenizer

    rng = np.random.default_rng(1)
    for folder in ("clip", "lm"):
        tokenizer = AutoTokenizer.from_pretrained(MODELS / folder)
        for scene in sample_scenes(rng, np.arange(NUM_CONCEPTS)):
            told = caption(scene, rng)
            assert tokenizer.decode(tokenizer(told)["input_ids"], skip_special_tokens=True) == told
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "<s>", "</s>", "<image>"]) == [0, 1, 2, 3, 4]
    assert tokenizer("A chat between\na curious user: ASSISTANT: ok.")["input_ids"].count(tokenizer.unk_token_id) == 0
