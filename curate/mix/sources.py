"""Sources of a mix: LLaVA JSON or JSON lines, webdataset shards, selections, text in its common forms, parquet.

In: one `[mix.sources.NAME]` table. Out: `Entry`s, each a record in LLaVA's form and where its picture's original bytes
are (a file under the image folder, or a byte range of a tar). What cannot be used is counted by reason and listed,
never replaced: records that are not conversations, pictures that are missing, empty, or named outside their folder.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from curate.emit.kept_samples import open_coreset
from curate.errors import ShardError, UsageError
from curate.mix.pictures import ImageFinder, Picture, PictureStore, plain_tar
from curate.mix.sampling import Amount
from curate.storage import manifest, paths, records
from curate.storage.tar import (
    CAPTION_SUFFIX,
    JSON_SUFFIX,
    MAX_MEMBER_BYTES,
    TAR_SUFFIXES,
    Sample,
    read_index,
    read_json,
    read_member,
    suffix_of,
    survey_pool,
)
from pipelines.records import MISSING, Reading, read
from pipelines.samples import from_sample
from pipelines.terminal import first_line

MAX_LISTED = 100
MAX_NAME = 200  # letters
ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json")  # what Hugging Face writes beside tables
KINDS = ((".json", "json"), (".jsonl", "json"), (".parquet", "parquet"))
BROKEN = ("truncated", "unreadable from")  # the beginnings of a shard's notes that mean lost records
OVER = f"over the limit of {MAX_MEMBER_BYTES:,} bytes for a file"
TEXT, ELSEWHERE = "text", "elsewhere"  # beside the folders of `expect`
TOO_LONG = "over max_tokens"


@dataclass(frozen=True)
class SourceOptions:
    """A table `[mix.sources.NAME]`.

    path: a JSON, JSON-lines or parquet file (or pattern), a pool, or a directory made by select, emit or mix.
    kind: which of these it is, for a folder that holds several.
    images: the folder, or the tars, that the records' `image` names lie in. only, without: which records to take
    (`without = {source = ["sharegpt"]}` leaves out records whose field has one of the values).
    expect: the number of records that the source must have; of a JSON source also a table of how many lie under each
    first folder of their image names, and how many in `text`, without image.
    count, fraction, cap: how many to draw; repeat: how often each is used; weight: the source's part of the mix's
    `total`.
    replaces: another source, whose place this one takes.
    selection: a directory made by `curate select`; drops records whose picture, compared by its bytes, was not kept.
    exclude_text: files of benchmark questions; drops records that share 13 words in a row with one. dedup_text: of
    conversations (about one picture, or without any) with this Jaccard similarity or more, only the first stays.
    merge: join all records of one image. max_rounds, max_tokens: limits on a record's rounds (question and answer);
    `overflow` says what to do beyond max_tokens; only whole rounds are cut. max_images: drops records of more pictures.
    instructions: once: a line on how to answer that ends all questions of a record is kept only in the first.
    """

    path: str
    images: str = ""
    kind: Literal["auto", "json", "shards", "selection", "parquet"] = "auto"
    prompt: str = records.PROMPT
    only: Literal["all", "image", "text"] = "all"
    without: dict[str, list[Any]] = field(default_factory=dict)
    expect: int | dict[str, int] | None = None
    replaces: str = ""
    drop_invalid: bool = False
    selection: str = ""
    exclude_text: list[str] = field(default_factory=list)
    dedup_text: float | None = None
    merge: bool = False
    max_rounds: int | None = None
    max_tokens: int | None = None
    max_images: int | None = None
    overflow: Literal["truncate", "split", "drop"] = "truncate"
    instructions: Literal["each", "once"] = "each"
    count: int | None = None
    fraction: float | None = None
    cap: int | None = None
    repeat: int = 1
    weight: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.expect, dict) and not all(type(number) is int for number in self.expect.values()):
            raise UsageError(f"expect={self.expect} is not a table of whole numbers.", "expect = {coco = 364_100, …}")
        if min(each for each in (self.max_rounds, self.max_tokens, self.max_images, 1) if each is not None) < 1:
            raise UsageError(
                f"max_rounds={self.max_rounds}, max_tokens={self.max_tokens}, max_images={self.max_images}: "
                "expected at least 1."
            )
        if self.dedup_text is not None and not 0.5 <= self.dedup_text <= 1:
            raise UsageError(f"dedup_text={self.dedup_text} is not a similarity from 0.5 to 1.", "dedup_text = 0.8")

    @property
    def amount(self) -> Amount:
        """The part of the options that says how many records to draw."""
        return Amount(self.count, self.fraction, self.cap, self.repeat, self.weight)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in LLaVA's form and its pictures, in the order of their marks; none makes it text-only."""

    record: dict[str, Any]
    pictures: tuple[Picture, ...]


