"""Results of a pass over all vectors or texts, stored beside the embeddings so that later selections can read them.

    EMB.columns/{digest}.npy   a column, f32 [rows], NaN where a row has no value; a vocabulary's vectors, f32 [m, d];
                               the concepts that images show, i32 [rows, per_image], -1 for none
    EMB.columns/{digest}.json  what it is, and of which embeddings

The digest covers what was asked (the prompts, the head's bytes, the list of concepts) and the embeddings' manifest, so
that a column of other embeddings is never used. The folder is a cache: it may be deleted, and where it cannot be
written the column is computed each time.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from curate.errors import ContractError, UsageError
from curate.storage import paths, sidecar
from curate.storage.manifest import Artefact, digest, load_json, save_json

log = logging.getLogger("curate")
OF_ALL, WIDTH = ("embeddings", "rows"), 90


def stored_array(
    embedded: Artefact, about: Mapping[str, Any], make: Callable[[], np.ndarray], rows: int | None = None
) -> np.ndarray:
    """Return an array of numbers: the stored one, or what `make` computes, which is then stored.

    rows: its length; of a column, as many as the embeddings have.
    """
    told = {**about, "embeddings": embedded.digest, "rows": sum(embedded.rows.values()) if rows is None else rows}
    folder = folder_of(embedded)
    place = paths.join(folder, digest(told))
    if paths.exists(f"{place}.json") and load_json(f"{place}.json") == told:
        try:
            values = sidecar.load_npy(f"{place}.npy")
        except (OSError, ValueError) as error:
            raise ContractError(f"{place}.npy cannot be read: {error}", f"delete {folder}") from None
        if len(values) == told["rows"] and values.dtype in (np.float32, np.int32):
            return values
    values = make()
    try:
        paths.make_dir(folder)
        sidecar.save_npy(f"{place}.npy", values)
        save_json(f"{place}.json", told)
    except (OSError, UsageError) as error:
        log.warning("%s cannot be written, so the column is computed anew each time (%s)", folder, error)
    return values


def folder_of(embedded: Artefact) -> str:
    """Return the folder in which arrays that belong to embeddings are stored."""
    return embedded.directory.rstrip("/") + ".columns"


def stored_lines(folder: str) -> Iterator[str]:
    """Yield what `curate show` says of such a folder: what each column is. Nothing for any other folder."""
    names = sorted(paths.listdir(folder)) if folder.endswith(".columns") else []
    told = [load_json(paths.join(folder, name)) for name in names if name.endswith(".json")]
    told = [each for each in told if isinstance(each, dict) and "embeddings" in each]
    if told:
        what = f"{len(told)} stored array{'s' * (len(told) > 1)}"
        yield f"{folder}: {what} for {folder.removesuffix('.columns')}; a cache, which may be deleted"
    for each in told:
        about = " · ".join(f"{key} {json.dumps(each[key], ensure_ascii=False)}" for key in each if key not in OF_ALL)
        yield f"  {each['rows']:,} rows · {about if len(about) <= WIDTH else about[: WIDTH - 1] + '…'}"


def vocabulary_of(embedded: Artefact) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Return the largest vocabulary that was embedded for these embeddings: its concepts, and unit rows f32 [m, d]."""
    folder = folder_of(embedded)
    best: tuple[int, str, dict[str, Any]] | None = None
    for name in sorted(paths.listdir(folder)) if paths.exists(folder) else []:
        told = load_json(paths.join(folder, name)) if name.endswith(".json") else {}
        if "vocabulary" in told and told.get("embeddings") == embedded.digest and (not best or told["rows"] > best[0]):
            best = told["rows"], name, told
    if best is None:
        return None
    try:
        vectors = sidecar.load_npy(paths.join(folder, best[1].removesuffix(".json") + ".npy"))
    except (OSError, ValueError):
        return None
    return tuple(best[2]["vocabulary"]), vectors
