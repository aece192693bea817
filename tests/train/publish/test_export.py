"""The artefact: loaded by transformers alone, equal to what was trained, and named as others expect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toys import assert_serves_the_ids_of_training, conversation, picture, sample, write_captions, write_mixed

from train import config as configuration
from train.config import Eval
from train.console import show_answers
from train.data.chat import to_messages
from train.data.prompts import Turn, pieces
from train.data.sources import decode_image, open_source
from train.errors import TrainError, UsageError
from train.eval import generate
from train.eval.evaluate import Question, batches, collect, concept_of, evaluate, normalise
from train.eval.generate import chat, load_speaker
from train.eval.layout import Layout
from train.model.compose import compose
from train.model.forward import hidden_states, tower_features
from train.model.learn import prepare
from train.publish.export import export, llava_hf_name, merge
from train.run.stage import make_encoder, run_stage


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


def trained_logits(world, run, ids, pixels, settings=()):
    """Logits of the model as it stood in training, adapters unmerged."""
    from train.run.checkpoint import load_trained

    options = configuration.load(str(world / "config.toml"), settings)
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
    asked = pieces([Turn("user", (None, "what colour is it ?"))], encoder.template, encoder.end_token)
    assert encoder.piece_ids(asked)[0] == ids[0].tolist()
    from train.model.tower import make_image_processor

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
    assert json.loads((model / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 2
    assert str(model.parent) not in (model / "train_manifest.json").read_text()


def test_head_is_named_under_the_language_model():
    assert llava_hf_name("lm_head.weight", "clip_vision_model") == "language_model.lm_head.weight"
    assert llava_hf_name("model.vision_tower.layernorm.weight", "dinov2") == "vision_tower.layernorm.weight"


def test_the_processor_gives_the_ids_of_training(world, model):
    from transformers import AutoProcessor

    options = configuration.load(str(world / "config.toml"))
    encoder = make_encoder(compose(options.model), options.model, options.finetune)
    assert_serves_the_ids_of_training(AutoProcessor.from_pretrained(model), world / "mixed", encoder, 5)


def test_the_adapter_loads_in_peft(world, run):
    from peft import PeftModel

    from train.run.checkpoint import load_trained

    options = configuration.load(str(world / "config.toml"))
    loaded = PeftModel.from_pretrained(compose(options.model).model, run / "adapter")
    ours = {name: tensor for name, tensor in load_trained(run).items() if "lora_" in name}
    theirs = {name.removeprefix("base_model.model."): p for name, p in loaded.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("settings", [["dora"], ["rslora"], ["dora", "rslora"]])
def test_doras_magnitudes_and_rsloras_scale_are_merged(world, tmp_path, settings):
    """PEFT's own switches; PEFT loads the adapter, and the export gives the logits of training."""
    from peft import PeftModel

    settings = [*(f"finetune.{name}=true" for name in settings), "finetune.steps=2"]
    options = train(world / "config.toml", world / "mixed", tmp_path / "run", settings=settings)
    export(tmp_path / "run", tmp_path / "model", dtype="fp32")
    composed = compose(options.model)
    ids = torch.tensor([[5, *[composed.image_id] * 5, 6, 7]])
    pixels = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = trained_logits(world, tmp_path / "run", ids, pixels, settings)
    speaker = load_speaker(tmp_path / "model")
    served = speaker.model(input_ids=ids, pixel_values=pixel_values(composed, pixels)).logits
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-4)
    loaded = PeftModel.from_pretrained(composed.model, tmp_path / "run" / "adapter")
    from train.run.checkpoint import load_trained

    ours = {name: tensor for name, tensor in load_trained(tmp_path / "run").items() if "lora_" in name}
    theirs = {name.removeprefix("base_model.model."): p for name, p in loaded.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("magnitude" in name for name in ours) == ("finetune.dora=true" in settings)


def test_scaled_features_are_folded_when_exported(world, tmp_path):
    """As transformers before 5.4 trained Gemmas: the factor acts in training, and the export needs to know nothing."""
    settings = ["model.scale_features=true", "finetune.steps=2"]
    options = train(world / "config.toml", world / "mixed", tmp_path / "run", settings=settings)
    export(tmp_path / "run", tmp_path / "model", dtype="fp32")
    speaker = load_speaker(tmp_path / "model")
    composed = compose(options.model)
    assert composed.feature_scale == 8.0  # sqrt(64)
    ids = torch.tensor([[5, *[composed.image_id] * 5, 6, 7]])
    pixels = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = trained_logits(world, tmp_path / "run", ids, pixels, settings)
    served = speaker.model(input_ids=ids, pixel_values=pixel_values(composed, pixels)).logits
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-4)
    plain = train(world / "config.toml", world / "mixed", tmp_path / "plain", settings=settings[1:])
    assert plain.model.scale_features is False
    first, other = (load_file(tmp_path / run / "projector.safetensors") for run in ("run", "plain"))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def pixel_values(composed, pixels):
    from train.model.forward import normalise as normalise_pixels

    return normalise_pixels(pixels, composed.vision, torch.float32)


