"""The commands of the README and of the guides: run as they are written, or held against the verbs' signatures."""

import re
import shlex

import pytest
import typer

from house import ROOT, Command, parse

# In this order: the guides go on in the folder that the first one fills.
GUIDES = ("laion.md", "published_embeddings.md", "mix_695k.md", "train_bunny.md", "ray.md", "add_a_step.md", "ask.md")
ACCOUNTS = ("evidence.md", "speed.md")  # figures, each with its command
DOCS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in (*GUIDES, *ACCOUNTS))]


def blocks(name, kind):
    """Return the fenced blocks whose first line ends in a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / name).read_text(), flags=re.S | re.M)


def commands(name, kind="sh run"):
    lines = "\n".join(blocks(name, kind)).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def carry_out(line, folder):
    words = shlex.split(line)
    assert words[0] in ("curate", "python"), line
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    environment["OMP_NUM_THREADS"] = "1"
    ended = Command(*words[words[0] == "python" :], cwd=folder, env=environment)
    assert ended.wait() == 0, f"{line}\n{ended.stderr[-1500:]}"
    return ended.stdout


def folder_with_pipelines(folder):
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    return folder


def test_every_page_is_read_here_and_linked_from_the_readme():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {*GUIDES, *ACCOUNTS}
    text = (ROOT / "README.md").read_text()
    assert all(f"({name})" in text for name in DOCS[1:])
    assert len(text.splitlines()) <= 120
    assert len(commands("README.md")) >= 6


def test_the_map_names_places_that_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in re.findall(r"(?:curate|train|tests|pipelines)/[\w/.]*", text):
        assert (ROOT / path).exists(), path
    for room in re.findall(r"\*\*`([\w/]+)/`\*\*", text):
        assert (ROOT / "curate" / room).is_dir() or (ROOT / room).is_dir(), room
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*/__init__.py")}
    rooms = {room for room in rooms if room.startswith(("curate/", "train/"))}
    assert not [room for room in rooms if room not in text and f"`{room.split('/')[1]}/`" not in text]


def test_files_that_pages_name_are_there():
    pages = [*DOCS, *(f"{room}/README.md" for room in ("curate", "train", "pipelines")), "tests/bench/gpu.md"]
    for page in pages:
        text = (ROOT / page).read_text()
        for path in re.findall(r"(?<![\w/.])(?:curate|train|tests)/[\w/]+\.(?:py|json|md)\b", text):
            assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"


def test_links_lead_somewhere():
    for name in DOCS:
        for target in re.findall(r"\]\(([^)#h][^)#]*)", (ROOT / name).read_text()):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_the_commands_of_the_readme_run_as_written(tmp_path):
    for line in commands("README.md"):
        carry_out(line, tmp_path if (tmp_path / "pipelines").exists() else folder_with_pipelines(tmp_path))


def test_the_guides_run_as_written(tmp_path, demo):
    folder_with_pipelines(tmp_path)
    (tmp_path / "shards").symlink_to(demo / "pool")
    for name in GUIDES:
        for file, text in re.findall(r"^```\w+ (\S+\.\w+)\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.S | re.M):
            (tmp_path / file).write_text(text)
        told = [carry_out(line, tmp_path) for line in commands(f"docs/{name}")]
        if name == "published_embeddings.md":
            assert "119 ok" in told[-1] and "476 unmatched" in told[-1]


@pytest.mark.parametrize("name", DOCS)
def test_the_other_commands_are_commands(name):
    from curate.run import pipeline
    from train import config

    makefile = (ROOT / "Makefile").read_text()
    for line in (line for kind in ("sh check", "sh", "sh run") for line in commands(name, kind)):
        words = shlex.split(line)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), line
            assert all(re.search(rf"^{word.split('=')[0]} [?:]?=", makefile, flags=re.M) for word in words[2:]), line
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line
        elif words[0] != "pip":
            verb, values = parse(line)
            if words[0] == "curate" and verb == "run" and values["pipeline"]:
                settings = {"pool": values["pool"] or None, "recipe": values["recipe"] or None}
                pipeline.load(values["pipeline"], values["out"] or None, settings=values["settings"] or [], **settings)
            elif values.get("config"):
                config.load(values["config"], values["settings"] or [])


def test_what_is_wrong_in_a_document_would_be_noticed():
    for line in ("curate embed a b --modle x", "curate nonsense a", "python -m train align --data a --outt b"):
        with pytest.raises((typer.BadParameter, Exception), match="No such|Missing"):
            parse(line)


def test_the_step_of_the_guide_works_as_the_guide_says(tmp_path, monkeypatch):
    import test_steps
    from artefacts import write_embeddings, write_pool

    from curate.cluster.cluster import ClusterOptions, cluster
    from curate.engine import Job
    from curate.report.show_steps import step_lines
    from curate.select import catalogue
    from curate.select.select import SelectOptions, select

    [step], [test] = blocks("docs/add_a_step.md", "python step"), blocks("docs/add_a_step.md", "python test")
    names = dict(vars(test_steps))
    exec(step, names)
    monkeypatch.setitem(catalogue.STEPS, "spread", names["spread"])
    exec(test, names)
    names["test_spread_takes_every_so_many_th_rank"]()
    assert any(line.strip().startswith("spread(column, n)") and "evenly spread" in line for line in step_lines())
    quiet = Job(workers=1, quiet=True)
    emb = write_embeddings(tmp_path / "emb", write_pool(tmp_path / "pool", ["a"], 60))
    cluster(emb, str(tmp_path / "clu"), ClusterOptions(k=2), quiet)
    [line] = commands("docs/add_a_step.md", "sh step")
    _, values = parse(line)
    made = select(str(tmp_path / "clu"), str(tmp_path / "s"), SelectOptions(steps=tuple(values["steps"])), quiet)
    assert made["counts"]["kept"] == made["funnel"][-1]["estimates"]["places"] > 0


def test_every_verb_of_the_readme_and_makefile_exists():
    from curate.cli import app

    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z]+)|^make ([a-z]+)", text, flags=re.M)):
        target = "".join(target)
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    for verb in filter(None, map("".join, set(re.findall(r"`curate ([a-z]+)|^curate ([a-z]+)", text, flags=re.M)))):
        assert verb in verbs, verb
