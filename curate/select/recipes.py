"""Named selections: each a list of steps, with the source of every number (pipelines/README.md has them in a table).

`bunny` is the chain that made Bunny's two million (arXiv:2402.11530; BAAI-DCAI/Dataset-Pruning, LAION/README.md and
dedup.py). `balanced` is ours: it derives its numbers from the pool. The others are published rules and variants. A
recipe may take arguments, like a call: `datacomp-image("emb/imagenet")`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from curate.errors import UsageError, unknown
from curate.select import syntax
from curate.select.frame import POOL, Directory, File
from curate.select.steps import phrases

DEFAULT = "balanced"
DEFAULT_BUDGET = "30%"
BEST = "30%"  # of the pool, by clip_score, are balanced: what DataComp's filter keeps (pipelines/LOG.md has the trials)


@dataclass(frozen=True)
class Recipe:
    """A named selection. steps: makes its steps from the budget as written (empty: all that is left) and arguments."""

    about: str
    steps: Callable[..., list[str]]

    def signature(self, name: str) -> str:
        """Write how the recipe is called."""
        plain = name.replace("-", "_")
        return syntax.signature(plain, {plain: self.steps}, 1).replace(plain, name, 1).removesuffix("()")


def _then_sample(*steps: str) -> Callable[[str], list[str]]:
    return lambda n: [*steps, *_sample(n)]


def _sample(n: str) -> list[str]:
    return [f"sample({n})"] if n else []


def _balanced(n: str) -> list[str]:
    n = n or f'"{DEFAULT_BUDGET}"'
    return [
        "placeholders(3, unrelated=True)",
        f'dedup("auto", budget={n})',
        f"mismatch(budget={n})",
        f'balance(cluster, {n}, keep="better:clip_score", contradicting_last=True, among="{BEST}")',
    ]


def _bunny(centroid: str = "0.15, 0.35", keep: str = "middle") -> Callable[[str], list[str]]:
    return _then_sample(
        f'dedup(0.86, keep="{keep}", rule="components")',
        "rank(clip_score, 0.40, 0.60)",
        f"rank(centroid_similarity, {centroid})",
    )


SEMDEDUP = 'dedup(0.945, keep="far", rule="semdedup")'
DATACOMP_BASIC = (
    "above(caption_words, 2)",
    "above(caption_chars, 5)",
    "at_least(min_side, 200)",
    "at_most(aspect_ratio, 3)",
)
DATACOMP_CAPTION = (
    "above(caption_words, 1)",
    "above(caption_chars, 5)",
)  # what its image-based filter asks of a caption


def _datacomp_image(n: str, target: Directory) -> list[str]:
    return [*DATACOMP_CAPTION, f"image_based({target!r})", *_sample(n)]


def _datacomp_best(n: str, target: Directory) -> list[str]:
    return ["rank(clip_score, 0, 0.30)", *_datacomp_image(n, target)]


def _llava_cc3m(n: str, extractor: str = phrases.DEFAULT) -> list[str]:
    return [f"noun_phrases(min=3, cap=100, extractor={extractor!r})", *_sample(n)]


def _metaclip(n: str, entries: File = POOL, t: int = 20_000) -> list[str]:
    return [f"metaclip(t={t}, entries={entries!r})", *_sample(n)]


def _concepts(n: str, vocabulary: File = POOL) -> list[str]:
    n = n or f'"{DEFAULT_BUDGET}"'
    return [f'dedup("auto", budget={n})', f"mismatch(budget={n})", f"concepts({vocabulary!r}, {n})"]


def _neg_clip_loss_norm_sim(n: str, target: Directory) -> list[str]:
    return ["rank(neg_clip_loss, 0, 0.30)", f"rank(norm_sim({target!r}), 0, 0.6667)", *_sample(n)]


RECIPES = {
    "balanced": Recipe(
        "threshold and mismatch share read off the pool, then evenly over image clusters among the best 30 %, better "
        "scores first, clusters of printed words last; 30 % of the pool by default",
        _balanced,
    ),
    "bunny": Recipe("Bunny: one of each component at 0.86, clip rank 40-60 %, centroid rank 15-35 %, sample", _bunny()),
    "bunny-auto": Recipe(
        "Bunny's chain with the near-duplicate threshold read off the pool: 0.86 was chosen for ViT-L/14",
        _then_sample(
            'dedup("auto", keep="middle", rule="components", templates=True)',
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
        _then_sample(SEMDEDUP, "rank(clip_score, 0.15, 0.55)"),
    ),
    "clip-30-50": Recipe(
        "SemDeDup at the 50 % setting, clip rank 30-50 % (OpenCLIP-B/32 59.70)",
        _then_sample(SEMDEDUP, "rank(clip_score, 0.30, 0.50)"),
    ),
    "semdedup": Recipe(
        "SemDeDup at the 50 % setting: of near-duplicates the least typical stays (arXiv:2303.09540)",
        _then_sample(SEMDEDUP),
    ),
    "datacomp-clip": Recipe(
        "DataComp: the 30 % with the highest clip_score (arXiv:2304.14108)", _then_sample("rank(clip_score, 0, 0.30)")
    ),
    "datacomp-basic": Recipe(
        "DataComp's basic filter without its test for English: captions of 3 words and 6 characters, 200 px, 3 to 1",
        _then_sample(*DATACOMP_BASIC),
    ),
    "datacomp-image": Recipe(
        "DataComp's image-based filter: clusters that are nearest to at least one image of a target set",
        _datacomp_image,
    ),
    "datacomp-best": Recipe(
        "DataComp-1B's: the image-based filter within the 30 % with the highest clip_score", _datacomp_best
    ),
    "laion": Recipe(
        "LAION-2B: clip_score of 0.28 or more, meant for ViT-B/32 (arXiv:2210.08402)",
        _then_sample("at_least(clip_score, 0.28)"),
    ),
    "llava-cc3m": Recipe(
        "LLaVA's rule for CC3M-595K: of each noun phrase with 3 captions or more at most 100 (arXiv:2304.08485)",
        _llava_cc3m,
    ),
    "metaclip": Recipe(
        "MetaCLIP's balancing: captions drawn by the entries they contain, t = 20,000 (arXiv:2309.16671)", _metaclip
    ),
    "concepts": Recipe(
        "threshold and mismatch share read off the pool, then evenly over the concepts that pictures show, best scores "
        "first; 30 % of the pool by default",
        _concepts,
    ),
    "neg-clip-loss": Recipe(
        "the 30 % with the highest negCLIPLoss (arXiv:2405.19547)", _then_sample("rank(neg_clip_loss, 0, 0.30)")
    ),
    "neg-clip-loss-norm-sim": Recipe(
        "of the 30 % highest in negCLIPLoss the two thirds nearest to a target set (NormSim): a fifth of the pool",
        _neg_clip_loss_norm_sim,
    ),
    "hierarchical": Recipe(
        "evenly over clusters of clusters (arXiv:2405.15613)", lambda n: [f"balance_tree({n or repr(DEFAULT_BUDGET)})"]
    ),
    "coincide": Recipe(
        "COINCIDE on stored embeddings, 20 % by default (arXiv:2406.10995)",
        lambda n: [f"coincide({n or repr('20%')})"],
    ),
    "typical": Recipe(
        "PreSel's choice within clusters: the most typical, 15 % by default (arXiv:2503.07591)",
        lambda n: [f"typical({n or repr('15%')})"],
    ),
    "prism": Recipe(
        "PRISM: the least redundant, 30 % by default; for instruction data (arXiv:2502.12119)",
        lambda n: [f"bottom(redundancy, {n or repr('30%')})"],
    ),
    "random": Recipe("a random sample, the baseline", lambda n: [f"sample({n or repr(DEFAULT_BUDGET)})"]),
}


def steps(text: str, n: int | float | str = "") -> list[str]:
    """Write a recipe's steps for a budget of n rows, or a share of the pool's good rows; empty: the recipe's own.

    text: its name, with arguments if it takes any. Raises: UsageError for an unknown recipe, arguments that it does not
    take, or something that is not a budget.
    """
    named = re.fullmatch(r"\s*([\w.-]+)\s*(\(.*\))?\s*", text, re.DOTALL)
    name = named[1] if named else text
    if named is None or name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    plain = name.replace("-", "_")
    like = 'datacomp-image("emb/target")'
    try:
        _, given = syntax.read(plain + (named[2] or "()"), {plain: RECIPES[name].steps}, "recipe", like, 1)
    except UsageError as error:
        raise UsageError(error.message.replace(plain, name), error.hint) from None
    if n == "":
        return RECIPES[name].steps("", **given)
    try:
        budget = syntax.parse_count(n, "n")
    except UsageError as error:
        raise UsageError(error.message, "--n 20000, or --n 2%") from None
    share = isinstance(budget, float)
    return RECIPES[name].steps(f'"{n}"' if share and isinstance(n, str) else str(n if share else budget), **given)
