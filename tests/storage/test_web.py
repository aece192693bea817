"""Web servers that ignore ranges, or fail for a moment, and trees that were copied to one."""

import functools
import http.server
import threading
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest

from curate.errors import UsageError
from curate.storage import paths, ranges, sidecar


class Server(http.server.SimpleHTTPRequestHandler):
    """Python's own, which knows no ranges. `failing` answers are 503 before there is another one."""

    failing = 0
    asked: list[str] = []

    def send_head(self):
        Server.asked.append(f"{self.command} {self.path}")
        if Server.failing:
            Server.failing -= 1
            self.send_error(503)
            return None
        return super().send_head()

    def log_message(self, *told):
        pass


@contextmanager
def served(folder):
    Server.failing, Server.asked = 0, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_ranges_that_a_server_ignores_are_cut_out_of_all_that_it_sends(tmp_path):
    data = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(data)
    with served(tmp_path) as url:
        spans = [(5, 9), (300, 310), (9000, 9100)]
        found = ranges.read_remote(f"{url}/file", [start for start, _ in spans], [stop for _, stop in spans])
        assert found == [data[start:stop] for start, stop in spans] and len(Server.asked) == 1
        assert ranges.read_remote(f"{url}/file", [-7, 3], [None, 4]) == [data[-7:], data[3:4]]
        assert paths.read_bytes(f"{url}/file") == data


def test_columns_are_read_where_ranges_are_ignored(tmp_path):
    schema = pa.schema([("number", pa.int32()), ("words", pa.string())])
    rows = [pa.array(range(900), pa.int32()), pa.array([f"word {row}" for row in range(900)])]
    sidecar.write_table(str(tmp_path / "a.arrow"), schema, [pa.record_batch(rows, schema=schema)], {"rows": 900})
    with served(tmp_path) as url:
        table = sidecar.table(f"{url}/a.arrow", ["number"])
    assert np.array_equal(table["number"].to_numpy(), np.arange(900))


def test_a_server_that_fails_for_a_moment_is_not_one_without_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIRST_PAUSE_S", 0)
    (tmp_path / "a.tar").write_bytes(b"x" * 5)
    with served(tmp_path) as url:
        Server.failing = 1
        assert paths.exists(f"{url}/a.tar")
        Server.failing = 2  # what the driver asks for a size: by HEAD, then by GET
        assert paths.look(f"{url}/a.tar").size == 5
        Server.failing = 4
        assert {place: held.size for place, held in paths.find(f"{url}/{{a,a}}.tar").items()} == {f"{url}/a.tar": 5}
        assert not paths.exists(f"{url}/none")
        with pytest.raises(FileNotFoundError):
            paths.look(f"{url}/none")
        with pytest.raises(UsageError, match="none.tar does not exist"):
            paths.find(f"{url}/none.tar")
        Server.failing = 99
        with pytest.raises(OSError, match="503.*5 times over"):
            paths.look(f"{url}/a.tar")


@pytest.mark.parametrize("root", ["s3://bucket/out", "http://127.0.0.1:8000/out", "memory://out", "/data/out", "out"])
def test_what_a_tree_says_of_its_own_folders_holds_where_it_was_copied_to(root):
    written = paths.relative("/before/out/emb", "/before/out/clu")
    assert paths.resolve(written, f"{root}/clu") == f"{root}/emb"
    assert paths.resolve(paths.relative("s3://bucket/pool", "/out/emb"), f"{root}/emb") == "s3://bucket/pool"
