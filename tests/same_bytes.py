"""Compare two outputs of the same pipeline, byte for byte: does a change of the code leave what users get as it was?

    git worktree add /tmp/before REVISION && make -C /tmp/before coreset train && make coreset train
    python tests/same_bytes.py /tmp/before/out/demo out/demo

Differences that a change of the code may make are set aside: in JSON, the versions of packages, times, speeds, digests
of manifests (they cover the versions), and the folders that paths begin with (the checkout's, too: an export says where
its parts lay, and so its digest in `eval` differs where the checkouts do); logs and event files; and the page, whose
figures of speed differ by the run. `--renamed 'OLD=>NEW'` takes a text of the first side as it is called on the second.
Everything else has to be equal. Exit code 1 where it is not.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import pyarrow as pa

APART = ("log.jsonl", ".seen.json", "report.html", "events.out", ".png")
VOLATILE = {"versions", "digest", "seconds", "started", "ended", "time", "device", "tokens_per_s", "data_wait_s"}
VOLATILE |= {"step_s", "mfu", "peak_memory_gb", "supervised_per_s", "eta_s", "_name_or_path"}


def plain(value, roots):
    """Take out of a JSON value what may differ between two runs of the same code."""
    if isinstance(value, dict):
        return {key: plain(each, roots) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [plain(each, roots) for each in value]
    if isinstance(value, str):
        for root in roots:
            value = value.replace(root, "OUT")
        return value
    return value


def content(path, roots, renamed):
    """What of a file has to be equal."""
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text()
        for old, new in renamed:
            text = text.replace(old, new)
        parts = text.splitlines() if path.suffix == ".jsonl" else [text]
        return [json.dumps(plain(json.loads(part), roots), sort_keys=True) for part in parts]
    if path.suffix == ".arrow" and renamed:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        rows = repr([table.schema.remove_metadata(), table.to_pylist() if "dropped_by" in table.schema.names else 0])
        for old, new in renamed:
            rows = rows.replace(old, new)
        return rows if "dropped_by" in table.schema.names else path.read_bytes()
    return path.read_bytes()


def main() -> int:
    """Print every file that differs, and how many are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--renamed", action="append", default=[], type=lambda text: tuple(text.split("=>")))
    told = parser.parse_args()
    sides = []
    for side in (told.before, told.after):
        files = {p.relative_to(side).as_posix(): p for p in sorted(side.rglob("*")) if p.is_file()}
        sides.append({name: p for name, p in files.items() if not any(re.search(part, name) for part in APART)})
    before, after = sides
    homes = [str(side.resolve().parents[1]) for side in (told.before, told.after)]
    roots = [str(told.before.resolve()), str(told.after.resolve()), *homes, str(told.before), str(told.after)]
    shared = sorted(before.keys() & after.keys())
    different = [
        name
        for name in shared
        if content(before[name], roots, told.renamed) != content(after[name], roots, told.renamed)
    ]
    for name in different:
        print(f"differs: {name}")
    alone = sorted(before.keys() ^ after.keys())
    for name in alone:
        print(f"only {'before' if name in before else 'after'}: {name}")
    print(f"{len(shared) - len(different)} files equal, {len(different) + len(alone)} differ")
    different += alone
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
