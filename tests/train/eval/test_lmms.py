"""The model that lmms-eval finds by our entry point: an exported folder and a run answer as `train eval` does.

Runs where lmms-eval is installed beside this package (train/README.md, lmms-eval): `lmms/bin/python -m pytest …`.
"""

from types import SimpleNamespace

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here")

from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: E402

from train.config import load  # noqa: E402
from train.data.prompts import Turn  # noqa: E402
from train.errors import UsageError  # noqa: E402
from train.eval import (
    evaluate,  # noqa: E402
    generate,  # noqa: E402
)


def requests(docs):
    def to_messages(doc):
        pictures = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["text"]}]}]

    settings = {"max_new_tokens": 4, "until": ["\n\n"]}
    found = [SimpleNamespace(args=("", to_messages, dict(settings), n, "toy", "test")) for n in range(len(docs))]
    return found, {"toy": {"test": docs}}


def test_a_run_and_its_export_answer_alike(world, tmp_path):
    from train.publish.export import export
    from train.run.stage import run_stage

    options = load(str(world / "config.toml"), ["align.steps=2"])
    run_stage("align", options, str(world / "captions"), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model", dtype="fp32")
    source = evaluate.open_source(str(world / "llava" / "data.json"), None)
    asked, _ = evaluate.collect(source, 7)
    pictures = [[evaluate.decode_image(source.image_bytes(place)) for place in one.images] for one in asked]
    docs = [{"images": images, "text": one.turns[-1].text} for one, images in zip(asked, pictures, strict=True)]
    docs.insert(3, {"images": [], "text": "what colour is it ?"})
    speaker = generate.load_speaker(tmp_path / "model")
    wanted = [
        speaker.answers([[Turn("user", (*((None,) * len(doc["images"])), doc["text"]))]], [doc["images"]], 4)[0]
        for doc in docs
    ]
    model = MODEL_REGISTRY_V2.get_model_class("data_curate")
    said = []
    for pretrained, batch_size in ((tmp_path / "model", 1), (tmp_path / "model", 3), (tmp_path / "run", 4)):
        made = model(str(pretrained), batch_size=batch_size, dtype="fp32")
        asked, made.task_dict = requests(docs)
        said.append(made.generate_until(asked))
    assert wanted == said[0] == said[1] == said[2] and len(said[0]) == 8
    with pytest.raises(UsageError, match="neither an exported model nor a finished"):
        model(str(tmp_path))
