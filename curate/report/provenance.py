"""How artefacts were made, for the report: the commands that manifests stand for, those that were typed, and speeds.

Commands give paths relative to the page. What a verb works out by itself (a model's digest, a recipe's steps) is not
written as an option; a mix's table is.
"""

import json
import math
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from curate.errors import CurateError
from curate.storage import paths, tar
from curate.storage.manifest import LOG, MANIFEST, PLAN, Artefact, load_json

WORKED_OUT = ("weights", "text_weights", "max_pixels", "recipe")
OF_THE_FIT = ("k", "iters", "sample")  # if centroids are given, `curate cluster` works these out itself
OPTIONAL_INPUTS = ("pool", "captions", "centroids", "losses")  # typed as options; a verb's first input is an argument


def provenance(artefact: Artefact, out: str) -> dict[str, Any]:
    """Write the command that made an artefact, its account and its troubles."""
    here, manifest = paths.parent(out), artefact.manifest
    inputs = [paths.relative(artefact.input_path(name), here) for name in manifest["inputs"]]
    if artefact.command == "mix":
        words = ["curate", "mix", "TABLE.toml", paths.relative(artefact.directory, here)]
    else:
        words = ["curate", artefact.command, *inputs[:1], paths.relative(artefact.directory, here)]
        words += _options(artefact, here)
    return {
        "command": shlex.join(words),
        "table": "\n".join(_table(artefact, here)) if artefact.command == "mix" else "",
        "counts": {key: value for key, value in manifest.get("counts", {}).items() if isinstance(value, int)},
        "digest": artefact.digest,
        "device": manifest.get("device", ""),
        "failed": manifest.get("failed", {}),
        "gone": manifest.get("gone", []),
    }


def _options(artefact: Artefact, here: str) -> Iterator[str]:
    """Write the options of the request, including those of its inputs that are given as options."""
    manifest = artefact.manifest
    options = dict(manifest.get("options", {})) | _places(artefact, here)
    beside = [name for name in list(manifest["inputs"])[1:] if name in OPTIONAL_INPUTS]
    options |= {name: paths.relative(artefact.input_path(name), here) for name in beside}
    passed = {*WORKED_OUT, *(OF_THE_FIT if "centroids" in options else ())}
    for key, value in options.items():
        option = f"--{key.replace('_', '-')}"
        if key == "steps":
            yield from (f"--step={step}" for step in _steps(artefact, value, here))
        elif key == "columns":
            yield f"{option}={','.join(value)}"
        elif value is True:
            yield option
        elif key not in passed and value not in ("", None) and value is not False:
            yield f"{option}={value}"


def _steps(artefact: Artefact, texts: Sequence[str], here: str) -> list[str]:
    """Write steps with the paths of files and directories relative to the page, not as they were typed."""
    from curate.select import catalogue

    try:
        read = dict.fromkeys(each for step in catalogue.parse(texts) for each in step.reads())
    except CurateError:  # a step that this version does not have
        return list(texts)
    for number, (typed, _) in enumerate(read, 1):
        for name in (f"file-{number}", f"target-{number}"):
            if name in artefact.manifest["inputs"]:
                place = json.dumps(paths.relative(artefact.input_path(name), here), ensure_ascii=False)
                texts = [text.replace(f'"{typed}"', place).replace(f"'{typed}'", place) for text in texts]
    return list(texts)


def _places(artefact: Artefact, here: str) -> dict[str, str]:
    """Find in the log the models that the manifest names without their path, or only by their weights."""
    places: dict[str, str] = {}
    for entry in entries(artefact.path(LOG)):
        for key in ("model", "pretrained"):
            name = str(entry.get(key) or "")
            place = name.removeprefix("local-dir:")
            if place.startswith("/"):
                places[key] = name.removesuffix(place) + paths.relative(place, here)
            elif name and "text_weights" in artefact.manifest.get("options", {}):
                places[key] = name
    return places


def _table(mixed: Artefact, here: str) -> Iterator[str]:
    """Write a mix's table, its paths filled in from the recorded inputs."""
    options = dict(mixed.manifest.get("options", {}))
    sources = options.pop("sources", {})
    yield "[mix]"
    yield from _values(options)
    for name, source in sources.items():
        yield f"[mix.sources.{_key(name)}]"
        places = {"path": name, "images": f"{name}.images"}
        recorded = {key: mixed.input_path(at) for key, at in places.items() if at in mixed.manifest["inputs"]}
        yield from _values({key: paths.relative(place, here) for key, place in recorded.items()} | source)


