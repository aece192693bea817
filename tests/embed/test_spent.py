"""Where the time of embedding goes: shares that add up, of threads and of decoding processes."""

import json
import time

import tiny_clip
from artefacts import write_pool
from hypothesis import given
from hypothesis import strategies as st

from curate.embed.embed import EmbedOptions, _workers, embed
from curate.embed.spent import WORK, Spent, in_words, shares
from curate.embed.weights import Source
from curate.engine import Job

SECONDS = st.dictionaries(st.sampled_from(WORK), st.floats(0, 9)) | st.just({})


@given(st.lists(st.tuples(SECONDS, st.floats(0, 9)), min_size=1, max_size=4))
def test_shares_come_to_a_hundred_and_what_nothing_claims_was_waited(shards):
    accounts = [{"threads": {**spent, "all": sum(spent.values()) + idle, "count": 2}} for spent, idle in shards]
    found = shares(accounts)["threads"]
    assert found["count"] == 2 and sum(found[work] for work in WORK) == 100
    whole = sum(each["threads"]["all"] for each in accounts)
    for work in set(WORK) - {"wait"}:
        exact = 100 * sum(spent.get(work, 0) for spent, _ in shards) / whole if whole else 0
        assert abs(found[work] - exact) <= 1


def test_time_is_taken_by_what_it_was_spent_on():
    spent = Spent()
    with spent.on("compute"):
        time.sleep(0.02)
    spent.add({"read": 0.01})
    account = spent.account(3)
    assert account["compute"] >= 0.02 and account["read"] == 0.01 and account["all"] >= 0.06
    assert in_words(shares([{"threads": {"decode": 3.0, "all": 4.0, "count": 1}}])) == (
        "time of 1 threads: decode 75 %, wait 25 %"
    )


def test_a_run_tells_and_logs_where_its_time_went(tmp_path, capsys):
    model, pool = tiny_clip.write(tmp_path / "clip"), write_pool(tmp_path / "pool", ["00000", "00001"], 5)
    embed(pool, str(tmp_path / "emb"), EmbedOptions(model), Job(workers=1))
    logged = [json.loads(line) for line in (tmp_path / "emb" / "log.jsonl").read_text().splitlines()]
    spent = next(each["spent"] for each in logged if "spent" in each)
    assert list(spent) == ["threads"] and sum(spent["threads"][work] for work in WORK) == 100
    assert f"embed: {in_words(spent)}\n" in capsys.readouterr().err


def test_two_workers_keep_a_gpu_busy_unless_the_model_is_large(monkeypatch):
    size = 1 << 30
    monkeypatch.setattr(Source, "size", property(lambda self: size))
    source = Source("", "", "", "", {})
    for asked, gpus, shards, expected in (
        (0, 1, 9, (2, 1 / 2)),
        (0, 4, 99, (8, 1 / 2)),
        (3, 2, 9, (3, 1 / 2)),
        (0, 4, 3, (3, 1)),
    ):
        assert _workers(Job(workers=asked, gpus=gpus), "cuda", source, shards) == expected
    assert _workers(Job(), "cpu", source, 9)[0] == 1
    size = 9 << 30
    assert _workers(Job(gpus=2), "cuda", source, 9) == (2, 1.0)
