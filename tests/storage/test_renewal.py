"""A finished directory that takes up what changed: what is compared, and a swap that leaves one state or the other."""

import json

import pyarrow as pa
import pytest

from curate.errors import ContractError
from curate.storage import paths, renewal, sidecar
from curate.storage.manifest import digest, open_input, open_output
from curate.storage.renewal import Parts
from curate.storage.tar import list_pool


def parts_of(place="here", contents=None, verify=False, **stamps):
    """What a listing shows; contents: the bytes of those files that may be read."""
    seen = {stem: (len(stem), stamp, "") for stem, stamp in stamps.items()}
    read = contents and (lambda stems: {stem: contents[stem] for stem in stems})
    return Parts(("pool",), seen, place, read, verify)


def begin(folder, parts, **more):
    pool = {"path": str(folder / "pool"), "digest": "".join(sorted(parts.seen))}
    return open_output(str(folder / "out"), "embed", {}, {"pool": pool}, parts=parts, **more)


def finish(output, parts, failed=()):
    """Make what is missing; every file says which stamp it was made of."""
    for stem in output.pending([stem for stem in parts.seen if stem not in failed]):
        with paths.atomic_write(output.path(f"{stem}.arrow")) as file:
            file.write(parts.seen[stem][1].encode())
    lost = {"failed": dict.fromkeys(failed, "broken")} if failed else {}
    shards = {stem: {"rows": 1, "digest": parts.seen[stem][1]} for stem in parts.seen if stem not in failed}
    return output.finish(shards=shards, **lost)


def state(folder):
    """Read a directory as any reader does: by its manifest, with every shard of the state that this names."""
    found = open_input(str(folder / "out"), "embed")
    for stem, shard in found.manifest["shards"].items():
        with open(found.path(f"{stem}.arrow")) as file:
            assert file.read() == shard["digest"], "a shard of another state than the manifest"
    return {stem: shard["digest"] for stem, shard in found.manifest["shards"].items()}


def files(folder):
    return sorted(path.name for path in (folder / "out").iterdir())


OLD = {"a": "1", "b": "1", "c": "1", "gone": "1"}
NEW = {"a": "1", "b": "2", "c": "1", "new": "1"}


@pytest.fixture
def finished(tmp_path):
    finish(begin(tmp_path, parts_of(**OLD)), parts_of(**OLD))
    return tmp_path


def test_what_is_new_or_changed_is_made_and_the_rest_kept(finished):
    output = begin(finished, parts_of(**NEW))
    assert not output.complete and output.why == "1 new, 1 changed, 1 gone, 2 kept"
    assert output.missing(list(NEW)) == ["b", "new"] and state(finished) == OLD
    kept = (finished / "out" / "a.arrow").stat().st_mtime_ns
    finish(output, parts_of(**NEW))
    assert state(finished) == NEW and (finished / "out" / "a.arrow").stat().st_mtime_ns == kept
    assert files(finished) == [".seen.json", "a.arrow", "b.arrow", "c.arrow", "manifest.json", "new.arrow"]
    again = begin(finished, parts_of(**NEW))
    assert again.complete and not again.why and files(finished)[-1] == "new.arrow"


@pytest.mark.parametrize(
    "now, told",
    [
        (parts_of(**OLD), ""),
        (parts_of(**OLD | {"b": "2"}), "1 changed, 3 kept"),
        (parts_of("elsewhere", **dict.fromkeys(OLD, "9")), ""),  # a copy: the times are its own, the sizes the same
        (parts_of(contents={"b": "1", "c": "1"}, **OLD | {"b": "9", "c": "9"}), "2 touched, same content"),
        (
            parts_of(contents={"b": "2", "c": "1"}, **OLD | {"b": "9", "c": "9"}),
            "1 changed, 3 kept (1 touched, same content)",
        ),
        (parts_of(contents=OLD | {"b": "2"}, verify=True, **OLD), "1 changed, 3 kept"),  # other bytes at the same time
    ],
)
def test_shards_are_compared_by_size_and_stamp_within_one_place_and_where_the_stamp_differs_by_content(
    finished, now, told
):
    output = begin(finished, now)
    assert output.why == told and output.complete == ("changed" not in told)
    if output.complete:  # what was read once need not be read again
        assert begin(finished, Parts(now.inputs, now.seen, now.place)).complete


