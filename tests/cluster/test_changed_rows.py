"""`curate cluster` again on embeddings that have changed: centroids stay, what is new is assigned, edges are exact."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from clouds import draw

from curate.cli import app
from curate.cluster import cluster as stage
from curate.cluster.cluster import cluster
from curate.cluster.options import ClusterOptions
from curate.engine import Job
from curate.errors import ContractError
from curate.storage import manifest as store
from curate.storage import sidecar
from house import fingerprint, manifest

QUIET = Job(quiet=True, workers=1)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Embeddings in two states: shard 00001 is another, 00002 is gone, 00004 and 00005 are new."""
    home = tmp_path_factory.mktemp("states")
    draw(home / "all", rows=600, stems=8)
    for name, stems in {
        "old": {"00000": "00000", "00001": "00001", "00002": "00002", "00003": "00003"},
        "new": {"00000": "00000", "00001": "00007", "00003": "00003", "00004": "00004", "00005": "00005"},
    }.items():
        shards = {}
        for stem, source in stems.items():
            (home / name).mkdir(exist_ok=True)
            shutil.copy(home / "all" / f"{source}.arrow", home / name / f"{stem}.arrow")
            shards[stem] = manifest(home / "all")["shards"][source] | {"digest": source}
        (home / name / "manifest.json").write_text(json.dumps(manifest(home / "all") | {"shards": shards}))
    return home


@pytest.fixture
def home(states, tmp_path):
    shutil.copytree(states / "old", tmp_path / "emb")
    return tmp_path


def renew(states, home):
    shutil.rmtree(home / "emb")
    shutil.copytree(states / "new", home / "emb")


def arrays(folder, k=None):
    """What a clustering holds, but for how it came about."""
    found = {name.split("/", 1)[1]: value for name, value in fingerprint(folder).items()}
    return {name: value for name, value in found.items() if name not in ("manifest.json", "fit.json")}


def run(home, out="clu", job=QUIET, **options):
    return cluster(str(home / "emb"), str(home / out), ClusterOptions(**{"k": 5, "floor": 0.7} | options), job)


@pytest.mark.parametrize("neighbours", [1, 2])
def test_the_centroids_stay_and_the_rest_is_what_assigning_to_them_from_nothing_gives(states, home, neighbours):
    run(home, neighbours=neighbours)
    centroids = (home / "clu" / "centroids.npy").read_bytes()
    shutil.copy(home / "clu" / "centroids.npy", home / "kept.npy")
    renew(states, home)
    made = run(home, neighbours=neighbours)
    assert (home / "clu" / "centroids.npy").read_bytes() == centroids
    cluster(
        str(home / "emb"),
        str(home / "whole"),
        ClusterOptions(centroids=str(home / "kept.npy"), floor=0.7, neighbours=neighbours),
        QUIET,
    )
    assert arrays(home / "clu") == arrays(home / "whole")
    later = [stem for stem, shard in made["shards"].items() if shard.get("later")]
    assert later == ["00001", "00004", "00005"]
    assert made["fit"]["later_rows"] == sum(made["shards"][stem]["ok"] for stem in later)
    assert run(home, neighbours=neighbours) == made, "and now it stands"


def test_what_stands_is_read_and_not_assigned_again(states, home, monkeypatch):
    run(home)
    renew(states, home)
    assigned = []
    assign = stage.kmeans.assign
    monkeypatch.setattr(stage.kmeans, "assign", lambda x, **c: assigned.append(len(x)) or assign(x, **c))
    run(home)
    assert len(assigned) == 3


def test_as_it_is_typed(states, home, capfd):
    def call(*words):
        app([str(word) for word in words], standalone_mode=False)

    words = ["cluster", home / "emb", home / "clu", "--floor", "0.7", "--workers", 1]
    call(*words, "--k", "5")
    renew(states, home)
    capfd.readouterr()
    call(*words)  # k is the one that it has
    out, told = capfd.readouterr()
    assert "cluster: 2 new, 1 changed, 1 gone, 2 kept" in told.splitlines()
    rows = sum(manifest(home / "clu")["shards"][stem]["ok"] for stem in ("00001", "00004", "00005"))
    assert f"{rows} of " in told and "came after the centroids were fitted; that is a large share: --refit" in told
    assert "k = 5 fitted on 2" in out and f"{rows} came later" in out
    call(*words, "--refit", "--k", "4")
    out, told = capfd.readouterr()
    assert "fitted again, on the 375 rows" in told and "came later" not in out
    assert manifest(home / "clu")["options"]["k"] == 4 and "later_rows" not in manifest(home / "clu")["fit"]
    cluster(str(home / "emb"), str(home / "whole"), ClusterOptions(k=4, floor=0.7), QUIET)
    assert {name.split("/", 1)[1]: v for name, v in fingerprint(home / "clu").items()} == {
        name.split("/", 1)[1]: v for name, v in fingerprint(home / "whole").items()
    }
    before = (home / "clu" / "manifest.json").stat().st_mtime_ns
    call(*words, "--refit", "--k", "4")
    assert (home / "clu" / "manifest.json").stat().st_mtime_ns == before, "these rows are what it was fitted on"