def test_parts_load_by_themselves_and_make_the_whole(run, model, tmp_path):
    """In a process that cannot import this project: plain classes of transformers, and a torch file."""
    for source, name in ((run, "of_run"), (model, "of_model")):
        export(source, tmp_path / name, dtype="fp32", parts=True)
        names = {file.name for file in (tmp_path / name).iterdir()}
        assert names == {"language_model", "vision_tower", "llava.projector", "README.md", "train_manifest.json"}
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, AutoImageProcessor
from transformers import CLIPVisionModel
whole = sys.argv[1]
for parts in sys.argv[2:]:
    lm, info = AutoModelForCausalLM.from_pretrained(parts + "/language_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tower, info = CLIPVisionModel.from_pretrained(parts + "/vision_tower", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    projector = torch.load(parts + "/llava.projector", weights_only=True)
    assert sorted(projector) == [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    tokenizer = AutoTokenizer.from_pretrained(parts + "/language_model")
    assert AutoImageProcessor.from_pretrained(parts + "/vision_tower").image_mean
    assert "train" not in sys.modules and tokenizer.chat_template
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[5, *[image] * 5, 6, 7]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
        for i in (0, 2):
            weight, bias = projector[f"model.mm_projector.{i}.weight"], projector[f"model.mm_projector.{i}.bias"]
            hidden = torch.nn.functional.linear(hidden, weight, bias)
            hidden = torch.nn.functional.gelu(hidden) if i == 0 else hidden
        embeds = lm.get_input_embeddings()(ids)
        embeds[0, 1:6] = hidden[0]
        ours = lm(inputs_embeds=embeds).logits
        served = AutoModelForImageTextToText.from_pretrained(whole)(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(ours, served, rtol=0, atol=1e-5)
"""
    arguments = [sys.executable, "-c", script, str(model), str(tmp_path / "of_run"), str(tmp_path / "of_model")]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr


def test_parts_are_named_and_described_as_converters_expect(model, tmp_path):
    """llama.cpp reads the tower's config.json itself, and transformers 4 its weights."""
    export(model, tmp_path / "parts", dtype="fp32", parts=True)
    config = json.loads((tmp_path / "parts" / "vision_tower" / "config.json").read_text())
    wanted = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    assert all(key in config for key in (*wanted, "num_attention_heads", "layer_norm_eps", "projection_dim"))
    names = load_file(tmp_path / "parts" / "vision_tower" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in names)
    text = (tmp_path / "parts" / "README.md").read_text()
    assert "--clip-model-is-vision" in text and "--image-mean 0.43 0.43 0.43" in text
    assert json.loads((tmp_path / "parts" / "language_model" / "config.json").read_text())["architectures"]
    with pytest.raises(UsageError, match="not empty"):
        export(model, tmp_path / "parts", dtype="fp32", parts=True)


def test_a_batch_answers_as_one_by_one(world, model):
    speaker = load_speaker(model)
    questions = [[Turn("user", (None, "what colour is it ?"))], [Turn("user", ("what comes after monday ?",))]]
    questions.append([Turn("user", (None, "how big is it on the dark square ?"))])
    images = [[decode_image(picture("red", True, 0))], [], [decode_image(picture("blue", False, 1))]]
    together = speaker.answers(questions, images, 6)
    assert together == [speaker.answers([q], [i], 6)[0] for q, i in zip(questions, images, strict=True)]


def test_a_picture_asked_several_times_is_seen_once(model):
    from PIL import Image

    speaker, seen = load_speaker(model), []
    colours = [Image.new("RGB", (32, 32), name) for name in ("red", "red", "blue", "red", "red")]
    asked = [[Turn("user", (None, "what colour is it ?"))]] * 5
    embeddings = next(m for m in speaker.model.model.vision_tower.modules() if isinstance(m, torch.nn.Conv2d))
    embeddings.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    together = speaker.answers(asked, [[colour] for colour in colours], 4)
    assert seen == [3]
    assert together == [speaker.answers([q], [[c]], 4)[0] for q, c in zip(asked, colours, strict=True)]


def test_the_loss_of_a_true_answer_is_that_of_a_plain_forward(world, model, monkeypatch):
    """Two by themselves, unpadded, the answer's tokens found by encoding it alone; logits three positions at a time."""
    monkeypatch.setattr(generate, "LOGITS", 3)
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


def test_text_that_imitates_a_picture_stays_text(model):
    from PIL import Image

    speaker, red = load_speaker(model), Image.new("RGB", (32, 32), "red")
    for shown in ([], [red]):
        turns = [Turn("user", (*(None for _ in shown), "what is <image> ?"))]
        assert len(speaker.answers([turns], [shown], 2)) == 1
        assert speaker.truth_losses([turns], [shown], ["an <image>"])[0][1] > 2


def test_pictures_and_text_do_not_share_a_batch_and_text_goes_by_length():
    asked = [((1,), "a"), ((), "of"), ((1,), "long " * 9), ((), "a good deal"), ((1,), "b"), ((), "any"), ((), "many")]
    kinds = [Question("", "", "", (Turn("user", (words,)),), images, "") for images, words in asked]
    assert [list(batch) for batch in batches(kinds, 2)] == [[0, 2], [4], [3], [6, 5], [1]]


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
    summary = evaluate(tmp_path / "model", str(tmp_path / "test.json"), tmp_path / "answers.jsonl")
    assert summary["tasks"]["caption"] == {key: summary[key] for key in ("questions", "accuracy", "perplexity")}
    assert summary["questions"] == 12 and summary["perplexity"] > 1
    assert summary["accuracy"] >= 0.75
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [record["id"] for record in records]
    options = configuration.Eval(batch_size=5, perplexity=False)
    short = evaluate(tmp_path / "model", str(tmp_path / "test.json"), tmp_path / "short.jsonl", options=options)
    assert short["accuracy"] == summary["accuracy"] and "perplexity" not in short


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
    assert len(skipped) == 1 and len(collect(open_source(str(tmp_path / "d.json")), limit=1)[0]) == 1


def test_records_that_cannot_be_asked_are_told_with_their_reasons(model, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.jpg").write_bytes(picture("red", True, 0))
    (tmp_path / "d.json").write_text(json.dumps([conversation(0), conversation(1), conversation(4)]))
    told = evaluate(model, str(tmp_path / "d.json"), tmp_path / "a.jsonl")
    assert told["skipped"] == 1 and told["left_out"] == ["1 × missing_image (e.g. d.json/v1)"]
    show_answers(told, tmp_path / "a.jsonl", 1, False)
    assert "left out: 1 × missing_image" in capsys.readouterr().out
    (tmp_path / "d.json").write_text(json.dumps([conversation(1)]))
    with pytest.raises(UsageError, match="can be used: 1 × missing_image"):
        evaluate(model, str(tmp_path / "d.json"), tmp_path / "b.jsonl")


def test_a_line_separator_in_an_answer_ends_no_line(tmp_path, capsys):
    row = {"key": "a", "question": "one\u2028two", "answer": "yes\x85", "truth": "yes", "right": False}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    show_answers({"questions": 1, "accuracy": 0.0, "tasks": {}}, tmp_path / "a.jsonl", 8, False)
    assert "yes" in capsys.readouterr().out
    (tmp_path / "x.jsonl").write_text('{"text": "one\u2028two"}\n{"text": "b"}\n')
    assert [each["text"] for each in Layout(tmp_path, "gqa").lines("x.jsonl")] == ["one\u2028two", "b"]


def test_too_many_candidates_are_refused_before_anything_is_answered(world, tmp_path):
    with pytest.raises(UsageError, match="expected 2 to"):
        evaluate(world / "lm", str(world / "llava" / "data.json"), tmp_path / "a.jsonl", options=Eval(candidates=999))


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
    with pytest.raises(TrainError, match="the weights of .* changed since"):
        export(tmp_path / "run", tmp_path / "model", dtype="fp32")
    assert not (tmp_path / "model").exists()


def _another_template(lm, _tower):
    lm.joinpath("chat_template.jinja").write_text(CHAT.replace("question", "which"))


def _another_word(lm, _tower):
    file = lm / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    file.write_text(json.dumps(words))


def _other_colours(_lm, tower):
    (tower / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "size": 32, "crop_size": 32}))


CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
CHAT += "{% if add_generation_prompt %}assistant : {% endif %}{# question #}"
CHANGES = {
    _another_template: "the chat template of",
    _another_word: "the tokenizer of",
    _other_colours: r"the preparation of images \(mean was \[0.48.*, is \[0.1, 0.1, 0.1\]\) of",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_read_beside_the_weights_is_noted_and_refused_when_it_changes(change, world, tmp_path, monkeypatch):
    import shutil

    import transformers as tf

    shutil.copytree(world / "lm", lm := tmp_path / "lm")
    (lm / "chat_template.jinja").write_text(CHAT)
    sees = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tf.CLIPVisionModel(tf.CLIPVisionConfig(**sees, image_size=32, patch_size=16)).save_pretrained(tmp_path / "tower")
    settings = [f"model.lm={lm}", f"model.tower={tmp_path}/tower", "model.template=chat", "finetune.steps=3"]
    given = (world / "config.toml", write_mixed(tmp_path / "m", 10))
    train(*given, tmp_path / "run", settings=settings)
    (tmp_path / "stopped").mkdir()
    for name in ("checkpoints", "metrics.jsonl"):
        (shutil.copytree if name == "checkpoints" else shutil.copyfile)(
            tmp_path / "run" / name, tmp_path / "stopped" / name
        )
    request = json.loads((tmp_path / "run" / "manifest.json").read_text())["request"]
    (tmp_path / "stopped" / ".plan.json").write_text(json.dumps({"format": 1, "request": request}))
    export(tmp_path / "run", tmp_path / "first", dtype="fp32")
    change(lm, tmp_path / "tower")
    with pytest.raises(TrainError, match=f"{CHANGES[change]} .* changed since .*run was trained"):
        export(tmp_path / "run", tmp_path / "second", dtype="fp32")
    assert not (tmp_path / "second").exists()
    with pytest.raises(TrainError, match=f"{CHANGES[change]} the base changed since .*step-000003 was trained"):
        train(*given, tmp_path / "stopped", settings=settings)


def test_others_may_read_all_that_is_written(run, model, tmp_path):
    """As far as the umask lets them: libraries make weights private, and a server runs under another name."""
    export(model, tmp_path / "parts", dtype="fp32", parts=True)
    merge([model, model], [0.5, 0.5], tmp_path / "merged")
    umask = os.umask(0)
    os.umask(umask)
    written = [path for folder in (run, model, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert any("language_model" in str(path) for path in written)
    assert {path.name for path in written if path.stat().st_mode & 0o777 != 0o666 & ~umask} == set()


def test_export_never_clears_a_foreign_folder(run, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        export(run, tmp_path, dtype="fp32", overwrite=True)
    with pytest.raises(UsageError, match="not a finished run"):
        export(Path("nowhere"), tmp_path / "out", dtype="fp32")


def test_a_model_stays_until_another_takes_its_place(world, model, tmp_path):
    import shutil

    from safetensors.torch import save_file

    here, other = tmp_path / "here", tmp_path / "other"
    shutil.copytree(model, here)
    shutil.copytree(model, other)
    ones = {name: torch.ones_like(value) for name, value in load_file(here / "model.safetensors").items()}
    save_file({"x": torch.ones(1)}, other / "model.safetensors", metadata={"format": "pt"})
    before = {file.name: file.read_bytes() for file in here.iterdir()}
    with pytest.raises(UsageError, match="hold different tensors"):
        merge([here, other], [0.5, 0.5], here, overwrite=True)
    assert before == {file.name: file.read_bytes() for file in here.iterdir()}
    save_file(ones, other / "model.safetensors", metadata={"format": "pt"})
    (here / ".unfinished").mkdir()  # as a command leaves it that is killed before its model stands
    (here / "stale.bin").touch()
    with pytest.raises(UsageError, match="type --overwrite to replace the model"):
        merge([here, other], [0.5, 0.5], here)
    merge([other, here], [1.0, 0.0], here, overwrite=True)  # of which one is replaced
    assert {file.name for file in here.iterdir()} == before.keys() - {"README.md"}  # the card is of one run
    assert all((value == 1).all() for value in load_file(here / "model.safetensors").values())
    (here / "train_manifest.json").unlink()  # and as one that is killed while it takes its place
    (here / ".unfinished").mkdir()
    merge([model, other], [0.5, 0.5], here)
    load_speaker(here)


def test_answers_replace_no_other_file(model, tmp_path):
    from train.eval.evaluate import evaluate

    (tmp_path / "data.json").write_text(json.dumps([conversation(4)]))
    with pytest.raises(UsageError, match="exists and was not written by eval"):
        evaluate(model, str(tmp_path / "data.json"), tmp_path / "data.json")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is a folder; give a file for the answers, such as .*/answers.jsonl$"):
            evaluate(model, str(tmp_path / "data.json"), tmp_path, overwrite=overwrite)
    assert json.loads((tmp_path / "data.json").read_text()) == [conversation(4)]


def test_a_full_disk_ends_in_one_line(tmp_path, capfd):
    import resource

    from train.__main__ import main
    from train.eval.progress import append_lines
    from train.model.weights import write_tensors

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SystemExit, match="1"):
            main(lambda: write_tensors({"x": torch.zeros(4096)}, tmp_path / "x.safetensors"))
        with pytest.raises(OSError, match=r"File too large: '.*/\.a\.jsonl\.unfinished'"):
            append_lines(tmp_path / ".a.jsonl.unfinished", [{"x": "x" * 8192}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "x.safetensors cannot be written" in err and "File too large" in err
