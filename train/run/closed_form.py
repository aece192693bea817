"""A first projector in closed form: it maps a picture to what the language model reads for the words of its text.

Gradient steps through a frozen language model have to find out, token by token, where in its space the pictures belong;
a few hundred steps of a small batch do not get there. But where words belong is known: at their own embeddings. So
before the first step the mean feature x of each picture is mapped by ridge regression to y, the sum of its text's
centred, normalised token embeddings, weighted by log(n / texts that have the token), so that rare words count more.
The language model then first reads image tokens as a faint bag of the words that go with such pictures.

The penalty is the one of SHARES with the least leave-one-out error, which ridge regression gives without refitting:
residual / (1 - leverage). Outputs are scaled to the mean norm of a centred token embedding. Two linear layers with a
GELU between them represent any linear map of rank r exactly in 2 r hidden units, since gelu(z) - gelu(-z) = z. If the
rank exceeds half the hidden units, the largest singular values are kept. Unused hidden units keep their random input
weights, with output weights of 0, from which they can learn.

Cost: the features of at most MOST pictures once, and the singular values of their [n, width] matrix.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from train.errors import UsageError

if TYPE_CHECKING:
    from train.run.loop import Training

log = logging.getLogger("train")

MOST = 20_000  # pictures; a matrix of 20,000 x 1,152 in f64 is 184 MB
FEWEST = 16
SHARES = tuple(10.0**e for e in range(-5, 2))  # penalties, as multiples of the largest squared singular value


@torch.no_grad()
def start_from_words(training: Training) -> None:
    """Set the projector from the first pictures that the run will see, at most `MOST`; a collective.

    The first rank solves for all: another kind of processor would round differently, and only gradients are summed.
    Raises: UsageError if fewer than FEWEST samples have one picture and a supervised text.
    """
    means, texts = _collect(training)
    if len(texts) < FEWEST:
        raise UsageError(f'start = "words": {len(texts)} samples have one image and a text; expected {FEWEST} or more')
    inner, scale = training.composed.model.model, training.composed.feature_scale
    projector = inner.multi_modal_projector
    table = inner.language_model.get_input_embeddings()
    words = table(torch.arange(len(table.weight), device=table.weight.device))  # as they are read: Gemma scales them

    def solve() -> tuple[float, list[Tensor]]:
        map_wd, centre_w, kept = fit(means, *bags(texts, words))
        offset_d = words.float().mean(0) / scale
        place(projector.linear_1, projector.linear_2, map_wd / scale, centre_w, offset_d)
        return kept, [parameter.cpu() for parameter in projector.parameters()]

    kept, solved = training.runtime.first(solve)
    for parameter, found in zip(projector.parameters(), solved, strict=True):
        parameter.copy_(found)
    log.info(
        "the projector starts from the words of %d texts: explains %.1f %% of their variance", len(texts), 100 * kept
    )


def bags(texts: list[list[int]], words_vd: Tensor) -> tuple[Tensor, float]:
    """Return the bag of words y f64 [n, d] of each text (token ids), and the mean norm of its centred embeddings."""
    found = Counter(token for text in texts for token in set(text))
    tokens = torch.tensor(sorted(found), device=words_vd.device)
    centred = (words_vd[tokens].double() - words_vd.double().mean(0)).cpu()
    at = {int(token): row for row, token in enumerate(tokens)}
    weights = torch.tensor([math.log(len(texts) / found[int(token)]) for token in tokens], dtype=torch.float64)
    directions = nn.functional.normalize(centred, dim=1) * weights[:, None]
    sums = [directions[[at[token] for token in text]].sum(0) / math.sqrt(len(text)) for text in texts]
    return torch.stack(sums), float(centred.norm(dim=1).mean())


def fit(x_nw: Tensor, y_nd: Tensor, norm: float) -> tuple[Tensor, Tensor, float]:
    """Fit y to x by ridge regression, with the penalty of the least leave-one-out error.

    norm: mean norm of the output.  Returns the scaled map f64 [w, d], the mean of x f64 [w], and the share of y's
    variance that the fit explains for left-out texts (below 0: none).
    """
    centre = x_nw.double().mean(0)
    target = y_nd.double() - y_nd.double().mean(0)
    u, s, vt = torch.linalg.svd(x_nw.double() - centre, full_matrices=False)
    along = u.T @ target
    least, chosen = math.inf, s
    for share in SHARES:
        shrunk = s**2 / (s**2 + share * s[0] ** 2)
        leverage = (u**2 * shrunk).sum(1) + 1 / len(u)
        error = float((((target - (u * shrunk) @ along) / (1 - leverage)[:, None]) ** 2).mean())
        if error < least:
            least, chosen = error, s / (s**2 + share * s[0] ** 2)
    fitted = vt.T @ (chosen[:, None] * along)
    length = ((x_nw.double() - centre) @ fitted).norm(dim=1).mean()
    return fitted * (norm / length), centre, 1 - least / float((target**2).mean())


def place(first: nn.Linear, second: nn.Linear, map_wd: Tensor, centre_w: Tensor, offset_d: Tensor) -> None:
    """Set two layers with a GELU between them to (x - centre) map + offset, or to the best approximation that fits."""
    u, s, vt = torch.linalg.svd(map_wd, full_matrices=False)
    rank = min(len(s), first.out_features // 2)
    into, out = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vt[:rank]
    shift = centre_w @ into
    for rows, sign in ((slice(0, rank), 1), (slice(rank, 2 * rank), -1)):
        first.weight[rows] = (sign * into.T).to(first.weight)
        first.bias[rows] = (-sign * shift).to(first.bias)
    second.weight.zero_()
    second.weight[:, :rank], second.weight[:, rank : 2 * rank] = out.T.to(second.weight), -out.T.to(second.weight)
    second.bias.copy_(offset_d.to(second.bias))


def _collect(training: Training) -> tuple[Tensor, list[list[int]]]:
    """Return the mean feature f32 [n, width] and the supervised ids of each sample with one image, over all ranks."""
    runtime, share = training.runtime, -(-MOST // training.runtime.world)
    special = set(training.collator.encoder.tokenizer.all_special_ids)
    means: list[Tensor] = []
    texts: list[list[int]] = []
    seen = set[int]()
    epoch = -(-len(training.plan.usable) // training.stage.batch_size)
    for batches in islice(training.batches(0), epoch):
        for batch in batches:
            said = defaultdict[int, list[int]](list)
            for owner, token in zip(batch.owners_s.tolist(), batch.targets_s.tolist(), strict=True):
                if token not in special:
                    said[owner].append(token)
            with runtime.autocast():
                feats = training.image_features(batch.to(runtime.device))
            times = Counter(batch.images)
            for row, index in enumerate(batch.images):
                if times[index] == 1 and said[index] and index not in seen and len(texts) < share:
                    assert feats is not None
                    seen.add(index)
                    means.append(feats[row].float().mean(0).cpu())
                    texts.append(said[index])
        if len(texts) >= share:
            break
    parts = runtime.gather((torch.stack(means) if means else None, texts))
    found = [part for part, _ in parts if part is not None]
    return torch.cat(found) if found else torch.zeros(0, 1), [text for _, some in parts for text in some]
