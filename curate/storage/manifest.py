"""How a directory is begun, resumed and brought up to date (in the making: output.py; reading: artefact.py).

`manifest.json` is written last, so that its presence means that the directory is complete; until then `.plan.json`
holds the request, and a rerun with the same request resumes where the last one stopped. A manifest holds nothing that
differs between two runs of the same request: times and speeds go to `log.jsonl`.
"""

import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from curate.errors import ContractError, UsageError
from curate.storage import paths, renewal
from curate.storage.artefact import FORMAT as FORMAT
from curate.storage.artefact import Artefact as Artefact
from curate.storage.artefact import check_aligned as check_aligned
from curate.storage.artefact import is_readable
from curate.storage.artefact import open_input as open_input
from curate.storage.json_files import digest as digest
from curate.storage.json_files import file_digest as file_digest
from curate.storage.json_files import load_json as load_json
from curate.storage.json_files import save_json as save_json
from curate.storage.output import FAILED as FAILED
from curate.storage.output import Output as Output
from curate.storage.renewal import LOG as LOG
from curate.storage.renewal import MANIFEST as MANIFEST
from curate.storage.renewal import PLAN as PLAN
from curate.storage.renewal import Change
from curate.storage.renewal import Parts as Parts


def versions(*packages: str) -> dict[str, str]:
    """Look up the installed versions of the packages that a stage uses."""
    found = {}
    for package in ("data-curate", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def reconcile(where: str, rows: int, parts: Mapping[str, int]) -> None:
    """Check that every row is accounted for once. Raises: ContractError with both sides."""
    if sum(parts.values()) != rows:
        account = " + ".join(f"{count:,} {name}" for name, count in parts.items())
        raise ContractError(f"{where}: {rows:,} rows in, but {account} = {sum(parts.values()):,} accounted for")


def open_output(
    directory: str,
    command: str,
    options: Mapping[str, Any],
    inputs: Mapping[str, Artefact | Mapping[str, Any]],
    *,
    overwrite: bool = False,
    parts: Parts | None = None,
    anew: str = "",
    free: Sequence[str] = (),
) -> Output:
    """Begin, resume or recognise as finished a derived directory, or its next state if its inputs have changed.

    inputs: finished artefacts, or for foreign input `{"path": …, "digest": …}`. parts: what each shard is made of, if
    each is made of its own part of the input: shards whose part has not changed are kept. Without parts, the whole
    directory is made anew in place if an input has changed. anew: why nothing that is there may be kept, or "". free:
    options that may differ from those it was made with.

    A directory made with other options or by another verb is refused unless `overwrite`; one that no verb of curate
    made is never deleted. Raises: ContractError naming the first difference, both values and what to do.
    """
    sources = {
        name: {"path": paths.relative(source.directory, directory), "digest": source.digest}
        if isinstance(source, Artefact)
        else {**source, "path": paths.relative(source["path"], directory)}
        for name, source in inputs.items()
    }
    plan = json.loads(json.dumps({"command": command, "options": dict(options), "inputs": sources}))
    if plan["options"].get("seed", 0) < 0:
        raise UsageError(f"seed={plan['options']['seed']} is negative.", "give 0 or a positive whole number")
    renewal.settle(directory)
    names = [entry for entry in paths.listdir(directory) if not entry.endswith(".tmp")]
    found = next((name for name in (MANIFEST, PLAN) if name in names), None)
    recorded = load_json(paths.join(directory, found)) if found else {}
    if names and not (isinstance(recorded, dict) and plan.keys() <= recorded.keys()):
        raise ContractError(
            f"{directory} holds {names[0]} and was not made by curate.", "give a new or empty directory"
        )
    output = Output(directory, plan, parts=parts)
    output.sources = tuple(source for source in inputs.values() if isinstance(source, Artefact))
    if found and overwrite:
        _refuse_own_input(directory, inputs)
        paths.remove(directory)
    elif found:
        _refuse_difference(directory, recorded, plan, parts.inputs if parts else sources, free)
        others = [name for name in free if recorded["options"].get(name) != plan["options"].get(name)]
        if found == MANIFEST:
            _renew(output, recorded, anew)
        elif parts is not None and parts.adopted and ("seen" in recorded or not _changed(recorded, plan)):
            renewal.drop_stale(directory, recorded, parts)
        elif (changed := _changed(recorded, plan)) or others:
            _refuse_own_input(directory, inputs)
            paths.remove(directory)
            of = f"from another state of {paths.resolve(changed, directory)}" if changed else "with other options"
            output.why = f"{directory} was begun {of}: starting over"
    if not output.complete:
        _begin(output)
    return output


def _begin(output: Output) -> None:
    """Write the plan of a directory in the making."""
    paths.make_dir(output.directory)
    seen = {"seen": output.parts.record()} if output.parts is not None else {}
    save_json(output.path(PLAN), {**output.plan, **seen})


def _renew(output: Output, recorded: dict[str, Any], anew: str) -> None:
    """Decide what of a finished directory must be made again, and point the output to the folder for that."""
    plan, parts, altered = output.plan, output.parts, _changed(recorded, output.plan)
    if anew:
        stands, output.why = False, anew
    elif parts is not None:
        change = renewal.compare(output.home, recorded, plan, parts)
        _refuse_another_pool(output, recorded, change)
        stands, output.why = not change, str(change)
        output.kept = change.kept
    else:
        since = paths.resolve(altered, output.home)
        stands = not altered
        output.why = f"{since} has changed since: {output.home} is made anew in place" if altered else ""
    if stands and recorded.get("options") == plan["options"]:
        output.complete, output.manifest = not recorded.get("failed"), recorded
        if parts is not None and (parts.verify or output.why):  # having been read once, files need not be read again
            with suppress(OSError):  # no permission: somebody else's directory
                output.save_seen(output.manifest)
        return  # if shards failed and parts are unknown, only the failed ones are tried again, in place
    output.basis = digest(recorded)
    output.directory = renewal.next_folder(output.home, plan, output.basis)
    if paths.exists(output.path(PLAN)) and parts is not None:
        renewal.drop_stale(output.directory, load_json(output.path(PLAN)), parts)
    renewal.adopt(output.home, output.directory, parts, output.kept)


def _changed(recorded: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Name the first input whose content differs from what was recorded, or ""."""
    before = recorded.get("inputs", {})
    differing = (
        source["path"]
        for name, source in plan["inputs"].items()
        if before.get(name, {}).get("digest") != source["digest"]
    )
    return next(differing, "")


def recorded(directory: str, command: str) -> dict[str, Any]:
    """Return the recorded request of a directory that this verb made, finished or not; else an empty dict."""
    for name in (MANIFEST, PLAN):
        if paths.exists(paths.join(directory, name)):
            found = load_json(paths.join(directory, name))
            made_so = isinstance(found, dict) and found.get("command") == command
            return found if made_so else {}
    return {}


def _refuse_own_input(directory: str, inputs: Mapping[str, Artefact | Mapping[str, Any]]) -> None:
    """Raise ContractError when a directory that is to be made anew is, or holds, what it would be made from."""
    out = paths.join(os.path.realpath(paths.local(directory)), "")
    for source in inputs.values():
        for place in source.places() if isinstance(source, Artefact) else [source["path"]]:
            if paths.join(os.path.realpath(paths.local(place)), "").startswith(out):
                raise ContractError(f"{directory} would be deleted, but {place} is needed.", "give another directory")


def _refuse_another_pool(output: Output, recorded: Mapping[str, Any], change: Change) -> None:
    """Raise ContractError if no shard would stay and the input has another path: it is a different pool."""
    before, after = recorded.get("inputs", {}), output.plan["inputs"]
    if change.kept or not recorded.get("shards"):
        return
    for name in output.parts.inputs if output.parts is not None else ():
        if before.get(name, {}).get("path") != after[name]["path"]:
            raise ContractError(
                f"{output.home} was made from {before[name]['path']}, and {after[name]['path']} has none of its shards "
                "unchanged.",
                "give another output directory, or --overwrite to make it anew",
            )


def _refuse_difference(
    directory: str,
    recorded: Mapping[str, Any],
    plan: Mapping[str, Any],
    renewed: Collection[str],
    free: Sequence[str],
) -> None:
    """Raise ContractError when a directory was made by another request than `plan`.

    renewed: inputs that may have changed; free: options that may.
    """
    if not is_readable(recorded.get("format", FORMAT)):
        raise ContractError(
            f"{directory} has format {recorded['format']}, this version writes {FORMAT}", "use --overwrite"
        )
    command, way_out = plan["command"], "give another output directory, or --overwrite to make it anew"
    if recorded.get("command") != command:
        raise ContractError(
            f"{directory} was made by `curate {recorded.get('command')}`, not by `curate {command}`.", way_out
        )
    before, after = recorded.get("options", {}), plan["options"]
    for name in [*after, *(name for name in before if name not in after)]:
        if before.get(name) != after.get(name) and name not in free:
            raise ContractError(
                f"{directory} was made with {name}={json.dumps(before.get(name))}, "
                f"now {name}={json.dumps(after.get(name))} is asked for.",
                way_out,
            )
    for name, source in plan["inputs"].items():
        if name not in renewed and recorded.get("inputs", {}).get(name, {}).get("digest") != source["digest"]:
            raise ContractError(f"{directory} was made from another state of {source['path']} ({name}).", way_out)
