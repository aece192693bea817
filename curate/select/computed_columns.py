"""Columns that are computed from the stored embeddings when a step asks for them.

They are written like calls, `rank(norm_sim("emb/target"), 0, 0.30)`, or, with their defaults, like any other column,
`above(neg_clip_loss, 0.2)`. A column is computed once in a selection: where it is first used, over the rows that are
still alive there, with random draws by the selection's seed. All other rows have no value (NaN).
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from curate.ask import heads, languages
from curate.ask.prompts import text_shares
from curate.errors import UsageError, unknown
from curate.select import syntax
from curate.select.frame import Directory, File, Frame, Group, Texts
from curate.select.steps import coverage, pair_scores
from curate.storage.manifest import file_digest

HIDDEN = 1  # the frame is not written
CAPTIONS = 1 << 14  # read at a time
LIKE = 'norm_sim("emb/target")'


def neg_clip_loss(
    frame: Frame,
    temperature: float = pair_scores.TEMPERATURE,
    batch_size: int = pair_scores.BATCH_SIZE,
    batches: int = pair_scores.BATCHES,
) -> np.ndarray:
    """Compute the cosine of image and caption, less what each has with all others in a batch (negCLIPLoss)."""
    if temperature < pair_scores.LEAST_TEMPERATURE or batch_size < 2 or batches < 1:
        raise UsageError(
            "neg_clip_loss needs a temperature of 0.003 or more, a batch_size of 2 or more and batches of 1 or more."
        )
    rows = np.flatnonzero(frame.alive & ~np.isnan(frame.column("clip_score")))
    assert frame.text_vectors is not None, "at least one row with a clip_score"
    scores = pair_scores.neg_clip_loss(
        frame.vectors, frame.text_vectors, rows, _random(frame, "neg_clip_loss"),
        temperature=temperature, batch_size=batch_size, batches=batches,
    )  # fmt: skip
    return _spread(frame, rows, scores)


def norm_sim(frame: Frame, directory: Directory, p: str = "inf") -> np.ndarray:
    """Measure nearness to another EMB: the highest cosine to its images, or the root of their squares' sum (p="2")."""
    if p not in ("inf", "2"):
        raise UsageError(f'norm_sim: p is {p!r}, expected "inf" or "2".')
    rows = np.flatnonzero(frame.alive)
    targets = (vectors for vectors, _ in frame.foreign(directory))
    return _spread(frame, rows, pair_scores.norm_sim(frame.vectors, rows, targets, float(p)))


def typicality(frame: Frame, neighbours: int = 20) -> np.ndarray:
    """Compute 1 / mean distance to the nearest neighbours in the cluster (TypiClust): high means typical."""
    if neighbours < 1:
        raise UsageError(f"typicality: {neighbours} neighbours, expected at least 1.")
    groups = np.where(frame.alive, frame.group("cluster"), -1)
    return coverage.typicality(frame.vectors, groups, neighbours, _random(frame, "typicality"))


def redundancy(frame: Frame, column: Group = "") -> np.ndarray:
    """Compute the mean cosine to all other rows (or to the column's group), centred on their common mean (PRISM)."""
    groups = np.unique(frame.group(column), return_inverse=True)[1] if column else np.zeros(len(frame.good), np.int64)
    return coverage.redundancy(frame.vectors, np.where(frame.alive, groups, -1))


def prompt(frame: Frame, text: str, others: Texts = ()) -> np.ndarray:
    """Compute the image's cosine to a text, or, with others, the text's softmax share of all (at CLIP's scale 100)."""
    texts = [text, *others]

    def make() -> np.ndarray:
        prompts = frame.embed_texts(texts)
        return _of_all(frame, lambda x: text_shares(x, prompts))

    return frame.stored({"prompt": texts}, make)


def head(frame: Frame, file: File, name: str = "") -> np.ndarray:
    """Score images by a linear head or MLP in a safetensors file. name: one of its classes [the only or last one]."""
    read = heads.read_head(file, frame.vectors(np.zeros(1, np.int64)).shape[1])
    if name and name not in read.classes:
        raise unknown("class of the head", name, read.classes)
    place = read.classes.index(name) if name else -1

    def make() -> np.ndarray:
        return _of_all(frame, lambda x: read.apply(x)[:, place])

    return frame.stored({"head": file_digest(file), "name": name}, make)


def language(frame: Frame, code: str) -> np.ndarray:
    """Say how likely a caption is in a language ("en"), relative to the likeliest: 0 … 1 (extra `language`)."""
    detect = languages.detector(code)

    def make() -> np.ndarray:
        rows = np.flatnonzero(frame.good)
        parts = np.array_split(rows, -(-len(rows) // CAPTIONS)) if len(rows) else []
        return _spread(frame, rows, np.array([detect(text) for part in parts for text in frame.captions(part)]))

    return frame.stored({"language": code, "by": languages.NAME}, make)


COLUMNS: dict[str, Callable[..., np.ndarray]] = {
    column.__name__: column for column in (neg_clip_loss, norm_sim, typicality, redundancy, prompt, head, language)
}


def check(frame: Frame, text: str) -> None:
    """Refuse a column that is neither stored nor can be computed. Raises: UsageError."""
    if text in frame.columns:
        return
    name = text.partition("(")[0].strip()
    if "(" not in text and name not in COLUMNS:
        frame.known(text, frame.columns, also=COLUMNS)
    name, arguments = _read(text)
    kinds = syntax.parameters(COLUMNS[name], HIDDEN)
    for key, value in arguments.items():
        if kinds[key] is Group and value:
            frame.known(value, frame.groups)
    if name == "typicality":
        frame.known("cluster", frame.groups)


def compute(frame: Frame, text: str) -> np.ndarray:
    """Compute a column as it is written, f32 [n]. Raises: UsageError when there is none like that."""
    check(frame, text)
    name, arguments = _read(text)
    return COLUMNS[name](frame, **arguments)


def reads(text: str) -> list[tuple[str, Any]]:
    """List what a column reads besides the pool: (path, Directory or File)."""
    if text.partition("(")[0].strip() not in COLUMNS:
        return []
    name, arguments = _read(text)
    kinds = syntax.parameters(COLUMNS[name], HIDDEN)
    return [(value, kinds[key]) for key, value in arguments.items() if kinds[key] in (Directory, File)]


def signature(name: str) -> str:
    """Write how a column is called, with its defaults."""
    return syntax.signature(name, COLUMNS, HIDDEN)


def _read(text: str) -> tuple[str, dict[str, Any]]:
    return syntax.read(text if "(" in text else f"{text}()", COLUMNS, "column", LIKE, HIDDEN)


def _random(frame: Frame, name: str) -> np.random.Generator:
    return np.random.default_rng([frame.seed, zlib.crc32(name.encode())])


def _of_all(frame: Frame, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Score the good rows in one pass. score: image vectors f16 [m, d] to f32 [m]."""
    scores = np.concatenate(list(frame.scored(score)))
    scores[~frame.good] = np.nan
    return scores


def _spread(frame: Frame, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    spread = np.full(len(frame.good), np.nan, np.float32)
    spread[rows] = values
    return spread
