"""Fields in the form of transformers 4, for readers that use it: LLaMA-Factory, mlx-lm, older vLLM.

transformers 5 writes rotary embeddings as one table (`rope_parameters`), special tokens as a list, and the preparation
of images inside processor_config.json. Version 4 refuses the second, does not find the third and, worst, ignores the
first: it then takes the family's default rotary share and base, and silently computes other logits. So the old fields
are written beside the new ones, with the same values; version 5 reads either.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from train.folder import read_json, write_json


def write_for_older_readers(folder: Path) -> None:
    """Add what transformers 4 reads to a saved model's config.json, tokenizer_config.json and image preparation."""
    config, meant = read_json(folder / "config.json"), _read_rope(folder)
    for part in (config, config.get("text_config", {})):
        part.pop("_name_or_path", None)  # a path on this machine
    plain = copy.deepcopy(config)
    for part in (plain, plain.get("text_config", {})):
        part.update(_plain_rope(part.get("rope_parameters") or {}))
    write_json(folder / "config.json", plain)
    if _read_rope(folder) != meant:  # version 5 reads them before the table, for families that version 4 lacks
        write_json(folder / "config.json", config)
    values = read_json(folder / "tokenizer_config.json")
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    values.setdefault(
        "model_input_names", ["input_ids", "attention_mask"]
    )  # else token_type_ids, which few models take
    write_json(folder / "tokenizer_config.json", values)
    if (folder / "processor_config.json").is_file():
        images = read_json(folder / "processor_config.json").get("image_processor")
        if images:
            write_json(folder / "preprocessor_config.json", images)


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rope_theta, partial_rotary_factor and rope_scaling, from one table or one per kind of layer (Gemma 3)."""
    local = parameters.get("sliding_attention")
    if isinstance(parameters.get("full_attention"), dict):
        parameters = parameters["full_attention"]
    known: dict[str, Any] = {
        key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters
    }
    rest = {key: value for key, value in parameters.items() if key not in known}
    if isinstance(local, dict) and "rope_theta" in local:
        known["rope_local_base_freq"] = local["rope_theta"]
    if rest.get("rope_type", "default") != "default":
        known["rope_scaling"] = rest
    return known


def _read_rope(folder: Path) -> Any:
    """Return the table as transformers reads it from a folder, or None if it cannot."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "rope_parameters", None)
    except (KeyError, StrictDataclassError, TypeError, ValueError):
        return None
