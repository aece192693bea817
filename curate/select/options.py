"""What `curate select` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated

from curate.errors import UsageError


@dataclass(frozen=True)
class SelectOptions:
    """What is selected: by steps, or by a recipe for a budget of n rows (2000, 0.02 or "2%"); by default `balanced`."""

    steps: Annotated[tuple[str, ...], "A step, e.g. 'rank(clip_score, 0.4, 0.6)'; repeat in order.", "--step"] = ()
    recipe: Annotated[str, "A named list of steps [balanced]."] = ""
    n: Annotated[int | float | str, "How many rows the recipe keeps: 2000000, or a share such as 2%."] = ""
    seed: int = 0
    losses: Annotated[str, "RUN/losses, as the trainer writes it: gives steps the column `loss`."] = ""
    model: Annotated[str, "The model that made the embeddings, for steps with texts, if they do not name it."] = ""
    pretrained: Annotated[str, "Its tag, or a local checkpoint."] = ""

    def texts(self) -> list[str]:
        """Write out the steps. Raises: UsageError when steps and recipe, or steps and n, are both given."""
        from curate.select import recipes

        if not self.steps:
            return recipes.steps(self.recipe or recipes.DEFAULT, self.n)
        if self.recipe or self.n != "":
            other = f"the recipe {self.recipe!r}" if self.recipe else f"n={self.n}"
            raise UsageError(
                f"steps and {other} are both given.", "give only one; to set the size, end with a step `sample(n)`"
            )
        return [text.strip() for text in self.steps]