def test_an_unfinished_directory_keeps_what_was_made_of_the_same_bytes(tmp_path):
    begin(tmp_path, parts_of(**OLD))
    for stem in OLD:
        schema = pa.schema([])
        sidecar.write_table(str(tmp_path / "out" / f"{stem}.arrow"), schema, [], {"digest": "1"})
    now = OLD | {"b": "2", "c": "9"}
    output = begin(tmp_path, parts_of(contents={"b": "2", "c": "1"}, **now))
    assert output.missing(list(now)) == ["b"]
    assert begin(tmp_path, parts_of(**now)).missing(list(now)) == ["b"], "their new time is written down"


def test_a_mended_shard_is_taken_up_and_one_that_is_as_it_was_tried_again(tmp_path):
    first = parts_of(a="1", b="1", c="1")
    finish(begin(tmp_path, first), first, failed=["b", "c"])
    output = begin(tmp_path, parts_of(a="1", b="2", c="1"))
    assert output.why == "1 changed, 1 tried again, 1 kept" and output.missing(["a", "b", "c"]) == ["b", "c"]
    finish(output, parts_of(a="1", b="2", c="1"), failed=["c"])
    assert state(tmp_path) == {"a": "1", "b": "2"}
    assert begin(tmp_path, parts_of(a="1", b="2", c="1")).why == "1 tried again, 2 kept"


def test_a_directory_of_an_older_version_is_compared_by_sizes_or_by_its_digest_alone(finished):
    (finished / "out" / ".seen.json").unlink()
    assert begin(finished, parts_of(**dict.fromkeys(OLD, "9"))).complete, "its input has the digest that it had"
    where = finished / "out" / "manifest.json"
    written = json.loads(where.read_text())
    for stem, shard in written["shards"].items():
        shard["size"] = len(stem) + (stem == "b")
    where.write_text(json.dumps(written))
    assert begin(finished, parts_of(**NEW)).why == "1 new, 1 changed, 1 gone, 2 kept"


def test_another_pool_is_refused_where_it_has_no_shard_of_it(finished):
    pool = {"path": str(finished / "other"), "digest": "x"}
    with pytest.raises(ContractError, match="other has none of its shards unchanged"):
        open_output(str(finished / "out"), "embed", {}, {"pool": pool}, parts=parts_of(z="1"))
    assert begin(finished, parts_of(z="1")).why == "1 new, 4 gone, 0 kept", "the same pool may change altogether"


def test_an_unfinished_directory_forgets_what_was_made_of_other_parts(tmp_path):
    first = begin(tmp_path, parts_of(**OLD))
    for stem in OLD:
        (tmp_path / "out" / f"{stem}.arrow").write_text("1")
    output = begin(tmp_path, parts_of(**NEW))
    assert not output.basis and output.missing(list(NEW)) == ["b", "new"]
    assert "gone.arrow" not in files(tmp_path)
    with pytest.raises(ContractError, match="another run is making"):
        first.finish(shards={})
    finish(output, parts_of(**NEW))
    assert state(tmp_path) == NEW


def test_an_interrupted_renewal_goes_on_and_what_it_made_serves_a_later_state(finished):
    output = begin(finished, parts_of(**NEW))
    for stem in ("b", "new"):
        (finished / output.path(f"{stem}.arrow")).write_text(NEW[stem])
    assert begin(finished, parts_of(**NEW)).missing(list(NEW)) == [], "the same state: all of it"
    later = NEW | {"new": "2", "d": "1"}
    again = begin(finished, parts_of(**later))
    assert again.missing(list(later)) == ["new", "d"] and again.directory != output.directory
    finish(again, parts_of(**later))
    assert state(finished) == later and not [name for name in files(finished) if name.startswith(".next")]
    with pytest.raises(ContractError, match="another run"):
        output.finish(shards={})
    assert state(finished) == later


