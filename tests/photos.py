"""Real photographs with their captions, the faults planted in them, and a plain embedder fitted on some of them."""

import copy
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clouds import unit
from PIL import Image, ImageDraw, ImageOps

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.ingest.published import ImportOptions, import_layout
from curate.select.select import SelectOptions, select
from curate.storage import manifest, sidecar
from curate.storage.tar import TarWriter
from house import REAL_DATA

QUIETLY = Job(workers=1, quiet=True)
STRENGTHS = np.logspace(-2, 3, 11)  # of a ridge


def web(tars=4):
    """Yield (bytes, caption) of the web photographs."""
    for shard in range(tars):
        with tarfile.open(REAL_DATA / "pairs" / f"{shard:05d}.tar") as tar:
            held = {}
            for member in tar:
                stem, _, suffix = member.name.partition(".")
                held.setdefault(stem, {})[suffix] = tar.extractfile(member).read()
        for sample in held.values():
            yield sample["jpg"], sample["txt"].decode()


def indoor():
    """Yield (bytes, caption) of the indoor photographs; what its questions were answered with makes the caption."""
    for part in ("train", "test"):
        for record in json.loads((REAL_DATA / "vqa" / f"daquar_{part}.json").read_text()):
            told = [turn["value"].replace("_", " ") for turn in record["conversations"] if turn["from"] == "gpt"]
            things = dict.fromkeys(word for answer in told for word in answer.split(", ") if not word.isdigit())
            yield (REAL_DATA / "vqa" / "images" / record["image"]).read_bytes(), ", ".join(things)


