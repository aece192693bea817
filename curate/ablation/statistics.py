"""What paired trials say: each arm's mean and spread, differences to the reference, and whether a bar is met.

A trial is a dict: `arm` (axis -> value), `seed`, `measures` (name -> number). Trials of two arms are paired by seed, so
that what a seed's pool, tests and first weights have in common drops out. Numbers in, dicts and lines of text out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Arm = Mapping[str, str]
Trials = Sequence[Mapping[str, Any]]
LEVEL = 0.95  # of the intervals


def summarise(
    trials: Trials, arms: Sequence[Arm], compare: str, reference: str, measures: Sequence[str]
) -> list[dict[str, Any]]:
    """Sum up each measure of each arm, and its difference to the arm with `reference` on the axis `compare`.

    Returns entries in the order of arms and measures; a measure that no trial of an arm has is left out.
    """
    entries = []
    for arm in arms:
        base = {**arm, compare: reference}
        for measure in measures:
            values = by_seed(trials, arm, measure)
            if values:
                other = None if arm[compare] == reference else by_seed(trials, base, measure)
                difference = None if other is None else {"to": reference, **paired(values, other)}
                entries.append(
                    {"arm": dict(arm), "measure": measure, **spread(list(values.values())), "difference": difference}
                )
    return entries


def judge(trials: Trials, bars: Sequence[Mapping[str, Any]], compare: str) -> list[dict[str, Any]]:
    """Judge each bar: is the mean difference greater than `by`, with one-sided p below `alpha`?

    A bar: claim, where (values of the other axes), better and than (values of `compare`), measure, by, alpha.
    """
    judged = []
    for bar in bars:
        better, than = ({**bar["where"], compare: bar[side]} for side in ("better", "than"))
        difference = paired(by_seed(trials, better, bar["measure"]), by_seed(trials, than, bar["measure"]), bar["by"])
        one_sided = difference.pop("exceeds")
        met = one_sided is not None and one_sided < bar["alpha"]
        judged.append({**bar, **difference, "p": one_sided, "met": met})
    return judged


def by_seed(trials: Trials, arm: Arm, measure: str) -> dict[int, float]:
    """Return seed -> value of the trials of an arm that have the measure."""
    return {
        int(trial["seed"]): float(trial["measures"][measure])
        for trial in trials
        if dict(trial["arm"]) == dict(arm) and measure in trial["measures"]
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return n, mean and sample standard deviation (None below two values)."""
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return {"n": n, "mean": mean, "sd": sd}


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], by: float = 0.0) -> dict[str, Any]:
    """Compare two arms over the seeds that both have, by Student's t on the differences.

    Returns n, mean, sd, t and two-sided p against zero, the interval `low` to `high`, and `exceeds`: the one-sided p
    that the mean difference is greater than `by`. What cannot be computed from fewer than two pairs, or from equal
    differences, is None; `exceeds` of equal differences is 0 or 1.
    """
    from scipy import stats

    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return {"n": 0, **dict.fromkeys(("mean", "sd", "t", "p", "low", "high", "exceeds"))}
    differences = spread([ours[seed] - theirs[seed] for seed in seeds])
    n, mean, sd = differences["n"], differences["mean"], differences["sd"]
    if sd is None:
        return {**differences, **dict.fromkeys(("t", "p", "low", "high", "exceeds"))}
    if sd <= 1e-12:
        return {**differences, "t": None, "p": None, "low": mean, "high": mean, "exceeds": 0.0 if mean > by else 1.0}
    error = sd / math.sqrt(n)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    t = mean / error
    return {
        **differences,
        "t": t,
        "p": float(2 * stats.t.sf(abs(t), n - 1)),
        "low": mean - reach,
        "high": mean + reach,
        "exceeds": float(stats.t.sf((mean - by) / error, n - 1)),
    }


def table(result: Mapping[str, Any], lead: str, measures: Sequence[str]) -> Iterator[str]:
    """Lay the summary out for the terminal: a block per combination of the other axes, a line per arm.

    lead: the measure shown with its spread and its difference to the reference; of the others the mean alone.
    """
    compare = str(result["compare"])
    entries = {(tuple(entry["arm"].items()), entry["measure"]): entry for entry in result["summary"]}
    blocks: dict[tuple[tuple[str, str], ...], list[tuple[tuple[str, str], ...]]] = {}
    for arm in dict.fromkeys(arm for arm, _ in entries):
        blocks.setdefault(tuple(pair for pair in arm if pair[0] != compare), []).append(arm)
    shown = [name for name in measures if name != lead and any(measure == name for _, measure in entries)]
    width = max([len(dict(arm)[compare]) for arm, _ in entries], default=0) + 2
    for rest, arms in blocks.items():
        yield ""
        yield " · ".join(f"{axis} {value}" for axis, value in rest) or str(result["name"])
        held = any(_held(entries.get((arm, lead))) for arm in arms)
        heads = f"{'on other records':>20}" if held else ""
        heads += "".join(f"  {name:>7}" for name in shown)
        yield f"  {compare:<{width}}{lead:>16}{'d to ' + str(result['reference']):>28}{'n':>4}{heads}"
        for arm in arms:
            entry = entries.get((arm, lead))
            leading = _lead(entry) if entry else f"{'':48}"
            leading += f"{_held(entry):>20}" if held else ""
            others = "".join(f"  {_mean(entries.get((arm, name))):>{max(7, len(name))}}" for name in shown)
            yield f"  {dict(arm)[compare]:<{width}}{leading}{others}"
    yield from _bars(result)


def _lead(entry: Mapping[str, Any]) -> str:
    mean = f"{entry['mean']:.3f}" + (f" ±{entry['sd']:.3f}" if entry["sd"] is not None else "")
    difference = entry["difference"]
    if difference is None or difference["mean"] is None:
        return f"{mean:>16}{'':28}{entry['n']:>4}"
    text = f"{difference['mean']:+.3f}"
    if difference["low"] is not None:
        text += f" [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return f"{mean:>16}{text:>28}{difference['n']:>4}"


def _held(entry: Mapping[str, Any] | None) -> str:
    told = ((entry or {}).get("difference") or {}).get("records")
    return f"[{told['low']:+.3f}, {told['high']:+.3f}]" if told else ""


def _mean(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['mean']:,.0f}" if entry["mean"] >= 100 else f"{entry['mean']:.3f}".removesuffix(".000")


def _bars(result: Mapping[str, Any]) -> Iterator[str]:
    if result["bars"]:
        yield ""
    for bar in result["bars"]:
        facts = "no pairs" if bar["mean"] is None else f"d {bar['mean']:+.3f}, n {bar['n']}"
        facts += f", p {bar['p']:.4f}" if bar["p"] is not None else ""
        yield f"  {'met    ' if bar['met'] else 'NOT MET'}  {bar['claim']} ({facts})"
