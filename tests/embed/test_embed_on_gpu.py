"""Embedding on a GPU, in each precision; rehearsed on a processor with REHEARSE_GPU=1."""

import pytest
import tiny_clip
from artefacts import write_pool

from curate.embed.embed import EmbedOptions, embed
from curate.engine import Job
from curate.storage import sidecar
from curate.vectors.exact import cosines
from house import GPU

pytestmark = pytest.mark.gpu
PRECISIONS = ["fp32", "bf16", *(["fp16"] if GPU == "cuda" else [])]


def vectors(folder, column):
    table = sidecar.table(str(folder / "00000.arrow"))
    return sidecar.vectors(table[column].combine_chunks())


def test_every_precision_is_near_the_processors_vectors(tmp_path, monkeypatch):
    model = tiny_clip.write(tmp_path / "model")
    pool = write_pool(tmp_path / "pool", ["00000", "00001"], 9)
    for precision in PRECISIONS:
        options = EmbedOptions(model, precision=precision, decoders=1)
        made = embed(pool, str(tmp_path / precision), options, Job(gpus=int(GPU == "cuda"), quiet=True))
        assert GPU == "cpu" or "cpu" not in made["device"]
    monkeypatch.setattr("curate.embed.encoder.choose_device", lambda: "cpu")
    embed(pool, str(tmp_path / "cpu"), EmbedOptions(model, precision="fp32"), Job(workers=1, quiet=True))
    for column in ("image_embedding", "text_embedding"):
        expected = vectors(tmp_path / "cpu", column)
        for precision in PRECISIONS:
            assert cosines(vectors(tmp_path / precision, column), expected).min() > (
                0.9999 if precision == "fp32" else 0.99
            )
