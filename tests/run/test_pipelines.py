"""The shipped pipelines say what the papers did: bases resolve, numbers agree with a table, mixes come out in count."""

import json
import tomllib

import pytest

import pipelines
from curate.errors import UsageError
from curate.mix.mix import read_table
from curate.run import pipeline
from house import ROOT, Command
from train import config
from train.errors import UsageError as TrainerUsageError

# ---- bases ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_says_only_what_its_base_does_not(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "root.toml").write_text(
        'about = "root"\n[model]\ntower = "{here}/tower"\nlm = "a"\n'
        '[align]\nlr = 5e-4\n[mix.sources.x]\npath = "{here}/x.json"\n'
    )
    (tmp_path / "other.toml").write_text('[model]\nlm = "b"\nmax_length = 7\n[mix.sources.y]\npath = "y.json"\n')
    own = 'base = ["deep/root.toml", "other.toml"]\nabout = "own"\n[finetune]\nlr = 1e-5\n'
    (tmp_path / "own.toml").write_text(own + '[mix.sources.y]\npath = "{here}/z.json"\n')
    path = str(tmp_path / "own.toml")
    plan, options = pipeline.load(path, None), config.load(path)
    assert plan.tables["about"] == "own" and "base" not in plan.tables
    assert (options.model.tower, options.model.lm) == (f"{tmp_path}/deep/tower", "b")
    assert (options.model.max_length, options.align.lr, options.finetune.lr) == (7, 5e-4, 1e-5)
    sources = {"x": {"path": f"{tmp_path}/deep/x.json"}, "y": {"path": f"{tmp_path}/z.json"}}
    assert plan.tables["mix"]["sources"] == read_table(path)["sources"] == sources


def test_a_pipeline_of_ones_own_may_stand_on_a_shipped_one(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "bunny.toml"\n[model]\nlm = "my/lm"\n')
    ours, shipped = config.load(str(tmp_path / "mine.toml")), config.load(str(pipeline.find("bunny")))
    assert ours.model.lm == "my/lm"
    assert (ours.model.tower, ours.align, ours.finetune) == (shipped.model.tower, shipped.align, shipped.finetune)


def test_neither_layer_is_changed_by_laying_them_over_each_other():
    lower, upper = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2], "e": {"f": 1}}
    assert pipelines.overlay(lower, upper) == {"a": {"b": 3, "c": 2}, "d": [2], "e": {"f": 1}}
    assert (lower, upper) == ({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2], "e": {"f": 1}})
    assert pipelines.overlay({}, upper) == upper and pipelines.overlay(lower, {}) == lower


@pytest.mark.parametrize(
    "text, said",
    [
        ('base = "own.toml"', "leads back to itself"),
        ('base = "other.toml"', "leads back to itself"),
        ('base = "nowhere.toml"', "nowhere.toml"),
        ("base = 3", "3"),
        ("[model\n", "TOML"),
    ],
)
def test_a_base_that_cannot_be_had_is_refused_by_both_programs(tmp_path, text, said):
    (tmp_path / "own.toml").write_text(text)
    (tmp_path / "other.toml").write_text('base = "own.toml"')
    for refuse, error in ((config.load, TrainerUsageError), (read_table, UsageError)):
        with pytest.raises(error, match=said):
            refuse(str(tmp_path / "own.toml"))
    with pytest.raises(UsageError, match=said):
        pipeline.load(str(tmp_path / "own.toml"), None)


def test_unknown_keys_are_refused_wherever_they_stand(tmp_path):
    (tmp_path / "root.toml").write_text("[model]\nspeed = 3\n[embed]\nmodle = 1\n")
    (tmp_path / "own.toml").write_text('base = "root.toml"\n')
    with pytest.raises(TrainerUsageError, match="speed"):
        config.load(str(tmp_path / "own.toml"))
    with pytest.raises(UsageError, match="modle"):
        pipeline.load(str(tmp_path / "own.toml"), None)


# ---- numbers ---------------------------------------------------------------------------------------------------------

