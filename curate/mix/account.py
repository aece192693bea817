"""What a mix's manifest records: the request, the state of its inputs, and counts for each source.

In: sources, and a few scalar columns of their temporary tables. Out: JSON for the manifest. Measures are given twice:
`before` for all usable records of a source, and for the records that the mix drew, each as often as it was drawn.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.mix import sampling
from curate.mix.pictures import is_tars
from curate.mix.sources import TOO_LONG, SourceOptions, files_of, kind_of
from curate.storage import manifest, paths, sidecar, tar

PERCENTILES = (5, 50, 95, 100)
MAX_SHOWN = 80
BEFORE_THE_LENGTH = ("merge", "max_rounds")  # rules that make other records, before max_tokens judges these
# What to do about a loss, by a part of its reason.
ADVICE = {
    "missing image": "is `images` the folder that the names start from?",
    "unsafe or foreign image name": "names must lead to an image under `images`",
    "an image mark without an image": "name it in `image`, or take the mark out",
    "an image without an image mark": "put <image> where the question shows it",
    "image is a URL": "download it first; curate does not",
    "unknown speaker": "turns are from human or gpt (user, assistant), or system",
    "neither conversations": "curate/README.md lists the forms that are read",
    "not JSON": "is the file complete?",
}
PLACES = ("path", "images", "selection", "exclude_text")  # inputs, recorded by what lies there


def recorded(options: Mapping[str, Any], sources: Mapping[str, SourceOptions]) -> dict[str, Any]:
    """List the resolved options without locations; `inputs` records what is at those by content."""
    asked: dict[str, Any] = {key: value for key, value in options.items() if key != "sources"}
    asked["tokenizer"] = asked["tokenizer"] if asked["tokenizer"] == "estimate" else _digest_file(asked["tokenizer"])
    defaults = vars(SourceOptions(""))
    asked["sources"] = {
        name: {k: v for k, v in vars(source).items() if k not in PLACES and v != defaults[k]}
        for name, source in sources.items()
    }
    return asked


def inputs(sources: Mapping[str, SourceOptions]) -> dict[str, manifest.Artefact | Mapping[str, Any]]:
    """Fingerprint all that the sources read, so that a change is noticed.

    Artefacts by their manifest, files by their bytes, tars and local folders of images by their names and sizes;
    a remote folder of images by nothing.
    """
    found: dict[str, manifest.Artefact | Mapping[str, Any]] = {}
    for name, source in sources.items():
        kind = kind_of(source)
        if paths.exists(paths.join(source.path, manifest.MANIFEST)):
            found[name] = manifest.open_input(source.path)
        elif kind == "shards":
            found[name] = {"path": source.path, "digest": _digest_tars(source.path)}
        else:
            digests = [_digest_file(location) for location in files_of(source, kind)]
            found[name] = {"path": source.path, "digest": manifest.digest(digests)}
        if source.images:
            found[f"{name}.images"] = {"path": source.images, "digest": _digest_images(source.images)}
        if source.selection:
            found[f"{name}.selection"] = manifest.open_input(source.selection, "select")
        for number, location in enumerate(source.exclude_text):
            found[f"{name}.exclude_text.{number}"] = {"path": location, "digest": _digest_file(location)}
    return found


def _digest_file(location: str) -> str:
    if not paths.exists(location):
        raise UsageError(f"{location} does not exist.")
    return manifest.file_digest(location)


def _digest_tars(pool: str) -> str:
    return manifest.digest([[shard.stem, shard.size] for shard in tar.list_pool(pool)])


def _digest_images(root: str) -> str:
    """Digest the names and sizes of all images under a folder, or of the tars. A folder's other files do not count."""
    if is_tars(root):
        return _digest_tars(root)
    if paths.is_remote(root):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name, size in _listing(paths.local(root), ""):
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _listing(root: str, inside: str) -> Iterator[tuple[str, int]]:
    with os.scandir(os.path.join(root, inside)) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            name = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir():
                yield from _listing(root, name)
            elif entry.name.rpartition(".")[2].lower() in tar.IMAGE_SUFFIXES and entry.is_file():
                yield name, entry.stat().st_size


@dataclass(frozen=True)
class Columns:
    """What the driver needs of a source's records, 24 bytes each."""

    tokens: np.ndarray
    supervised: np.ndarray
    rounds: np.ndarray
    image: np.ndarray  # a hash of where the picture lies; 0: none

    @classmethod
    def read(cls, location: str) -> "Columns":
        """Read them from a source's temporary table."""
        table = sidecar.table(location, ["tokens", "supervised", "rounds", "image_hash"])
        return cls(*(column.to_numpy() for column in table.columns))

    @property
    def is_text(self) -> np.ndarray:
        """Say which records are text-only, bool [n]."""
        return np.asarray(self.image == 0)

    def take(self, rows: np.ndarray) -> "Columns":
        """Pick rows, repeated ones as often as they are named."""
        return Columns(*(getattr(self, name)[rows] for name in ("tokens", "supervised", "rounds", "image")))