@dataclass
class Faults:
    """What a source lost and why: exact counts of records, the names of the first of each kind, and notes on shards.

    left_out: records that were not asked for. folders: how many records, lost ones included, are in each folder that
    `expect` names.
    """

    counts: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    listed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)

    def note(self, why: str, what: Any, number: int = 1) -> None:
        """Count a fault. what: the record's number or id."""
        self.counts[why] = self.counts.get(why, 0) + number
        if self.counts[why] <= MAX_LISTED:
            what = what[:MAX_NAME] if isinstance(what, str) else what  # a picture in base64 may be in place of a name
            self.listed.append({"why": why, "what": what})

    def drop(self, fields: Iterable[str]) -> None:
        """Note the fields that a record loses, once each."""
        for field_name in fields:
            note = f"the field {field_name} holds bytes that are not an image of its record; it is left out"
            self.notes += [note] if note not in self.notes else []

    def place(self, image: Any, expect: int | dict[str, int] | None) -> None:
        """Count a record by the first folder of its image's name, if `expect` gives folders."""
        if isinstance(expect, dict):
            first = image[0] if isinstance(image, list) and image else image
            folder = str(first).removeprefix("./").partition("/")[0] if first else TEXT
            folder = folder if folder in expect else ELSEWHERE
            self.folders[folder] = self.folders.get(folder, 0) + 1


def kind_of(source: SourceOptions) -> str:
    """Decide how a source is to be read. Raises: UsageError if it does not exist."""
    if source.kind != "auto":
        if source.kind == "selection":
            manifest.open_input(source.path, "select")
        return source.kind
    for suffix, kind in (*KINDS, *dict.fromkeys(TAR_SUFFIXES, "shards").items()):
        if source.path.lower().endswith(suffix):
            return kind
    if not any(mark in source.path for mark in "*?[{") and not paths.exists(source.path):
        raise UsageError(f"the mix source {source.path} does not exist.")
    if paths.exists(paths.join(source.path, manifest.MANIFEST)):
        made = manifest.open_input(source.path)
        if made.command == "select":
            return "selection"
        return "json" if made.manifest["options"].get("format") in ("llava", "messages") else "shards"
    inside = [name.lower() for name in paths.listdir(source.path)] if paths.is_dir(source.path) else []
    if any(name.endswith(TAR_SUFFIXES) for name in inside):
        return "shards"
    own = [name for name in inside if name.endswith(_suffixes("json")) and name not in ABOUT]
    return "parquet" if not own and any(name.endswith(".parquet") for name in inside) else "json"


def files_of(source: SourceOptions, kind: str) -> list[str]:
    """List the files of a JSON or parquet source."""
    if kind == "json" and paths.exists(paths.join(source.path, manifest.MANIFEST)):
        return [
            paths.join(source.path, {"emit": "coreset.json"}.get(manifest.open_input(source.path).command, "mix.json"))
        ]
    found = [name for suffix in _suffixes(kind) for name in paths.expand(source.path, suffix)]
    found = sorted({name for name in found if name.endswith(_suffixes(kind)) or name == source.path})
    if not found:
        inside = _suffixes("json") + _suffixes("parquet") if paths.is_dir(source.path) else ()
        deeper = (f"{source.path.rstrip('/')}/**/*{suffix}" for suffix in inside)
        hint = next((f"give path = '{each}'" for each in deeper if paths.expand(each, "")), None)
        raise UsageError(f"no {' or '.join(_suffixes(kind))} file matches the mix source {source.path}.", hint)
    return found


