"""JPEGs that the device decodes: the rows, statuses and nearly the vectors of the processor's decoder."""

import numpy as np
import pytest
import tiny_clip
from PIL import Image
from test_embed import make_tar, table_of, vectors_of
from test_encoder import FORMATS, photograph, saved

from curate.embed import images, jpegs
from curate.embed.embed import EmbedOptions, embed
from curate.engine import Job
from curate.errors import UsageError
from house import GPU, fingerprint

MARK = b"no device reads this"
ODD = {
    "cut": saved(photograph(1), "JPEG")[:-40],
    "stored in rgb": saved(photograph(1), "JPEG", keep_rgb=True),
    "one line in four": saved(photograph(1), "JPEG").replace(b"\x01\x22\x00", b"\x01\x41\x00"),
    "not jpeg": b"\xff\xd8 words \xff\xd9",
}


def test_only_what_every_decoder_reads_alike_is_left_to_the_device():
    let_through = [name for name, make in FORMATS.items() if images.plain_jpeg_size(make(), 10**6)]
    assert let_through == ["rgb.jpg", *(name for name in FORMATS if "rotated" in name)]
    assert not [name for name, data in ODD.items() if images.plain_jpeg_size(data, 10**6)]
    for sampling in (0, 1, 2):
        data = saved(photograph(size=(91, 60)), "JPEG", subsampling=sampling) + b"\0\0"
        assert images.plain_jpeg_size(data, 91 * 60) == (91, 60)
        assert images.plain_jpeg_size(data, 91 * 60 - 1) is None


@pytest.mark.parametrize("size", [(400, 300), (113, 401), (31, 7), (1, 1), (64, 640)])
def test_grey_cells_are_pillows_within_one(size):
    import torch

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    stack = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert (jpegs._grey(stack)[0].numpy() == np.asarray(image.convert("L"))).all()
    for side in (32, 64):
        found = jpegs._boxed(jpegs._grey(stack), side)[0].numpy()
        assert np.abs(found - images.grey_cells(image, side)).max() <= 1


@pytest.mark.parametrize("on", ["cpu", pytest.param(GPU, marks=pytest.mark.gpu)])
def test_rows_are_those_of_the_processor_and_the_manifest_says_how_near(on, tmp_path, monkeypatch, capsys):
    decode = jpegs._decode

    def refusing(coded, device):
        if any(MARK in data for data in coded):
            raise RuntimeError("Failed to decode batch")
        return decode(coded, device)

    monkeypatch.setattr(jpegs, "_decode", refusing)
    monkeypatch.setattr(jpegs, "CHUNK_PIXELS", 3 * 90 * 60)
    if on == "cuda" and (reason := jpegs.reason_against(on)):
        pytest.skip(reason)
    if on == "cpu":
        monkeypatch.setattr(jpegs, "reason_against", lambda _: "")
        monkeypatch.setattr("curate.embed.encoder.choose_device", lambda: "cpu")
    blobs = [saved(photograph(n, (90 + n % 3, 60)), "JPEG", quality=95) for n in range(30)]
    blobs += [FORMATS["progressive.jpg"](), FORMATS["cmyk.jpg"](), ODD["cut"], ODD["stored in rgb"]]
    blobs += [saved(photograph(n), "JPEG", comment=MARK) for n in range(2)]
    broken = saved(photograph(7), "JPEG", comment=MARK)
    blobs.append(broken[: len(broken) // 2] + b"\xff\xd9")  # a whole header, half a picture, and an end
    members = [part for n, data in enumerate(blobs) for part in ((f"{n:02}.jpg", data), (f"{n:02}.txt", b"words"))]
    pool = make_tar(tmp_path / "pool" / "00000.tar", members)
    model = tiny_clip.write(tmp_path / "clip")
    job = Job(workers=1, gpus=int(on == "cuda"))
    for name, options in (("full", {}), ("gpu", {"decode": "gpu"}), ("apart", {"decode": "gpu", "decoders": 1})):
        made = embed(pool, str(tmp_path / name), EmbedOptions(model, batch_size=8, precision="fp32", **options), job)
    full, rows = table_of(tmp_path / "full"), table_of(tmp_path / "gpu")
    assert fingerprint(tmp_path / "apart") == {
        key.replace("gpu/", "apart/"): value for key, value in fingerprint(tmp_path / "gpu").items()
    }
    same = ("key", "uid", "status", "width", "height", "writing")
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in full]
    bits = [(row["phash"] ^ other["phash"]).bit_count() for row, other in zip(rows, full, strict=True) if row["phash"]]
    assert len(bits) >= 35 and max(bits) <= 6
    ok = [at for at, row in enumerate(rows) if row["status"] == "ok"]
    both = (vectors_of(tmp_path / name, "00000", "image_embedding")[ok] for name in ("gpu", "full"))
    cosines = np.prod(list(both), axis=0).sum(axis=1)
    least = made["deviation"]["least_cosine"]
    assert made["options"]["decode"] == "gpu" and made["deviation"]["compared"] == 30 == made["decoded"]["gpu"]
    assert made["decoded"]["processor"] == len(ok) - 30 and 0.999 < least < 1
    assert cosines.min() == pytest.approx(least, abs=2e-3)
    told = capsys.readouterr().err
    assert f"30 pictures decoded by the GPU, {len(ok) - 30} by the processor; cosine with the processor's" in told


def test_without_a_gpu_it_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.embed.encoder.choose_device", lambda: "cpu")
    pool = make_tar(tmp_path / "pool" / "00000.tar", [("a.jpg", FORMATS["rgb.jpg"]()), ("a.txt", b"words")])
    model = tiny_clip.write(tmp_path / "clip")
    with pytest.raises(UsageError, match="needs a GPU that decodes JPEGs, but no GPU is seen.*--decode fast"):
        embed(pool, str(tmp_path / "emb"), EmbedOptions(model, decode="gpu"), Job(quiet=True))
    import torch

    assert bool(jpegs.reason_against("cuda")) == (not torch.cuda.is_available())
