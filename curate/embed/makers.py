"""What made a directory's shards: device and versions, which may differ if it was resumed elsewhere."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from curate.storage import manifest, sidecar


def made_by(device: str) -> dict[str, Any]:
    """Describe what makes shards in this run. device: as `encoder.describe_device` names it."""
    return {"device": device, "versions": manifest.versions("torch", "open_clip_torch", "pillow")}


def account(facts: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Any]:
    """Say what made the shards: one device with its versions, or `made_by`, which lists each with its shards."""
    shards: dict[str, list[str]] = {}
    for stem, fact in facts.items():
        shards.setdefault(json.dumps(fact.get("made_by", made_by(device)), sort_keys=True), []).append(stem)
    makers = [{**json.loads(maker), "shards": stems} for maker, stems in shards.items()]
    first = {name: makers[0][name] for name in ("versions", "device")} if makers else made_by(device)
    return {**first, **({"made_by": makers} if len(makers) > 1 else {})}


def say_other_maker(output: manifest.Output, todo: Sequence[str], stems: Sequence[str], device: str) -> None:
    """Say on stderr if the shards that exist already were made by other versions or on another device."""
    missing = set(output.missing(stems))  # other slices' shards, too
    there = next((stem for stem in stems if stem not in missing), None) if todo else None
    before = sidecar.facts(output.find(there)).get("made_by") if there is not None else None
    now = made_by(device)
    if before is not None and before != now:
        told = " and ".join(json.dumps(each, sort_keys=True) for each in (before, now))
        sys.stderr.write(f"embed: different versions or devices made the shards: {told}; the manifest says which\n")
