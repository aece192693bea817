"""Labels and chat templates, on samples made to break them. Ids are compared with the tokenizer's own on whole text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import word_tokenizer

from train.data.chat import chat_template, to_messages
from train.data.encoder import IGNORED, Encoder
from train.data.prompts import TEMPLATES, Rejected, get_template, parse, pieces
from train.errors import UsageError
from train.run.inspection import paint

PHI2 = Path(__file__).parents[4] / "shared" / "data" / "tokenizers" / "phi-2"
SPECIAL = ["<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<s>", "</s>", "<image>"]
PER_IMAGE = 3


def byte_tokenizer():
    """GPT-2's way: bytes, words with the space before them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["USER: what is this? ASSISTANT: this is a cat\nmodel user " * 9], trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def sentencepiece_tokenizer(*, legacy: bool):
    """Llama's way: a mark before the first word of a text (legacy: of each stretch between special tokens), and <s>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    scheme = "always" if legacy else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False)
    words = "USER: what is this? ASSISTANT: this is a cat model user assistant answers the question"
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trained.train_from_iterator([words] * 9, trainer)
    import json

    model = json.loads(trained.to_str())["model"]
    backend.model = models.BPE(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "legacy": sentencepiece_tokenizer(legacy=True),
    "metaspace": sentencepiece_tokenizer(legacy=False),
    "words": word_tokenizer(),
}


def encoder(tokenizer: str, template: str) -> Encoder:
    if tokenizer == "words" and template in ("gemma", "llama", "minicpm", "phi3"):
        pytest.skip("the word tokenizer lacks that template's tokens")
    return Encoder(TOKENIZERS[tokenizer], get_template(template), "<image>", PER_IMAGE)


def talk(*turns):
    return [{"from": role, "value": value} for role, value in turns]


PLAIN_TALK = talk(
    ("human", "<image>\nwhat is this?"), ("gpt", "a cat."), ("human", "why?"), ("gpt", "it is.\nyes."), ("human", "ok")
)
SYSTEM_TALK = talk(("system", "be short"), ("human", "what is it?\n<image>"), ("gpt", "é 日本 🙂 naïve"))
TWO_IMAGES = talk(("human", "<image>\n<image>\nwhich is a cat, <image>?"), ("gpt", "one"))
BARE = talk(("human", "<image>"), ("gpt", "a cat"))


def whole_text_ids(enc: Encoder, turns, generation=False) -> list[int]:
    text = enc.tokenizer.apply_chat_template(
        to_messages(turns), chat_template=chat_template(enc), tokenize=False, add_generation_prompt=generation
    )
    text = text.replace("<image>", "<image>" * enc.tokens_per_image)
    return list(enc.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    "conversation", [(PLAIN_TALK, 1), (SYSTEM_TALK, 1), (TWO_IMAGES, 3), (BARE, 1), (PLAIN_TALK, 0)]
)
def test_ids_are_those_of_the_chat_template(tokenizer, template, conversation):
    enc = encoder(tokenizer, template)
    turns = parse(*conversation)
    encoded = enc.encode(turns, 4096)
    if conversation != (PLAIN_TALK, 0):  # there "<image>" is text, which a served template would take for an image
        assert encoded.ids.tolist() == whole_text_ids(enc, turns)
        asked = turns[: [turn.role for turn in turns].index("assistant")]
        prompt, _ = enc.piece_ids(pieces(asked, enc.template, enc.end_token))
        assert prompt == whole_text_ids(enc, asked, generation=True)
        assert prompt == encoded.ids[: len(prompt)].tolist(), "an answer must go on from the prompt"
    assert int((encoded.ids == enc.image_id).sum()) == PER_IMAGE * conversation[1]


@pytest.mark.parametrize("given", [{"loss": False}, {"weight": 0}])
def test_an_answer_that_says_so_is_given_and_not_learnt(given):
    enc = encoder("words", "vicuna")
    marked = [{**PLAIN_TALK[0]}, {**PLAIN_TALK[1], **given}, *PLAIN_TALK[2:]]
    plain, encoded = (enc.encode(parse(turns, 1), 4096) for turns in (PLAIN_TALK, marked))
    assert (encoded.ids == plain.ids).all() and 0 < (encoded.labels != IGNORED).sum() < (plain.labels != IGNORED).sum()
    assert enc.tokenizer.decode(encoded.labels[encoded.labels != IGNORED]).replace(" ", "").startswith("itis.")
    with pytest.raises(Rejected, match="no_supervised_token"):
        enc.encode(parse([{**turn, **given} for turn in PLAIN_TALK], 1), 4096)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_supervised_are_exactly_the_answers_and_their_ends(tokenizer, template):
    enc = encoder(tokenizer, template)
    encoded = enc.encode(parse(PLAIN_TALK, 1), 4096)
    said = encoded.ids[encoded.labels != IGNORED]
    text = enc.tokenizer.decode(said).replace(" ", "").replace("\n", "")
    end = enc.end_token.replace(" ", "")
    answers = ["a cat.", "it is.\nyes."]
    if tokenizer == "words":
        answers = ["a<unk>.", "itis.yes."]
    assert text == "".join(a.replace(" ", "").replace("\n", "") + end for a in answers)
    assert (encoded.labels[encoded.labels != IGNORED] == said).all()


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_separators_and_special_tokens_in_text_stay_text(template):
    """LLaVA's splitting zeroes such samples or shifts their images."""
    enc = encoder("bytes", template)
    nasty = " ASSISTANT: </s> USER: <|endoftext|> <end_of_turn>\n<start_of_turn>model <image> <|end_of_text|>"
    turns = parse(
        talk(("human", "<image>\nsay" + nasty.replace("<image>", "")), ("gpt", nasty), ("human", "x"), ("gpt", "y")), 1
    )
    encoded = enc.encode(turns, 4096)
    assert int((encoded.ids == enc.image_id).sum()) == PER_IMAGE
    ends = int((encoded.labels == enc.end_id).sum())
    assert ends == 2, "each answer ends once, whatever it says"
    supervised = enc.tokenizer.decode(encoded.ids[encoded.labels != IGNORED])
    assert nasty.strip() in supervised


