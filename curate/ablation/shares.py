"""A mixture of sources: its arms, and a smooth response over the shares that says which is best and what to try next.

    [ablation]
    compare = "shares"
    [ablation.shares]
    sources = ["instruct", "captions", "text"]   # of [mix.sources]; the arms differ in their counts
    total = 1200                                 # records of each mix
    points = [[1, 0, 0], [0.5, 0.5, 0]]          # shares, in the sources' order; without: all mixtures of equal parts
    goal = {caption = 1, answer = 1}             # measures and their weights, below 0 where lower is better

The goal is the weighted mean of measures. What a seed adds to all its arms is taken out; then a Gaussian process is
fitted to the trials: a smooth function of the shares, its amplitude and length scale fitted by maximum likelihood
(scikit-learn), the trials' noise estimated from mixtures under several seeds. Its mean and 95 % interval are given for
every mixture on a lattice. Functions drawn from it say within which shares the best mixture lies, and the next to try
is the untried mixture of the highest expected improvement over the best that was tried (Jones, Schonlau, Welch 1998).

Shapes: k sources, p mixtures [p, k] whose rows sum to 1, n trials.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curate.errors import UsageError, unknown

AXIS = "shares"
PARTS = (20, 10, 8, 5, 4, 2)  # steps from 0 to 1 of a lattice: the first with at most MOST mixtures
MOST, DRAWN, ALONG = 1001, 1000, 21
REACH = 1.959964  # standard deviations of a 95 % interval
FEWEST = 3  # mixtures below which nothing is fitted


@dataclass(frozen=True)
class Shares:
    """The table `[ablation.shares]`."""

    sources: list[str]
    total: int
    points: list[list[float]] = field(default_factory=list)
    goal: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Surface:
    """A fitted response on p mixtures. mean: f64 [p]; cov: f64 [p, p], of the response itself, without the noise."""

    mean: np.ndarray
    cov: np.ndarray

    @property
    def sd(self) -> np.ndarray:
        """Return standard deviations, f64 [p]."""
        return np.sqrt(np.maximum(np.diag(self.cov), 1e-18))


def values(shares: Shares, mix: Any) -> dict[str, Any]:
    """Write the mixtures as values of an axis: a name, and the counts to lay over `[mix]`. Raises: UsageError."""
    known = mix.get("sources", {}) if isinstance(mix, dict) else {}
    for name in shares.sources:
        if name not in known:
            raise unknown("source of ablation.shares", name, known)
    if len(set(shares.sources)) < len(shares.sources) or len(shares.sources) < 2 or shares.total < 1:
        given = f"sources={shares.sources} and total={shares.total}"
        raise UsageError(f"[ablation.shares] has {given}; expected two sources or more, each once, and total >= 1.")
    for key in ("text_share", "total"):
        if mix.get(key) is not None:
            raise UsageError(f"mix.{key} and ablation.shares both set the amount.", f"leave out mix.{key}")
    found: dict[str, Any] = {}
    for point in shares.points or equal_parts(len(shares.sources)):
        if len(point) != len(shares.sources) or min(point) < 0 or abs(sum(point) - 1) > 1e-6:
            expected = f"{len(shares.sources)} shares from 0 to 1 that sum to 1"
            raise UsageError(f"ablation.shares.points has {point}; expected {expected}.")
        counts = dict(zip(shares.sources, whole(point, shares.total), strict=True))
        name = label(shares.sources, point)
        if name in found:
            raise UsageError(f"ablation.shares.points has {name} twice.")
        found[name] = {"mix": {"sources": {source: {"count": count} for source, count in counts.items()}}}
    return found


def equal_parts(k: int) -> list[list[float]]:
    """List the mixtures of 1, 2, … and k sources in equal parts: the simplex-centroid design."""
    chosen = (each for size in range(1, k + 1) for each in itertools.combinations(range(k), size))
    return [[1 / len(each) if place in each else 0.0 for place in range(k)] for each in chosen]


def whole(point: Sequence[float], total: int) -> list[int]:
    """Turn shares into counts that sum to the total, by the largest remainders."""
    exact = [share * total for share in point]
    counts = [math.floor(each + 1e-9) for each in exact]
    order = sorted(range(len(point)), key=lambda place: counts[place] - exact[place])
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


def label(sources: Sequence[str], point: Sequence[float]) -> str:
    """Name a mixture: `60% instruct + 40% text`."""
    parts = (f"{100 * share:.3g}% {name}" for name, share in zip(sources, point, strict=True) if share > 0)
    return " + ".join(parts)


def lattice(k: int) -> np.ndarray:
    """List the mixtures of k sources at equal steps, f64 [p, k]."""
    parts = next((parts for parts in PARTS if math.comb(parts + k - 1, k - 1) <= MOST), PARTS[-1])
    bars = itertools.combinations(range(parts + k - 1), k - 1)  # stars and bars
    cuts = np.array([(-1, *each, parts + k - 1) for each in bars])
    return np.asarray((np.diff(cuts, axis=1) - 1) / parts)


def noise_of(points_nk: np.ndarray, seeds: Sequence[int], settled_n: np.ndarray) -> float | None:
    """Estimate the variance of trials of one mixture, without what seeds add; None where no mixture repeats."""
    design, arm = _design(points_nk, seeds)
    free = len(settled_n) - int(np.linalg.matrix_rank(design))  # seeds that share no mixture cannot be compared
    if free < 1:
        return None
    means = np.bincount(arm, settled_n) / np.bincount(arm)
    return float(((settled_n - means[arm]) ** 2).sum() / free)


def _design(points_nk: np.ndarray, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Write each trial as its mixture and its seed, f64 [n, mixtures + seeds], and number the mixtures, i64 [n]."""
    arm = np.unique(points_nk, axis=0, return_inverse=True)[1].ravel()
    seed = np.unique(seeds, return_inverse=True)[1]
    return np.hstack([np.eye(arm.max() + 1)[arm], np.eye(seed.max() + 1)[seed]]), arm