def measure(columns: Columns) -> dict[str, Any]:
    """Count samples, tokens, rounds and images; `image_uses` says how many images are seen once, twice, … ten times."""
    uses = np.unique(columns.image[~columns.is_text], return_counts=True)[1]
    often = np.bincount(np.minimum(uses, 10), minlength=11)
    return {
        "samples": len(columns.tokens),
        "text_only": int(columns.is_text.sum()),
        "tokens": int(columns.tokens.sum()),
        "text_only_tokens": int(columns.tokens[columns.is_text].sum()),
        "supervised_tokens": int(columns.supervised.sum()),
        "rounds": int(columns.rounds.sum()),
        "images": len(uses),
        "image_uses_max": int(uses.max()) if len(uses) else 0,
        "image_uses": {f"{n}{'+' if n == 10 else ''}": int(count) for n, count in enumerate(often) if count},
        "length_percentiles": _percentiles(columns.tokens),
        "rounds_percentiles": _percentiles(columns.rounds),
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    return {str(p): int(np.percentile(values, p)) if len(values) else 0 for p in PERCENTILES}


def describe(
    sources: Mapping[str, SourceOptions],
    tables: Mapping[str, Columns],
    facts: Mapping[str, Mapping[str, Any]],
    order: sampling.Order,
) -> dict[str, Any]:
    """Describe each source and the whole mix: records read, lost by reason, and drawn, with their measures."""
    described, drawn = {}, []
    for number, (name, fact) in enumerate(facts.items()):
        rows = order.rows[order.source == number]
        drawn.append(tables[name].take(rows))
        entry = {"read": fact["read"], "usable": len(tables[name].tokens), **measure(drawn[-1])}
        entry |= {"distinct": len(np.unique(rows)), "before": measure(tables[name])}
        asked = sources[name].count
        if asked is not None and asked > entry["usable"]:
            entry["short_of_count"] = asked - entry["usable"]
        described[name] = entry | {key: value for key, value in fact.items() if key != "read" and value}
    whole = measure(_join(drawn))
    counts = {"rows": whole.pop("samples"), **whole}
    lost: dict[str, int] = {}
    for fact in facts.values():
        for why, count in fact["faults"].items():
            lost[why] = lost.get(why, 0) + count
    return {
        "sources": described,
        "counts": {key: value for key, value in counts.items() if isinstance(value, int)},
        "before": measure(_join(list(tables.values()))),
        "faults": lost,
        "text_share_samples": round(counts["text_only"] / max(1, counts["rows"]), 6),
        "text_share_tokens": round(counts["text_only_tokens"] / max(1, counts["tokens"]), 6),
        **{key: value for key, value in counts.items() if not isinstance(value, int)},
    }


def losses(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe what each source lost, one line per reason: how many of how many, the first of them, and what to do.

    sources: what `describe` returns for each, or what was found while it was read.
    """
    lines = []
    for name, fact in sources.items():
        first: dict[str, Any] = {}
        for each in fact.get("listed", ()):
            first.setdefault(each["why"], each["what"])
        for kind, counts in (("lost", fact.get("faults", {})), ("taken out by a rule", fact.get("ruled_out", {}))):
            for why, count in sorted(counts.items(), key=lambda pair: -pair[1]):
                example = f" (the first: {_shown(first[why])})" if why in first else ""
                made = fact.get("reshaped", {}) if why == TOO_LONG else {}
                of = fact["read"] + sum(made.get(rule, 0) for rule in BEFORE_THE_LENGTH)
                advice = next((f"; {told}" for part, told in ADVICE.items() if part in why), "")
                lines.append(f"{name}: {count:,} of {of:,} records {kind}: {why}{example}{advice}")
        if cut := fact.get("cut"):
            lines.append(
                f"{name}: max_tokens cut {cut['rounds']:,} rounds from {cut['records']:,} records that stay"
                '; overflow = "split" makes further records of what fits by itself'
            )
        if questions := fact.get("said_once"):
            lines.append(
                f"{name}: {questions:,} questions no longer repeat the closing line of their record's first question"
            )
        if short := fact.get("short_of_count"):
            lines.append(f"{name}: count asks for {short:,} more records than the {fact['usable']:,} usable ones")
        if fact.get("duplicate_ids"):
            example = _shown(fact["listed_ids"][0]) if fact.get("listed_ids") else ""
            lines.append(
                f"{name}: {fact['duplicate_ids']:,} records have the id of an earlier one (the first: {example})"
            )
        if fact.get("notes"):
            more = f", and {len(fact['notes']) - 1:,} more notes" if len(fact["notes"]) > 1 else ""
            lines.append(f"{name}: {fact['notes'][0]}{more}")
    return lines


def _shown(what: Any) -> str:
    text = json.dumps(what, default=str)  # escapes what would command a terminal
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _join(parts: list[Columns]) -> Columns:
    names = ("tokens", "supervised", "rounds", "image")
    return Columns(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
