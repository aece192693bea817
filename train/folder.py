"""A run's directory: its request, its state (new, unfinished, finished), its lock, and files written atomically.

    .plan.json      the request, while the run is unfinished      .lock   while a process writes it
    metrics.jsonl   one line per step                    tensorboard/   the same curves
    checkpoints/    step-000200/ …                       skipped.jsonl  samples left out, and why
    manifest.json   the request and the result; written last, so its existence means that the run is complete

Manifests hold no times and no absolute paths: the same request gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from filelock import FileLock, Timeout

from pipelines.samples import choose_tars
from train.errors import UsageError

FORMAT = 1
MANIFEST, PLAN, LOCK = "manifest.json", ".plan.json", ".lock"
SWAP = ".swap.json"  # left where `curate` was interrupted between two states of a directory
WORK = ("metrics.jsonl", "answers.jsonl")  # the work of an unfinished run: steps of a stage, answers to a benchmark
MEASURED = ".measured"  # folder beside runs: the lengths of the samples of their data
# Options that do not change the result, or, as with how a step is split into passes, only dropout masks and rounding.
EXECUTION = frozenset({"workers", "save_every", "keep_last", "peak_tflops", "tracker", "shard"})
EXECUTION |= {"micro_tokens", "micro_images", "gradient_checkpointing", "attention", "compile"}
STATES = {  # the digests that identify the content of an input
    "inputs.digest": "its data",
    "inputs.images_digest": "its images",
    "inputs.val_digest": "its validation data",
    "inputs.align_digest": "the align run that it starts from",
}
ANSWERED = {"weights": "of another model", "data": "to other data", "images": "to other pictures"}
LATER = frozenset({"align_digest", "batch_size"})  # not recorded before 2026-11-27, by an evaluation before 2026-11-29
Status = Literal["new", "unfinished", "finished"]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file atomically: under a temporary name, synced, then renamed. Errors name the final file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename == str(partial):
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # for names that are not UTF-8; becomes an escape in JSON


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises: UsageError for a missing or broken file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: {path.parent} is not a finished run") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return value


@contextmanager
def alone(lock: Path, out: Path) -> Iterator[None]:
    """Hold a lock file for this process; the lock ends when the process ends, for whatever reason.

    Raises: UsageError naming who holds it.
    """
    try:
        taken = FileLock(lock, timeout=0).acquire()
    except Timeout:
        holder = lock.read_text(encoding="utf-8")
        raise UsageError(f"--out {out} is being written by {holder}; wait for it, or give another --out") from None
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None
    with taken:
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make a directory and lock it for this process; it is removed again if it stays empty.

    Raises: UsageError naming who holds it.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a directory")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None
    try:
        with alone(out / LOCK, out):
            yield
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def open_run(out: Path, request: dict[str, Any], *, overwrite: bool = False) -> Status:
    """Start a request in a locked directory, or find the same request there, unfinished or finished.

    What was made from other data is neither resumed nor treated as finished. A run that ended before its first step or
    answer, for example because its data had to be fixed first, may be replaced by any request.
    Raises: UsageError naming the first option that differs, both values, and `--overwrite`.
    """
    found = next((out / name for name in (MANIFEST, PLAN) if (out / name).is_file()), None)
    done = any((out / name).is_file() and (out / name).stat().st_size for name in WORK)
    empty = found is not None and found.name == PLAN and not done
    there = [path for path in out.iterdir() if path.name != LOCK]
    if found is not None and (overwrite or (empty and _difference(read_json(found).get("request", {}), request))):
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        found, there = None, []
    if found is None:
        if there:
            raise UsageError(f"--out {out} holds other files; give a new or empty directory")
        write_json(out / PLAN, {"request": request})
        return "new"
    there_request = read_json(found).get("request", {})
    if not same_request(there_request, request):
        refuse_other(there_request, request, out)
    return "finished" if found.name == MANIFEST else "unfinished"


def same_request(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Return whether two requests ask for the same result; the earlier one may come from an older version."""
    return not _difference(there, here)


