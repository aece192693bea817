"""How well a model knows which text belongs to a picture: its own text and those of others, ranked by likelihood.

Pictures, all different, are shuffled with a fixed seed and dealt into groups of `candidates`; every text of a group is
scored after every picture of the group, in the form of the plain stage: image, then text, then the end token. With
T[i, j] the log-likelihood of text j after picture i, three questions are asked about each picture i. A tie counts
against the right answer, and chance is 1 / candidates:

likelihood  which text is the likeliest per token, T[i, j] / tokens of j? Common texts win after any picture, the more
            so the less a model sees.
gain        which text gains most from the picture: T[i, j] - log mean exp T[., j] over the group's other pictures? What
            makes a text common is in both terms and cancels; it is the pointwise mutual information of picture and
            text, with the marginal taken over the group. It ranks like the probability of picture i given text j, if
            all pictures of the group are equally probable.
picture     the reverse: after which picture is text i the likeliest, max T[., i]?

Ranks are coarse: of two models that rank the same texts first, one may be almost certain and the other hardly.
`information` measures this: the mean of log (exp T[i, i] / mean exp T[., i]) over all pictures of the group, in nats.
It is how far a text narrows down which of the pictures is its own: at most log `candidates`, about 0 for a model that
does not see, below 0 for one that is certain and wrong. Source: InfoNCE (arXiv 1807.03748), a lower bound on mutual
information.

Cost: each image once, and each text of a group once after each of its pictures; nothing is padded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.sources import Source, decode_image
from train.errors import UsageError
from train.eval.generate import Speaker
from train.eval.progress import Kept, Pace

SEED = 0
Pair = tuple[Callable[[], Any], str]  # what decodes a picture to a PIL image when its group is scored; a text
RANKS = ("rank", "gain_rank", "picture_rank")
TOGETHER = 10  # pictures after which a text is read at a time; their keys and values are held twice


def rank(
    speak: Callable[[], Speaker], pairs: Sequence[Pair], candidates: int, kept: Kept | None = None
) -> list[dict[str, float]]:
    """Rank texts after pictures.  speak: loads the model.  candidates: texts per picture, including the right one.
    kept: results of finished groups, and where to keep the others.

    Returns for each pair its `rank` by likelihood, 1 being best, its `gain_rank` by what the image adds, the
    `picture_rank` of its image for its text, and its `information` in nats.  Raises: UsageError.
    """
    check_candidates(candidates, len(pairs))
    kept = kept or Kept()
    found: list[dict[str, float]] = [{} for _ in pairs]
    pace = Pace("ranks", len(pairs))
    for number, (group, counted) in enumerate(deal(len(pairs), candidates)):
        name = f"ranks {number}"
        if name not in kept.parts:
            kept.add(name, _of_group(speak(), [pairs[i] for i in group], counted))
        for i, own in zip(group[:counted], kept.parts[name], strict=True):
            found[i] = own
        pace.add(counted)
    return found


def _of_group(speaker: Speaker, pairs: Sequence[Pair], counted: int) -> list[dict[str, float]]:
    texts = [text for _, text in pairs]
    lengths = np.array([len(ids) for ids in _tokens(speaker, texts)])
    means = likelihoods(speaker, [show() for show, _ in pairs], texts)
    nats = information(means * lengths).round(4)[:counted].tolist()
    own = zip(places(means, lengths)[:counted].tolist(), nats, strict=True)
    return [{**dict(zip(RANKS, ranks, strict=True)), "information": value} for ranks, value in own]


def check_candidates(candidates: int, pictures: int) -> None:
    """Refuse more candidates than there are pictures.  Raises: UsageError."""
    if not 2 <= candidates <= pictures:
        raise UsageError(
            f"eval.candidates = {candidates}: expected 2 to {pictures}, the held-out pictures that have a text"
        )


def summary(ranks: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Sum up what `rank` returns: how many are `ranked`, the mean `information`, and for each kind of rank the share
    that comes first and the mean: `ranked_first`, `mean_rank`; `gain_ranked_first`; …
    """
    told: dict[str, Any] = {"ranked": len(ranks)}
    told["information"] = round(float(np.mean([own["information"] for own in ranks])), 4)
    for name in RANKS:
        own = np.array([found[name] for found in ranks])
        kind = name.removesuffix("rank")
        told |= {f"{kind}ranked_first": round(float((own == 1).mean()), 4), f"{kind}mean_rank": round(own.mean(), 4)}
    return told


