"""Compare two outputs of the same pipeline, byte for byte: does a change of the code leave what users get as it was?

    git worktree add /tmp/before REVISION && make -C /tmp/before coreset train && make coreset train
    python tests/same_bytes.py /tmp/before/out/demo out/demo

Differences that a change of the code may make are set aside: in JSON, the versions of packages, times, speeds, digests
of manifests (they cover the versions), and the folders that paths begin with; logs and event files; and the page, whose
figures of speed differ by the run. Everything else has to be equal. Exit code 1 where it is not.
"""

import argparse
import json
import re
import sys
from pathlib import Path

APART = ("log.jsonl", "report.html", "events.out", ".png")
VOLATILE = {"versions", "digest", "seconds", "started", "ended", "time", "device", "tokens_per_s", "data_wait_s"}
VOLATILE |= {"step_s", "mfu", "peak_memory_gb", "rows_per_s", "request_digest", "created", "fingerprint_inputs"}


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


def content(path, roots):
    """What of a file has to be equal."""
    if path.suffix == ".json":
        return json.dumps(plain(json.loads(path.read_text()), roots), sort_keys=True)
    if path.suffix == ".jsonl":
        return [json.dumps(plain(json.loads(line), roots), sort_keys=True) for line in path.read_text().splitlines()]
    return path.read_bytes()


def main() -> int:
    """Print every file that differs, and how many are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    told = parser.parse_args()
    sides = []
    for side in (told.before, told.after):
        files = {p.relative_to(side).as_posix(): p for p in sorted(side.rglob("*")) if p.is_file()}
        sides.append({name: p for name, p in files.items() if not any(re.search(part, name) for part in APART)})
    before, after = sides
    roots = [str(told.before.resolve()), str(told.after.resolve()), str(told.before), str(told.after)]
    shared = sorted(before.keys() & after.keys())
    different = [name for name in shared if content(before[name], roots) != content(after[name], roots)]
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