def interrupted(monkeypatch, steps):
    """Let a swap end after so many changes of the disk, as a kill would."""
    done = []

    def counted(work):
        def call(*given):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(given)
            return work(*given)

        return call

    monkeypatch.setattr(renewal.paths, "move", counted(paths.move))
    monkeypatch.setattr(renewal.paths, "remove", counted(paths.remove))
    monkeypatch.setattr(renewal.os, "link", counted(renewal.os.link))


@pytest.mark.parametrize("steps", range(9))
@pytest.mark.parametrize("reader", [True, False])
def test_a_kill_at_any_step_leaves_one_state_or_the_other(finished, monkeypatch, steps, reader):
    output = begin(finished, parts_of(**NEW))
    with monkeypatch.context() as killed:
        interrupted(killed, steps)
        try:
            finish(output, parts_of(**NEW))
            assert steps == 8
        except KeyboardInterrupt:
            pass
    if reader:
        assert state(finished) == (OLD if steps == 0 else NEW)
    again = begin(finished, parts_of(**NEW))
    assert again.complete == (steps > 0) and again.missing(list(NEW)) == []
    if not again.complete:
        finish(again, parts_of(**NEW))
    assert state(finished) == NEW
    assert files(finished) == [".seen.json", "a.arrow", "b.arrow", "c.arrow", "manifest.json", "new.arrow"]


def test_two_runs_of_the_same_end_alike_and_of_others_one_is_refused(finished):
    first, second = (begin(finished, parts_of(**NEW)) for _ in range(2))
    finish(first, parts_of(**NEW))
    assert second.overtaken() and second.manifest["shards"].keys() == NEW.keys()
    assert finish(second, parts_of(**NEW)) == first.manifest and state(finished) == NEW
    (one, other) = begin(finished, parts_of(**OLD)), parts_of(**NEW | {"d": "1"})
    finish(begin(finished, other), other)
    with pytest.raises(ContractError, match="another run"):
        finish(one, parts_of(**OLD))
    assert state(finished) == NEW | {"d": "1"}


@pytest.mark.parametrize("last", ["_refuse_meanwhile", "save_seen", "link"])
def test_a_run_that_ends_just_after_another_of_the_same_takes_nothing_away(finished, monkeypatch, last):
    """Slices of one embedding end together: the later one must not delete what the earlier has brought in place."""
    late, fast = (begin(finished, parts_of(**NEW)) for _ in range(2))
    place, name = (renewal.os, "link") if last == "link" else (late, last)
    work = getattr(place, name)

    def overtaken(*given):
        monkeypatch.setattr(place, name, work)
        finish(fast, parts_of(**NEW))
        return work(*given)

    monkeypatch.setattr(place, name, overtaken)
    assert finish(late, parts_of(**NEW)) == fast.manifest
    assert state(finished) == NEW and begin(finished, parts_of(**NEW)).complete
    assert files(finished) == [".seen.json", "a.arrow", "b.arrow", "c.arrow", "manifest.json", "new.arrow"]


def test_a_swap_that_was_decided_on_another_state_is_void(finished):
    output = begin(finished, parts_of(**NEW))
    decided = {"folder": paths.name(output.directory), "basis": "other", "target": "x", "drop": ["a.arrow"]}
    renewal.save_json(str(finished / "out" / renewal.SWAP), decided)
    assert state(finished) == OLD and renewal.SWAP not in files(finished)


def test_a_directory_between_two_states_that_may_not_be_written_to_says_so(finished, monkeypatch):
    (finished / "out" / renewal.SWAP).write_text("{}")
    monkeypatch.setattr(
        renewal, "_carry_out", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ContractError, match="half-way through an update"):
        open_input(str(finished / "out"))


