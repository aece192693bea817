import io
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.storage import members, ranges
from curate.storage.schema import MEMBERS
from curate.storage.tar import TarWriter, read_index, read_member
from pipelines.tar_headers import describes

LONG = "folder/" * 30 + "key"
HELD = [
    ("a.jpg", b"1"),
    ("a.txt", b""),
    ("b.JPG", b"2" * 700),
    ("b.seg.npy", b"3"),
    ("c/d.txt", b"4"),
    ("a.json", b"{}"),
]


def write(path, held):
    with open(path, "wb") as file, TarWriter(file) as tar:
        for name, data in held:
            tar.add(name, data)
    with open(path, "rb") as file:
        index = read_index(file)
        contents = [[read_member(file, member) for member in sample.members] for sample in index.samples]
    return index, contents


def test_samples_are_read_by_their_places(tmp_path):
    index, contents = write(tmp_path / "a.tar", [*HELD, (f"{LONG}.jpg", b"5"), ("é.jpg", b"6")])
    size = (tmp_path / "a.tar").stat().st_size
    column = members.column(index, size)
    assert column.type == MEMBERS and column.null_count == 0
    found = members.samples([sample.key for sample in index.samples], column)
    assert found == index.samples
    assert list(members.read(str(tmp_path / "a.tar"), size, found)) == contents
    assert list(members.read(str(tmp_path / "a.tar"), size, [])) == []


def test_where_places_cannot_be_told_they_are_null(tmp_path):
    index, _ = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("\udcff.jpg", b"2"), ("b.\udcff", b"3"), ("c.jpg", b"4")])
    size = (tmp_path / "a.tar").stat().st_size
    column = members.column(index, size)
    assert column.is_null().to_pylist() == [False, True, True, False]
    assert members.samples(["a", "b"], column[:2]) is None
    packed = members.column(index, size - 1)  # a file of another size than the tar in it
    assert packed.type == MEMBERS and packed.null_count == 4
    assert members.column(read_index(io.BytesIO(b"\0" * 10240)), 10240).equals(pa.array([], MEMBERS))


def test_a_tar_that_has_changed_ends_the_reading(tmp_path):
    place = tmp_path / "a.tar"
    index, contents = write(place, [(f"{row}.txt", b"%d" % row) for row in range(5)])
    size = place.stat().st_size
    write(place, [(f"{row if row != 3 else 'x'}.txt", b"%d" % row) for row in range(5)])
    assert list(members.read(str(place), size, index.samples)) == contents[:3]
    place.write_bytes(place.read_bytes()[:1024])
    assert list(members.read(str(place), size, index.samples)) == contents[:1]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.jpg", "dir/" * 30 + "a.jpg", "ü" * 40 + ".jpg"])
def test_headers_of_all_forms_are_recognised(tmp_path, form, name):
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    data = (tmp_path / "a.tar").read_bytes()
    [sample] = read_index(io.BytesIO(data)).samples
    [member] = sample.members
    header = data[member.offset - 512 : member.offset]
    assert describes(header, member.name, 3) and not describes(header, member.name, 4)
    assert not describes(b"x" * 512, member.name, 3)
    assert not describes(header, "b.jpg", 3) or len(name) > 100 or not name.isascii()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=12),
    st.sampled_from([0.0, 0.03, 0.5, float("inf")]),
)
def test_joined_ranges_cover_what_is_wanted_and_little_else(spans, waste):
    starts, stops = (np.array([span[0] + side * span[1] for span in spans], np.int64) for side in (0, 1))
    first, last = ranges.join(starts, stops, waste)
    wanted = {place for start, stop in zip(starts, stops, strict=True) for place in range(start, stop)}
    covered = [place for start, stop in zip(first, last, strict=True) for place in range(start, stop)]
    assert len(set(covered)) == len(covered) and covered == sorted(covered) and wanted <= set(covered)
    if waste == float("inf"):
        assert len(first) <= 1
    else:
        assert len(covered) - len(wanted) <= waste * len(wanted)
    if waste == 0:
        assert set(covered) == wanted
