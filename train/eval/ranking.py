"""How well a model knows which text belongs to a picture: its own and those of others, ranked by likelihood.

Of each picture, no two alike, its own text and those of `candidates - 1` other pictures, drawn by a fixed seed, are
scored in the form of the plain stage: image, then text, then the end. Two scores: the mean log-likelihood a token, and
what the image adds to it (less the text's own without the image), which no text gets for being common. A tie counts
against the right one; chance is 1 / candidates.
Cost: the image once a picture, its keys and values shared by all candidates, and each text once without an image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.sources import Source, decode_image
from train.errors import UsageError
from train.eval.generate import Speaker

SEED = 0
TOGETHER = 5  # texts; of 20 captions of 5 to 32 tokens, 16 % is filling, 49 % where all are read together


def rank(speaker: Speaker, pairs: Sequence[tuple[str, Any, str]], candidates: int) -> dict[str, Any]:
    """Rank texts behind pictures.  pairs: key, PIL image, text; candidates: texts a picture, the right one among them.

    Returns `ranked` (how many pictures), and as shares of them `ranked_first` by likelihood and `gain_ranked_first` by
    what the image adds; `mean_rank` and `gain_mean_rank`, 1 being best.  Raises: UsageError.
    """
    if not 2 <= candidates <= len(pairs):
        raise UsageError(
            f"eval.candidates = {candidates}: expected 2 to {len(pairs)}, the held-out pictures that have a text"
        )
    rng = np.random.default_rng(SEED)
    texts = [text for _, _, text in pairs]
    parts = [texts[at : at + candidates] for at in range(0, len(texts), candidates)]
    alone = np.concatenate([likelihoods(speaker, None, part) for part in parts])
    ranks = []
    for number, (_, image, _) in enumerate(pairs):
        others = rng.choice([i for i in range(len(pairs)) if i != number], candidates - 1, replace=False)
        chosen = [number, *map(int, others)]
        scores = likelihoods(speaker, image, [texts[i] for i in chosen])
        ranks.append([_place(scores), _place(scores - alone[chosen])])
    first, mean = (np.array(ranks) == 1).mean(0), np.array(ranks).mean(0)
    told = {"ranked": len(pairs), "ranked_first": first[0], "gain_ranked_first": first[1]}
    told |= {"mean_rank": mean[0], "gain_mean_rank": mean[1]}
    return {name: round(float(value), 4) for name, value in told.items()} | {"ranked": len(pairs)}


def pairs_of(source: Source, questions: Sequence[Any]) -> list[tuple[str, Any, str]]:
    """Return key, image and text of the questions about one image; a picture once, known by its bytes."""
    found: dict[bytes, tuple[str, Any, str]] = {}
    for question in questions:
        if len(question.images) == 1:
            content = source.image_bytes(question.images[0])
            if content not in found:
                found[content] = (question.key, decode_image(content), question.truth.strip())
    return list(found.values())


def prompt(speaker: Speaker, image: Any | None) -> dict[str, torch.Tensor]:
    """Return the ids (and pixels) that a text is scored behind: an image alone, or the first token of any text."""
    processor = speaker.processor
    tokenizer = processor.tokenizer
    if image is None:
        token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return {"input_ids": torch.tensor([[token]], device=speaker.device)}
    text = (tokenizer.bos_token or "") + processor.image_token
    taken = processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
    taken = taken.to(speaker.device, dtype=speaker.model.dtype)
    return {name: taken[name] for name in ("input_ids", "pixel_values")}


@torch.inference_mode()
def likelihoods(speaker: Speaker, image: Any | None, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the mean log-likelihood f64 [n] a token, end included, of texts behind an image (None: behind none).

    The picture is read once; texts of like lengths are read together, so that little of a batch is filling, and alike
    texts once, so that they tie.
    """
    tokenizer = speaker.processor.tokenizer
    end = tokenizer.eos_token_id
    known = {text: tokenizer(text, add_special_tokens=False)["input_ids"] + [end] for text in texts}
    first = prompt(speaker, image)
    out = speaker.model(**first, use_cache=True, logits_to_keep=1)
    length = first["input_ids"].shape[1]
    order = sorted(known, key=lambda text: len(known[text]))
    means: dict[str, float] = {}
    for at in range(0, len(order), TOGETHER):
        some = [known[text] for text in order[at : at + TOGETHER]]
        longest = len(some[-1])
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in some], device=speaker.device)
        seen = [[1] * (length + len(row)) + [0] * (longest - len(row)) for row in some]
        mask = torch.tensor(seen, device=speaker.device)
        cache = copy.deepcopy(out.past_key_values)
        cache.batch_repeat_interleave(len(some))
        behind = speaker.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        logits = torch.cat([out.logits.expand(len(some), -1, -1), behind[:, :-1]], 1).float()
        said = torch.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0]
        means |= {
            text: float(line[: len(row)].double().mean())
            for text, line, row in zip(order[at:], said, some, strict=False)
        }
    return np.array([means[text] for text in texts])


def _place(scores: NDArray[np.float64]) -> int:
    """Return how many candidates score at least as well as the first, itself among them; 1 is best."""
    return int((scores >= scores[0]).sum())
