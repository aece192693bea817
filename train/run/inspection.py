"""Print samples as the model reads them: supervised text in green, image tokens as one word; sum up packing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from train.config import Config, Stage
from train.data.batches import Plan
from train.data.encoder import Encoded, Encoder
from train.data.measuring import measure
from train.data.prompts import Rejected
from train.data.sources import check_bad, encode, losses, open_source
from train.model.language import image_token_id, load_tokenizer
from train.model.tower import describe_tower
from train.run.stage import stage_template

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def describe(config: Config, stage_name: str, data: str, images: str | None, num: int, colour: bool) -> Iterator[str]:
    """Yield a paragraph per sample, then one on lengths, shares and packing.  Raises: UsageError, DataError."""
    stage: Stage = getattr(config, stage_name)
    tokenizer = load_tokenizer(config.model)
    image_token_id(tokenizer, config.model.image_token)
    tokens = describe_tower(config.model)[1].tokens_per_image
    template = stage_template(config.model, stage, tokenizer)
    encoder = Encoder(tokenizer, template, config.model.image_token, tokens, stage.message_trees)
    source = open_source(data, images)
    for index in range(min(num, len(source))):
        try:
            _, encoded = encode(source, encoder, index, config.model.max_length)
        except Rejected as reason:
            yield f"--- {source.name(index)}: skipped, {reason}"
            continue
        supervised = int((encoded.labels >= 0).sum())
        head = f"--- {source.name(index)}: {len(encoded.ids)} tokens, {supervised} supervised"
        yield head + "\n" + paint(encoded, encoder, colour)
    measured = measure(source, encoder, config.model.max_length)
    check_bad(source, measured.reasons, 1.0)
    yield "\n    ".join(
        [summary(Plan(measured, stage)), *(f"left out: {told}" for told in losses(source, measured.reasons))]
    )


def paint(encoded: Encoded, encoder: Encoder, colour: bool) -> str:
    """Decode ids; supervised text is green, or in [[ ]] without colour; each branch begins a new line."""
    out: list[str] = []
    begin, end = (GREEN, PLAIN) if colour else ("[[", "]]")
    kinds = np.where(encoded.ids == encoder.image_id, 2, (encoded.labels >= 0).astype(int))
    branches = set(np.cumsum(encoded.tree)[:-1].tolist())
    edges = sorted({0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), *branches, len(encoded.ids)})
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        ids = encoded.ids[start:stop].tolist()
        if start in branches:
            out.append("\n  ├ ")
        if ids[0] == encoder.image_id:
            out.append(f"<{len(ids)} image tokens>")
        else:
            text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
            out.append(f"{begin}{text}{end}" if encoded.labels[start] >= 0 else text)
    return "".join(out)


def summary(plan: Plan) -> str:
    """Say how long samples are, how many hold an image, and how the first step packs."""
    measured, usable = plan.measured, plan.usable
    lengths = measured.lengths[usable]
    rows = [row for micro in plan.micro_batches(0, 1) for row in micro]
    sizes = [sum(int(measured.lengths[i]) for i in row) for row in rows]
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(measured.reasons.values()).most_common())
    return (
        f"=== {len(usable)} usable samples of {len(measured.lengths)}"
        + (f" (skipped: {reasons})" if reasons else "")
        + f"\n    tokens a sample: median {int(np.median(lengths))}, longest {int(lengths.max())}; supervised "
        f"{measured.supervised.sum() / lengths.sum():.1%}; text only {(measured.images[usable] == 0).mean():.1%}; "
        f"cut at max_length {measured.num_truncated}"
        f"\n    {plan.steps} steps of {plan.stage.batch_size} samples; the first takes {len(rows)} rows, "
        f"{sum(sizes) / (len(sizes) * max(sizes)):.1%} full"
    )
