"""Render the demo: a pool of captioned pictures with planted faults, instruction data, and held-out tests.

Goes in: a folder, a seed, and how dirty the pool shall be. Comes out:
  pool/{00000}.tar         samples as img2dataset writes them (key.jpg, key.json, key.txt; keys of 9 digits)
  truth.arrow              one row per planned sample: what it shows, what was done to it (TRUTH). No stage reads it.
  instruct/instruct.json   LLaVA conversations about the clean pictures in instruct/images/
  text.json                LLaVA conversations without a picture
  test/test.json           held-out clean pictures in test/images/, one record per question, and tasks without a picture
                           (task "text"); the gpt turn is the truth
The same arguments give the same bytes. About 3,000 pictures a second on one core.

`judge` compares a selection with the truth: what share of each planted fault left, and at what cost in clean samples.
The world itself is world.py and words.py.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate import engine
from curate.demo.options import DemoOptions
from curate.demo.words import GROUNDS, NAMES, PLACES, QUESTIONS, SIZES, TASKS, TEXTURES, answer, text_task
from curate.demo.world import (
    DIRT,
    FAULTS,
    NUM_CONCEPTS,
    SIDE,
    Plan,
    caption,
    choose_concepts,
    draw,
    facts,
    plan,
    sample_scenes,
)
from curate.errors import ShardError, UsageError, unknown
from curate.storage import manifest
from curate.storage.tar import TarWriter, read_index

WORD = pa.dictionary(pa.int32(), pa.string())
TRUTH = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("fault", WORD),  # FAULTS, or a file fault: corrupt, empty, no_caption, not_utf8, truncated
        ("is_copy", pa.bool_()),
        ("source", pa.string()),  # the key of the sample this one was copied from; its own key if it is no copy
        ("concept", WORD),  # what the picture shows (a cheater shows its word in print)
        ("caption_concept", WORD),  # what the caption names; null where it names nothing
        ("size", WORD),
        ("place", WORD),
        ("background", WORD),
    ]
)
FILE_FAULTS = ("corrupt", "empty", "no_caption", "not_utf8", "truncated")
RIGHT = ("clean", "duplicate")  # faults whose caption tells the truth about its picture


def render(
    out: str | Path,
    *,
    rows: int = 20_000,
    seed: int = 0,
    shards: int = 8,
    dirt: str = "dirty",
    instruct: int = 3_000,
    tests: int = 4,
    caption_tests: int = 0,
    workers: int = 1,
) -> dict[str, int]:
    """Render a whole demo into the local folder `out` and return the count of rows by fault.

    dirt: a key of DIRT; all but "clean" also get one file of each of FILE_FAULTS. instruct: pictures with questions,
    and as many conversations without a picture. tests: held-out pictures per concept, each with all questions.
    caption_tests: further ones, of which only the caption is asked.
    Raises: UsageError when an argument is out of range.
    """
    if dirt not in DIRT:
        raise unknown("dirt", dirt, DIRT)
    if not 1 <= shards <= 99_999 or not 10 * shards <= rows <= 9_999 * shards:
        raise UsageError(f"{rows:,} rows in {shards:,} shards: a shard holds 10 to 9,999 rows (keys have 5 + 4 digits)")
    if min(instruct, tests, caption_tests) < 0:
        raise UsageError(f"instruct={instruct}, tests={tests}, caption_tests={caption_tests}: expected 0 or more.")
    out = Path(out)
    planned = plan(np.random.default_rng([seed, 0]), rows, DIRT[dirt])
    bounds = np.linspace(0, rows, shards + 1).astype(int)
    keys = [f"{shard:05d}{i:04d}" for shard in range(shards) for i in range(bounds[shard + 1] - bounds[shard])]
    broken = {} if dirt == "clean" else _choose_broken(planned, int(bounds[-2]))
    task = RenderShard(out / "pool", planned, keys, broken, bounds.tolist(), seed, DIRT[dirt].legible)
    for report in engine.run(task, range(shards), workers=workers):
        if report.error is not None:
            raise ShardError(f"pool/{report.item:05d}.tar: {report.error}")
    truth = _truth(planned, keys, broken)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, TRUTH) as writer:
        writer.write_table(truth)
    _write(out / "truth.arrow", sink.getvalue())
    render_instruct(out / "instruct", pictures=instruct, rng=np.random.default_rng([seed, 2]))
    write_texts(out / "text.json", rows=instruct, rng=np.random.default_rng([seed, 3]))
    render_tests(out / "test", per_concept=tests, captions=caption_tests, rng=np.random.default_rng([seed, 4]))
    return dict(sorted(Counter(truth["fault"].to_pylist()).items()))


def render_demo(out: str, chosen: DemoOptions, job: engine.Job) -> dict[str, Any]:
    """Render the demo's pool, instruction data and tests under `out`."""
    output = manifest.open_output(out, "demo", asdict(chosen), {}, overwrite=job.overwrite)
    if output.complete:
        return output.manifest
    with output.attempt():
        faults = render(out, **asdict(chosen), workers=job.workers or engine.cores())
    return output.finish(counts=faults, shards={}, versions=manifest.versions("numpy", "pillow"))


