"""Named selections: each a list of steps, with the source of every number.

`bunny` is the chain that made Bunny's two million (arXiv:2402.11530; BAAI-DCAI/Dataset-Pruning, LAION/README.md and
dedup.py). `balanced` is ours: it reads its numbers off the pool. The others are published variants.
"""

from collections.abc import Callable
from dataclasses import dataclass

from curate.errors import UsageError, unknown

DEFAULT = "balanced"
DEFAULT_BUDGET = "30%"


@dataclass(frozen=True)
class Recipe:
    """A selection by name. steps: from the budget, as it is written (empty: all that is left)."""

    about: str
    steps: Callable[[str], list[str]]


def _then_sample(*steps: str) -> Callable[[str], list[str]]:
    return lambda n: [*steps, *([f"sample({n})"] if n else [])]


def _balanced(n: str) -> list[str]:
    n = n or f'"{DEFAULT_BUDGET}"'
    return ['dedup("auto")', f"mismatch(budget={n})", f"balance(cluster, {n})"]


def _bunny(clip: str = "0.40, 0.60", centroid: str = "0.15, 0.35", keep: str = "middle") -> Callable[[str], list[str]]:
    return _then_sample(
        f'dedup(0.86, keep="{keep}", rule="components")',
        f"rank(clip_score, {clip})",
        f"rank(centroid_similarity, {centroid})",
    )


RECIPES = {
    "balanced": Recipe(
        "threshold and mismatch share read off the pool, then evenly over image clusters; 30 % of the pool if not told",
        _balanced,
    ),
    "bunny": Recipe("Bunny: one of each component at 0.86, clip rank 40-60 %, centroid rank 15-35 %, sample", _bunny()),
    "bunny-auto": Recipe(
        "Bunny's chain with the near-duplicate threshold read off the pool: 0.86 was chosen for ViT-L/14",
        _then_sample(
            'dedup("auto", keep="middle", rule="components")',
            "rank(clip_score, 0.40, 0.60)",
            "rank(centroid_similarity, 0.15, 0.35)",
        ),
    ),
    "bunny-20-40": Recipe(
        "the released variant with centroid rank 20-40 % (DataComp-medium 37.0 IN / 37.2 avg against 36.8 / 38.5)",
        _bunny(centroid="0.20, 0.40"),
    ),
    "bunny-far": Recipe(
        "Bunny, keeping the member farthest from the centroid (CLIPA-B/16 66.30 at 50 %)", _bunny(keep="far")
    ),
    "bunny-inner-middle": Recipe(
        "Bunny, keeping the member of median distance to its component's own mean (CLIPA-B/16 66.31 at 46.4 %)",
        _bunny(keep="inner-middle"),
    ),
    "clip-15-55": Recipe(
        "SemDeDup at the 50 % setting (0.945 on ViT-L/14), clip rank 15-55 % (OpenCLIP-B/32 61.26)",
        _then_sample('dedup(0.945, keep="far", rule="semdedup")', "rank(clip_score, 0.15, 0.55)"),
    ),
    "clip-30-50": Recipe(
        "SemDeDup at the 50 % setting, clip rank 30-50 % (OpenCLIP-B/32 59.70)",
        _then_sample('dedup(0.945, keep="far", rule="semdedup")', "rank(clip_score, 0.30, 0.50)"),
    ),
    "semdedup": Recipe(
        "SemDeDup at the 50 % setting: of near rows the least typical stays (arXiv:2303.09540)",
        _then_sample('dedup(0.945, keep="far", rule="semdedup")'),
    ),
    "datacomp-clip": Recipe(
        "DataComp: the 30 % with the highest clip_score (arXiv:2304.14108)", _then_sample("rank(clip_score, 0, 0.30)")
    ),
    "laion": Recipe(
        "LAION-2B: clip_score above 0.28, meant for ViT-B/32 (arXiv:2210.08402)",
        _then_sample("above(clip_score, 0.28)"),
    ),
    "random": Recipe("a random sample, the one to beat", lambda n: [f"sample({n or repr(DEFAULT_BUDGET)})"]),
}


def steps(name: str, n: int | float | str = "") -> list[str]:
    """Write a recipe's steps for a budget of n rows, or a share of the pool's good rows; empty: the recipe's own.

    Raises: UsageError for an unknown recipe or a budget that is none.
    """
    from curate.calls import parse_count

    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    if n == "" or n == 0:
        return RECIPES[name].steps("")
    try:
        budget = parse_count(n, "n")
    except UsageError as error:
        raise UsageError(error.message, "--n 20000, or --n 2%") from None
    share = isinstance(budget, float)
    return RECIPES[name].steps(f'"{n}"' if share and isinstance(n, str) else str(n if share else budget))
