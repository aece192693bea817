"""Real language models with a real vision network: trained, resumed, exported, asked. `make test-real`.

The folder that REAL_MODELS names holds efficientnet/ (timm), smollm2-135m/ and gemma3-270m/ (transformers).
"""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_loop import losses, unfinish

from train import config as configuration
from train.data.prompts import Turn
from train.eval.generate import chat, load_speaker
from train.publish.export import export
from train.run.stage import run_stage

MODELS = Path(os.environ.get("REAL_MODELS", "no folder is named"))
LANGUAGE_MODELS = {"smollm2-135m": "chat", "gemma3-270m": "gemma"}  # the second is a base model, without a template
PICTURES = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
pytestmark = [
    pytest.mark.realweights,
    pytest.mark.skipif(not MODELS.is_dir(), reason="REAL_MODELS names no folder of real models; see `make test-real`"),
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twelve pictures of one colour and a question about it, as LLaVA JSON."""
    folder = tmp_path_factory.mktemp("questions")
    records = []
    for number in range(12):
        name = list(PICTURES)[number % 3]
        Image.new("RGB", (64, 48), PICTURES[name]).save(folder / f"{number}.png")
        turns = [("human", "<image>\nWhat colour is it?"), ("gpt", name)]
        conversations = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
def test_a_real_model_learns_goes_on_and_speaks(lm, questions, tmp_path):
    settings = [f"model.tower={MODELS / 'efficientnet'}", f"model.lm={MODELS / lm}", "model.feature_layer=-1"]
    settings += [f"model.template={LANGUAGE_MODELS[lm]}", "model.image=squash", "finetune.batch_size=3"]
    settings += ["finetune.lr=1e-3", "finetune.projector_lr=1e-3", "finetune.lora_rank=4", "finetune.lora_alpha=8"]
    settings += ["finetune.workers=0", "finetune.save_every=2", "finetune.cache_features_mb=64"]
    options = configuration.load(None, [*settings, "finetune.steps=8"])
    data, images = str(questions / "data.json"), str(questions)

    run_stage("finetune", options, data, tmp_path / "whole", images=images)
    whole = losses(tmp_path / "whole")
    assert all(map(math.isfinite, whole)) and len(whole) == 8 and whole[-1] < 0.5 * whole[0]
    again = unfinish(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "step-000008", ignore_errors=True)
    run_stage("finetune", options, data, again, images=images)
    assert losses(again) == whole

    export(again, tmp_path / "model", dtype="fp32")
    speaker = load_speaker(tmp_path / "model", torch.device("cpu"))
    shown = [Image.open(questions / f"{number}.png") for number in range(3)]
    asked = [[Turn("user", (None, "What colour is it?"))]] * 3
    answers = speaker.answers(asked, [[image] for image in shown], 4)
    assert all(any(name in answer.lower() for name in PICTURES) for answer in answers), answers
    said = []
    chat(tmp_path / "model", str(questions / "0.png"), iter(["What colour is it?", "Are you sure?"]), said.append, 4)
    assert len(said) == 2 and said[0] == answers[0]