def _choose_broken(planned: Plan, last_shard: int) -> dict[int, str]:
    """Give each file fault a row: clean samples that nothing was copied from, and the pool's last row for the cut."""
    copied = set(planned.source[planned.is_copy].tolist())
    sound = [row for row in range(last_shard) if planned.fault[row] == 0 and row not in copied]
    at = np.linspace(0, max(len(sound) - 1, 0), len(FILE_FAULTS) + 1).astype(int)[1:-1]
    broken = {sound[i]: fault for i, fault in zip(at, FILE_FAULTS, strict=False)} if sound else {}
    return broken | {len(planned.fault) - 1: "truncated"}


def _encode(pixels: np.ndarray) -> bytes:
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=85)
    return jpeg.getvalue()


@dataclass(frozen=True)
class RenderShard:
    """The work of one process: draw the rows of a shard into a tar, and spoil those that `broken` names."""

    pool: Path
    planned: Plan
    keys: Sequence[str]
    broken: Mapping[int, str]
    bounds: Sequence[int]
    seed: int
    label: bool

    def setup(self) -> None:
        """Make the folder."""
        self.pool.mkdir(parents=True, exist_ok=True)

    def __call__(self, item: int) -> dict[str, Any]:
        """Write shard number `item`."""
        span = range(self.bounds[item], self.bounds[item + 1])
        rng = np.random.default_rng([self.seed, 1, item])
        sink = io.BytesIO()
        with TarWriter(sink) as tar:
            for row in span:
                for suffix, data in self._members(row, rng).items():
                    tar.add(f"{self.keys[row]}.{suffix}", data)
        data = sink.getvalue()
        if self.broken.get(span[-1]) == "truncated":
            data = _cut_last_picture(data)
        _write(self.pool / f"{item:05d}.tar", data)
        return {"rows": len(span)}

    def _members(self, row: int, rng: np.random.Generator) -> dict[str, bytes]:
        jpeg = _encode(draw(self.planned.shown[row], rng, label=self.label))
        caption = self.planned.captions[row]
        text: bytes | None = caption.encode()
        fault = self.broken.get(row)
        if fault == "corrupt":
            jpeg = jpeg[:2] + rng.bytes(len(jpeg) - 2)
        elif fault == "empty":
            jpeg = b""
        elif fault == "no_caption":
            text = None
        elif fault == "not_utf8":
            text = f"{caption} caf\xe9".encode("latin-1")
        described = _describe(self.keys[row], jpeg, None if fault in ("no_caption", "not_utf8") else caption)
        return {"jpg": jpeg, "json": described} | ({} if text is None else {"txt": text})


def _describe(key: str, jpeg: bytes, caption: str | None) -> bytes:
    """Return the JSON that img2dataset writes beside a picture."""
    sides = {f"{which}{axis}": SIDE for which in ("", "original_") for axis in ("width", "height")}
    state = {"key": key, "status": "success", "error_message": None, "exif": "{}"}
    digest = hashlib.sha256(jpeg).hexdigest()
    url = f"https://pictures.example/{key}.jpg"
    return json.dumps({"caption": caption, "url": url, **state, **sides, "sha256": digest}).encode()