def fit(points_nk: np.ndarray, values_n: np.ndarray, noise: float | None) -> Callable[[np.ndarray], Surface]:
    """Fit a Gaussian process to values, f64 [n], of mixtures. Returns a function that predicts at others, f64 [p, k].

    noise: the variance of one trial's noise; None: fitted as well, at least a hundredth of the values' variance.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    centre, scale = float(values_n.mean()), float(values_n.std()) or 1.0
    y = (values_n - centre) / scale
    kernel = ConstantKernel(1.0, (0.05, 20.0)) * RBF(0.5, (0.25, 3.0))  # length: the simplex is 1.4 across
    known = 1e-10 if noise is None else max(noise / scale**2, 1e-6)
    if noise is None:
        kernel += WhiteKernel(0.1, (1e-2, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bound that is reached is an answer, too
        learnt = GaussianProcessRegressor(kernel, alpha=known, n_restarts_optimizer=3, random_state=0).fit(points_nk, y)
    smooth = learnt.kernel_ if noise is not None else learnt.kernel_.k1
    known = known if noise is not None else learnt.kernel_.k2.noise_level
    plain = GaussianProcessRegressor(smooth, alpha=known, optimizer=None).fit(points_nk, y)

    def told_at(at_pk: np.ndarray) -> Surface:
        mean, cov = plain.predict(at_pk, return_cov=True)
        return Surface(centre + scale * mean, scale**2 * cov)

    return told_at


def improvement(surface: Surface, over: float) -> np.ndarray:
    """Compute the expected improvement over a value at each mixture, f64 [p]."""
    from scipy.stats import norm

    z = (surface.mean - over) / surface.sd
    return np.asarray(surface.sd * (z * norm.cdf(z) + norm.pdf(z)))


def without_seeds(points_nk: np.ndarray, seeds: Sequence[int], values_n: np.ndarray) -> np.ndarray:
    """Take out what a seed adds to all its trials: least squares on a mean for each mixture and each seed, f64 [n]."""
    design, arm = _design(points_nk, seeds)
    of_seeds = slice(arm.max() + 1, None)
    effects = np.linalg.lstsq(design, values_n, rcond=None)[0][of_seeds]
    return np.asarray(values_n - design[:, of_seeds] @ (effects - effects.mean()))


def respond(points_nk: np.ndarray, seeds: Sequence[int], values_n: np.ndarray) -> dict[str, Any] | None:
    """Fit the response and evaluate it: at what was tried, at the best, at the next to try, and along each share.

    Returns None for fewer mixtures than FEWEST. Everything in it is plain numbers, shares in the sources' order.
    """
    tried = np.unique(points_nk, axis=0)
    if len(tried) < FEWEST:
        return None
    settled = without_seeds(points_nk, seeds, values_n)
    grid = lattice(points_nk.shape[1])
    noise = noise_of(points_nk, seeds, settled)
    told_at = fit(points_nk, settled, noise)
    surface = told_at(np.vstack([grid, tried]))
    best = int(surface.mean[: len(grid)].argmax())
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal(
        surface.mean[: len(grid)], surface.cov[: len(grid), : len(grid)], DRAWN, check_valid="ignore", method="eigh"
    )
    low, high = np.quantile(grid[drawn.argmax(axis=1)], ((1 - 0.95) / 2, (1 + 0.95) / 2), axis=0)
    known = (np.abs(grid[:, None] - tried).max(axis=2) < 1e-6).any(axis=1)
    gains = np.where(known, -1.0, improvement(surface, surface.mean[len(grid) :].max())[: len(grid)])
    following = int(gains.argmax())
    told = [_told(surface, place) for place in range(len(surface.mean))]
    same = [np.abs(points_nk - point).max(axis=1) < 1e-9 for point in tried]
    return {
        "noise": None if noise is None else math.sqrt(noise),
        "tried": [
            {"shares": point.tolist(), "n": int(own.sum()), "seen": float(settled[own].mean()), **told[len(grid) + i]}
            for i, (point, own) in enumerate(zip(tried, same, strict=True))
        ],
        "best": {"shares": grid[best].tolist(), **told[best], "from": low.tolist(), "to": high.tolist()},
        "next": {"shares": grid[following].tolist(), **told[following], "gain": float(gains[following])},
        "along": [_curve(told_at, grid[best], source) for source in range(grid.shape[1])],
    }


def _curve(told_at: Callable[[np.ndarray], Surface], best_k: np.ndarray, source: int) -> dict[str, Any]:
    line = along(best_k, source)
    surface = told_at(line)
    return {"shares": line[:, source].tolist(), "values": [_told(surface, place) for place in range(ALONG)]}


def along(best_k: np.ndarray, source: int) -> np.ndarray:
    """List the mixtures in which one source's share goes from 0 to 1, the others as in the best, f64 [ALONG, k]."""
    others = best_k.copy()
    others[source] = 0
    if not others.sum():
        others = np.ones(len(best_k))
        others[source] = 0
    share = np.linspace(0, 1, ALONG)[:, None]
    return np.asarray((1 - share) * others / others.sum() + share * np.eye(len(best_k))[source])


