"""The language of the demo's world: names, captions, questions about a picture, and tasks without one.

Everything is lower case, and punctuation stands apart from words, so that a word-level tokenizer gives back what it
was given. Randomness comes from the generator passed in.
"""

from __future__ import annotations

import numpy as np

NAMES = tuple(
    "rup kop zim vab dax fep gol hib juk lor mib nop paf quo rav sib tov urd wex yot "
    "bim caz dov ebo fid gak huz ilk jep kiv lum moz naf oxi pob ruk sev tig ulp vog "
    "wim yaz zor bef cug dob fip gev hox jaz kem lod mup nez pid rog suv tef vun wob".split()
)
GROUNDS = ("teal", "olive", "maroon", "navy", "grey", "brown", "plum", "sand")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "medium", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
VAGUE = ("image", "photo", "a picture", "an image", "a photo")
LEADS = ("a", "this is a", "there is a", "we see a", "an image of a", "a photo of a")
QUESTIONS = {
    "what": ("what is this ?", "what is in the image ?", "what do we see ?"),
    "size": ("how large is it ?", "what size is it ?"),
    "where": ("where is it ?", "in which part of the image is it ?"),
    "background": ("which background is it on ?", "what is behind it ?"),
    "caption": ("describe the image .", "what does the image show ?"),
}
TASKS = ("what", "size", "where", "background")
DAYS = tuple("monday tuesday wednesday thursday friday saturday sunday".split())
MONTHS = tuple("january february march april may june july august september october november december".split())
OPPOSITES = (
    "hot cold",
    "big little",
    "up down",
    "open shut",
    "wet dry",
    "fast slow",
    "old new",
    "hard soft",
    "full empty",
)
THINGS = tuple("tree house river stone bread water light road".split())
# The words of the chat templates that people train small models with, so that those templates work on it too.
CHAT = (
    "a chat between a curious user and an artificial intelligence assistant . the assistant gives helpful , detailed , "
    "and polite answers to the user ' s questions . user assistant human system question answer caption : ; ! - \" ( )"
)


def write_caption(
    name: int, size: int, place: int, ground: int, texture: int, rng: np.random.Generator, *, full: bool = False
) -> str:
    """Describe a scene: the name always; size, place and background with probability .5, .5, .4, or all if `full`."""
    has_size, has_place, has_ground = rng.random(3) < ((1, 1, 1) if full else (0.5, 0.5, 0.4))
    lead = LEADS[rng.integers(len(LEADS))]
    head = f"{lead} {SIZES[size]} {NAMES[name]}" if has_size else f"{lead} {NAMES[name]}"
    parts = [f" at the {PLACES[place]}"] if has_place else []
    parts += [f" on a {TEXTURES[texture]} {GROUNDS[ground]} background"] if has_ground else []
    if rng.random() < 0.3:
        parts.reverse()
    return head + "".join(parts)


def answer(task: str, name: int, size: int, place: int, ground: int, texture: int) -> str:
    """Return the true answer to a question of `task` (one of TASKS)."""
    answers = {
        "what": NAMES[name],
        "size": SIZES[size],
        "where": PLACES[place],
        "background": f"{TEXTURES[texture]} {GROUNDS[ground]}",
    }
    return answers[task]


def text_task(rng: np.random.Generator) -> tuple[str, str]:
    """Draw a question that needs no picture, and its answer: calendars, sums, opposites, reversing, counting."""
    kind = rng.integers(8)
    if kind < 2:
        names, unit = ((DAYS, "day"), (MONTHS, "month"))[kind]
        i, step = int(rng.integers(len(names))), int(rng.choice([-1, 1]))
        return f"which {unit} comes {'after' if step > 0 else 'before'} {names[i]} ?", names[(i + step) % len(names)]
    if kind < 4:
        a, b = sorted((int(n) for n in rng.integers(0, 11, 2)), reverse=True)
        return (f"what is {a} plus {b} ?", str(a + b)) if kind == 2 else (f"what is {a} minus {b} ?", str(a - b))
    if kind == 4:
        pair = OPPOSITES[rng.integers(len(OPPOSITES))].split()
        side = int(rng.integers(2))
        return f"what is the opposite of {pair[side]} ?", pair[1 - side]
    if kind == 5:
        start, length = int(rng.integers(0, 16)), int(rng.integers(2, 6))
        return f"count from {start} to {start + length - 1} .", " ".join(str(start + i) for i in range(length))
    things = [THINGS[i] for i in rng.permutation(len(THINGS))[: rng.integers(2, 4)]]
    if kind == 6:
        return f"say {' '.join(things)} in reverse .", " ".join(reversed(things))
    return f"how many words are in {' '.join(things)} ?", str(len(things))


def vocabulary() -> list[str]:
    """Return every word (and punctuation mark) that this module can write, in a fixed order."""
    questions = [q for kind in QUESTIONS.values() for q in kind]
    tasks = [
        "which day month comes after before plus minus opposite of count from to say in reverse how many words are"
    ]
    texts = [*NAMES, *GROUNDS, *TEXTURES, *SIZES, *PLACES, *VAGUE, *LEADS, "at the on a background", *questions, *tasks]
    texts += [*DAYS, *MONTHS, *OPPOSITES, *THINGS, *map(str, range(41)), CHAT, "yes no not i he she they it s t ok"]
    return list(dict.fromkeys(word for text in texts for word in text.split()))
