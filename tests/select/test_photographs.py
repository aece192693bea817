"""Near-duplicates among real photographs: planted copies are found, and hardly a photograph is taken for another."""

import numpy as np
import photos
import pytest
from clouds import unit

from curate.embed.images import perceptual_hash
from curate.select.steps import auto_threshold, near_duplicates
from curate.vectors import duplicate_forest, kmeans, near_pairs


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(5)
    images, source, kind = [], [], []
    for number, (data, _) in enumerate(photos.web(2)):
        image = photos.opened(data)
        images.append(image)
        source.append(number)
        kind.append("")
        if rng.random() < 0.25:
            for name in rng.choice(list(photos.VARIANTS), rng.integers(1, 4), replace=False):
                images.append(photos.VARIANTS[str(name)](image))
                source.append(number)
                kind.append(str(name))
    phash = np.array([perceptual_hash(image) for image in images], np.uint64)
    vectors = {
        s: unit(np.array([photos.described(i, strong=s) for i in images])).astype(np.float16) for s in (True, False)
    }
    return vectors, phash, np.array(source), np.array(kind)


@pytest.mark.realdata
@pytest.mark.parametrize("strong", [True, False])
@pytest.mark.parametrize("planted", [True, False])
def test_copies_of_photographs_are_found_and_one_in_a_hundred_at_most_is_wronged(pool, strong, planted):
    vectors, phash, source, kind = pool
    rows = np.flatnonzero((kind == "") | planted)
    x, phash, source, kind = vectors[strong][rows], phash[rows], source[rows], kind[rows]
    centroids = kmeans.fit(x.astype(np.float32), len(x) // 100, 10, 0, backend="kmeans").centroids
    clusters, closeness = kmeans.assign(x, centroids)
    order = np.argsort(clusters, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(clusters, minlength=len(centroids)))])
    a, b, similarity = duplicate_forest.near_duplicate_forest(x, order, bounds, 0.8)
    a, b = order[a], order[b]
    bits = near_pairs.differing_bits(phash[a], phash[b])
    rule = auto_threshold.find_threshold(similarity, bits, 0.8).rule
    edges = np.minimum(a, b), np.maximum(a, b), similarity, bits
    alive = np.ones(len(x), bool)
    hashes = lambda rows: (phash[rows], np.ones(len(rows), bool))  # noqa: E731
    found = near_duplicates.resolve(edges, alive, -closeness, "components", "middle", rule, x.__getitem__, hashes)
    wronged = ~found.keep & (source[found.duplicate_of] != source) & (kind == "")
    assert wronged.sum() <= 0.01 * (kind == "").sum()
    if not planted:
        assert wronged.sum() <= 2
        return
    originals = np.flatnonzero(kind == "")
    joined = found.component == found.component[originals[source]]
    easy = np.isin(kind, ["resized", "compressed"])
    assert joined[easy].mean() > 0.85 and joined[kind != ""].mean() > (0.6 if strong else 0.4)


@pytest.mark.realdata
def test_the_default_selection_of_faulty_photographs_keeps_fewer_faults(pool, tmp_path):
    """The embedder knows colours and gradients, fitted on half of the captions; faults are planted in the other."""
    photographs, captions = list(photos.web(2)), [caption for _, caption in photos.web(2)]
    names = [[list(photos.VARIANTS)[number % len(photos.VARIANTS)]] for number in range(len(photographs))]
    fit, rest = np.split(np.random.default_rng(6).permutation(len(photographs)), 2)
    faults = photos.plant(rest, np.random.default_rng(7), variants=1)
    vectors, _, _, kind = pool
    plain = vectors[True][kind == ""].astype(np.float32)
    features = plain[faults.source]
    for row in np.flatnonzero(faults.variant):
        number = faults.source[row]
        image = photos.VARIANTS[names[number][0]](photos.opened(photographs[number][0]))
        features[row] = unit(photos.described(image)[None])[0]
    words = photos.Words(captions, 128)
    embedder = photos.Embedder(words, photos.Sight(plain[fit], words([captions[number] for number in fit])))
    texts = embedder.texts([captions[number] for number in faults.caption])
    photos.write_pool(tmp_path / "pool", faults, photographs, names)
    photos.write_embeddings(tmp_path / "vectors", embedder.images(features), texts)
    photos.import_and_cluster(tmp_path, seed=0)
    told = photos.compare(photos.selected(tmp_path, "sel", recipe="balanced", n="30%")[0], faults)
    assert told["rows"] == round(0.3 * len(faults.source))
    assert told["dedup precision"] > 0.9 and told["dedup recall"] > 0.5 and told["wronged"] <= 0.01
    assert told["swapped"] < 0.8 * faults.swapped.mean() and told["mismatch recall"] > 0.6
