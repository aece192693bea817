import gzip
import io
import random
import tarfile
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import ShardError, UsageError
from curate.storage.tar import (
    BLOCK,
    MAX_MEMBER_BYTES,
    Member,
    TarWriter,
    _header,
    is_safe,
    list_pool,
    open_tar,
    read_index,
    read_json,
    read_member,
    split_name,
    survey_pool,
)
from house import REAL_DATA
from pipelines import gzipped
from pipelines.tar_headers import Headers
from train import errors as train_errors
from train.data import scratch


def tar_of(members, kind=tarfile.GNU_FORMAT):
    """Write a tar with Python's own writer. members: (name, bytes) or TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(b"\0" * member.size))
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def index_of(data):
    return read_index(io.BytesIO(data))


def content(data, index):
    """All samples as (key, {suffix: bytes}, twin)."""
    file = io.BytesIO(data)
    return [
        (sample.key, {member.suffix: read_member(file, member) for member in sample.members}, sample.repeated)
        for sample in index.samples
    ]


TWO = [("a.jpg", b"image a" * 200), ("a.txt", b"caption a"), ("b.jpg", b"image b" * 200), ("b.txt", b"caption b")]


def test_samples_come_in_order_with_their_bytes():
    data = tar_of(TWO)
    index = index_of(data)
    assert content(data, index) == [
        ("a", {"jpg": b"image a" * 200, "txt": b"caption a"}, False),
        ("b", {"jpg": b"image b" * 200, "txt": b"caption b"}, False),
    ]
    assert index.notes == [] and index.size == len(data)


def test_interleaved_members_join_and_a_repeated_member_is_a_twin():
    data = tar_of(
        [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4"), ("a.jpg", b"5"), ("a.txt", b"6")]
    )
    assert content(data, index_of(data)) == [
        ("a", {"jpg": b"1", "txt": b"3"}, False),
        ("b", {"jpg": b"2", "txt": b"4"}, False),
        ("a", {"jpg": b"5", "txt": b"6"}, True),
    ]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_as_they_are(kind):
    names = [
        "x" * 250 + ".jpg",
        "deep/" * 60 + "y.jpg",
        "ünï/漢字.jpg",
        b"caf\xe9.jpg".decode("utf-8", "surrogateescape"),
    ]
    index = index_of(tar_of([(name, b"data") for name in names], kind))
    assert [sample.members[0].name for sample in index.samples] == names
    assert not index.notes


def test_names_split_at_the_first_dot_of_their_last_part():
    assert split_name("v1.2/000.seg.PNG") == ("v1.2/000", "seg.png")
    assert split_name("plain") == ("plain", "")


def test_links_devices_and_directories_are_passed_over_and_recorded():
    infos = []
    for name, kind in [("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("d", tarfile.DIRTYPE)]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        infos.append(info)
    data = tar_of([*infos, ("README", b"x"), *TWO, ("a.pyd", b"cos"), ("b.seg.pkl", b"cos")])
    index = index_of(data)
    assert [[member.suffix for member in sample.members] for sample in index.samples] == [
        ["jpg", "txt", "pyd"],
        ["jpg", "txt", "seg.pkl"],
    ]
    assert index.notes == [
        "passed over 2 member(s): link or device",
        "passed over 1 member(s): without a suffix",
    ]


@pytest.mark.parametrize(
    "key, safe",
    [
        ("000", True),
        ("a/b..c", True),
        ("../x", False),
        ("a/../../x", False),
        ("/etc/x", False),
        ("\\x", False),
        ("a\\..\\x", False),
        ("C:x", False),
        ("s3://x/y", False),
        ("a/http://x", False),
        ("coco:000001", True),
        ("2024-01-01 10:11:10", True),
        ("", False),
        ("a\0b", False),
        ("a\nb", False),
        ("a\x1b[31m", False),
        ("a\u202eb", True),
        ("caf\udce9", False),
    ],
)
def test_keys_that_would_leave_their_folder_are_told(key, safe):
    assert is_safe(key) == safe


def test_a_truncation_at_any_byte_keeps_all_that_was_whole():
    data = tar_of(TWO)
    ends = {member.name: member.offset + member.size for sample in index_of(data).samples for member in sample.members}
    for length in [*range(0, len(data), 97), *(end + more for end in ends.values() for more in (-1, 0, 1))]:
        whole = [name for name, end in ends.items() if end <= length]
        try:
            index = index_of(data[:length])
        except ShardError as error:
            assert not whole and "no sample" in str(error)
            continue
        read = [member.name for sample in index.samples for member in sample.members]
        assert read == whole
        assert index.notes or length >= ends["b.txt"] + BLOCK, "a truncation leaves a note"


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"<html>not found</html>", "truncated"),
        (b"PK\x03\x04" + b"\x13" * 4000, "not a tar"),
        (b"\x1f\x8b\x08" + b"\x13" * 4000, "gzip: unpack it first .gunzip."),
        (b"\x28\xb5\x2f\xfd" + b"\x13" * 4000, "zstd: unpack it first .unzstd."),
        (b"\0" * 10240 + b"\x13" * 4000, "follows the end-of-archive mark"),
        (tar_of([("README", b"x")]), "without a suffix"),
    ],
)
def test_a_shard_of_which_nothing_can_be_read_says_what_it_is(data, words):
    with pytest.raises(ShardError, match=words):
        index_of(data)


def test_a_foreign_stretch_ends_the_reading_with_a_note():
    data = tar_of(TWO)
    second = index_of(data).samples[1].members[0].offset - BLOCK
    broken = data[:second] + b"\x55" * 512 + data[second + 512 :]
    index = index_of(broken)
    assert [sample.key for sample in index.samples] == ["a"]
    assert index.notes == [f"unreadable from byte {second} of {len(data)}"]


def test_tars_that_were_joined_are_read_one_after_the_other():
    parts = [tar_of(TWO), tar_of([]), tar_of([("c.jpg", b"x"), ("b.json", b"{}")]), tar_of([("a.jpg", b"again")])]
    index = index_of(b"".join(parts))
    assert [(sample.key, len(sample.members), sample.repeated) for sample in index.samples] == [
        ("a", 2, False),
        ("b", 3, False),
        ("c", 1, False),
        ("a", 1, True),
    ]
    assert len(index.notes) == 2 and all("several archives" in note for note in index.notes)


def test_what_follows_the_end_and_is_no_tar_is_recorded():
    index = index_of(tar_of(TWO) + b"\x13" * 2000)
    assert len(index.samples) == 2 and "not read: what follows the end-of-archive mark" in index.notes[0]


@pytest.mark.parametrize("data", [b"\0" * 1024, tar_of([]), tar_of([("__MACOSX/._a.jpg", b"x"), ("._b.jpg", b"x")])])
def test_a_whole_tar_without_samples_has_no_rows_and_says_so(data):
    index = index_of(data)
    assert not index.samples and index.notes


def test_what_macos_adds_is_passed_over():
    index = index_of(tar_of([("._a.jpg", b"x"), *TWO, ("__MACOSX/a.jpg", b"x")]))
    assert [sample.key for sample in index.samples] == ["a", "b"]
    assert "passed over 2 member(s): macOS" in index.notes[0]


def test_a_pool_takes_packed_tars_and_names_what_it_passes_over(tmp_path):
    for name in (
        "0.tar",
        "1.tar.gz",
        "2.tgz",
        "3.TAR",
        "0.tar.gz",
        "3.tgz",
        "4.tar.zst",
        "5.zip",
        "._0.tar",
        "0.parquet",
    ):
        (tmp_path / name).write_bytes(gzip.compress(tar_of(TWO)) if "gz" in name else tar_of(TWO))
    pool = survey_pool(str(tmp_path))
    assert [shard.stem for shard in pool.shards] == ["0", "1", "2", "3"]
    assert pool.shards[0].location.endswith("0.tar") and pool.shards[0].size == (tmp_path / "0.tar").stat().st_size
    told = {fault["example"]: fault["count"] for fault in pool.passed.values()}
    assert told == {"0.tar.gz": 2, "4.tar.zst": 2, "._0.tar": 1}
    for shard in pool.shards:
        with open_tar(shard.location) as file:
            assert content(tar_of(TWO), read_index(file)) == content(tar_of(TWO), index_of(tar_of(TWO)))


def test_a_torn_gzip_gives_what_it_holds(tmp_path):
    noise = random.Random(0).randbytes(40_000)
    packed = gzip.compress(tar_of([("a.jpg", noise), ("b.jpg", noise)]))
    (tmp_path / "a.tar").write_bytes(packed[: len(packed) * 2 // 3])
    with open_tar(str(tmp_path / "a.tar")) as file:
        index = read_index(file)
    assert [sample.key for sample in index.samples] == ["a"] and "truncated" in index.notes[0]


def test_a_gzip_file_that_unpacks_to_far_more_than_its_size_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(gzipped, "LEAST_BYTES", 32 << 20)
    packed = gzip.compress(tar_of(TWO)) + gzip.compress(bytes(64 << 20))
    (tmp_path / "a.tar.gz").write_bytes(packed)
    tracemalloc.start()
    with pytest.raises(ShardError, match="more than 33,554,432 bytes.*gunzip"), open_tar(str(tmp_path / "a.tar.gz")):
        pass
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    with pytest.raises(train_errors.UsageError, match="more than 33,554,432 bytes.*gunzip"):
        scratch.unpacked(tmp_path / "a.tar.gz")


@pytest.mark.parametrize("cut", [0, 1, 9, 20_000])
def test_gzip_files_are_unpacked_as_far_as_they_go(cut):
    """Joined, padded with zeros in between, and cut anywhere."""
    noise, zeros = random.Random(0).randbytes(3_000_000), bytes(5_000_000)
    packed = gzip.compress(noise) + bytes(700) + gzip.compress(zeros) + gzip.compress(noise)
    plain = io.BytesIO()
    assert gzipped.unpack(io.BytesIO(packed[: len(packed) - cut]), plain, "x") == (not cut)
    whole = noise + zeros + noise
    assert whole.startswith(plain.getvalue()) and len(whole) - len(plain.getvalue()) <= 40_000


@pytest.mark.parametrize("suffix", ["{}.jpg", "{}.seg"])
def test_any_number_of_members_under_one_key_is_read_in_linear_time(suffix):
    names = [f"k.{suffix.format(number)}" for number in range(30_000)]
    data = b"".join(_header(name, 0) for name in names) + bytes(1024)
    began = time.process_time()
    [sample] = index_of(data).samples
    assert len(sample.members) == 30_000 and len(sample.images) == (30_000 if "jpg" in suffix else 0)
    assert time.process_time() - began < 6  # all with all took minutes


def header(name, size, kind=b"0", **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def test_lengths_beyond_the_file_cost_no_memory():
    huge = 1 << 60
    tars = [
        header("a.jpg", huge),
        header("././@LongLink", huge, b"L") + b"x" * 600,
        header("pax", huge, b"x") + b"30 path=" * 100,
        header("s.jpg", huge, b"S"),
        header("pax", 512, b"x") + b"25 size=9999999999999999\n".ljust(512, b"\0") + header("a.jpg", 5) + b"x" * 512,
        header("pax", 512, b"x") + b"999999999999999999 path=x\n".ljust(512, b"\0") + header("a.jpg", 5),
    ]
    tracemalloc.start()
    for data in tars:
        with pytest.raises(ShardError, match="truncated"):
            index_of(data)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_pax_header_of_many_records_is_read_in_linear_time():
    records = b"".join(b"%d a=%s\n" % (len(value) + 6, value) for value in [b"1" * 90] * 9000)
    data = header("pax", len(records), b"x") + records.ljust(-(-len(records) // 512) * 512, b"\0")
    assert index_of(data + tar_of(TWO)).samples[0].key == "a"


def test_a_member_over_the_limit_or_cut_is_an_error_of_its_own():
    with pytest.raises(ShardError, match="over the limit"):
        read_member(io.BytesIO(), Member("a.jpg", "jpg", 0, MAX_MEMBER_BYTES + 1))
    with pytest.raises(ShardError, match="ends after 3 of 5"):
        read_member(io.BytesIO(b"abc"), Member("a.jpg", "jpg", 0, 5))


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"7", b"\xff", b"[" * 100_000])
def test_json_that_is_no_object_is_none(data):
    assert read_json(data) is None


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=130).filter(
    lambda name: not name.endswith("/")
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500)), min_size=1, max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_pythons_reader_sees(members, kind):
    data = tar_of([(f"{name}.jpg", body) for name, body in members], kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]
    file = io.BytesIO(data)
    headers = Headers(file)
    found = [
        (name, read_member(file, Member(name, "", offset, size)))
        for name, offset, size, trouble in list(headers)
        if not trouble
    ]
    assert found == expected and headers.whole and not headers.notes


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_tars_never_crash_and_lose_nothing_before_the_damage(data):
    kind = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
    members = [
        (f"{number:03d}{'x' * (number * 23 % 80)}.{suffix}", bytes(300))
        for number in range(5)
        for suffix in ("jpg", "txt")
    ]
    whole = bytearray(tar_of(members, kind))
    first = data.draw(st.integers(0, len(whole) - 1))
    for at in [first, *data.draw(st.lists(st.integers(first, len(whole) - 1), max_size=5))]:
        whole[at] = data.draw(st.integers(0, 255))
    safe = [
        member.name
        for sample in index_of(tar_of(members, kind)).samples
        for member in sample.members
        if member.offset + member.size <= first
    ]
    damaged = bytes(whole[: data.draw(st.integers(first, len(whole)))])
    try:
        index = index_of(damaged)
    except ShardError:
        assert not safe
        return
    read = [member.name for sample in index.samples for member in sample.members]
    assert set(safe) <= set(read)
    for sample in index.samples:
        for member in sample.members:
            read_member(io.BytesIO(damaged), member)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_no_tar(data):
    with pytest.raises(ShardError):
        index_of(data)


def test_the_writer_is_read_back_by_us_and_by_python(tmp_path):
    members = [("k" * 120 + ".jpg", b"1" * 700), ("é.txt", b""), ("z.json", b"{}")]
    twice = []
    for name in ("one.tar", "two.tar"):
        with open(tmp_path / name, "wb") as file, TarWriter(file) as tar:
            for member in members:
                tar.add(*member)
        twice.append((tmp_path / name).read_bytes())
    assert twice[0] == twice[1] and len(twice[0]) % 10240 == 0
    assert [member.name for sample in index_of(twice[0]).samples for member in sample.members] == [
        m[0] for m in members
    ]
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert [(info.name, tar.extractfile(info).read()) for info in tar] == members


def test_pools_are_listed_sorted_with_unique_stems(tmp_path):
    for name in ("a/00001.tar", "a/00000.tar", "b/00000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [shard.stem for shard in list_pool(str(tmp_path / "a"))] == ["00000", "00001"]
    assert [shard.stem for shard in list_pool(f"{tmp_path}/{{a,b}}/00000.tar")] == ["a__00000", "b__00000"]
    assert [shard.stem for shard in list_pool(f"{tmp_path}/a/{{00000..00001}}.tar")] == ["00000", "00001"]
    for pool in (str(tmp_path), f"{tmp_path}/c", f"{tmp_path}/a/*.zip", f"{tmp_path}/a/{{00000..00002}}.tar"):
        with pytest.raises(UsageError):
            list_pool(pool)


@pytest.mark.realdata
def test_real_shards_are_read_whole():
    for shard in list_pool(str(REAL_DATA / "pairs")):
        with open(shard.location, "rb") as file:
            index = read_index(file)
        assert len(index.samples) == 440 and not index.notes
        assert all({member.suffix for member in sample.members} == {"jpg", "txt", "json"} for sample in index.samples)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=130), st.integers(0, 2**36))
def test_headers_are_tarfiles_own(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert _header(name, size) == info.tobuf(tarfile.GNU_FORMAT)