def _passed_over(source: SourceOptions, kind: str) -> list[str]:
    """Note files of the other kind in a source's folder; beside shards, such files describe the shards."""
    if kind not in ("json", "parquet") or not paths.is_dir(source.path):
        return []
    if paths.exists(paths.join(source.path, manifest.MANIFEST)):
        return []
    other = "parquet" if kind == "json" else "json"
    beside = [name for name in paths.listdir(source.path) if name.endswith(_suffixes(other)) and name not in ABOUT]
    told = (
        f"{len(beside)} {other} files beside the {kind} ones are not read (e.g. {beside[0]}); a pattern reads them"
        if beside
        else ""
    )
    return [told] if told else []


def _suffixes(kind: str) -> tuple[str, ...]:
    return (".json", ".jsonl") if kind == "json" else (".parquet",)


def entries(name: str, source: SourceOptions, faults: Faults, scratch: str) -> Iterator[Entry]:
    """Yield the usable records of a source in their order.

    scratch: path prefix for a temporary tar of the pictures that lie inside a table (parquet).
    """
    kind = kind_of(source)
    faults.notes += _passed_over(source, kind)
    if kind == "shards":
        found = _from_shards(source, faults, scratch)
    elif kind == "selection":
        found = _from_selection(source, faults, scratch)
    elif kind == "parquet":
        found = _from_parquet(name, source, faults, scratch)
    else:
        found = _from_json(name, source, faults, scratch)
    for entry in found:
        is_text = not entry.pictures
        left_out = any(entry.record.get(key) in values for key, values in source.without.items())
        if left_out or (source.only == "image" and is_text) or (source.only == "text" and not is_text):
            faults.left_out += 1
        else:
            yield entry


def images_of(source: SourceOptions) -> str:
    """Locate the folder that a source's image names start from: the one given, else that of an emit or mix output."""
    beside = paths.join(source.path, "images")
    made = paths.exists(paths.join(source.path, manifest.MANIFEST)) and paths.exists(beside)
    return source.images or (beside if made else "")


def _from_json(name: str, source: SourceOptions, faults: Faults, scratch: str) -> Iterator[Entry]:
    finder = ImageFinder(images_of(source), scratch)
    number = 0
    with PictureStore(f"{scratch}.tar") as store:
        for location in files_of(source, "json"):
            with paths.open_read(location) as file:
                for value, trouble in records.read_records(file, location):
                    default_id = f"{name}-{number}"
                    reading = Reading(None, fault=trouble) if trouble else read(value, default_id, suffix_of=suffix_of)
                    if reading.record is None:
                        faults.note(f"broken: {reading.fault}", number)
                    else:
                        faults.place(reading.record.get("image"), source.expect)
                        yield from _with_pictures(reading, default_id, finder, store, faults)
                    number += 1


def _with_pictures(
    reading: Reading, default_id: str, finder: ImageFinder, store: PictureStore, faults: Faults
) -> Iterator[Entry]:
    """Yield a record with its pictures, or count what is wrong with the first one that cannot be found."""
    found: list[Picture] = []
    for number, picture in enumerate(reading.pictures):
        if picture.data is not None:
            found.append(store.add(f"{default_id}_{number}" if number else default_id, picture.data))
            continue
        located, why = finder.find(picture.name)
        if located is None:
            faults.note(why, picture.name)
            return
        found.append(located)
    assert reading.record is not None
    faults.drop(reading.dropped)
    yield Entry(reading.record, tuple(found))