def _cut_last_picture(data: bytes) -> bytes:
    """Cut a tar in the middle of its last picture, as a broken download would."""
    picture = read_index(io.BytesIO(data)).samples[-1].image
    assert picture is not None
    return data[: picture.offset + picture.size // 2]


def _truth(planned: Plan, keys: Sequence[str], broken: Mapping[int, str]) -> pa.Table:
    names = np.array(NAMES)
    vague = planned.fault == FAULTS.index("underspecified")
    fault = [broken.get(row, FAULTS[code]) for row, code in enumerate(planned.fault)]
    grounds = [f"{TEXTURES[t]} {GROUNDS[g]}" for t, g in planned.shown[["texture", "ground"]]]
    columns: dict[str, Any] = {
        "key": keys,
        "shard": [key[:5] for key in keys],
        "fault": fault,
        "is_copy": planned.is_copy,
        "source": [keys[row] for row in planned.source],
        "concept": names[planned.shown["concept"]],
        "caption_concept": np.where(vague, None, names[planned.told["concept"]].astype(object)),
        "size": np.array(SIZES)[planned.shown["size"]],
        "place": np.array(PLACES)[planned.shown["place"]],
        "background": grounds,
    }
    arrays = [pa.array(columns[field.name], pa.string() if field.type == WORD else field.type) for field in TRUTH]
    return pa.table(
        [a.dictionary_encode() if f.type == WORD else a for a, f in zip(arrays, TRUTH, strict=True)], schema=TRUTH
    )


def _write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def _write_json(path: Path, records: list[dict[str, Any]]) -> None:
    _write(path, json.dumps(records, indent=1).encode())


def _turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """Return LLaVA's form of a conversation."""
    return [{"from": who, "value": said} for pair in pairs for who, said in zip(("human", "gpt"), pair, strict=True)]


def render_instruct(out: Path, *, pictures: int, rng: np.random.Generator) -> None:
    """Write clean pictures by concept frequency, each with 2 to 4 questions in a random order."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i, scene in enumerate(sample_scenes(rng, choose_concepts(rng, pictures))):
        name = f"{i:06d}.jpg"
        (out / "images" / name).write_bytes(_encode(draw(scene, rng)))
        kinds = [(*TASKS, "caption")[k] for k in rng.permutation(len(TASKS) + 1)[: rng.integers(2, 5)]]
        pairs = []
        for kind in kinds:
            asked = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))]
            pairs.append((asked, caption(scene, rng) if kind == "caption" else answer(kind, *facts(scene))))
        pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
        records.append({"id": f"instruct-{i:06d}", "image": name, "conversations": _turns(*pairs)})
    _write_json(out / "instruct.json", records)


def write_texts(path: Path, *, rows: int, rng: np.random.Generator) -> None:
    """Write conversations of 1 to 3 turns that need no picture."""
    drawn = ([text_task(rng) for _ in range(rng.integers(1, 4))] for _ in range(rows))
    _write_json(path, [{"id": f"text-{i:06d}", "conversations": _turns(*pairs)} for i, pairs in enumerate(drawn)])


def render_tests(out: Path, *, per_concept: int, rng: np.random.Generator, captions: int = 0) -> None:
    """Write held-out pictures, equally many of each concept, with one record per task: TASKS and `caption`.

    As many tasks without a picture follow as there are pictures, then `captions` further pictures per concept, with the
    task `caption` alone.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    pictures = NUM_CONCEPTS * per_concept
    records = _write_tests(out, 0, per_concept, TASKS, rng)
    for i in range(pictures):
        records.append({"id": f"test-{i:06d}-text", "conversations": _turns(text_task(rng)), "task": "text"})
    _write_json(out / "test.json", records + _write_tests(out, pictures, captions, (), rng))


def _write_tests(
    out: Path, first: int, per_concept: int, tasks: Sequence[str], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Draw pictures, numbered from `first`, and return a record for the caption and for each of the tasks."""
    records = []
    for i, scene in enumerate(sample_scenes(rng, np.repeat(np.arange(NUM_CONCEPTS), per_concept)), first):
        name = f"{i:06d}.jpg"
        (out / "images" / name).write_bytes(_encode(draw(scene, rng)))
        said = {"caption": (QUESTIONS["caption"][0], caption(scene, rng, full=True))}
        said |= {task: (QUESTIONS[task][0], answer(task, *facts(scene))) for task in tasks}
        for task, (asked, truth) in said.items():
            extra = {"task": task, "concept": NAMES[scene["concept"]]}
            turns = _turns((f"<image>\n{asked}", truth))
            records.append({"id": f"test-{i:06d}-{task}", "image": name, "conversations": turns, **extra})
    return records


def judge(
    keys: Sequence[str], kept: Sequence[bool], dropped_by: Sequence[str | None], truth: pa.Table
) -> dict[str, Any]:
    """Compare a selection with the truth.

    keys, kept, dropped_by: one entry per row of the selection. truth: the table of truth.arrow, in any order.
    Returns `kinds` (per fault: planted, removed, and removed by each reason; a row that never reached the selection
    was removed by "unreadable"), `duplicates` (extra copies planted and left; sources of which dedup left nothing),
    `kept`, `right_share` of what was kept, and the concepts that right pairs cover before and after.
    """
    fate = {key: None if keep else (why or "unknown") for key, keep, why in zip(keys, kept, dropped_by, strict=True)}
    rows = truth.select(["key", "fault", "source", "concept"]).to_pydict()
    reasons: dict[str, Counter[str | None]] = defaultdict(Counter)
    groups: dict[str, list[str | None]] = defaultdict(list)
    before, after = set(), set()
    for key, fault, source, concept in zip(*rows.values(), strict=True):
        why = fate.get(key, "unreadable")
        reasons[fault][why] += 1
        groups[source].append(why)
        if fault in RIGHT:
            before.add(concept)
            if why is None:
                after.add(concept)
    kinds = {}
    for fault in [f for f in (*FAULTS, *FILE_FAULTS) if f in reasons]:
        planted = reasons[fault].total()
        by = {str(why): n for why, n in sorted(reasons[fault].items(), key=str) if why is not None}
        kinds[fault] = {"planted": planted, "removed": sum(by.values()), "removed_by": by}
    num_kept = sum(1 for why in fate.values() if why is None)
    num_right = sum(reasons[fault][None] for fault in RIGHT)
    return {
        "kinds": kinds,
        "duplicates": _judge_copies(list(groups.values())),
        "kept": num_kept,
        "right_share": num_right / num_kept if num_kept else None,
        "concepts": {"before": len(before), "after": len(after)},
    }


def _judge_copies(groups: list[list[str | None]]) -> dict[str, int]:
    """Count over groups of copies with their source: extra copies planted and kept, and groups dedup left empty."""
    lost = sum(all(str(why).startswith("dedup") for why in group) for group in groups)
    return {
        "extra_planted": sum(len(group) - 1 for group in groups),
        "extra_kept": sum(max(group.count(None) - 1, 0) for group in groups),
        "sources": len(groups),
        "sources_lost_to_dedup": lost,
    }


def format_judgement(judgement: Mapping[str, Any]) -> str:
    """Lay out what `judge` found as a table for the terminal."""
    return "\n".join(_judgement_lines(judgement))


def _judgement_lines(judgement: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'planted fault':<16}{'rows':>8}{'removed':>9}{'share':>8}  removed by"
    for fault, counts in judgement["kinds"].items():
        by = ", ".join(f"{why} {n:,}" for why, n in sorted(counts["removed_by"].items(), key=lambda item: -item[1]))
        share = counts["removed"] / counts["planted"]
        yield f"{fault:<16}{counts['planted']:>8,}{counts['removed']:>9,}{share:>8.1%}  {by}".rstrip()
    copies, concepts = judgement["duplicates"], judgement["concepts"]
    lost = f"{copies['sources_lost_to_dedup']:,} of {copies['sources']:,} sources lost to dedup"
    yield f"extra copies: {copies['extra_planted']:,} planted, {copies['extra_kept']:,} kept; {lost}"
    right = "" if judgement["right_share"] is None else f", {judgement['right_share']:.1%} of them right pairs"
    covered = f"{concepts['after']} of {concepts['before']} concepts still have a right pair"
    yield f"kept {judgement['kept']:,} rows{right}; {covered}"
