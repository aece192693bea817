"""A mix as JSON: `mix.json` in LLaVA's form, or as messages for other trainers.

Out, by `format`:
    llava      mix.json: a list with one record per line, each exactly as it came
    messages   mix.json: `{"messages": [{"role", "content"}], "images": [...], "record": ...}`, for LLaMA-Factory
               (through dataset_info.json, media_dir = OUT/images) and ms-swift: content is text with a mark `<image>`
               an image. `record` is the record as JSON text, without what is in the other two, so that every column
               has one type and reading the file again restores the record. mix.trl.jsonl: the same turns as lists of
               parts, as TRL reads them.
Pictures that are files under one folder stay there under their names. Others (in tars, in tables, under several
folders) are copied byte for byte to `OUT/images/SOURCE/`, and the records name the copies.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from curate.errors import UsageError
from curate.mix.pictures import Picture, read_picture
from curate.mix.sampling import Order
from curate.mix.sources import SourceOptions, images_of
from curate.storage import faults, paths, records
from curate.storage.faults import Faults
from curate.storage.manifest import Output, save_json
from pipelines.record_forms import HUMAN, ROLES, SPEAKERS
from pipelines.records import IMAGE_MARK, split_at_marks

Row = Callable[[int, int, Sequence[str]], list[Any]]
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def write_json(output: Output, form: str, row: Row, order: Order, sources: Mapping[str, SourceOptions]) -> Faults:
    """Write a mix's records in their order. row: fetches columns of (source, row). Raises: UsageError.

    Returns which records another trainer will not take, though all are written.
    """
    names = list(sources)
    roots = {images_of(source) for source in sources.values()} - {""}
    if form == "llava" and len(roots) > 1:
        raise UsageError(
            'format = "llava" copies no images, and the sources have several image folders.',
            'put them under one folder that every record\'s `image` is relative to, or use format = "webdataset"',
        )
    drawn = list(zip(order.source.tolist(), order.rows.tolist(), strict=True))
    inside = any(place >= 0 for at in drawn for place in row(*at, ["offset"])[0])
    found = _records(output, names, row, drawn, copies=inside or len(roots) > 1)
    if form == "llava":
        _write_list(output.path("mix.json"), found)
        return {}
    refused: Faults = {}
    with paths.atomic_write(output.path("mix.trl.jsonl")) as trl:

        def lines() -> Iterator[bytes]:
            for line in found:
                record = json.loads(line)
                trl.write(records.dump(as_parts(record)) + b"\n")
                if why := _refused(record):
                    faults.add(refused, why, str(record.get("id", "")))
                yield records.dump(as_messages(record))

        _write_list(output.path("mix.json"), lines())
    columns = {"messages": "messages", "images": "images"}
    entry = {
        "file_name": "mix.json",
        "formatting": "sharegpt",
        "columns": columns,
        "tags": TAGS | {"system_tag": "system"},
    }
    save_json(output.path("dataset_info.json"), {"mix": entry})
    return refused


def _refused(record: Mapping[str, Any]) -> str:
    """Say what LLaMA-Factory (0.9.5) does not accept in a record, or nothing."""
    turns = record["conversations"]
    roles = [SPEAKERS[ROLES[turn["from"]]] for turn in turns]
    body = roles[1:] if roles[0] == "system" else roles
    if len(body) % 2 or any(role != ("user", "assistant")[place % 2] for place, role in enumerate(body)):
        return "records whose turns do not alternate: LLaMA-Factory skips them (drop_invalid leaves them out)"
    if any(turn["from"] not in HUMAN and IMAGE_MARK in turn["value"] for turn in turns):
        return f"records with {IMAGE_MARK} in an answer: LLaMA-Factory takes it for a picture, and stops"
    return ""


def _write_list(location: str, lines: Iterator[bytes]) -> None:
    with paths.atomic_write(location) as file:
        for number, line in enumerate(lines):
            file.write((b",\n" if number else b"[\n") + line)
        file.write(b"\n]\n")


def _records(
    output: Output, names: Sequence[str], row: Row, drawn: Sequence[tuple[int, int]], *, copies: bool
) -> Iterator[bytes]:
    """Yield each record's JSON, with its pictures copied if that is asked for."""
    for position, (source, number) in enumerate(drawn):
        line, *places = row(source, number, ("record", "location", "offset", "size", "suffix"))
        if copies and places[0]:
            pictures = [Picture(*place) for place in zip(*places, strict=True)]
            several = len(pictures) > 1
            written = [
                f"{names[source]}/{position:09d}{f'.{n}' if several else ''}.{picture.suffix}"
                for n, picture in enumerate(pictures)
            ]
            for name, picture in zip(written, pictures, strict=True):
                paths.write_plain(output.path(f"images/{name}"), read_picture(picture))
            line = records.dump({**json.loads(line), "image": written if several else written[0]})
        yield line


def as_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a record as messages with text and images, and `record`, from which everything else is restored."""
    turns = record["conversations"]
    plain = all(set(turn) == {"from", "value"} and turn["from"] in SPEAKERS for turn in turns)
    rest = {**record, "conversations": None if plain else turns}
    return {**_speech(record, str), "record": records.dump(rest).decode()}


def as_parts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a record as messages whose content is a list of parts, text and images in their order."""
    return _speech(record, _parts)


def _speech(record: Mapping[str, Any], written: Callable[[str], Any]) -> dict[str, Any]:
    image = record.get("image")
    images = image if isinstance(image, list) else [image] if image else []
    messages = []
    for turn in record["conversations"]:
        content = written(turn["value"]) if turn["from"] in HUMAN or written is str else [_text(turn["value"])]
        messages.append({"role": SPEAKERS[ROLES[turn["from"]]], "content": content})
    return {"messages": messages, "images": images}


def _parts(value: str) -> list[dict[str, str]]:
    return [{"type": "image"} if part is None else _text(part) for part in split_at_marks(value)] or [_text("")]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
