"""What a run depends on besides its data: weights, tokenizer, chat template and image preparation, as it read them.

A hub id or a folder may change from one day to the next, most often its chat template or preprocessor. Options only
name them, so a run also records what they were: in its checkpoints, which resume with nothing else, and in its
manifest, for `export`, which reads them again. A tokenizer is compared by the ids it gives, not by its files' bytes,
which a newer library may write differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.encoder import Encoder
from train.data.own_template import OwnTemplate
from train.errors import TrainError
from train.model.compose import Composed

PROBE = "The 3 brown föxes,  don't\n\tjump() über 世界 🙂 <b>12345</b>."
WORDS = {"weights": "the weights", "tokenizer": "the tokenizer", "template": "the chat template"}


def describe_base(composed: Composed, encoder: Encoder) -> dict[str, Any]:
    """Return what was read, by name, as JSON values."""
    tokenizer, vision, template = composed.tokenizer, composed.vision, encoder.template
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    values = {
        "weights": composed.fingerprint,
        "tokenizer": _digest([ids, probe, encoder.bos_ids]),
        "template": _digest(template.source) if isinstance(template, OwnTemplate) else "",
        **{name: getattr(vision, name) for name in ("image_size", "short_side", "resample", "mean", "std")},
    }
    return dict(json.loads(json.dumps(values)))  # as they are read back


def check_base(noted: Mapping[str, Any], now: Mapping[str, Any], sources: str, run: Path) -> None:
    """Refuse to continue what was trained on another base.  Raises: TrainError.

    noted, now: what `describe_base` returned then (nothing in older versions) and now.  sources: the base's names.
    """
    for name in now:
        if name in noted and noted[name] != now[name]:
            what = WORDS.get(name) or f"the preparation of images ({name} was {noted[name]}, is {now[name]})"
            raise TrainError(f"{what} of {sources} changed since {run} was trained; restore it, or train again")


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(errors="replace"), digest_size=16).hexdigest()
