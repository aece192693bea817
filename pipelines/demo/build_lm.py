"""Train the demo's tiny language model and write it as a transformers folder.

  python -m pipelines.demo.build_lm OUT [--seed 5] [--steps 800]

A Llama of 2 layers, width 128, 0.4 M weights (f16), with a word-level tokenizer of every word of the demo's world. It
learns to describe scenes after reading their keywords in random order, as many as a picture has tokens: the projector
will later supply these positions. The forms are those of the trainer's templates `plain` and `qa`:
  15 %  <s> caption </s>
  60 %  <s> keywords … caption </s>   or   … caption : caption </s>   or   … question : … answer : … </s> (1 to 3 turns)
  25 %  <s> question : … answer : … </s>   text tasks, no picture
It must answer text tasks and read keywords as GATES ask (exit 1 if not). About 2 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from curate.demo.words import GROUNDS, NAMES, PLACES, QUESTIONS, SIZES, TEXTURES, answer, text_task, vocabulary
from curate.demo.words import write_caption as caption
from pipelines.demo.common import MuonAdamW, save_tokenizer

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
IGNORED = -100
NUM_IMAGE_TOKENS = 17  # 16 patches and the class token of the demo's towers
GATES = {"text_exact": 0.90, "what_exact": 0.95, "caption_name": 0.95}
BATCH = 128
SEED_SPACE = 8_000_000
Facts = tuple[int, int, int, int, int]
Example = tuple[list[str], int]  # words, and how many of the first are not learnt


def draw_facts(rng: np.random.Generator) -> Facts:
    """Draw a scene's facts, every concept equally often."""
    return tuple(int(rng.integers(n)) for n in (len(NAMES), 3, len(PLACES), len(GROUNDS), len(TEXTURES)))  # type: ignore[return-value]


def keywords(facts: Facts, rng: np.random.Generator) -> list[str]:
    """Shuffle the facts of a scene into at most NUM_IMAGE_TOKENS words, some of them repeated."""
    name, size, place, ground, texture = facts
    words = [NAMES[name], SIZES[size], *PLACES[place].split(), TEXTURES[texture], GROUNDS[ground]]
    length = NUM_IMAGE_TOKENS if rng.random() < 0.7 else int(rng.integers(len(words), NUM_IMAGE_TOKENS))
    words += [words[i] for i in rng.integers(len(words), size=length - len(words))]
    return [words[i] for i in rng.permutation(length)]


def turn(question: str, reply: str) -> list[str]:
    """Write one turn of the template `qa`."""
    return f"question : {question} answer : {reply} </s>".split()


def ask(facts: Facts, rng: np.random.Generator) -> list[str]:
    """Draw a question about a scene and answer it."""
    kind = list(QUESTIONS)[rng.integers(len(QUESTIONS))]
    question = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))]
    return turn(question, caption(*facts, rng) if kind == "caption" else answer(kind, *facts))


def example(rng: np.random.Generator) -> Example:
    """Draw one training text."""
    form, facts = rng.random(), draw_facts(rng)
    if form < 0.15:
        return ["<s>", *caption(*facts, rng).split(), "</s>"], 1
    if form >= 0.75:
        turns = [word for _ in range(rng.integers(1, 4)) for word in turn(*text_task(rng))]
        return ["<s>", *turns], 1
    prefix = ["<s>", *keywords(facts, rng)]
    if form < 0.50:
        lead = ["caption", ":"] if form < 0.25 else []
        return [*prefix, *lead, *caption(*facts, rng).split(), "</s>"], len(prefix)
    asked = [word for _ in range(rng.integers(1, 4)) for word in ask(facts, rng)]
    return [*prefix, *asked], len(prefix)


