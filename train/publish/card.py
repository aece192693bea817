"""The model card of an exported folder: README.md, made from the manifests of its run, its align run and their data.

It says what was trained on which data and how, which scores `eval` measured, and the commands that serve the folder.
Nothing in it is filled in by hand: what no manifest records (a licence, an intended use) is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from train.config import Stage
from train.errors import UsageError
from train.folder import MANIFEST, absolute, digest_weights, read_json
from train.model.compose import OWN_TOWERS

CARD = "README.md"
_HEAD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava]
---
# {name}

A vision-language model in llava-hf's form: vision tower {tower}, an MLP of two layers as projector, language model \
{lm}. {parameters:,} parameters in {dtype}, {tokens} tokens per image, conversations in the template `{template}`.
"""
_SERVE = """\
## Use

transformers:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model, processor = AutoModelForImageTextToText.from_pretrained("{folder}"), AutoProcessor.from_pretrained("{folder}")
asked = [{{"type": "image", "path": "X.jpg"}}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": asked}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.dtype)
print(processor.decode(model.generate(**inputs, max_new_tokens=128)[0], skip_special_tokens=True))
```

vLLM: `vllm serve {folder} --max-model-len {length}`

llama.cpp: `python -m train export {folder} --out PARTS --parts`; PARTS/README.md has its commands.
"""
_OWN_TOWER = """\
## Use

`python -m train generate {folder} --image X.jpg --prompt "What is this?"`

Its tower is {tower}, which is not a transformers class: vLLM, llama.cpp and plain transformers refuse it.
"""

_SCALED = """
transformers before 5.4, and vLLM where its Gemma scales all its inputs, multiply the image features by \
sqrt(hidden_size) once more than this model expects: first compare an answer with that of `python -m train generate`.
"""


def write_card(place: Path, run: Path, dtype: str, scores: Sequence[Path] = (), *, folder: Path) -> None:
    """Write the card of a model that is in `place` and will be moved to `folder`.

    scores: what `eval` wrote for this model: output directories of `--tasks`, or manifests beside answers.
    Raises: UsageError if one is neither.
    """
    paths = {path.resolve(): path for given in scores for path in _manifests(given)}
    found = [_scores(path, place) for path in paths.values()]
    (place / CARD).write_text(_card(place, run, dtype, found, folder.name), encoding="utf-8")


def _card(place: Path, run: Path, dtype: str, scores: Sequence[tuple[str, Any]], name: str) -> str:
    manifest, config = read_json(run / MANIFEST), read_json(place / "config.json")
    model = manifest["request"]["model"]
    words = {"tower": _bare(model["tower"]), "lm": _bare(model["lm"]), "tokens": config["image_seq_length"]}
    template = manifest["request"]["stage"].get("template") or model["template"]
    text = _HEAD.format(name=name, parameters=_count(place), dtype=dtype, template=template, **words)
    runs = [run]
    if align := manifest["request"]["inputs"].get("align"):
        runs.insert(0, Path(absolute(align, run)))
    text += "\n## Training\n\n" + "\n".join(_stage(each) for each in runs if (each / MANIFEST).is_file())
    text += _table(scores)
    own = OWN_TOWERS.get(config["vision_config"]["model_type"])
    use = (_OWN_TOWER if own else _SERVE).format(folder=name, tower=own, length=model["max_length"])
    return text + "\n" + use + (_SCALED if config["text_config"]["model_type"] == "gemma" else "")


def _count(place: Path) -> int:
    """Count the parameters in a folder's safetensors, from their headers."""
    total = 0
    for path in place.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


def _stage(run: Path) -> str:
    manifest = read_json(run / MANIFEST)
    request, result, versions = manifest["request"], manifest["result"], manifest["versions"]
    inputs, stage = request["inputs"], request["stage"]
    changed = {key: value for key, value in stage.items() if _is_told(key, value)}
    skipped = "".join(f", {count:,} left out ({reason})" for reason, count in result["skipped"].items())
    lines = [
        f"### {request['command']}",
        "",
        f"- data: {_bare(inputs['data'])} (digest {inputs['digest']}), {result['samples']:,} samples{skipped}, "
        f"{result['tokens']:,} tokens, {result['supervised']:,} of them supervised",
        *_data(Path(absolute(inputs["data"], run)) / MANIFEST),
        f"- {result['steps']:,} steps of {stage['batch_size']} samples; first loss {result['first_loss']:.4f}, "
        f"last loss {result['last_loss']:.4f}",
    ]
    if "val_loss" in result:
        lines.append(f"- validation loss {result['val_loss']:.4f} after step {result['best_step']:,}: these weights")
    lines.append("- options: " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in changed.items()))
    return "\n".join([*lines, f"- with {', '.join(f'{name} {version}' for name, version in versions.items())}", ""])


def _is_told(key: str, value: Any) -> bool:
    default = getattr(Stage, key, None)
    default = list(default) if isinstance(default, tuple) else default
    return key in ("tune", "lr", "schedule", "seed") or (value != default and key != "val")


def _data(path: Path) -> list[str]:
    """Say how the data were made, if they have a manifest."""
    if not path.is_file():
        return []
    made = read_json(path)
    options = json.dumps(made.get("options", {}), ensure_ascii=False)
    return [f"- made by `curate {made['command']}` with {options}"] if "command" in made else []


def _manifests(given: Path) -> list[Path]:
    found = [given] if given.is_file() else sorted(given.glob(f"*/{MANIFEST}"))
    if not found:
        raise UsageError(
            f"--scores {given}: no results of `eval` there; give the --out of eval --tasks, or its manifest"
        )
    return found


def _scores(path: Path, place: Path) -> tuple[str, dict[str, Any]]:
    manifest = read_json(path)
    request = manifest.get("request", {})
    if request.get("command") != "eval" or "result" not in manifest:
        raise UsageError(f"--scores {path} is not what `eval` writes")
    if request["weights"] != digest_weights(place):
        raise UsageError(f"--scores {path} belong to another model, or to this one before it was exported again")
    return request.get("task", path.name.partition(".")[0]), manifest["result"]


def _table(scores: Sequence[tuple[str, Any]]) -> str:
    if not scores:
        return ""
    lines = ["", "## Scores", "", "| benchmark | questions | score |", "|---|---|---|"]
    for name, result in scores:
        values = result.get("scores") or {key: result[key] for key in ("accuracy", "perplexity") if key in result}
        told = ", ".join(f"{metric} {value:.4g}" if value is not None else metric for metric, value in values.items())
        lines.append(f"| {name} | {result.get('questions', '')} | {told or 'scored by its server'} |")
    return "\n".join([*lines, ""])


def _bare(source: str) -> str:
    """Return the name of a model or data set without its parent folders; a hub id stays whole."""
    return source if source.count("/") == 1 and not source.startswith((".", "/")) else Path(source).name
