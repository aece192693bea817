"""Read a source of a mix once, apply its rules, and keep its usable records in a temporary table.

In: a source's options. Out: `NAME.arrow`, a row per usable record: its JSON as one line, where its picture's bytes are,
its tokens, supervised tokens (those of the answers) and rounds. `NAME.facts.json` counts the records read, lost to
faults, taken out or reshaped by a rule, and those whose id an earlier record had; the counts must add up.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import pyarrow as pa

from curate.emit.kept_samples import kept_pictures
from curate.errors import UsageError
from curate.mix import reshape, text_overlap
from curate.mix.pictures import Picture, read_picture
from curate.mix.sources import MAX_LISTED, TOO_LONG, Entry, Faults, SourceOptions, entries
from curate.storage import manifest, paths, records, sidecar
from pipelines.record_forms import MODEL
from pipelines.records import IMAGE_MARK

SCRATCH_SCHEMA = pa.schema(
    [
        ("record", pa.large_binary()),
        ("has_source", pa.bool_()),
        ("location", pa.list_(pa.string())),  # of each picture, in the order of the marks, as the next three
        ("offset", pa.list_(pa.int64())),
        ("size", pa.list_(pa.int64())),
        ("suffix", pa.list_(pa.string())),
        ("image_hash", pa.uint64()),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("rounds", pa.int32()),
    ]
)
BATCH = 1024
Count = Callable[[list[str]], list[int]]


def token_counter(tokenizer: str) -> Count:
    """Make a function that counts the tokens of texts. tokenizer: `estimate`, or the path of a tokenizer.json."""
    if tokenizer == "estimate":
        return lambda texts: [records.estimate_tokens(text) for text in texts]
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_file(paths.local(tokenizer))
    except Exception as error:  # the class that it raises
        raise UsageError(f"{tokenizer} is not a readable tokenizer.json: {error}") from None
    return lambda texts: [len(found.ids) for found in loaded.encode_batch(texts, add_special_tokens=False)]


@dataclass
class ReadSource:
    """The engine's task: read the source of a name."""

    sources: dict[str, SourceOptions]
    place: str
    tokenizer: str
    image_tokens: int

    def setup(self) -> None:
        """Load the tokenizer."""
        self.count = token_counter(self.tokenizer)

    def __call__(self, name: str, /) -> dict[str, Any]:
        """Read one source and write its table."""
        location, faults, ruled_out = paths.join(self.place, f"{name}.arrow"), Faults(), Faults()
        found = _CountedRecords(entries(name, self.sources[name], faults, paths.join(self.place, name)))
        reshaped: dict[str, int] = {}
        cut: dict[str, int] = {}
        said_once = {"questions": 0}
        shaped = self._shape(found, self.sources[name], ruled_out, reshaped, cut)
        if self.sources[name].instructions == "once":
            shaped = _instructed_once(shaped, said_once)

        def batches() -> Iterator[pa.RecordBatch]:
            usable = 0
            for batch in self._rows(shaped):
                usable += batch.num_rows
                yield batch
            read = found.yielded + faults.left_out + sum(faults.counts.values())
            rules_took = {**({"left out": faults.left_out} if faults.left_out else {}), **ruled_out.counts}
            manifest.reconcile(name, read + sum(reshaped.values()), {"usable": usable, **faults.counts, **rules_took})
            facts = {"read": read, "faults": faults.counts, "ruled_out": rules_took, "reshaped": reshaped}
            facts |= {
                "listed": faults.listed + ruled_out.listed,
                "notes": ruled_out.notes + faults.notes,
                "folders": faults.folders,
            }
            facts |= {"cut": cut} if cut else {}
            facts |= {"said_once": said_once["questions"]} if said_once["questions"] else {}
            facts |= {"duplicate_ids": found.repeated, "listed_ids": found.listed}
            manifest.save_json(
                facts_location(self.place, name), facts
            )  # before the table, which says that both are there

        return {"rows": sidecar.write_table(location, SCRATCH_SCHEMA, batches())}

    def _shape(
        self,
        found: Iterable[Entry],
        source: SourceOptions,
        ruled_out: Faults,
        reshaped: dict[str, int],
        cut: dict[str, int],
    ) -> Iterator[Entry]:
        """Apply the source's rules. reshaped: filled with how many records each rule added (or took away).

        cut: filled with the records that max_tokens shortened, and the rounds that they lost.
        """

        def fit(record: dict[str, Any]) -> list[dict[str, Any]]:
            most = source.max_tokens or 1
            return reshape.fit(record, most, source.overflow, lambda text: self.count([text])[0], self.image_tokens)

        found = _RecordFilter(source, ruled_out).filter(found)
        for entry in _merge(found, reshaped) if source.merge else found:
            parts = [entry]
            if source.max_rounds is not None:
                parts = _reshaped(entry, lambda record: reshape.segment(record, source.max_rounds or 1))
                reshaped["max_rounds"] = reshaped.get("max_rounds", 0) + len(parts) - 1
            for part in parts:
                fitted = [part]
                if source.max_tokens is not None:
                    fitted = _reshaped(part, fit)
                    reshaped["max_tokens"] = reshaped.get("max_tokens", 0) + max(0, len(fitted) - 1)
                    gone = _rounds([part]) - _rounds(fitted)
                    if fitted and gone:
                        cut["records"] = cut.get("records", 0) + 1
                        cut["rounds"] = cut.get("rounds", 0) + gone
                if not fitted:
                    ruled_out.note(TOO_LONG, part.record.get("id"))
                yield from fitted

    def _rows(self, found: Iterator[Entry]) -> Iterator[pa.RecordBatch]:
        """Turn entries into rows, batch by batch."""
        while chunk := list(islice(found, BATCH)):
            turns = [(number, turn) for number, entry in enumerate(chunk) for turn in entry.record["conversations"]]
            sizes = self.count([turn["value"].replace(IMAGE_MARK, "") for _, turn in turns])
            tokens = [self.image_tokens * len(entry.pictures) for entry in chunk]
            supervised, rounds = [0] * len(chunk), [0] * len(chunk)
            for (number, turn), size in zip(turns, sizes, strict=True):
                tokens[number] += size
                if turn["from"] in MODEL:
                    supervised[number] += size
                    rounds[number] += 1
            places = ("location", "offset", "size", "suffix")
            yield pa.record_batch(
                [
                    pa.array([records.dump(entry.record) for entry in chunk], pa.large_binary()),
                    pa.array(["source" in entry.record for entry in chunk]),
                    *(
                        pa.array([[getattr(each, key) for each in entry.pictures] for entry in chunk], kind)
                        for key, kind in ((key, SCRATCH_SCHEMA.field(key).type) for key in places)
                    ),
                    pa.array([_hash_pictures(entry.pictures) for entry in chunk], pa.uint64()),
                    pa.array(tokens, pa.int32()),
                    pa.array(supervised, pa.int32()),
                    pa.array(rounds, pa.int32()),
                ],
                schema=SCRATCH_SCHEMA,
            )


