"""Columns that cost a pass over all vectors, stored beside the embeddings so that later selections read them.

    EMB.columns/{digest}.npy   f32 [rows], NaN where a row has no value
    EMB.columns/{digest}.json  what it is, and of which embeddings

The digest covers what the column says (the prompts, the head's bytes) and the embeddings' manifest, so that a column of
other embeddings is never taken. The folder is a cache: it may be deleted, and where it cannot be written the column is
computed each time.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from curate.errors import ContractError, UsageError
from curate.storage import paths, sidecar
from curate.storage.manifest import Artefact, digest, load_json, save_json

log = logging.getLogger("curate")


def stored_column(embedded: Artefact, about: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a column of all rows, f32 [n]: the stored one, or what `make` computes, which is then stored."""
    told = {**about, "embeddings": embedded.digest, "rows": sum(embedded.rows.values())}
    folder = embedded.directory.rstrip("/") + ".columns"
    place = paths.join(folder, digest(told))
    if paths.exists(f"{place}.json") and load_json(f"{place}.json") == told:
        try:
            values = sidecar.load_npy(f"{place}.npy")
        except (OSError, ValueError) as error:
            raise ContractError(f"{place}.npy cannot be read: {error}", f"delete {folder}") from None
        if values.shape == (told["rows"],) and values.dtype == np.float32:
            return values
    values = np.asarray(make(), np.float32)
    try:
        paths.make_dir(folder)
        sidecar.save_npy(f"{place}.npy", values)
        save_json(f"{place}.json", told)
    except (OSError, UsageError) as error:
        log.warning("%s cannot be written: the column is computed anew each time (%s)", folder, error)
    return values
