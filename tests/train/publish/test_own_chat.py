"""A run in the language model's own template, from its default to the answers of the exported folder."""

import dataclasses
import json

import pytest
from toys import assert_serves_the_ids_of_training, word_tokenizer

from train import config as configuration
from train.data.prompts import parse
from train.data.sources import decode_image, open_source
from train.eval.generate import load_speaker
from train.model.compose import compose
from train.publish.export import export
from train.run.stage import make_encoder, run_stage

TEMPLATE = """\
{%- for m in messages %}{{ m.role + ' : ' + m.content + ('<eos>\\n' if m.role == 'assistant' else ' ') }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"""


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """The options, a finished run and its export."""
    home = tmp_path_factory.mktemp("own")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / "tokenizer")
    options = configuration.load(
        str(world / "config.toml"), ["finetune.steps=2", "model.template=", f"model.tokenizer={home / 'tokenizer'}"]
    )
    run_stage("finetune", options, str(world / "mixed"), home / "run")
    export(home / "run", home / "model", dtype="fp32")
    return options, home


def test_it_is_the_default_and_the_manifest_says_so(made):
    _, home = made
    request = json.loads((home / "run" / "manifest.json").read_text())["request"]
    assert request["model"]["template"] == "chat"


def test_the_export_serves_the_ids_of_training(made, world):
    from transformers import AutoProcessor

    options, home = made
    encoder = make_encoder(compose(options.model), options.model, options.finetune)
    assert_serves_the_ids_of_training(AutoProcessor.from_pretrained(home / "model"), world / "mixed", encoder, 5)
    parts = export(home / "model", home / "parts", dtype="fp32", parts=True)
    assert parts and (home / "parts" / "language_model" / "chat_template.jinja").read_text() == TEMPLATE


def test_the_export_answers_and_its_truths_have_losses(made, world):
    _, home = made
    speaker = load_speaker(home / "model")
    source = open_source(str(world / "mixed"))
    record = source.record(0)
    turns = parse(record.conversations, len(record.images))
    images = [decode_image(source.image_bytes(location)) for location in record.images]
    assert len(speaker.answers([turns[:1]], [images], 4)) == 1
    [(loss, tokens)] = speaker.truth_losses([turns[:1]], [images], [turns[1].text])
    assert tokens == 2 and loss > 0, "the answer's one word and the token that ends it, not the newline behind it"


def test_without_a_template_of_its_own_it_is_vicunas_or_refused(world):
    from train.errors import UsageError

    model = dataclasses.replace(configuration.load(str(world / "config.toml")).model, template="")
    composed = compose(model)
    assert make_encoder(composed, model, configuration.Stage()).template.name == "vicuna"
    with pytest.raises(UsageError, match="no chat template of its own"):
        make_encoder(composed, dataclasses.replace(model, template="chat"), configuration.Stage())