def opened(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def cropped(image):
    width, height = image.size
    return image.crop((width // 20, height // 20, width - width // 20, height - height // 20))


def captioned(image):
    image = image.copy()
    width, height = image.size
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height - max(14, height // 12), width, height), fill="black")
    draw.text((6, height - max(13, height // 12)), "the best of today, more inside", fill="white")
    return image


def saved(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def compressed(image):
    return opened(saved(image, 30))


VARIANTS = {
    "resized": lambda image: image.resize((image.width * 5 // 8 + 8, image.height * 5 // 8 + 8)),
    "cropped": cropped,
    "compressed": compressed,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
    "bordered": lambda image: ImageOps.expand(image, border=max(4, min(image.size) // 25), fill="white"),
    "captioned": captioned,
}


def described(image, *, strong=True):
    """Describe an image by colours and gradients on a grid: a plain embedder. Weak: by eight by eight grey levels."""
    pixels = np.asarray(image.resize((96, 96), Image.Resampling.BOX), np.float32) / 255
    grid = pixels.reshape(8, 12, 8, 12, 3).mean((1, 3))
    if not strong:
        grey = grid.mean(2)
        return np.concatenate([(grey - grey.mean()).ravel(), [0.3]])
    grey = pixels.mean(2)
    dy, dx = np.gradient(grey)
    strength = np.hypot(dx, dy)
    turn = ((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * 8).astype(int).clip(0, 7)
    histogram = [np.where(turn == angle, strength, 0).reshape(8, 12, 8, 12).mean((1, 3)) for angle in range(8)]
    return np.concatenate([(grid - grid.mean((0, 1))).ravel(), 4 * np.sqrt(histogram).ravel()])


@dataclass
class Faults:
    """A pool's rows, as indices of photographs. source: whose image; variant: which of it, 0 the photograph itself;
    caption: whose caption. A row is swapped where the two differ, and a copy where its variant is not 0."""

    source: np.ndarray
    variant: np.ndarray
    caption: np.ndarray

    @property
    def swapped(self):
        return self.source != self.caption


def plant(numbers, rng, *, copies=0.2, swapped=0.25, variants=2):
    """Plant faults among photographs: this share of the rows are copies, with their source's caption, and in this share
    captions change places. Returns the rows in random order."""
    total = round(len(numbers) / (1 - copies))
    source = np.concatenate([numbers, rng.choice(numbers, total - len(numbers), replace=False)])
    variant = np.where(np.arange(total) < len(numbers), 0, rng.integers(1, variants + 1, total))
    order = rng.permutation(total)
    source, variant, caption = source[order], variant[order], source[order].copy()
    chosen = rng.permutation(total)[: round(swapped * total)]
    caption[chosen] = source[np.roll(chosen, 1)]
    return Faults(source, variant, caption)


class Words:
    """Captions as unit vectors: words and pairs of words by tf-idf, reduced by a singular value decomposition."""

    def __init__(self, captions, dim, seed=0):
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.counts = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english")
        counts = self.counts.fit_transform(captions)
        self.axes = TruncatedSVD(min(dim, counts.shape[1] - 1), random_state=seed).fit(counts)
        self.mean = self.axes.transform(counts).mean(0)

    def __call__(self, captions):
        x = self.axes.transform(self.counts.transform(captions)) - self.mean
        return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32)


class Sight:
    """A linear map from image features to a text space: ridge regression on pairs, its strength cross-validated."""

    def __init__(self, features, text, dim=256):
        from sklearn.decomposition import PCA
        from sklearn.linear_model import RidgeCV

        self.mean = features.mean(0)
        self.axes = PCA(min(dim, len(features) - 1), random_state=0).fit(self._centred(features))
        self.pairs = self.axes.transform(self._centred(features)), text
        self.map = RidgeCV(STRENGTHS).fit(*self.pairs)

    def with_strength(self, strength):
        """Return the same with a ridge of this strength."""
        from sklearn.linear_model import Ridge

        other = copy.copy(self)
        other.map = Ridge(strength).fit(*self.pairs)
        return other

    def _centred(self, features):
        return unit(features - self.mean)

    def seen(self, features):
        """Return what tells pictures apart, as unit rows."""
        return unit(self.axes.transform(self._centred(features)))

    def told(self, features):
        """Return where the map puts the pictures in the text space, as unit rows."""
        return unit(self.map.predict(self.axes.transform(self._centred(features))))


@dataclass
class Embedder:
    """A CLIP of sorts: half of an image's vector is what it looks like, half what a caption of it would be.

    hints: f32 [n, d], unit rows, of where else an image is thought to lie in the text space; they count for a third.
    """

    words: Words
    sight: Sight

    def images(self, features, hints=None):
        told = self.sight.told(features)
        told = told if hints is None else unit(told + 0.5 * hints)
        return unit(np.concatenate([self.sight.seen(features), told], 1)).astype(np.float32)

    def texts(self, captions):
        told = self.words(captions)
        return np.concatenate([np.zeros((len(told), self.sight.axes.n_components_), np.float32), told], 1)


def write_pool(folder, faults, photographs, variants):
    """Write the rows as a tar. photographs: (bytes, caption) by number; variants: the names of each one's variants."""
    Path(folder).mkdir(parents=True)
    with open(Path(folder) / "00000.tar", "wb") as file, TarWriter(file) as tar:
        rows = zip(faults.source, faults.variant, faults.caption, strict=True)
        for row, (source, variant, caption) in enumerate(rows):
            data = photographs[source][0]
            if variant:
                data = saved(VARIANTS[variants[source][variant - 1]](opened(data)), 85)
            tar.add(f"{row:06d}.jpg", data)
            tar.add(f"{row:06d}.txt", photographs[caption][1].encode())


def middle(image, size):
    """Resize an image so that its middle square of `size` is most of it, and cut that out: u8 [size, size, 3]."""
    scale = 1.14 * size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def write_embeddings(folder, image, text):
    """Write vectors as the layout npy wants them, with the keys of the pool."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir()
    np.save(folder / "vectors.npy", image)
    np.save(folder / "vectors.text.npy", text)
    pa.parquet.write_table(pa.table({"key": [f"{row:06d}" for row in range(len(image))]}), folder / "vectors.parquet")


def import_and_cluster(home, seed):
    """Join home/vectors to home/pool as home/emb, and cluster that as home/clu."""
    options = ImportOptions("npy", pool=str(home / "pool"), join="key")
    import_layout(str(home / "vectors"), str(home / "emb"), options, QUIETLY)
    cluster(str(home / "emb"), str(home / "clu"), ClusterOptions(seed=seed), QUIETLY)


def selected(home, name, **options):
    """Select from home/clu. Returns the table of what became of each row, and the funnel."""
    out = str(home / "sel" / name)
    select(str(home / "clu"), out, SelectOptions(**options), QUIETLY)
    return sidecar.table(f"{out}/00000.arrow"), manifest.load_json(f"{out}/funnel.json")


def compare(table, faults):
    """Compare a selection with what was planted: of its coreset, and of the steps that drop copies and mismatches."""
    kept = np.array(table["kept"])
    dropped = np.array(table["dropped_by"].cast("string").fill_null("").to_pylist())
    source, swapped, rows = faults.source, faults.swapped, int(kept.sum())
    told = {"rows": rows, "swapped": float(swapped[kept].mean()), "copies": 1 - len(np.unique(source[kept])) / rows}
    by_dedup = np.char.startswith(dropped, "dedup(")
    if by_dedup.any():
        twin = [int(key) if key else -1 for key in table["twin"].fill_null("").to_pylist()]
        right = by_dedup & (source[twin] == source)
        told["dedup precision"] = float(right.sum() / by_dedup.sum())
        told["dedup recall"] = float(right.sum() / (len(source) - len(np.unique(source))))
        told["wronged"] = float((by_dedup & ~right & (faults.variant == 0)).sum() / (faults.variant == 0).sum())
    cut = np.char.startswith(dropped, "mismatch(") | np.char.startswith(dropped, "rank(clip_score, 0,")
    if cut.any():
        met = ~by_dedup
        told["mismatch precision"] = float(swapped[cut].mean())
        told["mismatch recall"] = float(swapped[cut].sum() / swapped[met].sum())
    return told
