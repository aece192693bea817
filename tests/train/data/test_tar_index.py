"""The index of a tar against Python's own reading of it, for every way that tars are written and torn."""

import io
import tarfile
import tracemalloc

import pytest

from train.data import tar_index
from train.data.tar_index import Keys, index_tar


def write(path, names, form=tarfile.USTAR_FORMAT, mtime=0):
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.mtime, info.size = mtime, (37 * i) % 1500
            if name.endswith("/"):
                info.type, info.size = tarfile.DIRTYPE, 0
            tar.addfile(info, io.BytesIO(bytes(i % 251 for _ in range(info.size))))
    return path


NAMES = [f"{i:06d}.{suffix}" for i in range(50) for suffix in ("jpg", "txt", "json")]
LONG = [*NAMES[:4], "x" * 150 + ".jpg", *NAMES[4:8]]
PREFIXED = [f"{'part/' * 12}{'folder' * 8}/{i}.jpg" for i in range(9)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("names", "mtime"), [(NAMES, 0), (NAMES, 1.5), (["a/", "a/b.jpg", "a/ü.txt", ".x.jpg"], 0), (PREFIXED, 0), ([], 0)]
)
def test_it_finds_what_tarfile_finds(tmp_path, form, names, mtime):
    path = write(tmp_path / "a.tar", names, form, mtime)
    found, fault = index_tar(path)
    assert (found, fault) == tar_index._index_any(path) and fault == ""
    with tarfile.open(path) as tar:
        assert found == [(each.name, each.offset_data, each.size) for each in tar if each.isreg()]
    assert [name for name, _, _ in found] == [name for name in names if not name.endswith("/")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_from_their_extensions(tmp_path, form):
    path = write(tmp_path / "a.tar", LONG, form)
    assert tar_index._index_plain(path) is None
    assert [name for name, _, _ in index_tar(path)[0]] == LONG


def test_plain_tars_are_read_in_arrays(tmp_path):
    """Floating-point times give every member an extended header, as webdataset's writer leaves them."""
    assert tar_index._index_plain(write(tmp_path / "a.tar", NAMES)) is not None
    assert tar_index._index_plain(write(tmp_path / "b.tar", NAMES, tarfile.PAX_FORMAT, 1.5)) is not None


@pytest.mark.parametrize("seed", range(60))
def test_torn_and_rotten_tars_are_read_as_far_as_they_are_whole(tmp_path, seed):
    import random

    rng = random.Random(seed)
    path = write(tmp_path / "a.tar", NAMES[:24], rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]), 1.5)
    data = bytearray(path.read_bytes())
    if seed % 3 == 0:
        data = data[: rng.randrange(len(data))]
    elif seed % 3 == 1:
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
    else:
        at = rng.randrange(len(data) - 2000)
        data[at : at + 1500] = bytes(1500)
    path.write_bytes(data)
    assert index_tar(path) == tar_index._index_any(path)


def header(name, size, kind=b"0", digits=None):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    made = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if digits:
        made[124:136] = digits
        made[148:156] = b" " * 8
        made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


@pytest.mark.parametrize(
    "bad",
    [
        header("a.jpg", 0, digits=b"-0000001000\0"),  # the next header would be this one
        header("a.jpg", 0, digits=b"-0000002000\0"),
        header("a.jpg", 0, digits=b"1_000_000_0\0"),
        header("pax", 1 << 60, b"x"),
        header("././@LongLink", 1 << 33, b"L"),
    ],
)
def test_headers_that_lie_end_the_reading_and_cost_no_memory(tmp_path, bad):
    path = tmp_path / "a.tar"
    path.write_bytes(header("b.jpg", 512) + b"x" * 512 + bad + b"30 path=" * 100 + bytes(1024))
    tracemalloc.start()
    found, fault = index_tar(path)
    assert found == [("b.jpg", 512, 512)] and ("truncated" in fault or "unreadable" in fault)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_sparse_members_and_links_are_passed_over_and_counted(tmp_path):
    link, sparse = header("l.jpg", 0, b"2"), header("s.jpg", 512, b"S") + b"x" * 512
    (tmp_path / "a.tar").write_bytes(link + sparse + header("b.jpg", 512) + b"x" * 512 + bytes(1024))
    found, fault = index_tar(tmp_path / "a.tar")
    assert [name for name, _, _ in found] == ["b.jpg"]
    assert fault == "passed over 1 member(s): link or device; passed over 1 member(s): sparse"


def test_keys_are_a_sequence_of_strings():
    parts = [["a", "", "größe"], [], ["\ud800x", "z" * 99]]
    keys = Keys(parts)
    assert list(keys) == ["a", "", "größe", "?x", "z" * 99] and len(keys) == 5
    with pytest.raises(IndexError):
        keys[5]
    assert list(Keys([])) == []