def refuse_other(there: dict[str, Any], here: dict[str, Any], out: Path) -> NoReturn:
    """Refuse a request in another one's directory.  Raises: UsageError naming the first option that differs."""
    difference = _difference(there, here)
    if changed := STATES.get(difference.partition(" ")[0]):
        told = f"{out} was made from another state of {changed}"
        raise UsageError(f"{told}; type --overwrite to train again, or choose another --out")
    if others := ANSWERED.get(difference.partition(" ")[0]):
        raise UsageError(f"{out} holds answers {others}; choose another --out, or type --overwrite to answer again")
    if difference.startswith("model.template = "):
        name = there["model"]["template"] or "vicuna"  # the default before a model's own template became it
        raise UsageError(
            f"{out} was made with {difference}; without model.template it is now the language model's own template "
            f'("chat"). To continue it, type --set model.template={name}; else choose another --out, or --overwrite'
        )
    raise UsageError(f"{out} was made with {difference}; repeat that, choose another --out, or type --overwrite")


def finish(out: Path, request: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the manifest, which marks the run as finished."""
    import peft
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    write_json(out / MANIFEST, {"format": FORMAT, "request": request, "result": result, "versions": versions})
    (out / PLAN).unlink(missing_ok=True)


def _difference(there: Any, here: Any, name: str = "") -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            if key in EXECUTION or (key in LATER and key not in there):
                continue
            inner = _difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if inner:
                return inner
        return ""
    return "" if _plain(there) == _plain(here) else f"{name} = {there!r}, not {here!r}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def relative(path: str, out: Path) -> str:
    """Write a local path relative to the directory of a manifest; hub ids stay as they are."""
    prefix = "local-dir:" if path.startswith("local-dir:") else ""
    local = Path(path.removeprefix(prefix))
    return (
        prefix + Path(os.path.relpath(local.resolve(), out.resolve())).as_posix() if path and local.exists() else path
    )


def absolute(path: str, out: Path) -> str:
    """Undo `relative`."""
    prefix = "local-dir:" if path.startswith("local-dir:") else ""
    local = out.resolve() / path.removeprefix(prefix)
    return prefix + str(local.resolve()) if path and local.exists() else path


def digest_file(path: Path) -> str:
    """Digest a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def refuse_half(folder: Path) -> None:
    """Refuse a folder of data that `curate` has not finished: a run would train on only part of it.

    Raises: UsageError naming the verb that completes it.
    """
    found = next((folder / name for name in (SWAP, MANIFEST, PLAN) if (folder / name).is_file()), None)
    if found is None or found.name == MANIFEST:
        return
    plan = folder / (MANIFEST if found.name == SWAP else PLAN)
    verb = read_json(plan).get("command", "…") if plan.is_file() else "…"
    what = "between two states" if found.name == SWAP else "unfinished"
    raise UsageError(f"--data {folder} is {what}; re-run the `curate {verb} …` that made it: it resumes")


def shards_in(path: Path) -> tuple[list[Path], list[str]]:
    """List the tars of a folder, or the one that a path names, by name; and say which files are passed over."""
    files = {file.name: file for file in (sorted(path.iterdir()) if path.is_dir() else [path])}
    chosen, passed = choose_tars(files)
    return [files[name] for name in chosen], [f"{name} is passed over: {why}" for name, why in passed.items()]


def digest_data(data: str) -> str:
    """Digest a data set: by its manifest, else by a JSON's bytes, else by the names and sizes of its shards."""
    path = Path(data)
    if (path / MANIFEST).is_file():
        return digest_file(path / MANIFEST)
    shards = shards_in(path)[0] or (sorted(path.glob("*.parquet")) if path.is_dir() else [])
    if path.is_file() and not shards:
        return digest_file(path)
    named = "".join(f"{shard.name} {shard.stat().st_size}\n" for shard in shards)
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def refuse_unexported(folder: Path) -> None:
    """Refuse a folder that is not an exported model, and say how to export one.  Raises: UsageError."""
    if (folder / "config.json").is_file():
        return
    if (folder / MANIFEST).is_file():
        out = folder.parent / "model"
        raise UsageError(f"{folder} is a run, not a model; export it: python -m train export {folder} --out {out}")
    raise UsageError(f"{folder} is not an exported model; make one with: python -m train export RUN --out {folder}")


def digest_weights(folder: Path) -> str:
    """Digest a model without reading all of it: names, sizes, and both ends of each of its files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 22))
            file.seek(max(0, size - (1 << 22)))
            digest.update(file.read())
    return digest.hexdigest()