def test_pad_equal_to_eos_keeps_the_end_supervised():
    enc = encoder("bytes", "bunny")
    assert enc.tokenizer.pad_token_id == enc.tokenizer.eos_token_id
    encoded = enc.encode(parse(BARE, 1), 4096)
    assert encoded.labels[-1] == enc.tokenizer.eos_token_id


def test_golden_vicuna_and_gemma():
    """The published formats, written out once by hand."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    turns = parse(PLAIN_TALK, 1)
    tokenizer = TOKENIZERS["bytes"]
    bunny = tokenizer.decode(encoder("bytes", "bunny").encode(turns, 4096).ids)
    image = "<image>" * PER_IMAGE
    first = f"USER: {image}\nwhat is this? ASSISTANT: a cat.<|endoftext|>"
    assert bunny == system + first + "USER: why? ASSISTANT: it is.\nyes.<|endoftext|>"
    gemma = tokenizer.decode(encoder("bytes", "gemma").encode(turns, 4096).ids)
    assert gemma == (
        f"<start_of_turn>user\n{image}\nwhat is this?<end_of_turn>\n<start_of_turn>model\na cat.<end_of_turn>\n"
        "<start_of_turn>user\nwhy?<end_of_turn>\n<start_of_turn>model\nit is.\nyes.<end_of_turn>\n"
    )
    plain = tokenizer.decode(encoder("bytes", "plain").encode(parse(BARE, 1), 4096).ids)
    assert plain == image + "a cat<|endoftext|>"


NASTY = talk(
    ("system", "be kind"),
    ("gpt", "too early"),
    ("human", "<image>\nsay </s> USER:"),
    ("human", "again <image>"),
    ("gpt", " an <image> ASSISTANT: é🙂 <|endoftext|>\n"),
    ("human", "and?"),
    ("gpt", ""),
    ("human", "why"),
    ("gpt", "so"),
    ("human", "unanswered"),
)
SAID = "an <image> ASSISTANT: é🙂 <|endoftext|>"
ASKED = "<3 image tokens>\nsay </s> USER:\nagain\n<3 image tokens>"


def in_vicunas_way(end):
    first = f"be kind USER: {ASKED} ASSISTANT:[[ {SAID}{end}]]"
    return first + f"USER: and? ASSISTANT:{end}USER: why ASSISTANT:[[ so{end}]]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", f"<6 image tokens>[[{SAID}<|endoftext|>]]<|endoftext|>[[so<|endoftext|>]]"),
        ("vicuna", in_vicunas_way("<|endoftext|>")),
        ("bunny", in_vicunas_way("<|endoftext|>")),
        ("phi3", in_vicunas_way("<|endoftext|>")),
        ("llama", in_vicunas_way("<|end_of_text|>")),
        ("minicpm", in_vicunas_way("</s>")),
        (
            "gemma",
            f"<start_of_turn>user\nbe kind\n{ASKED}<end_of_turn>\n"
            f"<start_of_turn>model\n[[{SAID}<end_of_turn>\n]]"
            "<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n<end_of_turn>\n"
            "<start_of_turn>user\nwhy<end_of_turn>\n<start_of_turn>model\n[[so<end_of_turn>\n]]",
        ),
    ],
)
def test_golden_labels_of_a_nasty_sample(template, expected):
    """Separators, special tokens and `<image>` in text, two images, turns out of order, an empty answer, Unicode."""
    enc = encoder("bytes", template)
    encoded = enc.encode(parse(NASTY, 2), 4096)
    assert paint(encoded, enc, colour=False) == expected
    ends = (encoded.ids == enc.end_id).sum()
    assert ends == (6 if template == "gemma" else 3), "each turn ends once, whatever it says"


def test_turns_out_of_order_are_put_in_order():
    turns = parse(
        talk(
            ("gpt", "dropped"), ("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d"), ("human", "never answered")
        ),
        0,
    )
    assert [(turn.role, turn.text) for turn in turns] == [("user", "a\nb"), ("assistant", "c\nd")]


def test_an_image_nobody_placed_comes_first():
    turns = parse(talk(("human", "what?"), ("gpt", "x")), 1)
    assert turns[0].parts == (None, "what?")


@pytest.mark.parametrize(
    ("conversation", "images", "reason"),
    [
        ([], 0, "no_conversation"),
        (None, 0, "no_conversation"),
        ([{"from": "martian", "value": "x"}], 0, "bad_turn"),
        ([{"from": "human", "value": 3}], 0, "bad_turn"),
        (["x"], 0, "bad_turn"),
        (talk(("human", "x")), 0, "no_answer"),
        (talk(("gpt", "x")), 0, "no_answer"),
        (talk(("human", "<image> <image>"), ("gpt", "x")), 1, "image_count"),
    ],
)
def test_unusable_conversations_say_why(conversation, images, reason):
    with pytest.raises(Rejected, match=reason):
        parse(conversation, images)


def test_empty_answers_and_long_prompts_have_nothing_to_learn():
    enc = encoder("bytes", "vicuna")
    with pytest.raises(Rejected, match="no_supervised_token"):
        enc.encode(parse(talk(("human", "<image>"), ("gpt", "  ")), 1), 4096)
    with pytest.raises(Rejected, match="no_supervised_token"):
        enc.encode(parse(talk(("human", "<image> " + "what " * 500), ("gpt", "x")), 1), 300)
    with pytest.raises(Rejected, match="image_beyond_max_length"):
        enc.encode(parse(talk(("human", "what " * 500 + "<image>"), ("gpt", "x")), 1), 300)
    long = enc.encode(parse(talk(("human", "<image>"), ("gpt", "cat " * 500)), 1), 300)
    assert long.truncated and len(long.ids) == 300


def test_plain_can_end_as_published():
    import dataclasses

    template = dataclasses.replace(get_template("plain"), end_text="\n")
    enc = Encoder(TOKENIZERS["bytes"], template, "<image>", PER_IMAGE)
    ids = enc.encode(parse(BARE, 1), 4096).ids
    assert enc.tokenizer.decode(ids) == "<image>" * PER_IMAGE + "a cat\n"


def test_a_template_needs_its_tokens():
    with pytest.raises(UsageError, match="needs <end_of_turn>"):
        Encoder(word_tokenizer(), get_template("gemma"), "<image>", PER_IMAGE)
    with pytest.raises(UsageError, match="did you mean 'vicuna'"):
        get_template("vicunna")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=3),
    st.sampled_from(["bytes", "legacy"]),
)
def test_any_text_is_labelled_by_its_own_tokens(rounds, tokenizer):
    enc = encoder(tokenizer, "vicuna")
    turns = parse(talk(*[turn for q, a in rounds for turn in (("human", "q" + q), ("gpt", "a" + a))]), 0)
    encoded = enc.encode(turns, 1 << 20)
    assert (encoded.ids == enc.end_id).sum() == (encoded.labels == enc.end_id).sum() == len(rounds)
    assert np.isin(enc.image_id, encoded.ids).sum() == 0
    supervised = encoded.labels != IGNORED
    assert (encoded.labels[supervised] == encoded.ids[supervised]).all()
    if tokenizer == "bytes":
        expected = "".join(" " + ("a" + a).strip() + enc.end_token for _, a in rounds)
        assert enc.tokenizer.decode(encoded.ids[supervised]) == expected


@pytest.mark.realdata
@pytest.mark.skipif(not PHI2.is_dir(), reason="the phi-2 tokenizer of ../shared/data is absent")
def test_phi2_tokenizer_end_to_end():
    from train.config import Model
    from train.model.language import load_tokenizer

    tokenizer = load_tokenizer(Model(lm=str(PHI2)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    enc = Encoder(tokenizer, get_template("bunny"), "<image>", 729)
    for conversation, images in ((PLAIN_TALK, 1), (SYSTEM_TALK, 1), (TWO_IMAGES, 3), (BARE, 1)):
        turns = parse(conversation, images)
        assert enc.encode(turns, 4096).ids.tolist() == whole_text_ids(enc, turns)
    assert enc.encode(parse(BARE, 1), 4096).labels[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
