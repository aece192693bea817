"""The artefact: loaded by transformers alone, equal to what was trained, and named as others expect."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toys import conversation, picture, sample, write_captions, write_mixed

from train import config as configuration
from train.data import decode_image, encode, open_source
from train.errors import TrainError, UsageError
from train.evaluate import Question, batches, collect, concept_of, evaluate, normalise
from train.export import export, llava_hf_name, merge
from train.generate import ask, chat, load_speaker
from train.model import compose, hidden_states, prepare, tower_features
from train.prompts import Turn, parse, to_messages
from train.stages import make_encoder, run_stage

TOWERS, LMS = ("clip", "siglip", "dinov2"), ("phi", "gemma", "stablelm", "phi3", "llama", "qwen2")


def train(config, data, out, stage="finetune", settings=(), **more):
    options = configuration.load(str(config), settings)
    run_stage(stage, options, str(data), out, **more)
    return options


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    train(world / "config.toml", world / "mixed", out)
    return out


@pytest.fixture(scope="module")
def model(run):
    out = run.parent / "model"
    export(run, out, dtype="fp32")
    return out


def trained_logits(world, run, ids, pixels):
    """Logits of the model as it stood in training, adapters unmerged."""
    from train.checkpoint import load_trained

    options = configuration.load(str(world / "config.toml"))
    composed = compose(options.model)
    trainable = prepare(composed, options.finetune)
    with torch.no_grad():
        for name, tensor in load_trained(run).items():
            trainable[name].copy_(tensor)
    composed.model.eval()
    positions = torch.arange(ids.shape[1])[None]
    return composed.model.lm_head(hidden_states(composed, ids, positions, tower_features(composed, pixels)))


def test_transformers_alone_gives_equal_logits(world, run, model, tmp_path):
    """In a process that cannot import this project."""
    image = tmp_path / "x.jpg"
    image.write_bytes(picture("red", True, 0))
    script = """
