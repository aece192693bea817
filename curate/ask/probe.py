"""A linear head from a few keys that a person marked: logistic regression over the stored image vectors.

    P(label | x) = softmax(W x + b), fitted with an L2 penalty whose strength is chosen by cross-validation

Every figure is for held-out rows: each row is judged by a model that was fitted without its fold. Accuracy is compared
with that of always naming the commonest label; calibration is the mean distance between the stated probability of the
named label and how often it was right, over ten bins (expected calibration error). Rows to label next are those of
which the head is least sure (the smallest lead of its first label over its second), at most one per cluster where
there are clusters, so that they are not all copies of one picture. Cost: a pass over the keys, one over the vectors for
the rows to label next, and fits of as many rows as were marked.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from curate.ask.heads import Head, read_head, write_head
from curate.ask.reading import scored
from curate.errors import UsageError
from curate.storage import paths
from curate.storage.manifest import Artefact, open_input
from curate.vectors.exact import widen

STRENGTHS = np.logspace(-2, 4, 13)  # C for unit vectors: from a nearly constant answer to a nearly unpenalised one
FOLDS = 5
LEAST = 5  # rows per label, so that each fold holds one
MAX_LABELS = 100


def probe(directory: str, labels: str, out: str, n: int = 20, seed: int = 0) -> dict[str, Any]:
    """Fit a head on marked rows, write it, and measure it on held-out ones.

    directory: of embed, import, cluster or select. labels: a file of `key TAB label` lines. Returns counts, held-out
    figures, and `next`: the keys of n rows to label next. Raises: UsageError.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict

    if n < 0 or not 0 <= seed < 2**32:
        raise UsageError(
            f"n={n}, seed={seed}; expected 0 or more rows to label next, and a seed from 0 to 2 ** 32 - 1."
        )
    if not out.endswith(".safetensors"):
        raise UsageError(f"{out} does not end in .safetensors; a head is written as such a file.")
    source = open_input(directory, "embed", "import", "cluster", "select")
    embedded = source.embeddings()
    marked = read_labels(labels)
    x_nd, keys = _vectors_of(embedded, marked)
    uses = Counter(keys)
    once = np.array([uses[key] == 1 for key in keys], bool)  # of several pictures, which was marked is unknown
    x_nd, names = x_nd[once], [marked[key] for key in keys if uses[key] == 1]
    counts = Counter(names)
    if len(counts) < 2 or min(counts.values()) < LEAST:
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
        told += f" ({len(uses) - len(names):,} keys left out, each in several rows)" if len(uses) > len(names) else ""
        raise UsageError(
            f"{labels}: {told} of {len(marked)} marked keys were found; expected two labels, {LEAST} rows each."
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    left = min(counts.values()) - -(-min(counts.values()) // FOLDS)  # rows of the rarest label when a fold is held out
    inner = StratifiedKFold(min(FOLDS, left), shuffle=True, random_state=seed)
    model = GridSearchCV(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, cv=inner, scoring="neg_log_loss")
    classes, y = np.unique(names, return_inverse=True)
    held_out = cross_val_predict(model, x_nd, y, cv=folds, method="predict_proba")
    fitted = model.fit(x_nd, y).best_estimator_
    weight, bias = fitted.coef_, fitted.intercept_
    if len(classes) == 2:  # scikit-learn keeps the second class's row alone
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.concatenate([[0.0], bias])
    about = {"output": "softmax", "classes": classes.tolist(), "activation": "none", "embeddings": embedded.digest}
    write_head(out, weight, bias, about)
    head = read_head(out, x_nd.shape[1])
    return {
        "labelled": dict(sorted(counts.items())),
        "unknown_keys": len(marked) - len(uses),
        "repeated_keys": len(uses) - len(names),
        **_judge(held_out, y),
        "strength": float(fitted.C),
        "next": _least_sure(source, embedded, head, set(marked), n),
    }


def lines(told: Mapping[str, Any], out: str) -> Iterator[str]:
    """Yield what the terminal shows of what `probe` returned. out: the head."""
    counts = " · ".join(f"{count:,} {name}" for name, count in told["labelled"].items())
    unclear = f" · {told['repeated_keys']:,} left out, each in several rows" * bool(told["repeated_keys"])
    yield f"{counts} · {told['unknown_keys']:,} keys not found{unclear} → {out}"
    by_label = f"{told['commonest']:.1%} by always naming the commonest label"
    yield f"held out: {told['accuracy']:.1%} right ({by_label}), calibration error {told['calibration_error']:.3f}"
    yield "label next, least sure first:"
    for row in told["next"]:
        yield f"  {row['key']}  lead {row['lead']:.3f}"


def read_labels(location: str) -> dict[str, str]:
    """Read `key TAB label` lines. Raises: UsageError for a line of another form, or a key with two labels."""
    found: dict[str, str] = {}
    try:
        lines = paths.read_text(location).removeprefix("\ufeff").split("\n")  # other line ends may be in keys
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UsageError(f"{location} cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        key, tab, label = line.removesuffix("\r").partition("\t")
        if not line.strip():
            continue
        if not tab or not label.strip() or not key:
            raise UsageError(f"{location}:{number}: {line[:80]!r}; expected a key, a tab and a label.")
        if found.setdefault(key, label.strip()) != label.strip():
            raise UsageError(f"{location}:{number}: {key} is marked {label.strip()!r} and {found[key]!r}.")
    if not found:
        raise UsageError(f"{location} marks no key; expected a key, a tab and a label in each line.")
    if len(set(found.values())) > MAX_LABELS:
        raise UsageError(f"{location} has {len(set(found.values())):,} labels; expected at most {MAX_LABELS}.")
    return found


def _vectors_of(embedded: Artefact, marked: Mapping[str, str]) -> tuple[np.ndarray, list[str]]:
    """Look up the vectors f32 [m, d] of the marked keys that are found and have one, and their keys."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted, parts, names = pa.array(list(marked)), [], []
    for stem, table in embedded.sidecars.tables(["key"]):
        rows = np.asarray(pc.indices_nonzero(pc.is_in(table["key"], wanted)), np.int64)
        if len(rows):
            vectors = embedded.sidecars.take_vectors(stem, "image_embedding", rows)
            there = vectors.any(axis=1)
            parts.append(vectors[there])
            names += table["key"].take(rows[there]).to_pylist()
    return (widen(np.concatenate(parts)) if parts else np.empty((0, 1), np.float32)), names


def _judge(held_out: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Score held-out probabilities f64 [n, k]: accuracy, that of the commonest label, and the calibration error."""
    named, sure = held_out.argmax(axis=1), held_out.max(axis=1)
    right = named == y
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return {
        "accuracy": round(float(right.mean()), 4),
        "commonest": round(float(np.bincount(y).max() / len(y)), 4),
        "calibration_error": round(float(sum(gaps)), 4),
    }


def _least_sure(source: Artefact, embedded: Artefact, head: Head, marked: set[str], n: int) -> list[dict[str, Any]]:
    """Name the rows whose first label leads least over the second, one per cluster where there are clusters."""
    try:
        clusters = source.source("cluster")
    except LookupError:
        clusters = None
    waiting: list[tuple[float, str, int, int | None]] = []  # lead, stem, row, cluster
    keep = 50 * (n + len(marked))
    for block, scores in scored(embedded, head.apply):
        stem, first, good = block.stem, block.first, block.good
        top = np.sort(scores, axis=1)
        lead = np.where(good, top[:, -1] - top[:, -2], np.inf)
        rows = np.argsort(lead, kind="stable")[:keep]
        own = clusters.table(stem, ["cluster"])["cluster"].to_numpy() if clusters else None
        waiting += [
            (float(lead[row]), stem, int(first + row), int(own[first + row]) if own is not None else None)
            for row in rows.tolist()
            if good[row]
        ]
        waiting = sorted(waiting, key=lambda each: each[0])[:keep]
    seen: set[int] = set()  # clusters
    chosen: list[dict[str, Any]] = []
    for least, stem, row, cluster in waiting:
        if len(chosen) == n:
            break
        key = embedded.table(stem, ["key"])["key"][row].as_py() if cluster not in seen else None
        if key is not None and key not in marked:
            seen |= {cluster} if cluster is not None else set()
            chosen.append({"key": key, "lead": round(least, 4)})
    return chosen
