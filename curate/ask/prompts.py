"""Texts and pictures as vectors in the space of a directory's embeddings.

CLIP's two towers share one space, so a prompt is compared with the stored image vectors by their dot product and no
image is opened again. The model is the one that made the embeddings: the manifest names it and the digest of its
weights, `log.jsonl` says where a local one lay. Imported embeddings name none, so the user must.
"""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from curate.embed import encoder, images, weights
from curate.errors import UsageError
from curate.storage import paths
from curate.storage.manifest import LOG, Artefact
from curate.vectors.narrow import products
from curate.words import is_blank

BATCH = 64
SCALE = 100.0
UNKNOWN = ("", "\ue000", "\U00012000")  # no text; a private-use character, a cuneiform sign: two ways to be unknown
WAY_OUT = "name the model that made them: --model NAME --pretrained TAG, as `curate embed` takes them"


def embed_texts(
    embedded: Artefact, texts: Sequence[str], model: str = "", pretrained: str = "", *, listed: bool = False
) -> np.ndarray:
    """Embed texts by the text tower of the model that made the embeddings. Returns unit rows f32 [len(texts), d].

    model, pretrained: for a manifest that names none, or where the model lies now. listed: the texts are a long list,
    some of which the model may not be able to read. Raises: UsageError for a text that is empty, too long, or not
    readable by the model, a model that cannot be loaded, or one with other weights than those that made the embeddings.
    """
    for text in texts:
        if is_blank(text):
            raise UsageError("a prompt is empty; expected some words.")
        if text != text.encode(errors="ignore").decode():
            raise UsageError(f"{text[:60]!a} is not UTF-8 text; expected some words.")
    loaded, tokenize = _load(*_source_of(embedded, model, pretrained))
    tokens = tokenize(list(texts))
    _refuse_cut(texts, tokens, tokenize)
    _refuse_unread(texts, tokens, tokenize, listed)
    parts = [loaded.texts(tokens[first : first + BATCH]) for first in range(0, len(texts), BATCH)]
    return np.concatenate(parts)


def _refuse_cut(texts: Sequence[str], tokens_nl: np.ndarray, tokenize: encoder.Tokenizer) -> None:
    """Refuse a text that is cut: without its last letter its tokens are the same."""
    padding = tokenize(["a"])[0, -1]
    full = np.flatnonzero(tokens_nl[:, -1] != padding)
    long = [texts[row] for row in full.tolist()]
    cut = (tokenize([text.strip()[:-1] for text in long]) == tokens_nl[full]).all(axis=1)
    for place in np.flatnonzero(cut).tolist():
        width = f"the {tokens_nl.shape[1]} tokens that the model reads"
        raise UsageError(f"{long[place][:60]!r}… is longer than {width}; expected fewer words.")


def _refuse_unread(texts: Sequence[str], tokens_nl: np.ndarray, tokenize: encoder.Tokenizer, listed: bool) -> None:
    """Refuse a text of which the tokenizer knows no word: the answer would be that of an empty text."""
    unread = np.isin(tokens_nl, tokenize(list(UNKNOWN))).all(axis=1)
    if unread.all() if listed else unread.any():
        text = texts[int(unread.argmax())]
        raise UsageError(f"the embeddings' model knows no word of {text[:60]!r}; expected words it knows.")


def other_weights(embedded: Artefact, model: str, pretrained: str) -> dict[str, str]:
    """Return the digest of the named model's weights, where the embeddings do not record theirs; else nothing.

    It keeps what is stored for one model's texts from another's. Raises: UsageError for a model that cannot be loaded.
    """
    if not model or embedded.manifest["options"].get("weights"):
        return {}
    return {"text_weights": _found(model, pretrained).weights}


def embed_image(embedded: Artefact, location: str, model: str = "", pretrained: str = "") -> np.ndarray:
    """Embed a picture by the image tower of the model that made the embeddings. Returns a unit vector f32 [d].

    Raises: UsageError for a file that is not a picture, and as `embed_texts` does.
    """
    loaded, _ = _load(*_source_of(embedded, model, pretrained))
    try:
        pixels = images.transform(loaded.preprocess)(images.decode(paths.read_bytes(location)))
    except FileNotFoundError:
        raise UsageError(f"{location} does not exist; expected a picture.") from None
    except images.BadImage as bad:
        raise UsageError(f"{location} cannot be used as a picture: {bad.status}.") from None
    return np.asarray(loaded.images(pixels[None])[0])


def text_shares(x_nd: np.ndarray, texts_md: np.ndarray) -> np.ndarray:
    """Compute the first text's share among m texts for images f16 [n, d]: f32 [n]; for one text its cosine.

    The share is a softmax at the scale at which CLIP models end their training: 100. It needs only the others' cosines
    minus the first's, so one product fewer than there are texts.
    """
    if len(texts_md) == 1:
        return products(x_nd, texts_md)[:, 0]
    scaled = products(x_nd, SCALE * (texts_md[1:] - texts_md[:1]))
    return np.asarray(1 / (1 + np.exp(np.minimum(scaled, 80)).sum(axis=1)), np.float32)


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
    for line in reversed(paths.read_lines(location)):
        try:
            entry = json.loads(line)
        except ValueError:  # a run was killed while it wrote the line
            continue
        folder = str(entry.get("model", "")).removeprefix("local-dir:")
        if "model" in entry:
            return (entry["model"], entry.get("pretrained", "")) if paths.exists(folder) else None
    return None


@lru_cache(maxsize=2)
def _found(model: str, pretrained: str) -> weights.Source:
    try:
        return weights.find(model, pretrained)
    except UsageError as error:
        raise UsageError(f"the model that made the embeddings cannot be loaded: {error}", WAY_OUT) from None


@lru_cache(maxsize=2)
def _load(model: str, pretrained: str, digest: str, precision: str) -> tuple[encoder.Encoder, encoder.Tokenizer]:
    """Load a model once per process. Raises: UsageError when its weights do not have the digest."""
    source = _found(model, pretrained)
    if digest and source.weights != digest:
        raise UsageError(f"{model} has other weights than the model that made the embeddings.", WAY_OUT)
    device = encoder.choose_device()
    usable = encoder.choose_precision(precision, device, source)[0]
    return encoder.Encoder(source, usable, device), encoder.Tokenizer(source)