@dataclass
class _RecordFilter:
    """Drop records by the source's rules: drop_invalid, selection, exclude_text, dedup_text, in this order."""

    source: SourceOptions
    ruled_out: Faults
    kept: set[bytes] = field(default_factory=set)
    benchmark: set[str] = field(default_factory=set)
    remembered: text_overlap.Remembered | None = None

    def filter(self, found: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the records that every rule keeps; count the others by rule in `ruled_out`."""
        source = self.source
        if source.selection:
            self.kept = kept_pictures(source.selection)
        for location in source.exclude_text:
            self._read_benchmark(location)
        if source.dedup_text is not None:
            self.remembered = text_overlap.Remembered(source.dedup_text)
        for entry in found:
            why = self._judge(entry)
            if why:
                self.ruled_out.note(why, entry.record.get("id"))
            else:  # from here on records may be held by the thousand, and their pictures' bytes must not
                yield Entry(entry.record, tuple(replace(picture, data=None) for picture in entry.pictures))

    def _read_benchmark(self, location: str) -> None:
        """Add a file's questions to those that no record may contain; note lines that hold none."""
        read = unread = asked = 0
        with paths.open_read(location) as file:
            for value, _ in records.read_records(file, location):
                found = isinstance(value, dict)
                read, unread = read + 1, unread + (not found)
                asked += found and any(text_overlap.questions(value))
                self.benchmark.update(text_overlap.runs(value) if found else ())
        told = {
            f"{unread:,} of {read:,} lines are not JSON objects": unread,
            "no line holds a question": read and not asked,
        }
        what = f"exclude_text: {paths.name(location)}: {', '.join(why for why, holds in told.items() if holds)}"
        if any(told.values()):
            self.ruled_out.notes.append(f"{what}; expected JSON with `text`, `question` or turns")

    def _judge(self, entry: Entry) -> str:
        record, pictures, source = entry.record, entry.pictures, self.source
        trouble = reshape.invalid(record, len(pictures)) if source.drop_invalid else ""
        if trouble:
            return f"invalid: {trouble}"
        if source.max_images is not None and len(pictures) > source.max_images:
            return "over max_images"
        if source.selection and any(records.image_uid(read_picture(each)) not in self.kept for each in pictures):
            return "picture not selected"
        if self.benchmark and any(run in self.benchmark for run in text_overlap.runs(record)):
            return "benchmark text"
        if self.remembered is not None and self.remembered.near(records.whole_text(record), pictures or None):
            return "near-duplicate text"
        return ""


class _CountedRecords:
    """Iterate over records, counting them and those whose id an earlier one had (8 bytes of memory an id)."""

    def __init__(self, found: Iterator[Entry]) -> None:
        self.records = found
        self.yielded = self.repeated = 0
        self.listed: list[Any] = []
        self.seen: set[int] = set()

    def __iter__(self) -> Iterator[Entry]:
        for entry in self.records:
            self.yielded += 1
            if "id" in entry.record:
                value = _hash(repr(entry.record["id"]))
                if value in self.seen:
                    self.repeated += 1
                    self.listed += [entry.record["id"]] if len(self.listed) < MAX_LISTED else []
                self.seen.add(value)
            yield entry


def _merge(found: Iterable[Entry], reshaped: dict[str, int]) -> Iterator[Entry]:
    before = after = 0

    def counted() -> Iterator[tuple[dict[str, Any], Any]]:
        nonlocal before
        for entry in found:
            before += 1
            yield entry.record, entry.pictures or None

    for record, pictures in reshape.merge_by_image(counted()):
        after += 1
        yield Entry(record, pictures or ())
    reshaped["merge"] = after - before


def _instructed_once(entries: Iterable[Entry], told: dict[str, int]) -> Iterator[Entry]:
    """Keep a record's closing line only in its first question. told: `questions` counts those that lost it."""
    for entry in entries:
        record, questions = reshape.instruct_once(entry.record)
        told["questions"] += questions
        yield Entry(record, entry.pictures)


def _reshaped(entry: Entry, rule: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> list[Entry]:
    """Apply a rule that may make several records of one; each keeps the pictures whose marks it has.

    A rule sees several pictures as their numbers (`image = [0, 1, …]`), which it shares out with the marks.
    """
    if len(entry.pictures) < 2:
        return [Entry(record, entry.pictures) for record in rule(entry.record)]
    numbered = {**entry.record, "image": list(range(len(entry.pictures)))}
    made = rule(numbered)
    if len(made) == 1 and made[0] is numbered:
        return [entry]
    names = entry.record["image"]
    parts = []
    for record in made:
        numbers = record.pop("image", [])
        if numbers:
            record["image"] = names[numbers[0]] if len(numbers) == 1 else [names[number] for number in numbers]
        parts.append(Entry(record, tuple(entry.pictures[number] for number in numbers)))
    return parts


def _rounds(parts: Iterable[Entry]) -> int:
    return sum(len(reshape.rounds(part.record["conversations"])) for part in parts)


def facts_location(place: str, name: str) -> str:
    """Locate the file of facts about a source that were found while it was read."""
    return paths.join(place, f"{name}.facts.json")


def _hash_pictures(pictures: Sequence[Picture]) -> int:
    """Hash the locations of pictures; 0 for none."""
    return _hash("\0".join(f"{each.location}\0{each.offset}" for each in pictures)) if pictures else 0


def _hash(text: str) -> int:
    """Hash a text to 64 bits, never 0, which stands for none."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1
