import errno
import functools
import http.server
import os
import stat
import threading
from contextlib import nullcontext

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from curate.errors import UsageError
from curate.report.report import write_page
from curate.select.pool import _lines
from curate.storage import paths, whole_files


class Flaky(MemoryFileSystem):
    """A driver whose every operation fails in passing before it succeeds."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    failures, asked = 2, []

    def _stumble(self, what):
        Flaky.asked.append(what)
        if Flaky.asked.count(what) <= Flaky.failures:
            raise ConnectionResetError("reset by peer")


def stumbling(name):
    def operation(self, path, *rest, **options):
        self._stumble((name, path))
        return getattr(MemoryFileSystem, name)(self, path, *rest, **options)

    return operation


for name in ("exists", "isdir", "size", "ls", "rm", "cat_file", "get_file", "put_file"):
    setattr(Flaky, name, stumbling(name))


@pytest.fixture
def place(monkeypatch):
    monkeypatch.setattr(paths, "FIRST_PAUSE_S", 0.001)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.asked, Flaky.failures = [], 2
    Flaky.store.clear()
    return "flaky://pool"


def test_what_fails_in_passing_is_tried_again(place):
    with paths.atomic_write(f"{place}/a.txt") as file:
        file.write(b"words")
    assert paths.exists(f"{place}/a.txt") and paths.size(f"{place}/a.txt") == 5 and paths.listdir(place) == ["a.txt"]
    assert paths.read_text(f"{place}/a.txt") == "words"
    with paths.local_copy(f"{place}/a.txt") as path, open(path) as copy:
        assert copy.read() == "words"
    paths.remove(f"{place}/a.txt")
    assert not paths.exists(f"{place}/a.txt")


def test_what_goes_on_failing_is_given_up_and_what_is_final_is_not_tried_again(place):
    with pytest.raises(FileNotFoundError):
        paths.read_bytes(f"{place}/none")
    assert len(Flaky.asked) == 3
    Flaky.failures = 99
    with pytest.raises(OSError, match=r"flaky://pool/none: ConnectionResetError: reset by peer, 5 times over"):
        paths.size(f"{place}/none")
    assert Flaky.asked.count(("size", f"{place}/none")) == paths.TRIES
    for client in ("httpx._exceptions", "httpx2._exceptions"):  # of huggingface_hub: they are no OSErrors
        assert paths._may_pass(type("ConnectError", (Exception,), {"__module__": client})())


def test_two_processes_delete_one_directory(tmp_path):
    for turn in range(20):
        folder = tmp_path / str(turn)
        for number in range(200):
            paths.make_dir(str(folder / str(number % 10)))
            (folder / str(number % 10) / str(number)).touch()
        failed = []

        def delete(folder=folder, failed=failed):
            try:
                paths.remove(str(folder))
            except OSError as error:
                failed.append(error)

        threads = [threading.Thread(target=delete) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and not folder.exists()


def test_writers_of_one_file_at_once_never_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.os, "getpid", lambda: 1)  # as in containers on several machines
    target = str(tmp_path / "plan.json")
    with paths.atomic_write(target) as one, paths.atomic_write(target) as two:
        one.write(b"one")
        two.write(b"two")
    assert (tmp_path / "plan.json").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def write_all(folder, names):
    for name in names:
        with paths.atomic_write(f"{folder}/{name}") as file:
            file.write(name.encode())


def test_files_written_together_appear_whole_at_the_end_and_none_on_an_error(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("before")
    with pytest.raises(ZeroDivisionError), whole_files.together():
        write_all(tmp_path, ["a", "b"])
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"
    monkeypatch.setattr(whole_files, "MOST_WAITING", 3)
    with whole_files.together():
        write_all(tmp_path, ["a", "b"])
        assert (tmp_path / "a").read_text() == "before" and not (tmp_path / "b").exists()
        with pytest.raises(ZeroDivisionError), paths.atomic_write(f"{tmp_path}/none"):
            raise ZeroDivisionError
        write_all(tmp_path, ["new/c", "d"])
        assert {path.name for path in tmp_path.iterdir()} > {"a", "b", "new"} and not (tmp_path / "d").exists()
    found = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a": "a", "b": "b", "c": "new/c", "d": "d"}


def test_a_full_disk_at_the_end_names_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"), whole_files.together():
        write_all(tmp_path, ["a", "b"])
        monkeypatch.setattr(whole_files.os, "fsync", full)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_by_the_name_that_was_given(tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path, f"{tmp_path}/new/", f"{tmp_path}/file/under", "/proc/none"):
        with pytest.raises(OSError) as caught, paths.atomic_write(str(target)) as file:
            file.write(b"x")
        assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_web_servers_files_have_their_own_addresses_and_sizes(tmp_path):
    for name in ("0", "1"):
        (tmp_path / f"{name}.tar").write_bytes(b"x" * (5 + int(name)))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        wanted = {f"{url}/{name}.tar": (tmp_path / f"{name}.tar").stat().st_size for name in ("0", "1")}
        (tmp_path / "dead").symlink_to("nowhere")
        for pattern in (f"{url}/*.tar", f"{url}/{{0..1}}.tar", url):
            assert {place: held.size for place, held in paths.find(pattern, ".tar").items()} == wanted, pattern
        server.shutdown()


@pytest.mark.parametrize("status, asked", [(401, 1), (403, 1), (410, 1), (429, 5), (503, 5)])
def test_a_web_server_that_refuses_for_good_is_asked_once(monkeypatch, status, asked):
    class Refusing(http.server.BaseHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Refusing.requests += 1
            self.send_error(status)

        def log_message(self, *told):
            pass

    monkeypatch.setattr(paths, "FIRST_PAUSE_S", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/pool/a.tar"
        with pytest.raises(OSError, match=str(status)) as told, paths.local_copy(url):
            pass
        server.shutdown()
    assert Refusing.requests == asked and isinstance(told.value, PermissionError) == (asked == 1)


def test_files_that_are_named_are_found_where_no_listing_is_allowed(tmp_path):
    for name in ("0", "1"):
        (tmp_path / f"{name}.tar").write_bytes(b"x" * (5 + int(name)))

    class Unlisted(http.server.SimpleHTTPRequestHandler):
        def list_directory(self, path):
            self.send_error(403)

        def log_message(self, *told):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Unlisted, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = {place: held.size for place, held in paths.find(f"{url}/{{0,1}}.tar", ".tar").items()}
        assert found == {f"{url}/0.tar": 5, f"{url}/1.tar": 6}
        with pytest.raises(PermissionError, match="403"):
            paths.find(url, ".tar")
        server.shutdown()


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(UsageError, match="a device or a pipe, not a plain file"),
        paths.atomic_write(str(tmp_path / "pipe")),
    ):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_page_is_written_over_a_page_and_over_no_data(tmp_path):
    for name, word in (
        ("page.html", None),
        ("new.json", None),
        ("manifest.json", "holds data"),
        ("a.tar", "holds data"),
    ):
        if name != "new.json":
            (tmp_path / name).write_bytes(b"before")
        with pytest.raises(UsageError, match=word) if word else nullcontext():
            write_page(str(tmp_path / name), b"page")
        assert (tmp_path / name).read_bytes() == (b"before" if word else b"page")


def test_lines_of_a_list_end_where_editors_end_them(tmp_path):
    kept = ["a\u2028b", "c\x85d\x0be\x0cf\x1cg", "", "h"]
    for end in ("\n", "\r\n", "\r"):
        for last in ("", end):
            (tmp_path / "list.txt").write_bytes((end.join(kept) + last).encode())
            assert paths.read_lines(str(tmp_path / "list.txt")) == kept
            assert _lines(str(tmp_path / "list.txt")) == kept, "what steps read"
    (tmp_path / "list.txt").write_bytes(b"")
    assert paths.read_lines(str(tmp_path / "list.txt")) == []
