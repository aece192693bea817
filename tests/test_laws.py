"""The laws of the house: who imports whom, what is documented, how long a file may be."""

import ast
import itertools
import re
import sys
from pathlib import Path

import pytest

from curate.storage import schema

ROOT = Path(__file__).parent.parent
# From the ground up. A room imports itself and rooms of the lines before its own; those of one line keep apart.
# Both programs share `pipelines`, how files are read; its top level imports the standard library alone.
FLOORS = """
pipelines
curate/errors curate/words curate/processes curate/progress
curate/naming curate/faults
curate/attempts
curate/vectors
curate/storage curate/engine curate/options
curate/embed curate/cluster curate/emit
curate/ask
curate/select
curate/ingest curate/demo curate/mix curate/report
curate/run
curate/ablation
curate/command
curate/cli
curate/__main__
train/errors
train/config train/folder train/dist train/work
train/data
train/model
train/run
train/publish train/bench
train/eval
train/console
train/__main__
"""
FLOOR = {room: number for number, line in enumerate(FLOORS.split("\n")) for room in line.split()}
FILES = sorted(
    [path for package in ("curate", "train") for path in (ROOT / package).rglob("*.py")]
    + list((ROOT / "pipelines").glob("*.py"))  # the scripts in pipelines/demo are programs of their own
)
HEAVY = ("torch", "faiss", "open_clip", "transformers", "sklearn", "scipy", "ray", "jinja2", "webdataset")
MAX_LINES = 400


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def room_of(name: str) -> str:
    """`curate/select/steps/by_score` stands in the room `curate/select`; `pipelines` is one room."""
    return "pipelines" if name.startswith("pipelines/") else "/".join(name.split("/")[:2])


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """All modules that a file imports, inside functions too; `from package import name` as package.name and package."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def files_imported(path: Path) -> set[str]:
    names = {name_of(file) for file in FILES}
    found = {name.replace(".", "/") for name in imports(path)}
    return (found | {f"{name}/__init__" for name in found & {"pipelines"}}) & names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    own = room_of(name_of(path))
    if path.name == "__init__.py" and own != "pipelines":
        assert not imports(path)
        return
    assert own in FLOOR, f"give {own} a place in FLOORS"
    for other in {room_of(name) for name in files_imported(path)} - {own}:
        assert other.split("/")[0] in (own.split("/")[0], "pipelines"), (
            "curate and train meet at files and in pipelines"
        )
        assert FLOOR[other] < FLOOR[own], f"{own} imports {other}"


def test_no_files_import_each_other_in_a_circle():
    arrows = {name_of(path): files_imported(path) for path in FILES}
    while arrows:
        free = [name for name, others in arrows.items() if not others & arrows.keys() - {name}]
        assert free, f"a circle among {sorted(arrows)}"
        for name in free:
            del arrows[name]


@pytest.mark.parametrize("path", [file for file in FILES if name_of(file).startswith("curate/")], ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & set(HEAVY)


@pytest.mark.parametrize("path", [file for file in FILES if room_of(name_of(file)) == "pipelines"], ids=name_of)
def test_what_both_programs_share_needs_the_standard_library_alone(path):
    outside = {name.split(".")[0] for name in imports(path, top_level_only=True)} - sys.stdlib_module_names
    assert outside <= {"pipelines"}


def documented(section: str) -> list[tuple[str, str]]:
    text = (ROOT / "curate" / "README.md").read_text()
    body = re.split(r"^###? ", text.split(section, 1)[1], flags=re.M)[0]
    return re.findall(r"^\| (\S+) \| (\S.*?) \| ", body, flags=re.M)[1:]


@pytest.mark.parametrize(
    "section, columns",
    [("### embeddings", schema.embedding_schema(8)), ("### selection", schema.SELECTION_SCHEMA)],
)
def test_the_documented_columns_are_the_schema(section, columns):
    rows = [row for row in documented(section) if row[0] in columns.names]
    assert rows == [(field.name, str(field.type).replace("[8]", "[d]")) for field in columns]


def test_the_documented_cluster_columns_are_the_schemas():
    rows = documented("### clusters")
    expected = [(f.name, str(f.type)) for f in (*schema.CLUSTER_SCHEMA, *schema.EDGE_SCHEMA)]
    assert [row for row in rows if row[0] != "column"] == expected


def test_the_documented_statuses_are_those_that_exist():
    text = (ROOT / "curate" / "README.md").read_text()
    for status, meaning in schema.STATUSES.items():
        assert f"| {status} | {meaning} |" in text


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_no_two_files_of_tests_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]  # pytest takes them for one module
    assert sorted(set(names)) == sorted(names)


def test_the_project_names_no_machine_and_no_registry():
    words = ["/" + "work/", "pypi" + ".org", "/" + "opt/", "files.python" + "hosted"]
    roots = [path for path in ROOT.iterdir() if not path.name.startswith((".", "out", "build"))]
    for path in itertools.chain(roots, *(each.rglob("*") for each in roots if each.is_dir())):
        if path.suffix in {".py", ".md", ".toml", ".txt", ".j2"}:
            text = path.read_text(errors="replace")
            assert not [word for word in words if word in text], path
