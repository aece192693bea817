"""What `curate steps` prints: every step, column and recipe of `curate select`, how to write it, a line about it."""

from collections.abc import Iterable, Iterator


def step_lines() -> Iterator[str]:
    """Yield the steps, columns and recipes of `curate select`, how to write each, and what it does or is."""
    import inspect

    from curate.select import catalogue, computed_columns, pool, recipes
    from curate.select.catalogue import STEPS

    def about(function: object) -> str:
        return (inspect.getdoc(function) or "").splitlines()[0]

    yield "steps, for --step:"
    yield from _aligned((catalogue.signature(name), about(step)) for name, step in STEPS.items())
    yield "columns of numbers, for rank, above, top and the like:"
    made = ((computed_columns.signature(name), about(column)) for name, column in computed_columns.COLUMNS.items())
    yield from _aligned([*pool.ABOUT.items(), *made])
    yield "columns of groups, for balance and cap:"
    yield f"  {', '.join((*pool.GROUPS, 'cluster'))}"
    yield "recipes, for --recipe, with --n for the number of rows:"
    yield from _aligned((recipe.signature(name), recipe.about) for name, recipe in recipes.RECIPES.items())


def _aligned(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield pairs as one line each, the second in an aligned column if the first is short enough."""
    pairs = list(lines)
    width = min(50, max(len(left) for left, _ in pairs))
    yield from (f"  {left:<{width}}  {right}" for left, right in pairs)