def _from_shards(source: SourceOptions, faults: Faults, scratch: str) -> Iterator[Entry]:
    held = survey_pool(source.path)
    faults.notes += [f"{each['count']:,} {kind} (e.g. {each['example']})" for kind, each in held.passed.items()]
    for shard in held.shards:
        location = plain_tar(shard, scratch)
        with paths.open_read(location) as file:
            try:
                index = read_index(file)
            except ShardError as error:
                faults.notes.append(f"{shard.stem}: {error}")
                faults.note("a shard that cannot be read", shard.stem)
                continue
            faults.notes += [f"{shard.stem}: {note}" for note in index.notes]
            if any(note.startswith(BROKEN) for note in index.notes):
                faults.note("a shard that breaks off", shard.stem)
            for sample in index.samples:
                texts: dict[str, bytes] = {}
                for suffix in (JSON_SUFFIX, CAPTION_SUFFIX):
                    member = sample.member(suffix)
                    if member is not None and member.size <= MAX_MEMBER_BYTES:
                        texts[suffix] = read_member(file, member)
                yield from _from_sample(sample, texts, location, source.prompt, faults)


def _from_selection(source: SourceOptions, faults: Faults, scratch: str) -> Iterator[Entry]:
    """Read the kept samples of a selection, with the captions by which they were scored.

    These are the samples' own, unless there was none or `embed --caption` chose another. Turns of its JSON stay.
    """
    coreset = open_coreset(source.path)
    chosen = coreset.embedded.manifest["options"].get("caption")
    for stem, rows in coreset.all_kept_rows():
        location, captions = "", None
        for fetched in coreset.fetch(stem, rows):
            if fetched.sample is None or fetched.gone:
                faults.note(f"gone: {fetched.gone}", fetched.key)
                continue
            location = location or plain_tar(coreset.tars[stem], scratch)  # one that gzip packed has no places to read
            texts = {suffix: data for _, suffix, data in fetched.members}
            if chosen or not fetched.has_text:
                captions = captions or coreset.embedded.table(stem, ["caption"])["caption"]
                scored = captions[fetched.row].as_py() or ""
                texts[CAPTION_SUFFIX] = scored.encode() or texts.get(CAPTION_SUFFIX, b"")
            yield from _from_sample(fetched.sample, texts, location, source.prompt, faults)


def _from_sample(
    sample: Sample, texts: Mapping[str, bytes], location: str, prompt: str, faults: Faults
) -> Iterator[Entry]:
    """Make a record of a webdataset sample: of its JSON if that is a record, its conversation, or its caption."""
    if any(each.size > MAX_MEMBER_BYTES for each in sample.members):
        faults.note(OVER, sample.key)
        return
    pictures = [Picture(location, each.offset, each.size, each.suffix.rpartition(".")[2]) for each in sample.images]
    names = [paths.name(member.name) for member in sample.images]
    stored = read_json(texts.get(JSON_SUFFIX, b""))
    reading = from_sample(stored, texts.get(CAPTION_SUFFIX), names, sample.key, prompt)
    if reading.record is None:
        faults.note(reading.fault if reading.fault == MISSING else f"broken: {reading.fault}", sample.key)
    else:
        yield Entry(reading.record, reading.arrange(pictures))


def _from_parquet(name: str, source: SourceOptions, faults: Faults, scratch: str) -> Iterator[Entry]:
    """Read Hugging Face style parquet; pictures inside it are put into a tar beside the scratch, byte for byte."""
    finder = ImageFinder(source.images, scratch)
    number = 0
    with PictureStore(f"{scratch}.tar") as store:
        for location in files_of(source, "parquet"):
            for value in _rows_of(location):
                default_id = f"{name}-{number}"
                number += 1
                reading = read(value, default_id, suffix_of=suffix_of)
                if reading.record is None:
                    faults.note(f"broken: {reading.fault}", default_id)
                else:
                    yield from _with_pictures(reading, default_id, finder, store, faults)


def _rows_of(location: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file. Raises: ShardError naming a damaged file, which Arrow does not name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with paths.open_read(location) as table:
            for batch in pq.ParquetFile(table).iter_batches(256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's or the network's
            raise
        raise ShardError(f"{location}: {first_line(error)}", "fetch it again") from None