def _values(table: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None)


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key)


def _value(value: Any) -> str:
    """Write a value as TOML does: as JSON does, except for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


def select_words(selection: Artefact, out: str) -> list[str]:
    """Write the beginning of a `curate select` command that differs only in its steps."""
    [source] = (name for name in selection.manifest["inputs"] if name in ("clusters", "embeddings"))
    here = paths.parent(out)
    words = ["curate", "select", paths.relative(selection.input_path(source), here)]
    words.append(paths.relative(selection.directory, here) + "-moved")
    others = (word for word in _options(selection, here) if not word.startswith("--step=") and word != "--seed=0")
    return [shlex.quote(word) for word in (*words, *others)]


def training(runs: Mapping[str, str], out: str) -> Iterator[dict[str, str]]:
    """Write each training run's command, configuration and model, from its manifest (or plan, if unfinished)."""
    here = paths.parent(out)
    for name, place in runs.items():
        names = (MANIFEST, PLAN)
        record = next((paths.join(place, name) for name in names if paths.exists(paths.join(place, name))), None)
        manifest = load_json(record) if record else {}
        request = manifest.get("request", {})
        stage = str(request.get("command", "finetune"))
        words = ["python", "-m", "train", stage]
        for option in ("data", "images", "align"):
            if isinstance(value := request.get("inputs", {}).get(option), str) and value:
                words += [f"--{option}", paths.relative(paths.resolve(value, place), here)]
        words += ["--config", f"{name}.toml", "--out", paths.relative(place, here)]
        model = {key: _from_page(value, place, here) for key, value in request.get("model", {}).items()}
        facts = {key: str(model.get(key) or "").removeprefix("local-dir:") for key in ("tower", "lm", "template")}
        account = [f"{key} {value}" for key, value in (facts | manifest.get("versions", {})).items() if value]
        tables = {"model": model, stage: request.get("stage", {})} if model else {}
        lines = [line for key, table in tables.items() for line in (f"[{key}]", *_values(table))]
        entry = {"command": shlex.join(words), "file": f"{name}.toml", "table": "\n".join(lines)}
        yield entry | {"account": " · ".join(account) or "no manifest yet"}


def _from_page(value: Any, place: str, here: str) -> Any:
    """Write a local model's path, recorded relative to `place`, relative to the page; anything else as it is."""
    text = str(value).removeprefix("local-dir:")
    if not text.startswith("."):
        return value
    return str(value).removesuffix(text) + paths.relative(paths.resolve(text, place), here)


def typed(chain: Sequence[Artefact]) -> list[str]:
    """List the command lines that were typed, in the order of the stages, each once."""
    lines = [entry.get("typed") for artefact in chain for entry in entries(artefact.path(LOG))]
    told = [line for line in dict.fromkeys(lines) if isinstance(line, str)][-12:]
    return [line.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for line in told]  # LC_ALL=C


def speeds(chain: Sequence[Artefact]) -> Iterator[dict[str, Any]]:
    """Read how fast each stage ran from the logs beside the artefacts."""
    for artefact in chain:
        for entry in entries(artefact.path(LOG)):
            if entry.get("seconds") and entry.get("rows"):
                yield {**entry, "rate": entry["rows"] / entry["seconds"]}


def versions(chain: Sequence[Artefact]) -> dict[str, str]:
    """Gather the versions that the stages recorded."""
    recorded = {"python": platform.python_version()}
    for artefact in chain:
        recorded |= {name: str(version) for name, version in artefact.manifest.get("versions", {}).items()}
    return recorded


def entries(location: str) -> Iterator[Mapping[str, Any]]:
    """Read the objects of a JSON lines file, if it is there; a line torn by a kill is passed over."""
    if paths.exists(location):
        with paths.open_read(location) as file:
            for line in file:
                entry = tar.read_json(line)
                if isinstance(entry, Mapping):
                    yield entry


def is_finite(value: Any) -> bool:
    """Say whether a value of a log is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