def test_other_options_are_refused_as_ever(states, home):
    run(home)
    renew(states, home)
    with pytest.raises(ContractError, match="k=5, now k=6"):
        run(home, k=6)


@pytest.fixture
def interrupted(states, home, monkeypatch):
    """A clustering of which the centroids are there, and no shard is assigned yet."""

    def begin(**options):
        with monkeypatch.context() as cut:
            cut.setattr(stage, "_assign", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(home, **options)
        assert (home / "clu" / "centroids.npy").exists()

    return begin


def test_what_was_begun_on_other_rows_is_begun_anew_where_k_and_sample_are_left_to_it(states, home, interrupted, capfd):
    interrupted(k=0)
    renew(states, home)
    run(home, k=0, job=Job(workers=1))
    told = f"cluster: {home / 'clu'} was begun from another state of {home / 'emb'}: starting over"
    assert told in capfd.readouterr().err
    run(home, out="whole", k=0)
    assert {name.split("/")[1]: v for name, v in fingerprint(home / "clu").items()} == {
        name.split("/")[1]: v for name, v in fingerprint(home / "whole").items()
    }


@pytest.mark.parametrize("other", [{"k": 6}, {"seed": 1}, {"iters": 3}])
def test_a_refit_with_other_options_takes_no_centroids_over_from_one_that_was_cut_short(home, interrupted, other):
    interrupted()
    run(home, **other, refit=True)
    run(home, out="whole", **other)
    assert arrays(home / "clu") == arrays(home / "whole")
    assert manifest(home / "clu")["options"] == manifest(home / "whole")["options"]


def test_a_k_that_was_typed_is_refused_of_what_was_begun_on_other_rows_too(states, home, interrupted):
    interrupted()
    renew(states, home)
    with pytest.raises(ContractError, match="k=5, now k=6"):
        run(home, k=6)


def test_slices_share_it(states, home):
    run(home)
    renew(states, home)
    shutil.copytree(home / "clu", home / "sliced")
    whole = run(home)
    for _ in range(3):
        for rank in range(2):
            made = run(home, out="sliced", job=Job(quiet=True, workers=1, part=(rank, 2)))
    assert made == whole and arrays(home / "sliced") == arrays(home / "clu")


def test_a_slice_that_is_first_waits_for_what_others_scatter_of_shards_that_stand(states, home):
    """Only a shard of the second slice is another: all sidecars are there while the first slice has yet to scatter."""
    run(home)
    found = manifest(home / "emb")
    shutil.copy(states / "all" / "00007.arrow", home / "emb" / "00001.arrow")
    found["shards"]["00001"] = manifest(states / "all")["shards"]["00007"] | {"digest": "00007"}
    (home / "emb" / "manifest.json").write_text(json.dumps(found))
    first, second = (Job(quiet=True, workers=1, part=(rank, 2)) for rank in (1, 0))
    assert run(home, job=first)["unfinished"] == ["00000", "00002"]
    made = run(home, job=second)
    assert not made.get("unfinished") and made["shards"]["00001"]["later"]
    run(home, "fresh", k=0, centroids=str(home / "clu" / "centroids.npy"))
    assert arrays(home / "clu") == arrays(home / "fresh")


def test_a_run_that_ends_before_the_swap_leaves_the_state_before_and_the_next_goes_on(states, home, monkeypatch):
    run(home)
    before = arrays(home / "clu")
    renew(states, home)
    shutil.copytree(home / "clu", home / "again")
    with monkeypatch.context() as killed:
        killed.setattr(stage.edges, "join_edges", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(home)
    here = {name: value for name, value in arrays(home / "clu").items() if not name.startswith(".")}
    assert here == before and store.open_input(str(home / "clu")).stems == ["00000", "00001", "00002", "00003"]
    assert run(home) == run(home, out="again") and arrays(home / "clu") == arrays(home / "again")


def test_embeddings_made_otherwise_leave_no_assignment(states, home):
    run(home)
    written = manifest(home / "emb")
    (home / "emb" / "manifest.json").write_text(json.dumps(written | {"options": {"model": "another"}}))
    made = run(home)
    assert all(shard.get("later") for shard in made["shards"].values())


def test_what_an_older_version_began_goes_on_from_its_centroids(states, home, capfd):
    run(home, job=Job(quiet=True, workers=1, part=(0, 2)))
    for path in (home / "clu").glob("0*.arrow"):  # shards did not say what they were assigned to
        table = sidecar.table(str(path))
        sidecar.write_table(str(path), table.schema, table.to_batches(), {"rows": table.num_rows})
    (home / "clu" / ".buckets").mkdir(exist_ok=True)
    (home / "clu" / ".buckets" / "00000.arrow").write_bytes(b"as it was scattered then")
    np.save(home / "centroids.npy", np.load(home / "clu" / "centroids.npy"))
    made = cluster(str(home / "emb"), str(home / "clu"), ClusterOptions(k=5, floor=0.7), Job(workers=1))
    assert "begun by an older version: its centroids are kept" in capfd.readouterr().err
    run(home, out="whole")
    assert made == manifest(home / "whole") and arrays(home / "clu") == arrays(home / "whole")
    assert pa.ipc.open_file(home / "clu" / "edges.arrow").read_all().num_rows == made["edges"]