def collate(examples: list[Example], ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, i64 [n, longest]."""
    rows = [torch.tensor([ids[word] for word in words]) for words, _ in examples]
    labels = [row.clone() for row in rows]
    for label, (_, skipped) in zip(labels, examples, strict=True):
        label[:skipped] = IGNORED
    return pad_sequence(rows, True, ids["<pad>"]), pad_sequence(labels, True, IGNORED)


def train(model: Any, ids: dict[str, int], *, steps: int, seed: int) -> None:
    """Train in place."""
    rng = np.random.default_rng([SEED_SPACE, seed])
    optimiser = MuonAdamW(model, "layers", lr=3e-3, steps=steps, weight_decay=0.05)
    started = time.perf_counter()
    for step in range(steps):
        rows, labels = collate([example(rng) for _ in range(BATCH)], ids)
        loss = model(input_ids=rows, labels=labels).loss
        optimiser.step(loss)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)


@torch.inference_mode()
def complete(model: Any, ids: dict[str, int], prompts: list[list[str]], limit: int = 20) -> list[str]:
    """Continue prompts greedily up to </s>; those of one length go together."""
    words = list(ids)
    said = [""] * len(prompts)
    for length in {len(prompt) for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        batch = torch.tensor([[ids[word] for word in prompts[i]] for i in rows])
        new = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=limit, do_sample=False)
        for i, row in zip(rows, new[:, length:].tolist(), strict=True):
            text = [words[token] for token in row]
            said[i] = " ".join(text[: text.index("</s>")] if "</s>" in text else text)
    return said


def check(model: Any, ids: dict[str, int], rows: int = 600) -> dict[str, float]:
    """Measure text tasks and the reading of keywords on fresh draws, and the perplexity of the tasks' answers."""
    rng = np.random.default_rng([SEED_SPACE, 99])

    def exact(draw: Callable[[], tuple[list[str], str]]) -> float:
        drawn = [draw() for _ in range(rows)]
        said = complete(model, ids, [prompt for prompt, _ in drawn])
        return float(np.mean([a == b for a, (_, b) in zip(said, drawn, strict=True)]))

    def task() -> tuple[list[str], str]:
        question, reply = text_task(rng)
        return ["<s>", *turn(question, reply)[: -1 - len(reply.split())]], reply

    def what() -> tuple[list[str], str]:
        facts = draw_facts(rng)
        prompt = ["<s>", *keywords(facts, rng), *turn(QUESTIONS["what"][0], "")[:-1]]
        return prompt, answer("what", *facts)

    facts = [draw_facts(rng) for _ in range(rows)]
    captions = complete(model, ids, [["<s>", *keywords(fact, rng), "caption", ":"] for fact in facts])
    named = [NAMES[fact[0]] in text.split() for fact, text in zip(facts, captions, strict=True)]
    tasks = [task() for _ in range(rows)]
    batch, labels = collate([([*p, *reply.split(), "</s>"], len(p)) for p, reply in tasks], ids)
    with torch.inference_mode():
        perplexity = math.exp(model(input_ids=batch, labels=labels).loss.item())
    return {
        "text_exact": exact(task),
        "what_exact": exact(what),
        "caption_name": float(np.mean(named)),
        "text_perplexity": perplexity,
    }


def main() -> None:
    """Build one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    words = [*SPECIALS, *vocabulary(), "\n"]
    ids = {word: i for i, word in enumerate(words)}
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {**names, "model_max_length": 512, "padding_side": "right", "extra_special_tokens": ["<image>"]}
    save_tokenizer(given.out, words, template="<s> $A", config=config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.out)
    some, _ = example(np.random.default_rng(0))
    assert tokenizer(" ".join(some[1:]))["input_ids"] == [ids[word] for word in some]

    torch.manual_seed(given.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=ids["<pad>"],
            bos_token_id=ids["<s>"],
            eos_token_id=ids["</s>"],
        )
    )
    train(model, ids, steps=given.steps, seed=given.seed)
    model.eval().half().save_pretrained(given.out)
    found = check(model.float(), ids)
    print("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    if short := [f"{name} < {least}" for name, least in GATES.items() if found[name] < least]:
        raise SystemExit(f"written, but do not ship it: {', '.join(short)}")


if __name__ == "__main__":
    main()
