"""The shipped mixes write the papers' sets: counts asserted by folder, held to files of a hundredth of the size."""

import json

import pytest
from artefacts import picture

import pipelines
from curate.engine import Job
from curate.errors import ContractError, UsageError
from curate.mix.mix import mix
from curate.run import pipeline

# Records by folder of mix-665K; SVIT's differs by 157,712 records of Visual Genome in the place of as many of COCO.
MIX_665K = {"coco": 364_100, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 86_417, "text": 40_688}
SVIT_665K = {**MIX_665K, "coco": 364_100 - 157_712, "vg": 86_417 + 157_712}
SIZES = {
    "mix_665k": 665_298,
    "svit_mix_665k": 665_298,
    "bunny_695k": 694_610,
    "bunny_llava_1_4m": 694_610 + 665_298,
    "lcs_558k": 558_128,
    "cc3m_595k": 595_375,
}
PREFIX = {
    "coco": "coco/train2017/{:012d}.jpg",
    "gqa": "gqa/images/{}.jpg",
    "ocr_vqa": "ocr_vqa/images/{}.jpg",
    "textvqa": "textvqa/train_images/{}.jpg",
    "vg": "vg/VG_100K/{}.jpg",
}
SCALE, STUBS = 100, 7


def scaled(table):
    return {key: round(number / SCALE) for key, number in table.items()}


def talk(number, image):
    asked = {"from": "human", "value": ("<image>\n" if image else "") + f"What is {number}?"}
    return [asked, {"from": "gpt", "value": f"It is {number}."}]


def stub(root, name):
    path = root / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(len(name), side=8))
    return name


def write_instructions(path, images, table):
    """Write LLaVA's form: ids of both kinds, and text-only records with ShareGPT's stray field, last in the file."""
    made = []
    for folder, number in scaled(table).items():
        for index in range(number):
            if folder == "text":
                made.append({"id": f"share_{index}", "model": "", "conversations": talk(index, False)})
                continue
            image = stub(images, PREFIX[folder].format(index % STUBS))
            made.append({"id": index if folder == "vg" else f"{folder}{index}", "image": image})
            made[-1]["conversations"] = talk(index, True)
    path.write_text(json.dumps(made))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files with the published ones' schemas and a hundredth of their records, in the layout of README.md's table."""
    data = tmp_path_factory.mktemp("published") / "data"
    images = data / "images"
    images.mkdir(parents=True)
    write_instructions(data / "llava_v1_5_mix665k.json", images, MIX_665K)
    write_instructions(data / "SVIT_mix_665K.json", images, SVIT_665K)
    wizard = [{"instruction": f"Do {n}.", "output": f"{n} is done."} for n in range(70_000 // SCALE)]
    (data / "alpaca_evol_instruct_70k.json").write_text(json.dumps(wizard))
    for name, folder in (("LAION", "allava_laion/images"), ("VFLAN", "allava_vflan/images/images_191task_1k")):
        made = [
            {"id": f"{name}_{n}", "image": stub(images, f"{folder}/{n % STUBS}.jpeg"), "conversations": talk(n, True)}
            for n in range(40)
        ]
        (data / f"ALLaVA-Instruct-{name}-4V.json").write_text(json.dumps(made))
    for path, folder, image, number in (
        ("blip_laion_cc_sbu_558k.json", "lcs_558k", "{0:05d}/{0}.jpg", 558_128),
        ("chat.json", "cc3m", "GCC_train_{0:09d}.jpg", 595_375),
    ):
        captions = [
            {"id": f"{n:09d}", "image": stub(data / folder, image.format(n % STUBS)), "conversations": talk(n, True)}
            for n in range(round(number / SCALE))
        ]
        (data / path).write_text(json.dumps(captions))
    return data.parent


def mixed(name, out, root):
    """Mix by a shipped pipeline, with paths under root and the expected counts scaled, as `--set` would."""
    settings = ['mix.format="llava"']
    for source, table in pipelines.read(pipeline.find(name))["mix"]["sources"].items():
        settings += [f"mix.sources.{source}.{key}={root / table[key]}" for key in ("path", "images") if key in table]
        expect = table.get("expect")
        parts = scaled(expect) if isinstance(expect, dict) else {}
        settings += [f"mix.sources.{source}.expect.{folder}={number}" for folder, number in parts.items()]
        settings += [f"mix.sources.{source}.expect={round(expect / SCALE)}"] if isinstance(expect, int) else []
    plan = pipeline.load(name, None, settings=settings)
    return mix(plan.tables["mix"], str(out), Job(workers=1, quiet=True))


@pytest.mark.parametrize("name", SIZES)
def test_what_is_expected_adds_up_to_the_papers_sizes(name):
    sizes = []
    for table in pipelines.read(pipeline.find(name))["mix"]["sources"].values():
        expect = table["expect"] if isinstance(table["expect"], dict) else {"": table["expect"]}
        sizes.append(sum(number for key, number in expect.items() if (key, table.get("only")) != ("text", "image")))
    assert sum(sizes) == SIZES[name]


@pytest.mark.parametrize("name", [*SIZES, "bunny_allava_1_3m", "bunny_llava_allava_2m"])
def test_a_set_comes_out_of_its_published_files_in_count(name, published, tmp_path):
    manifest = mixed(name, tmp_path / "mix", published)
    llava, svit = scaled(MIX_665K), scaled(SVIT_665K)
    wanted = {
        "llava": sum(llava.values()),
        "svit": sum(svit.values()) - (0 if name.startswith("svit") else svit["text"]),
        "wizardlm": 700,
        "allava_laion": 40,
        "allava_vflan": 40,
        "lcs": 5_581,
        "cc3m": 5_954,
    }
    found = {source: entry["samples"] for source, entry in manifest["sources"].items()}
    assert found == {source: wanted[source] for source in found}
    text = {"llava": llava["text"], "svit": svit["text"] if name.startswith("svit") else 0, "wizardlm": 700}
    assert manifest["counts"]["text_only"] == sum(text.get(source, 0) for source in found)
    assert (
        manifest["counts"]["rows"] == sum(found.values()) == len(json.loads((tmp_path / "mix/mix.json").read_bytes()))
    )
    if name in SIZES:
        assert abs(SIZES[name] / SCALE - manifest["counts"]["rows"]) <= 3  # of rounding, folder by folder


def test_a_file_with_other_counts_is_refused_by_folder(published, tmp_path):
    root = tmp_path / "other"
    (root / "data").mkdir(parents=True)
    (root / "data" / "images").symlink_to(published / "data" / "images")
    held = json.loads((published / "data" / "llava_v1_5_mix665k.json").read_text())
    moved = [{**record, "image": stub(published / "data" / "images", "attic/0.jpg")} for record in held[:2]]
    for records, said in (
        (held[1:], "has 3,640 records in coco, expected 3,641"),
        ([*held, {**held[-1], "id": "more"}], "has 408 records in text, expected 407"),
        (moved + held, "has 2 records in elsewhere, expected 0"),
    ):
        (root / "data" / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
        with pytest.raises(ContractError, match=said):
            mixed("mix_665k", tmp_path / said[:5] / str(len(records)), root)
    with pytest.raises(UsageError, match="whole numbers"):
        mix({"sources": {"x": {"path": "x.json", "expect": {"coco": "many"}}}}, str(tmp_path / "x"), Job())
