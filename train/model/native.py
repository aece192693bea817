"""Load an exported folder with transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipelines.terminal import first_line
from train.errors import UsageError
from train.folder import refuse_unexported
from train.model.own import register_own_classes
from train.model.published import lacking
from train.model.tower import needed


def load_native(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Load an exported folder and its processor, also with a tower class of ours.  Raises: UsageError."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    refuse_unexported(folder)
    register_own_classes()
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if missing := needed(found["missing_keys"]):
            raise lacking(missing)
        return model, AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = first_line(error)
        raise UsageError(f"{folder} cannot be loaded as an exported model ({reason:.300})") from None