def _told(surface: Surface, place: int) -> dict[str, float]:
    mean, reach = float(surface.mean[place]), REACH * float(surface.sd[place])
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def responses(
    trials: Sequence[Mapping[str, Any]], shares: Shares, axis: Mapping[str, Any], goal: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Fit the response for each combination of the other axes, in the form that curate/README.md describes.

    axis: the values of the axis `shares`, as `values` made them. goal: measures and weights.
    """
    points = {
        name: [tables["mix"]["sources"][source]["count"] / shares.total for source in shares.sources]
        for name, tables in axis.items()
    }
    names, of_all = {tuple(point): name for name, point in points.items()}, sum(map(abs, goal.values()))
    groups: dict[tuple[tuple[str, str], ...], list[tuple[list[float], int, float]]] = {}
    for trial in trials:
        if set(goal) <= set(trial["measures"]):
            value = sum(weight * trial["measures"][name] for name, weight in goal.items())
            rest = tuple((name, arm) for name, arm in trial["arm"].items() if name != AXIS)
            groups.setdefault(rest, []).append((points[trial["arm"][AXIS]], trial["seed"], value / of_all))
    found = []
    for rest, own in groups.items():
        at, seeds, reached = zip(*own, strict=True)
        told = respond(np.array(at), seeds, np.array(reached))
        if told:
            for each in (*told["tried"], told["best"], told["next"]):
                each["name"] = names.get(tuple(each["shares"])) or label(shares.sources, each["shares"])
            told["next"]["counts"] = whole(told["next"]["shares"], shares.total)
            about = {"arm": dict(rest), "sources": shares.sources, "total": shares.total, "goal": dict(goal)}
            found.append({**about, "trials": len(own), **told})
    return found


def lines(result: Mapping[str, Any], shares: Shares) -> Iterator[str]:
    """Yield the closing lines of a sweep: what was tried and its fit, the best mixture, the next to try."""
    if not result["mixtures"]:
        asked = f"{FEWEST} mixtures that have the goal's measures"
        yield f"\nno response is fitted: it needs {asked}; measured: {', '.join(result['measures']) or 'nothing'}"
    for each in result["mixtures"]:
        rest = "".join(f", {axis} {value}" for axis, value in each["arm"].items())
        goal = " + ".join(f"{weight:g} {name}" for name, weight in each["goal"].items())
        yield f"\nmixtures of {each['total']:,} records{rest}; goal: the weighted mean of {goal}"
        width = max(len(tried["name"]) for tried in each["tried"])
        yield f"  {'':<{width}}    seen     fit  95 % interval      n"
        for tried in each["tried"]:
            told = f"{tried['seen']:6.3f}  {tried['mean']:6.3f}  {_interval(tried)}  {tried['n']:>5}"
            yield f"  {tried['name']:<{width}}  {told}"
        if each["noise"] is None:
            yield "  no mixture was trained with two seeds: the noise is a guess, and so are the intervals; add seeds"
        best, following = each["best"], each["next"]
        spans = zip(each["sources"], best["from"], best["to"], strict=True)
        likely = ", ".join(f"{name} {100 * low:.0f}–{100 * high:.0f} %" for name, low, high in spans)
        yield f"  best by the fit: {best['name']}: {best['mean']:.3f} {_interval(best)}"
        yield f"  the best mixture lies, 95 of 100 times, within {likely}"
        gain = f"{following['gain']:.4f} expected above the best tried"
        # All of them, since points that are given replace the default ones.
        points = [*(shares.points or equal_parts(len(shares.sources))), following["shares"]]
        typed = ", ".join(f"[{', '.join(f'{share:.12g}' for share in point)}]" for point in points)
        yield f"  next to try: {following['name']} ({gain}): --set 'ablation.shares.points=[{typed}]'"


def _interval(told: Mapping[str, float]) -> str:
    return f"[{told['low']:.3f}, {told['high']:.3f}]"
