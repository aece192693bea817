"""The shipped pipelines say what the papers did: bases resolve, numbers agree with a table, mixes come out in count."""

import pytest

import pipelines
from curate import pipeline
from curate.errors import UsageError
from curate.mix import read_table
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