def deal(count: int, size: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Deal pictures into groups of `size`, and say how many of each count; earlier ones complete the last group."""
    order = np.random.default_rng(SEED).permutation(count)
    for first in range(0, count, size):
        group = order[first : first + size]
        yield np.concatenate([group, order[: size - len(group)]]), len(group)


def places(means: NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the three ranks i64 [n, 3] of each picture of a group, 1 being best.

    means: f64 [n, n], log-likelihood per token of text j after picture i.  lengths: i64 [n], tokens of each text.
    """
    totals = means * lengths
    gains = np.empty_like(totals)
    for i in range(len(totals)):
        others = np.delete(totals, i, 0)
        gains[i] = totals[i] - np.logaddexp.reduce(others, 0) + np.log(len(others))
    place = [(scores >= np.diag(scores)[:, None]).sum(1) for scores in (means, gains, totals.T)]
    return np.stack(place, 1)


def information(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how well each text tells its own picture from the others of the group, f64 [n], in nats.

    totals: f64 [n, n], the log-likelihood of text j after picture i.
    """
    nats: NDArray[np.float64] = np.diag(totals) - np.logaddexp.reduce(totals, 0) + np.log(len(totals))
    return nats


def pairs_of(source: Source, questions: Sequence[Any]) -> list[tuple[int, Pair]]:
    """Return index, picture and text of the questions about one image; equal pictures, by their bytes, only once."""
    first: dict[str, int] = {}
    for place, question in enumerate(questions):
        if len(question.images) == 1:
            first.setdefault(question.pictures[0], place)

    def show(place: int) -> Any:
        return decode_image(source.image_bytes(questions[place].images[0]))

    return [(place, (partial(show, place), questions[place].truth.strip())) for place in first.values()]


def prompt(speaker: Speaker, images: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the ids and pixels that precede a scored text: only an image, one row for each."""
    processor = speaker.processor
    text = (processor.tokenizer.bos_token or "") + processor.image_token
    taken = processor(text=[text] * len(images), images=list(images), return_tensors="pt", add_special_tokens=False)
    taken = taken.to(speaker.device, dtype=speaker.model.dtype)
    return {name: taken[name] for name in ("input_ids", "pixel_values")}


@torch.inference_mode()
def likelihoods(speaker: Speaker, images: Sequence[Any], texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the mean log-likelihood per token f64 [images, texts], end included, of each text after each image.

    A text is read after several images at once, whose keys and values are cached: rows of one length. Equal texts are
    read once, so that they tie.
    """
    known = dict(zip(texts, _tokens(speaker, texts), strict=True))
    means = np.empty((len(images), len(texts)))
    for at in range(0, len(images), TOGETHER):
        first = prompt(speaker, images[at : at + TOGETHER])
        rows, length = first["input_ids"].shape
        out = speaker.model(**first, use_cache=True, logits_to_keep=1)
        for text, tokens in known.items():
            ids = torch.tensor([tokens] * rows, device=speaker.device)
            mask = torch.ones(rows, length + len(tokens), dtype=torch.long, device=speaker.device)
            cache = copy.deepcopy(out.past_key_values)
            behind = speaker.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
            logits = torch.cat([out.logits, behind[:, :-1]], 1).float()
            said = torch.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0].double().mean(1)
            means[at : at + rows, [j for j, other in enumerate(texts) if other == text]] = said.cpu().numpy()[:, None]
    return means


def _tokens(speaker: Speaker, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, including its end."""
    tokenizer = speaker.processor.tokenizer
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
