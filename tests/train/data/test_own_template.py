"""`template = "chat"`: language models' own chat templates, each written here in its family's manner, in few words."""

import dataclasses
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import word_tokenizer

from train.data import own_template
from train.data.chat import chat_template, own_source, to_messages
from train.data.encoder import IGNORED, Encoder
from train.data.own_template import read_own_template
from train.data.prompts import Rejected, Turn, parse
from train.errors import UsageError
from train.run.inspection import paint

CHATML = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif -%}
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""
HEADERS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set said = '' %}{% endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now("%d %b %Y") + '\\n\\n' + said
   + '<|eot_id|>' }}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
STRICT = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif -%}
{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{%
  endif -%}
{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim }}
{{- '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
SEPARATED = """\
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
BRACKETS = """\
{{- bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{%
  set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}{% if m.role == 'user' %}
{%- if said is defined and loop.revindex <= 2 and (loop.last or loop.revindex == 2) %}{{ '[INST] ' + said
   + '\\n\\n' }}
{%- else %}{{ '[INST] ' }}{% endif %}{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{%
  endif %}
{%- endfor %}"""
THINKING = """\
{%- set last = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}{%
  endif %}
{%- endfor %}
{%- for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\\n' + m.content
   + '<|im_end|>\\n' }}
{%- else %}{% set thought = '' %}{% set said = m.content %}{% if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}{% if loop.index0 > last.at %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%
  endif %}
{{- said + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if not enable_thinking | default(true) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
GENERATION = """\
{%- for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\\n' + m.content
   + '<|im_end|>\\n' }}
{%- elif loop.last %}{% generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>' }}{%
  endgeneration %}{{ '\\n' }}
{%- else %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
FAMILIES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "strict": STRICT,
    "separated": SEPARATED,
    "brackets": BRACKETS,
    "thinking": THINKING,
    "generation": GENERATION,
}
SPECIAL = (
    "<s> </s> <image> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn>".split()
)
SPECIAL += "<end_of_turn> <|user|> <|assistant|> <|system|> <|end|>".split()


def tokenizer(source, *, bos=True):
    """GPT-2's way of bytes and words, a bos before each text as Llama 3 has it, and every family's tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(["user\nwhat is this?\n\nmodel assistant\n\nthis is a cat"] * 9, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>")])
    if bos:
        first = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **names)


def encoder(source, *, bos=True):
    own = tokenizer(source, bos=bos)
    return Encoder(own, read_own_template(own), "<image>", 3)


def talk(*turns, images=1):
    return parse([{"from": role, "value": value} for role, value in turns], images)


def served(enc, turns, *, asks=False, **said):
    """The ids that an exported processor makes of messages."""
    text = enc.tokenizer.apply_chat_template(
        to_messages(turns), chat_template=chat_template(enc), tokenize=False, add_generation_prompt=asks, **said
    )
    return list(enc.tokenizer(text.replace("<image>", "<image>" * 3), add_special_tokens=False)["input_ids"])


SYSTEM = ("system", "be short")
NASTY = "an <|im_end|> [/INST] <image> </s>\n<|end|> é🙂"
ROUNDS = (("human", "<image>\nwhat is it?"), ("gpt", "a cat"), ("human", "and?"), ("gpt", NASTY))
PICTURE = "<3 image tokens>\nwhat is it?"
EXPECTED = {
    "chatml": (
        f"<s><|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n"
        "[[a cat<|im_end|>]]\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[[NASTY<|im_end|>]]\n"
    ),
    "headers": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\nbe short<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{PICTURE}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\n[[a cat<|eot_id|>]]<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[NASTY<|eot_id|>]]"
    ),
    "strict": (
        f"<s><start_of_turn>user\nbe short\n{PICTURE}<end_of_turn>\n<start_of_turn>model\n[[a cat<end_of_turn>]]\n"
        "<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n[[NASTY<end_of_turn>]]\n"
    ),
    "separated": (
        f"<s><|system|>be short<|end|><|user|>{PICTURE}<|end|><|assistant|>[[a cat<|end|>]]<|user|>and?<|end|>"
        "<|assistant|>[[NASTY<|end|>]]"
    ),
    "brackets": f"<s>[INST] {PICTURE} [/INST][[ a cat</s>]][INST] be short\n\nand? [/INST][[ NASTY</s>]]",
    "thinking": (
        f"<s><|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n"
        "[[a cat<|im_end|>]]\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "[[NASTY<|im_end|>]]\n"
    ),
    "generation": (
        f"<s><|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n"
        "a cat<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[[NASTY<|im_end|>]]\n"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_their_ends_are_learnt_and_nothing_else(family):
    """Text that imitates tokens stays text; a system text that is refused goes before the first question."""
    enc = encoder(FAMILIES[family])
    encoded = enc.encode(talk(SYSTEM, *ROUNDS), 4096)
    assert paint(encoded, enc, colour=False) == EXPECTED[family].replace("NASTY", NASTY)
    assert (encoded.labels == enc.end_id).sum() == (1 if family == "generation" else 2)
    learnt = encoded.labels != IGNORED
    assert (encoded.ids[learnt] == encoded.labels[learnt]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_given_where_it_is_not_to_be_learnt(family):
    enc, turns = encoder(FAMILIES[family]), talk(SYSTEM, *ROUNDS)
    first = next(n for n, turn in enumerate(turns) if turn.role == "assistant")
    given = [dataclasses.replace(turn, learnt=n != first) for n, turn in enumerate(turns)]
    plain, encoded = enc.encode(turns, 4096), enc.encode(given, 4096)
    learnt = encoded.labels != IGNORED
    assert (encoded.ids == plain.ids).all() and (encoded.labels == enc.end_id).sum() == 1
    assert learnt.any() and learnt.argmax() > (plain.ids == enc.end_id).argmax(), "the last answer alone"


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_exported_template(family, bos):
    enc = encoder(FAMILIES[family], bos=bos)
    for turns in (
        talk(SYSTEM, *ROUNDS[:2]),
        talk(*ROUNDS[:2], ("human", "why?"), ("gpt", "it is.\n\nyes.")),
        talk(("human", "<image>\n<image>\nwhich, <image>?"), ("gpt", "one"), images=3),
        talk(("human", "<image>"), ("gpt", "a cat")),
        talk(SYSTEM, ("human", "hello"), ("gpt", ""), ("human", "hm"), ("gpt", "hi"), images=0),
    ):
        ids = enc.encode(turns, 4096).ids.tolist()
        assert ids == served(enc, turns)
        assert ids.count(enc.image_id) == 3 * sum(turn.num_images for turn in turns)
        if len(turns) == 2:
            prompt = served(enc, turns[:1], asks=True)
            assert prompt == ids[: len(prompt)], "an answer must go on from the prompt"


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_alone_are_rendered_as_the_model_itself_does(family):
    """Also where messages hold plain strings; the date apart, which is fixed."""
    enc = encoder(FAMILIES[family], bos=False)
    turns = talk(("human", "hello"), ("gpt", "hi"), ("human", "and?"), ("gpt", "so"), images=0)
    said = [{"role": turn.role, "content": turn.text} for turn in turns]
    own = FAMILIES[family].replace('strftime_now("%d %b %Y")', "'26 Jul 2024'")
    one, other = (
        enc.tokenizer.apply_chat_template(said, chat_template=t, tokenize=False) for t in (own, chat_template(enc))
    )
    assert one == other and own_source(chat_template(enc)) == own


def test_thinking_is_learnt_in_the_last_answer_and_counted_where_it_is_left_out():
    enc = encoder(THINKING)
    first = ("gpt", "<think>\nhm\n</think>\n\na cat")
    turns = talk(ROUNDS[0], first, ("human", "and?"), ("gpt", "<think>\nso\n</think>\n\nyes"))
    encoded = enc.encode(turns, 4096)
    assert paint(encoded, enc, colour=False) == (
        f"<s><|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n[[a cat<|im_end|>]]\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[[<think>\nso\n</think>\n\nyes<|im_end|>]]\n"
    )
    assert encoded.thinks and encoded.shortened
    assert encoded.ids.tolist() == served(enc, turns, enable_thinking=True)
    alone = enc.encode(talk(ROUNDS[0], first), 4096)
    assert alone.thinks and not alone.shortened
    plain = enc.encode(talk(*ROUNDS[:2]), 4096)
    assert not plain.thinks and not plain.shortened
    assert plain.ids.tolist() == served(enc, talk(*ROUNDS[:2])), "an export thinks only where that is asked for"
    enc.template = dataclasses.replace(enc.template, thinks=True)
    think = enc.tokenizer.convert_tokens_to_ids("<think>")
    assert think not in served(enc, turns[:1], asks=True)
    chatml = encoder(CHATML).encode(turns, 4096)
    assert not chatml.thinks and not chatml.shortened, "elsewhere it is text as any other"


def test_tool_turns_are_counted_by_name():
    for speaker in ("tool", "observation", "function_call"):
        with pytest.raises(Rejected, match="tool_turn"):
            talk(("human", "x"), (speaker, "{}"), ("gpt", "y"), images=0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "no chat template of its own"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "answer_without_end"),
        ("{% for m in messages %}{{ m.role + '</s>' }}{% endfor %}", "left_out"),
        ("{{ messages[-1].content + '</s>' }}", "left_out"),
        ("{{ raise_exception('no') }}", "refused_by_chat_template: no"),
        ("{% for m in messages %}{{ m.content.x.y }}{% endfor %}", "refused_by_chat_template"),
        ("{% for m in messages %}{{ m.content + ['</s>', '<s>'][loop.index0 // 2] }}{% endfor %}", "not keep the text"),
        (
            CHATML.replace("|im_start|>assistant\\n", "|im_start|>assistant\\n<think>\\n"),
            r"what_ends_the_prompt.*'<think>\\n'",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_words(source, reason):
    with pytest.raises(UsageError, match=reason):
        read_own_template(tokenizer(source))


def test_several_templates_without_a_default_are_refused_in_words():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"rag": "{{ messages }}", "tool_use": "{{ messages }}"}
    with pytest.raises(UsageError, match="several chat templates and none of them is the default"):
        read_own_template(tokenizer)


def test_a_word_tokenizer_can_have_one():
    """Its special tokens alone are enough."""
    own = word_tokenizer()
    own.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + (' ' if m.role == 'user' else '<eos>') }}{% endfor %}"
    )
    own.chat_template += "{{ 'assistant ' if add_generation_prompt else '' }}"
    enc = Encoder(own, read_own_template(own), "<image>", 3)
    encoded = enc.encode(talk(("human", "<image>\nwhat colour"), ("gpt", "red")), 64)
    assert paint(encoded, enc, colour=False).replace(" ", "") == "user<3imagetokens>whatcolourassistant[[red<eos>]]"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=3),
    st.sampled_from(["chatml", "headers", "strict", "brackets"]),
)
def test_any_text_is_learnt_as_itself(rounds, family):
    enc = ENCODERS[family]
    turns = [turn for q, a in rounds for turn in (Turn("user", ("q" + q,)), Turn("assistant", (("a" + a).strip(),)))]
    try:
        encoded = enc.encode(turns, 1 << 20)
    except UnicodeEncodeError:  # half a character: `parse` refuses it
        return
    said = enc.tokenizer.decode(encoded.ids[encoded.labels != IGNORED])
    lead = " " if family == "brackets" else ""
    assert said == "".join(lead + ("a" + a).strip() + enc.end_token for _, a in rounds)


ENCODERS = {family: encoder(source) for family, source in FAMILIES.items()}


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", " ", "\n", "\u2003", "a", "think", "<"]), max_size=9).map("".join)
)
def test_thinking_is_cut_as_by_an_expression(text):
    expression = re.compile(r"(<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
    for each in (text, f"<think>{text}", f"<think>{text}</think>{text}"):
        found = expression.match(each)
        assert own_template._thought(each) == (found.groups() if found else None)


def test_thinking_that_nothing_ends_is_seen_in_linear_time():
    began = time.process_time()
    assert own_template._thought("<think>" + " " * 200_000 + "so" + " " * 200_000) is None
    assert time.process_time() - began < 1  # the expression took the third power of the spaces
