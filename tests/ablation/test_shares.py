"""A mixture as arms, and the response that is fitted to it, beside responses that are known."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from curate.ablation import arms, run, shares, trials
from curate.engine import Job
from curate.errors import ShardError, UsageError
from curate.mix import mix
from curate.run import pipeline
from curate.storage import paths

TABLE = """
[ablation]
seeds = [5, 6]
compare = "shares"
take = {pool = ["dirty"], recipe = ["balanced"]}
bars = []
[ablation.shares]
sources = ["instruct", "captions", "text"]
total = 70
"""


def plan_of(tmp_path, text, *settings):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return pipeline.load(str(path), str(tmp_path / "out"), settings=settings)


def drawn(best, seeds, noise, k=3):
    """Values of all equal parts and some more mixtures: a bowl round the best, what a seed adds, and noise."""
    rng = np.random.default_rng(seeds)
    points = np.array([*shares.equal_parts(k), *np.eye(k) * 0.6 + 0.4 / k])
    own = rng.normal(0, 0.2, len(seeds))  # more than the whole bowl, and the same for all of a seed
    at = np.repeat(points, len(seeds), axis=0)
    which = np.tile(np.arange(len(seeds)), len(points))
    values = 0.5 - 0.3 * ((at - best) ** 2).sum(axis=1) + own[which] + rng.normal(0, noise, len(at))
    return at, np.array(seeds)[which], values


@pytest.mark.parametrize("best", [(0.6, 0.3, 0.1), (0.2, 0.3, 0.5), (0.7, 0.3)])
def test_the_optimum_of_a_known_bowl_lies_within_its_interval(best):
    best, inside, reached, width = np.array(best), 0, [], []
    for first in range(3):
        told = shares.respond(*drawn(best, [4 * first + seed for seed in range(4)], 0.01, len(best)))["best"]
        low, high = np.array(told["from"]), np.array(told["to"])
        inside += bool(np.all((low - 0.051 <= best) & (best <= high + 0.051)))  # a step of the lattice
        reached.append(0.5 - 0.3 * ((told["shares"] - best) ** 2).sum())
        width.append((high - low).max())
    assert inside >= 2 and np.mean(reached) > 0.49  # of 0.5; the corners have .25 to .45
    assert max(width) < 0.8  # and it says something


def test_without_an_effect_nothing_is_told_apart():
    at, seeds, _ = drawn(np.ones(3) / 3, [1, 2, 3], 0.0)
    found = shares.respond(at, seeds, np.random.default_rng(0).normal(0, 0.01, len(at)))
    assert all(high - low > 0.5 for low, high in zip(found["best"]["from"], found["best"]["to"], strict=True))


def test_the_noise_is_what_repeated_mixtures_say():
    at, seeds, values = drawn(np.array([0.2, 0.3, 0.5]), list(range(40)), 0.02)
    noise = shares.noise_of(at, seeds, shares.without_seeds(at, seeds, values))
    assert noise is not None and math.isclose(math.sqrt(noise), 0.02, rel_tol=0.15)
    once = seeds == 0
    assert shares.noise_of(at[once], seeds[once], values[once]) is None
    found = shares.respond(at[once], seeds[once], values[once])
    assert found["noise"] is None and min(each["high"] - each["low"] for each in found["tried"]) > 0.002


def test_the_next_mixture_has_the_highest_expected_improvement_and_was_not_tried():
    at, seeds, values = drawn(np.array([0.6, 0.3, 0.1]), [1, 2], 0.02)
    found = shares.respond(at, seeds, values)
    grid, tried = shares.lattice(3), np.unique(at, axis=0)
    settled = shares.without_seeds(at, seeds, values)
    told_at = shares.fit(at, settled, shares.noise_of(at, seeds, settled))
    over = told_at(tried).mean.max()
    rng, expected = np.random.default_rng(0), []
    surface = told_at(grid)
    for mean, sd in zip(surface.mean, surface.sd, strict=True):  # by drawing, not by the formula
        expected.append(np.maximum(rng.normal(mean, sd, 20_000) - over, 0).mean())
    new = ~(np.abs(grid[:, None] - tried).max(axis=2) < 1e-6).any(axis=1)
    chosen = np.abs(grid - found["next"]["shares"]).max(axis=1) < 1e-9
    assert chosen.sum() == 1 and new[chosen].all()
    assert math.isclose(found["next"]["gain"], np.array(expected)[chosen][0], rel_tol=0.1)
    assert np.array(expected)[chosen][0] >= 0.97 * np.array(expected)[new].max()


def test_what_a_seed_adds_is_taken_out_even_where_trials_are_missing():
    at, seeds, values = drawn(np.array([0.5, 0.5, 0.0]), [1, 2, 3], 0.0)
    there = np.arange(len(at)) % 7 != 2
    settled = shares.without_seeds(at[there], seeds[there], values[there])
    bowl = values - np.array([values[seeds == seed].mean() for seed in seeds])
    assert np.ptp(settled - bowl[there]) < 1e-9


def test_shares_become_whole_counts_and_lattices_are_the_compositions():
    rng = np.random.default_rng(0)
    for k, total in itertools.product((2, 3, 5), (1, 7, 1000)):
        point = rng.dirichlet(np.ones(k))
        counts = shares.whole(point, total)
        assert sum(counts) == total and max(abs(c - s * total) for c, s in zip(counts, point, strict=True)) < 1
        grid = shares.lattice(k)
        assert len(np.unique(grid, axis=0)) == len(grid) <= shares.MOST and np.allclose(grid.sum(axis=1), 1)
    assert len(shares.lattice(3)) == math.comb(22, 2) and len(shares.equal_parts(3)) == 7


def test_points_become_arms_whose_counts_differ(tmp_path):
    found = arms.parse(plan_of(tmp_path, 'base = "ablation_mix.toml"\n' + TABLE))
    names = [arm["shares"] for arm in found.arms]
    assert len(found.trials) == 14 and names[0] == "100% instruct" == found.options.reference
    last = found.trials[6].plan.tables["mix"]["sources"]
    assert names[6] == "33.3% instruct + 33.3% captions + 33.3% text"
    assert [last[name]["count"] for name in ("instruct", "captions", "text")] == [24, 23, 23]
    assert last["captions"]["path"] == found.trials[6].plan.place("emit")
    assert len({trial.keys["coresets"] for trial in found.trials}) == 2  # one a seed: what is aligned is shared


@pytest.mark.parametrize(
    "setting, word",
    [
        ("ablation.shares.points=[[1, 1, 0]]", "sum to 1"),
        ("ablation.shares.points=[[0.5, 0.5]]", "3 shares"),
        ("ablation.shares.points=[[1, 0, 0], [1.0, 0, 0]]", "twice"),
        ('ablation.shares.sources=["instruct", "txt"]', "did you mean 'text'"),
        ('ablation.shares.sources=["text"]', "two sources"),
        ("ablation.shares.total=0", "total >= 1"),
        ("mix.text_share=0.1", "leave out mix.text_share"),
        ("ablation.shares.goals=1", "did you mean 'goal'"),
    ],
)
def test_a_wrong_mixture_is_refused_in_words(tmp_path, setting, word):
    with pytest.raises(UsageError, match=word) as caught:
        arms.parse(plan_of(tmp_path, 'base = "ablation_mix.toml"\n' + TABLE, setting))
    assert "\n" not in str(caught.value)


def test_a_sweep_says_what_to_try_next(tmp_path, capsys):
    """Of trials that are done: their answers are a bowl, so nothing is trained."""
    plan = plan_of(
        tmp_path, 'base = "ablation_mix.toml"\n' + TABLE + "goal = {answer = 1, text_accuracy = 3, caption = 0}\n"
    )
    for trial in arms.parse(plan).trials:
        counts = [trial.plan.tables["mix"]["sources"][name]["count"] for name in ("instruct", "captions", "text")]
        value = 1 - 0.3 * ((np.array(counts) / 70 - (0.6, 0.3, 0.1)) ** 2).sum() + 0.01 * trial.seed
        measures = {"answer": value - 0.3, "text_accuracy": value + 0.1, "kept": 9}
        paths.make_dir(trial.plan.out)
        record = {"request": trial.request, "measures": measures}
        (Path(trial.plan.out) / trials.TRIAL).write_text(json.dumps(record))
    assert run.command(plan, Job(workers=1, quiet=True), "", dry_run=False, as_json=False, echo=print)
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / run.RESULT).read_text())
    [fitted] = found["mixtures"]
    assert fitted["arm"] == {"pool": "dirty", "recipe": "balanced"} and fitted["trials"] == 14
    assert sum(fitted["next"]["counts"]) == 70 and f"next to try: {fitted['next']['name']}" in told
    reached = [1 - 0.3 * ((np.array(each["shares"]) - (0.6, 0.3, 0.1)) ** 2).sum() for each in fitted["tried"]]
    assert np.allclose([each["seen"] for each in fitted["tried"]], np.array(reached) + 0.055, atol=1e-9)
    assert "Which mixture is best" in (tmp_path / "out" / "report.html").read_text()
    [typed] = re.findall(r"--set '(.+)'$", told, re.MULTILINE)
    again = arms.parse(plan_of(tmp_path, (tmp_path / "plan.toml").read_text(), typed)).trials
    assert sum(trial.finished() is not None for trial in again) == 14  # what is done stays done
    assert {trial.arm["shares"] for trial in again if trial.finished() is None} == {fitted["next"]["name"]}


def test_a_mix_that_is_short_of_an_arms_count_is_refused(tmp_path):
    trial = arms.parse(plan_of(tmp_path, 'base = "ablation_mix.toml"\n' + TABLE)).trials[0]
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
    (tmp_path / "few.json").write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(3)]))
    mix.mix({"sources": {"text": {"path": str(tmp_path / "few.json"), "count": 5}}}, trial.plan.place("mix"), Job())
    with pytest.raises(ShardError, match="text has 3 records, 2 fewer than this arm asks for"):
        trials.refuse_short(trial.plan)


def test_the_noise_is_that_of_trials_where_seeds_share_no_mixture():
    rng = np.random.default_rng(0)
    points = np.array([[0.1, 0.9], [0.2, 0.8], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [0.3, 0.7], [0.4, 0.6]])
    seeds = [0, 0, 1, 1, 2, 2, 3, 3]
    noises = []
    for _ in range(400):
        settled = shares.without_seeds(points, seeds, rng.normal(size=8) + np.array([0, 3, 7, 20])[seeds])
        noises.append(shares.noise_of(points, seeds, settled))
    assert abs(np.mean(noises) - 1) < 0.2