def test_without_parts_all_is_made_anew_in_place_when_an_input_has_changed(tmp_path):
    def make(digest, stems):
        source = {"path": str(tmp_path / "clu"), "digest": digest}
        output = open_output(str(tmp_path / "out"), "embed", {}, {"clusters": source})
        made = not output.complete
        if made:
            for stem in stems:
                (tmp_path / "out" / output.path(f"{stem}.arrow")).write_text(digest)
            (tmp_path / "out" / output.path("images/x.jpg")).parent.mkdir(exist_ok=True)
            (tmp_path / "out" / output.path(f"images/{digest}.jpg")).write_text("")
            output.finish(shards={stem: {"rows": 1, "digest": digest} for stem in stems})
        return made, output.why

    assert make("one", "ab") == (True, "") and make("one", "ab") == (False, "")
    (tmp_path / "out" / "notes.md").write_text("mine")
    made, why = make("two", "bc")
    assert made and "clu has changed since" in why and "made anew in place" in why
    assert state(tmp_path) == {"b": "two", "c": "two"}
    assert files(tmp_path) == ["b.arrow", "c.arrow", "images", "manifest.json", "notes.md"]
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["two.jpg"]


def test_an_unfinished_directory_of_another_state_is_begun_anew(tmp_path):
    source = {"path": str(tmp_path / "clu"), "digest": "one"}
    open_output(str(tmp_path / "out"), "select", {}, {"clusters": source})
    (tmp_path / "out" / "a.arrow").write_text("one")
    output = open_output(str(tmp_path / "out"), "select", {}, {"clusters": source | {"digest": "two"}})
    assert "starting over" in output.why and output.missing(["a"]) == ["a"]


def test_an_input_that_changes_meanwhile_is_noticed_before_anything_is_finished(finished):
    emb = open_input(str(finished / "out"))
    output = open_output(str(finished / "clu"), "cluster", {}, {"embeddings": emb})
    finish(begin(finished, parts_of(**NEW)), parts_of(**NEW))
    with pytest.raises(ContractError, match="out has changed while .*clu was being made from it"):
        output.finish(shards={})
    assert not (finished / "clu" / "manifest.json").exists()


def test_a_swap_works_where_names_cannot_be_linked_and_on_a_url(finished, monkeypatch):
    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(renewal.os, "link", no_links)
    finish(begin(finished, parts_of(**NEW)), parts_of(**NEW))
    assert state(finished) == NEW
    place = "memory://renewal/out"
    for stamps in (OLD, NEW):
        now = parts_of(**stamps)
        output = open_output(place, "embed", {}, {"pool": {"path": "memory://pool", "digest": "d"}}, parts=now)
        for stem in output.missing(list(stamps)):
            with paths.atomic_write(output.path(f"{stem}.arrow")) as file:
                file.write(stamps[stem].encode())
        output.finish(shards={stem: {"rows": 1} for stem in stamps})
    assert {stem: paths.read_text(f"{place}/{stem}.arrow") for stem in NEW} == NEW
    assert paths.listdir(place) == [".seen.json", "a.arrow", "b.arrow", "c.arrow", "manifest.json", "new.arrow"]


def test_a_pool_that_a_verb_was_cut_short_at_is_refused_or_finished_first(tmp_path):
    """A coreset or mix of which half is there must not pass for a whole one."""
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).touch()
    (tmp_path / ".plan.json").write_text('{"command": "mix"}')
    for pool in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(ContractError, match="is unfinished") as refused:
            list_pool(str(pool))
        assert "re-run the `curate mix …` that made it" in str(refused.value)
    (tmp_path / "manifest.json").write_text('{"state": 1}')
    assert [shard.stem for shard in list_pool(str(tmp_path))] == ["0", "1"]
    later = tmp_path / ".next-1"
    later.mkdir()
    (later / "2.tar").touch()
    for name in ("manifest.json", ".seen.json"):
        (later / name).write_text('{"state": 2}')
    basis, target = (digest({"state": number}) for number in (1, 2))
    decided = {"folder": ".next-1", "basis": basis, "target": target, "drop": ["1.tar"]}
    (tmp_path / ".swap.json").write_text(json.dumps(decided))
    assert [shard.stem for shard in list_pool(str(tmp_path))] == ["0", "2"]
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        ".plan.json",
        ".seen.json",
        "0.tar",
        "2.tar",
        "manifest.json",
    ]