SIGLIP, CLIP = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336"
DINO, EVA = "facebook/dinov2-large", "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"
PHI3, LLAMA3 = "microsoft/Phi-3-mini-4k-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"
LORA = ("lora", 2e-4, 2e-5, 128, 256)
# pipeline: tower, lm, template, max_length; align lr; finetune tune, lr, projector_lr, rank, alpha; batches; tower
BUNNY = {
    "bunny": (SIGLIP, "microsoft/phi-2", "bunny", 2048, 5e-4, *LORA, 256, 128, False),
    "bunny_phi_2_eva": (EVA, "microsoft/phi-2", "bunny", 2048, 5e-5, *LORA, 256, 128, False),
    "bunny_phi_1_5_siglip": (SIGLIP, "microsoft/phi-1_5", "bunny", 2048, 5e-4, *LORA, 256, 128, False),
    "bunny_phi_1_5_eva": (EVA, "microsoft/phi-1_5", "bunny", 2048, 1e-3, *LORA, 256, 128, False),
    "bunny_stablelm_2_siglip": (SIGLIP, "stabilityai/stablelm-2-1_6b", "bunny", 2048, 5e-4, *LORA, 256, 128, False),
    "bunny_stablelm_2_eva": (EVA, "stabilityai/stablelm-2-1_6b", "bunny", 2048, 1e-3, *LORA, 256, 128, False),
    "bunny_qwen_1_5_siglip": (SIGLIP, "Qwen/Qwen1.5-1.8B", "bunny", 2048, 5e-4, *LORA, 256, 128, False),
    "bunny_minicpm_siglip": (SIGLIP, "openbmb/MiniCPM-2B-history", "minicpm", 2048, 5e-4, *LORA, 256, 128, False),
    "bunny_v1_0_4b": (SIGLIP, PHI3, "phi3", 4096, 1e-3, *LORA, 256, 128, False),
    "bunny_v1_0_4b_second": (SIGLIP, PHI3, "phi3", 4096, 1e-3, *LORA, 256, 128, True),
    "bunny_v1_1_4b": (SIGLIP, PHI3, "phi3", 4096, 1e-3, *LORA, 256, 128, False),
    "bunny_v1_1_4b_second": (SIGLIP, PHI3, "phi3", 4096, 1e-3, *LORA, 256, 128, True),
    "bunny_llama_3_8b": (SIGLIP, LLAMA3, "llama", 2048, 1e-3, *LORA, 256, 128, False),
    "bunny_llama_3_8b_second": (
        *(SIGLIP, LLAMA3, "llama", 2048, 1e-3),
        *("lora", 1e-4, 1e-5, 128, 256, 256, 128, True),
    ),
    "bunny_v1_1_llama_3_8b": (
        *(SIGLIP, LLAMA3, "llama", 4096, 1e-3),
        *("lora", 1e-4, 1e-5, 256, 256, 256, 128, False),
    ),
    "bunny_v1_1_llama_3_8b_second": (
        *(SIGLIP, LLAMA3, "llama", 4096, 1e-3),
        *("lora", 1e-4, 1e-5, 256, 256, 256, 128, True),
    ),
}
FULL = ("full", 2e-5, 2e-5, 128, 256)  # no rank, no alpha: those are the defaults
LLAVA = {
    "llava_1_5_7b": (CLIP, "lmsys/vicuna-7b-v1.5", "vicuna", 2048, 1e-3, *FULL, 256, 128, False),
    "llava_1_5_13b": (CLIP, "lmsys/vicuna-13b-v1.5", "vicuna", 2048, 1e-3, *FULL, 256, 128, False),
    "llava_1_5_7b_lora": (CLIP, "lmsys/vicuna-7b-v1.5", "vicuna", 2048, 1e-3, *LORA, 256, 128, False),
    "llava_1_5_13b_lora": (CLIP, "lmsys/vicuna-13b-v1.5", "vicuna", 2048, 1e-3, *LORA, 256, 128, False),
    "llava_phi": (CLIP, "microsoft/phi-2", "bunny", 2048, 1e-3, *FULL, 256, 256, False),
}
CELLS = {
    "llava_gemma": (CLIP, "2b", True),
    "llava_gemma_2b_clip_unaligned": (CLIP, "2b", False),
    "llava_gemma_2b_dino": (DINO, "2b", True),
    "llava_gemma_2b_dino_unaligned": (DINO, "2b", False),
    "llava_gemma_7b_clip": (CLIP, "7b", True),
    "llava_gemma_7b_clip_unaligned": (CLIP, "7b", False),
    "llava_gemma_7b_dino": (DINO, "7b", True),
    "llava_gemma_7b_dino_unaligned": (DINO, "7b", False),
}
GEMMA = {
    name: (tower, f"google/gemma-{size}-it", "gemma", 2048, 1e-3, *FULL, 256, 128, False)
    for name, (tower, size, _) in CELLS.items()
}
ROWS = {**BUNNY, **LLAVA, **GEMMA}
ABOUT_ALL = ("mme", "mme_cognition", "vqav2_test", "gqa", "sqa", "pope")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_papers_numbers(name):
    options = config.load(str(pipeline.find(name)))
    model, align, finetune = options.model, options.align, options.finetune
    found = (model.tower, model.lm, model.template, model.max_length, align.lr)
    found += (finetune.tune, finetune.lr, finetune.projector_lr, finetune.lora_rank, finetune.lora_alpha)
    assert (*found, align.batch_size, finetune.batch_size, finetune.tune_tower) == ROWS[name]
    assert align.tune == "projector"
    assert align.template == ("plain" if name not in GEMMA or not CELLS[name][2] else "gemma")
    assert align.epochs == finetune.epochs == 1 and align.warmup == finetune.warmup == 0.03
    assert finetune.lora_dropout == 0.05 and not align.tune_tower
    assert align.weight_decay == finetune.weight_decay == (0.1 if name == "llava_phi" else 0.0)
    assert model.image == "pad" and model.scales == (3 if "v1_1" in name else 1)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_states_its_own_published_scores(name):
    stated = tomllib.loads(pipeline.find(name).read_text())["eval"]["published"]
    wanted = {*ABOUT_ALL, "mmbench_test", "mmbench", "mmmu", "mmmu_test"} if name in BUNNY else {"pope", "mme"}
    assert wanted <= set(stated)
    assert pipeline.load(name, None).tables["eval"]["published"] == stated, "a score of the base shows through"
    assert all(0 < value < 100 for key, value in stated.items() if not key.startswith("mme"))


