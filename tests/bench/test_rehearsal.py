"""The measurements that need a GPU, at toy size on a processor, so that they cannot rot."""

import json

import pytest

from house import ROOT, Command

RESULT = "RESULT "


@pytest.mark.parametrize("part", ["training", "embedding", "numerics", "shards"])
def test_a_part_of_the_gpus_measurements_runs_on_a_processor(part):
    ended = Command(ROOT / "tests" / "bench" / "gpu.py", "--part", part, "--rehearse", cwd=ROOT)
    assert ended.wait() == 0, ended.stderr
    told = [json.loads(line.removeprefix(RESULT)) for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    assert told and not any("left out" in each for each in told)