import sys, torch, numpy
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, out = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
processor = AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it ?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open(image), text=text, return_tensors="pt")
assert "train" not in sys.modules
numpy.savez(out, ids=inputs["input_ids"].numpy(), logits=model(**inputs).logits.detach().numpy())
"""
    arguments = [sys.executable, "-c", script, str(model), str(image), str(tmp_path / "out.npz")]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr
    served = np.load(tmp_path / "out.npz")
    ids = torch.from_numpy(served["ids"])
    options = configuration.load(str(world / "config.toml"))
    composed = compose(options.model)
    encoder = make_encoder(composed, options.model, options.finetune)
    assert encoder.prompt([Turn("user", (None, "what colour is it ?"))]) == ids[0].tolist()
    from train.tower import make_image_processor

    processor = make_image_processor(composed.vision)
    pixels = processor([decode_image(image.read_bytes())], do_rescale=False, do_normalize=False, return_tensors="np")
    expected = trained_logits(world, run, ids, torch.from_numpy(pixels["pixel_values"])).detach()
    torch.testing.assert_close(torch.from_numpy(served["logits"]), expected, rtol=0, atol=1e-4)


def test_names_and_settings_are_those_of_llava_hf(model):
    names = set(load_file(model / "model.safetensors"))
    assert {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",  # blocks that training cut are exported
        "multi_modal_projector.linear_1.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
    } <= names
    assert not any("lora" in name or name.startswith("model.") for name in names)
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert (config["vision_feature_select_strategy"], config["image_seq_length"]) == ("full", 5)
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 2
    assert str(model.parent) not in (model / "train_manifest.json").read_text()


def test_head_is_named_under_the_language_model():
    assert llava_hf_name("lm_head.weight", "clip_vision_model") == "language_model.lm_head.weight"
    assert llava_hf_name("model.vision_tower.layernorm.weight", "dinov2") == "vision_tower.layernorm.weight"


def test_the_processor_gives_the_ids_of_training(world, model):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    options = configuration.load(str(world / "config.toml"))
    encoder = make_encoder(compose(options.model), options.model, options.finetune)
    source = open_source(str(world / "mixed"))
    for index in range(5):
        record, encoded = encode(source, encoder, index, 64)
        messages = to_messages(parse(record.conversations, len(record.images)))
        images = [decode_image(source.image_bytes(location)) for location in record.images]
        text = processor.apply_chat_template(messages)
        ids = processor(text=text, images=images or None, return_tensors="np", add_special_tokens=False)["input_ids"]
        assert ids[0].tolist() == encoded.ids.tolist()


def test_the_adapter_loads_in_peft(world, run):
    from peft import PeftModel

    from train.checkpoint import load_trained

    options = configuration.load(str(world / "config.toml"))
    loaded = PeftModel.from_pretrained(compose(options.model).model, run / "adapter")
    ours = {name: tensor for name, tensor in load_trained(run).items() if "lora_" in name}
    theirs = {name.removeprefix("base_model.model."): p for name, p in loaded.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("tower", "lm"), zip(TOWERS * 2, LMS, strict=True))
def test_every_class_trains_exports_and_answers(tmp_path, world, tower, lm):
    import transformers as tf

    vocabulary = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    towers = {"clip": tf.CLIPVisionConfig, "siglip": tf.SiglipVisionConfig, "dinov2": tf.Dinov2Config}
    lms = {"phi": tf.PhiConfig, "gemma": tf.GemmaConfig, "stablelm": tf.StableLmConfig, "phi3": tf.Phi3Config}
    lms |= {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config}
    towers[tower](image_size=224, patch_size=14).save_pretrained(tmp_path / "tower")
    lms[lm](**vocabulary).save_pretrained(tmp_path / "lm")
    config = tmp_path / "c.toml"
    config.write_text(
        f'[model]\ntower = "{{here}}/tower"\nlm = "{{here}}/lm"\ntokenizer = "{world}/lm"\nshrink = "tiny"\n'
        'template = "qa"\nmax_length = 64\n'
        '[align]\ntemplate = "plain"\nsteps = 1\nbatch_size = 4\nworkers = 0\n'
        "[finetune]\nsteps = 1\nbatch_size = 4\nlora_rank = 2\nworkers = 0\n"
    )
    train(config, world / "captions", tmp_path / "align", "align")
    train(config, world / "mixed", tmp_path / "tuned", align=tmp_path / "align")
    export(tmp_path / "tuned", tmp_path / "model", dtype="fp32")
    (tmp_path / "x.png").write_bytes(picture("red", True, 0))
    assert isinstance(ask(tmp_path / "model", str(tmp_path / "x.png"), "what colour is it ?", 4), str)


def test_a_batch_answers_as_one_by_one(world, model):
    speaker = load_speaker(model)
    questions = [[Turn("user", (None, "what colour is it ?"))], [Turn("user", ("what comes after monday ?",))]]
    questions.append([Turn("user", (None, "how big is it on the dark square ?"))])
    images = [[decode_image(picture("red", True, 0))], [], [decode_image(picture("blue", False, 1))]]
    together = speaker.answers(questions, images, 6)
    assert together == [speaker.answers([q], [i], 6)[0] for q, i in zip(questions, images, strict=True)]


def test_the_loss_of_a_true_answer_is_that_of_a_plain_forward(world, model):
    """Two by themselves, unpadded, the answer's tokens found by encoding it alone."""
    speaker = load_speaker(model)
    asked = [
        [Turn("user", (None, "what colour is it ?"))],
        [Turn("user", (None, "how big is it on the dark square ?"))],
    ]
    images, truths = (
        [[decode_image(picture("red", True, 0))], [decode_image(picture("blue", False, 1))]],
        ["red", "big"],
    )
    together = speaker.truth_losses(asked, images, truths)
    for turns, own, truth, (loss, tokens) in zip(asked, images, truths, together, strict=True):
        text = speaker.processor.apply_chat_template(to_messages(turns), add_generation_prompt=True)
        inputs = speaker.processor(text=text, images=own, return_tensors="pt", add_special_tokens=False)
        tokenizer = speaker.processor.tokenizer
        answer = [*tokenizer(f" {truth}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        with torch.inference_mode():
            logits = speaker.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
        logs = logits.log_softmax(-1)[-len(answer) - 1 : -1]
        assert tokens == len(answer)
        assert loss == pytest.approx(-float(sum(logs[i, t] for i, t in enumerate(answer))), rel=1e-4)


def test_pictures_and_text_do_not_share_a_batch():
    kinds = [Question("", "", "", (), images, "") for images in ((1,), (1,), (1,), (), (), (1,))]
    assert [[len(q.images) for q in batch] for batch in batches(kinds, 2)] == [[1, 1], [1], [0, 0], [1]]


def test_a_conversation_goes_on(model, tmp_path):
    (tmp_path / "x.jpg").write_bytes(picture("red", True, 0))
    said = []
    chat(model, str(tmp_path / "x.jpg"), iter(["what colour is it ?", "how big ?"]), said.append, 4)
    assert len(said) == 2


def test_learns_what_it_is_shown(world, tmp_path):
    """All of the language model, on four colours: held-out pictures are named, by the rule of the caption task too."""
    settings = ["finetune.tune=full", "finetune.steps=150", "finetune.lr=3e-3", "finetune.projector_lr=3e-3"]
    settings += ["finetune.batch_size=16", "finetune.cache_features_mb=10"]
    train(world / "config.toml", write_captions(tmp_path / "c", 64), tmp_path / "run", settings=settings)
    export(tmp_path / "run", tmp_path / "model", dtype="fp32")
    (tmp_path / "images").mkdir()
    records = []
    for i in range(100, 112):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(picture(*sample(i), i))
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a {sample(i)[0]} square"}]
        record = {"id": str(i), "image": f"{i}.jpg", "conversations": turns, "task": "caption", "concept": sample(i)[0]}
        records.append(record)
    (tmp_path / "test.json").write_text(json.dumps(records))
    summary = evaluate(tmp_path / "model", str(tmp_path / "test.json"), tmp_path / "answers.jsonl", batch_size=5)
    assert summary["tasks"]["caption"] == {key: summary[key] for key in ("questions", "accuracy", "perplexity")}
    assert summary["questions"] == 12 and summary["perplexity"] > 1
    assert summary["accuracy"] >= 0.75
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [record["id"] for record in records]


def test_scoring_rules():
    assert normalise(" Red. ") == "red"
    assert concept_of("a small BLUE, red square", {"red", "blue"}) == "blue" and concept_of("nothing", {"red"}) == ""


def test_every_answer_turn_is_a_question(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.jpg").write_bytes(picture("red", True, 0))
    (tmp_path / "d.json").write_text(json.dumps([conversation(0), conversation(1), conversation(4)]))
    questions, skipped = collect(open_source(str(tmp_path / "d.json")))
    assert [(q.key, q.truth, len(q.turns)) for q in questions] == [
        ("v0", "red", 1),
        ("v0", "big", 3),
        ("t4", "tuesday", 1),
    ]
    assert skipped == 1 and len(collect(open_source(str(tmp_path / "d.json")), limit=1)[0]) == 1


def test_merge_is_the_weighted_average(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import save_file

    first = load_file(model / "model.safetensors")
    save_file({k: v + 1 for k, v in first.items()}, other / "model.safetensors", metadata={"format": "pt"})
    merge([model, other], [0.25, 0.75], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == first.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(merged[name], tensor + 0.75)
    load_speaker(tmp_path / "merged")
    with pytest.raises(UsageError, match="sum to 1"):
        merge([model, other], [0.5, 0.6], tmp_path / "again")


def test_a_changed_base_is_refused(world, tmp_path):
    import shutil

    shutil.copytree(world / "lm", tmp_path / "lm")
    settings = [f"model.lm={tmp_path}/lm", "finetune.steps=1"]
    train(world / "config.toml", write_mixed(tmp_path / "m", 10), tmp_path / "run", settings=settings)
    from safetensors.torch import save_file

    weights = load_file(tmp_path / "lm" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainError, match="have changed since"):
        export(tmp_path / "run", tmp_path / "model", dtype="fp32")


def test_export_never_clears_a_foreign_folder(run, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        export(run, tmp_path, dtype="fp32", overwrite=True)
    with pytest.raises(UsageError, match="not a finished run"):
        export(Path("nowhere"), tmp_path / "out", dtype="fp32")