@pytest.mark.parametrize("name", CELLS)
def test_an_unaligned_cell_has_no_align_stage(name):
    plan = pipeline.load(name, None)
    stages = ["mix", *(["align"] if CELLS[name][2] else []), "finetune", "export"]
    assert plan.stages("train") == stages and plan.stages("eval") == ["eval"]
    plan.tables.setdefault("data", {})["eval"] = "test.json"
    assert plan.stages("train") == [*stages, "eval"]


def test_every_model_pipeline_is_in_the_table():
    named = {path.stem for path in pipeline.shipped().glob("[!a]*.toml") if "model" in pipelines.read(path)}
    assert named - {"demo", "photos", "real", "small"} == set(ROWS)


def check(name):
    """Tell what the trainer makes of a shipped pipeline."""
    checked = Command("train", "check", "--config", pipeline.find(name), "--json", cwd=ROOT)
    assert checked.wait() == 0, checked.stderr
    return json.loads(checked.stdout)


def test_the_recipe_for_one_gpu_is_checked_without_a_hub():
    said = check("small")["composed"]
    assert (said["tokens_per_image"], said["parameters"]) == (256, 1_026_168_256)
    assert said["limits"] == "" and said["template"].startswith("unknown: ")


@pytest.mark.parametrize("name", ["bunny", "llava_gemma"])
def test_the_trainer_checks_it_and_knows_its_scores(name):
    said = check(name)
    assert said["eval"]["published"]["pope"] > 80
    assert said["composed"]["tokens_per_image"] in (576, 729) and said["composed"]["parameters"] > 2e9
