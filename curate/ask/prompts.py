"""Texts and pictures as vectors of the space in which a directory's embeddings lie.

CLIP's two towers end in one space, so a prompt is compared with the stored image vectors by their dot product and no
image is looked at again. The model is the one that made the embeddings: the manifest names it and the digest of its
weights, `log.jsonl` says where a local one lay. Imported embeddings know none, so it has to be named.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from curate.embed import encoder, images, weights
from curate.errors import UsageError
from curate.storage import paths
from curate.storage.manifest import LOG, Artefact
from curate.vectors.exact import widen

BATCH = 64
BLOCK = 1 << 13  # rows whose vectors are scored at a time: they stay in the cache
SCALE = 100.0
WAY_OUT = "name the model that made them: --model NAME --pretrained TAG, as `curate embed` takes them"


def embed_texts(embedded: Artefact, texts: Sequence[str], model: str = "", pretrained: str = "") -> np.ndarray:
    """Embed texts by the text tower of the model that made the embeddings. Returns unit rows f32 [len(texts), d].

    model, pretrained: where the manifest names none, or where it lies now. Raises: UsageError for an empty text, a
    model that cannot be had, or one with other weights than those that made the embeddings.
    """
    for text in texts:
        if not text.strip():
            raise UsageError("a prompt is empty; expected some words.")
    loaded, tokenize = _load(*_source_of(embedded, model, pretrained))
    tokens = tokenize(list(texts))
    parts = [loaded.texts(tokens[first : first + BATCH]) for first in range(0, len(texts), BATCH)]
    return np.concatenate(parts)


def embed_image(embedded: Artefact, location: str, model: str = "", pretrained: str = "") -> np.ndarray:
    """Embed a picture by the image tower of the model that made the embeddings. Returns a unit vector f32 [d].

    Raises: UsageError for a file that is no picture, and as `embed_texts` does.
    """
    loaded, _ = _load(*_source_of(embedded, model, pretrained))
    try:
        pixels = images.transform(loaded.preprocess)(images.decode(paths.read_bytes(location)))
    except FileNotFoundError:
        raise UsageError(f"{location} does not exist; expected a picture.") from None
    except images.BadImage as bad:
        raise UsageError(f"{location} cannot be used as a picture: {bad.status}.") from None
    return np.asarray(loaded.images(pixels[None])[0])


def text_shares(cosines_nm: np.ndarray) -> np.ndarray:
    """Turn cosines to m texts into the share of the first, f32 [n]; of one text into its cosine.

    The share is a softmax at CLIP's own scale, at which its models were trained and end up: 100.
    """
    if cosines_nm.shape[1] == 1:
        return np.asarray(cosines_nm[:, 0])
    scaled = SCALE * (cosines_nm - cosines_nm[:, :1])
    return np.asarray(1 / np.exp(np.minimum(scaled, 80)).sum(axis=1), np.float32)


def in_blocks(
    vectors: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, score: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Score rows block by block. vectors: row numbers to f16 [m, d]; score: f32 [m, d] to f32 [m]. Returns f32 [n]."""
    found = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), BLOCK):
        part = slice(first, first + BLOCK)
        found[part] = score(widen(vectors(rows[part])))
    return found


def _source_of(embedded: Artefact, model: str, pretrained: str) -> tuple[str, str, str, str]:
    """Find the model's name, its weights, their digest ("" where unknown) and the precision that was used."""
    made = embedded.manifest["options"]
    if not model:
        if "model" not in made:
            raise UsageError(f"{embedded.directory} does not say which model made its embeddings.", WAY_OUT)
        model, pretrained = _place_of(embedded) or (made["model"], pretrained or made.get("pretrained", ""))
    return model, pretrained, str(made.get("weights", "")), str(made.get("precision", "auto"))


def _place_of(embedded: Artefact) -> tuple[str, str] | None:
    """Read where a local model lay from the log; None where there is none, or another machine wrote it."""
    location = embedded.path(LOG)
    if not paths.exists(location):
        return None
    for line in reversed(paths.read_text(location).splitlines()):
        entry = json.loads(line)
        folder = str(entry.get("model", "")).removeprefix("local-dir:")
        if "model" in entry:
            return (entry["model"], entry.get("pretrained", "")) if paths.exists(folder) else None
    return None


@lru_cache(maxsize=2)
def _load(model: str, pretrained: str, digest: str, precision: str) -> tuple[encoder.Encoder, encoder.Tokenizer]:
    """Load a model once a process. Raises: UsageError when its weights are others than those of the digest."""
    try:
        source = weights.find(model, pretrained)
    except UsageError as error:
        raise UsageError(f"the model that made the embeddings cannot be had: {error}", WAY_OUT) from None
    if digest and source.weights != digest:
        raise UsageError(f"{model} has other weights than the model that made the embeddings.", WAY_OUT)
    device = encoder.choose_device()
    usable = encoder.choose_precision(precision, device, source)[0]
    return encoder.Encoder(source, usable, device), encoder.Tokenizer(source)
