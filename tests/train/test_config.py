import pytest

from train.config import load
from train.errors import UsageError


def write(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return str(path)


def test_reads_tables_expands_here_and_overrides(tmp_path):
    path = write(tmp_path, '[model]\nlm = "{here}/lm"\n[embed]\nmodel = "x"\n[align]\nlr = 1\nbetas = [0.9, 0.98]\n')
    config = load(path, ["align.steps=7", "model.template=gemma", "embed.batch=3", "finetune.packing=false"])
    assert config.model.lm == f"{tmp_path}/lm" and config.model.template == "gemma"
    assert config.align.lr == 1.0 and config.align.betas == (0.9, 0.98) and config.align.steps == 7
    shares = load(write(tmp_path, "[finetune]\nval = 0.02\n"), ["align.val=0.1"])
    assert (shares.finetune.val, shares.align.val) == ("0.02", "0.1")
    assert load(write(tmp_path, "[finetune]\nval = 0"), []).finetune.val == "", "none"
    assert config.finetune.tune == "lora" and config.finetune.packing is False and config.align.tune == "projector"


@pytest.mark.parametrize(
    ("text", "overrides", "word"),
    [
        ("[model]\ntowr = 'x'", [], "did you mean 'tower'"),
        ("[algin]\nlr = 1", [], "did you mean [align]"),
        ("[align]\nlr = 'fast'", [], "align.lr='fast' is not a number"),
        ("[align]\nsteps = true", [], "align.steps=True is not a whole number"),
        ("[align]\nlr = -1.0", [], "greater than 0"),
        ("[finetune]\ntune = 'lota'", [], "is not one of projector, lora, full"),
        ("align = 3", [], "[align] is 3, not a table"),
        ("", ["align.betas=[0.9]"], "is not a list of 2 numbers"),
        ("", ["eval.published={pope='x'}"], "is not a table of numbers"),
        ("", ["align.lr.x=1"], "is not a number"),
        ("[align]\nlr=1", ["align.lr.x=1"], "lr is a value, not a table"),
        ("[align]\ntune_tower = true", [], "needs align.tune"),
        ("[align\n", [], "not valid TOML"),
        ("", ["lr=1"], "table.key=value"),
        ("", ["align.lrr=1"], "did you mean 'lr'"),
        ("", ["aling.lr=1"], "did you mean 'align'"),
        ("", ["stage.lr=1"], "unknown table 'stage'"),
        ("", ["align.lr=nan"], "align.lr=nan is not a finite number"),
        ("", ["align.betas=[0.9, 1.0]"], "must lie in [0, 1)"),
        ("", ["generate.max_new_tokens=0"], "greater than 0"),
        ("", ["align.seed=-5"], "align.seed = -5 must lie in [0, 2^63)"),
        ("", ["align.epochs=1e300"], "align.epochs = 1e+300 must be at most 100,000"),
        ("", [f"model.seed={2**63}"], "must lie between"),
        ("", ["model.image_token="], "must name a token"),
    ],
)
def test_refuses_with_one_helpful_line(tmp_path, text, overrides, word):
    with pytest.raises(UsageError, match=".*") as error:
        load(write(tmp_path, text), overrides)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(UsageError, match="no configuration file"):
        load("nowhere.toml")
    with pytest.raises(UsageError, match="--config pipelines cannot be read"):
        load("pipelines")
