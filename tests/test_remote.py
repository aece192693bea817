"""Pools and outputs on S3: a real S3 server on loopback (moto's), undisturbed and behind a proxy that breaks things."""

import itertools
import logging
import threading
import time

import pytest
import tiny_clip
from artefacts import write_pool
from proxied import Proxy

from curate.cluster.cluster import ClusterOptions, cluster
from curate.embed.embed import EmbedOptions, embed
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job
from curate.errors import UsageError
from curate.select.select import SelectOptions, select
from curate.storage import paths, tar

pytest.importorskip("s3fs", reason="needs an S3 driver: pip install 's3fs' 'moto[s3]' flask flask-cors")
pytest.importorskip("flask_cors", reason="needs an S3 server: pip install 's3fs' 'moto[s3]' flask flask-cors")
moto = pytest.importorskip("moto.server", reason="needs an S3 server: pip install 's3fs' 'moto[s3]' flask flask-cors")
QUIET = Job(workers=1, quiet=True)


@pytest.fixture(scope="module")
def proxy():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    made = Proxy(server.get_host_and_port())
    yield made
    made.shutdown()
    server.stop()


@pytest.fixture
def bucket(proxy, monkeypatch):
    """An empty bucket behind the proxy, as a location; readers give up on a silent server after a second."""
    import s3fs

    patience = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 0}}}
    monkeypatch.setattr("fsspec.config.conf", {"s3": patience})
    monkeypatch.setattr(paths, "FIRST_PAUSE_S", 0.05)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.faults = lambda method, path: None
    proxy.seen.clear()
    name = f"pool{time.monotonic_ns()}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A small pool on disk, a model, and what the pipeline makes of it there."""
    home = tmp_path_factory.mktemp("here")
    write_pool(home / "pool", ["00000", "00001"], 12)
    model = tiny_clip.write(home / "model")
    walk(str(home), str(home / "pool"), model)
    return home, model


def walk(home, pool, model):
    embed(pool, f"{home}/emb", EmbedOptions(model), QUIET)
    cluster(f"{home}/emb", f"{home}/clu", ClusterOptions(k=3, floor=0.5), QUIET)
    select(f"{home}/clu", f"{home}/sel", SelectOptions(steps=("sample(10)",)), QUIET)
    emit(f"{home}/sel", f"{home}/out", EmitOptions(shard_size=4), QUIET)
    emit(f"{home}/sel", f"{home}/llava", EmitOptions(format="llava", shard_size=4), QUIET)


def upload(home, bucket):
    import s3fs

    s3fs.S3FileSystem().put(f"{home}/pool", f"{bucket}/pool", recursive=True)


def content(bucket, folder):
    """Download what a folder of the bucket holds."""
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    return {name.split(f"{folder}/", 1)[1]: fs.cat_file(name) for name in fs.find(f"{bucket}/{folder}")}


def same_files(home, bucket):
    """Compare all but what names the pool: manifests hold the location of their inputs, as a digest too."""
    for folder in ("emb", "clu", "sel", "out", "llava"):
        there = content(bucket, folder)
        on_disk = {str(path.relative_to(home / folder)) for path in (home / folder).rglob("*") if path.is_file()}
        assert set(there) == on_disk - {"log.jsonl"}
        for name, data in there.items():
            if name not in ("manifest.json", ".plan.json", ".seen.json", "fit.json"):
                assert data == (home / folder / name).read_bytes(), f"{folder}/{name}"


def test_the_whole_road_on_s3_leaves_the_files_of_a_local_run(here, bucket, proxy):
    """And the pool is listed once by each verb that reads it, no tar or table beside it is asked for its size."""
    home, model = here
    upload(home, bucket)
    asked = []
    proxy.faults = lambda method, path: asked.append((method, path))
    walk(bucket, f"{bucket}/pool", model)
    proxy.faults = lambda method, path: None
    same_files(home, bucket)
    of_pool = [(method, path) for method, path in asked if "/pool/" in path or "prefix=pool%2F&" in path]
    assert sum("list-type" in path for _, path in of_pool) == 3  # embed, and two emits
    assert {method for method, _ in of_pool} == {"GET"}


def test_faults_on_the_way_are_outlived(here, bucket, proxy):
    """Of the requests that are made for the first time, many meet a 503, a cut connection or silence."""
    home, model = here
    upload(home, bucket)
    turn, met = itertools.cycle(["slow", *["503", None, "cut", None] * 12]), {}
    lock = threading.Lock()

    def faults(method, path):
        with lock:
            first = (method, path) not in met
            return met.setdefault((method, path), next(turn)) if first else None

    proxy.faults = faults
    walk(bucket, f"{bucket}/pool", model)
    proxy.faults = lambda method, path: None
    assert proxy.seen["503"] >= 10 and proxy.seen["cut"] >= 10 and proxy.seen["slow"] >= 2
    same_files(home, bucket)


def test_a_server_that_stays_broken_is_given_up_in_one_line(bucket, proxy, monkeypatch):
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)  # it waits between its own tries as well, and longer each time
    proxy.faults = lambda method, path: "503"
    before = time.monotonic()
    with pytest.raises(OSError, match="times over"):
        paths.read_bytes(f"{bucket}/none")
    assert time.monotonic() - before < 60


def test_an_upload_appears_whole_or_not_at_all(bucket):
    with pytest.raises(RuntimeError), paths.atomic_write(f"{bucket}/half") as file:
        file.write(b"x" * 9_000_000)
        raise RuntimeError
    assert not paths.exists(f"{bucket}/half") and paths.listdir(bucket) == []
    with paths.atomic_write(f"{bucket}/whole") as file:
        file.write(b"words")
    assert paths.read_text(f"{bucket}/whole") == "words" and paths.size(f"{bucket}/whole") == 5
    with paths.local_copy(f"{bucket}/whole") as path, open(path) as copy:
        assert copy.read() == "words"


def test_remote_pools_are_listed_by_folder_glob_and_braces(here, bucket):
    home, _ = here
    upload(home, bucket)
    for pattern in ("", "/*.tar", "/{00000..00001}.tar"):
        assert [shard.stem for shard in tar.list_pool(f"{bucket}/pool{pattern}")] == ["00000", "00001"]
    assert tar.list_pool(f"{bucket}/pool/00001.tar")[0].size == (home / "pool" / "00001.tar").stat().st_size
    for pattern in ("/{00000..00002}.tar", "/00009.tar", "s"):
        with pytest.raises(UsageError, match="does not exist"):
            tar.list_pool(f"{bucket}/pool{pattern}")
