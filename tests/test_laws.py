"""The laws of the house: who imports whom, what is documented, how long a file may be."""

import ast
import re
from pathlib import Path

import pytest

from curate import store

ROOT = Path(__file__).parent.parent
ROOMS = {
    **dict.fromkeys(["errors", "__init__"], 0),
    **dict.fromkeys(["checkpoints", "encoders", "images", "products", "kmeans", "relate", "duplicates", "evidence"], 1),
    **dict.fromkeys(["frame", "selectors", "steps", "recipes", "cuts", "demo_words", "demo_world"], 1),
    **dict.fromkeys(["contrasts", "calls", "computed", "quotas", "oddness", "coverage", "scores"], 1),
    **dict.fromkeys(["ranks", "budgets", "representatives", "targets", "phrases", "vocabulary"], 1),
    **dict.fromkeys(["paths", "records", "rules", "drawing", "texts", "arrays"], 1),
    **dict.fromkeys(["store", "shards", "engine"], 2),
    **dict.fromkeys(["layouts", "extras", "rows", "sources", "coreset", "columns", "options", "demo"], 3),
    **dict.fromkeys(["emit_tables", "spool", "accounts", "graph"], 3),
    **dict.fromkeys(["embed", "importing", "packing", "cluster", "selection", "emit", "mix"], 4),
    **dict.fromkeys(
        [
            "show",
            "report",
            "gallery",
            "exhibits",
            "movable",
            "clustermap",
            "concepts",
            "trials",
            "charts",
            "making",
            "life",
        ],
        5,
    ),
    **dict.fromkeys(["pipeline", "arms"], 6),
    **dict.fromkeys(["calibration"], 2),
    **dict.fromkeys(["estimate", "ablation"], 7),
    **dict.fromkeys(["cli", "verbs", "__main__"], 8),
}
PLAIN = ("checkpoints", "paths", "records", "rules", "drawing", "texts", "arrays")
NUMERICS = [room for room, floor in ROOMS.items() if floor == 1 and room not in PLAIN]
HEAVY = ("torch", "faiss", "open_clip", "transformers", "sklearn", "scipy", "ray", "jinja2", "webdataset")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def rooms_of(path: Path, package: str) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.") and name.count(".") >= 1}


@pytest.mark.parametrize("path", sorted((ROOT / "curate").glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    assert path.stem in ROOMS, f"give curate/{path.name} a place in ROOMS"
    assert not any(name.split(".")[0] == "train" for name in imports(path))
    for room in rooms_of(path, "curate"):
        if room in ROOMS and room != path.stem:
            same_floor = ROOMS[room] == ROOMS[path.stem] and ROOMS[room] != 4
            assert ROOMS[room] < ROOMS[path.stem] or same_floor, f"{path.stem} imports {room}"
    if path.stem in NUMERICS:
        assert not rooms_of(path, "curate") & {"paths", "store", "shards", "engine"}, "numerics take arrays"


@pytest.mark.parametrize("path", sorted((ROOT / "train").glob("*.py")), ids=lambda path: path.stem)
def test_the_trainer_never_imports_the_curator(path):
    assert not any(name.split(".")[0] == "curate" for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "curate").glob("*.py")), ids=lambda path: path.stem)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & set(HEAVY)


def documented(section: str) -> list[tuple[str, str]]:
    text = (ROOT / "curate" / "README.md").read_text()
    body = re.split(r"^###? ", text.split(section, 1)[1], flags=re.M)[0]
    return re.findall(r"^\| (\S+) \| (\S.*?) \| ", body, flags=re.M)[1:]


@pytest.mark.parametrize(
    "section, schema",
    [("### embeddings", store.embedding_schema(8)), ("### selection", store.SELECTION_SCHEMA)],
)
def test_the_documented_columns_are_the_schema(section, schema):
    rows = [row for row in documented(section) if row[0] in schema.names]
    assert rows == [(field.name, str(field.type).replace("[8]", "[d]")) for field in schema]


def test_the_documented_cluster_columns_are_the_schemas():
    rows = documented("### clusters")
    expected = [(f.name, str(f.type)) for f in (*store.CLUSTER_SCHEMA, *store.EDGE_SCHEMA)]
    assert [row for row in rows if row[0] != "column"] == expected


def test_the_documented_statuses_are_those_that_exist():
    text = (ROOT / "curate" / "README.md").read_text()
    for status, meaning in store.STATUSES.items():
        assert f"| {status} | {meaning} |" in text


def test_files_stay_small():
    for path in [*(ROOT / "curate").glob("*.py"), *(ROOT / "train").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 450, path


def test_the_project_names_no_machine_and_no_registry():
    words = ["/" + "work/", "pypi" + ".org", "/" + "opt/", "files.python" + "hosted"]
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".toml", ".txt", ".j2"} and not any(
            part.startswith((".", "out", "build")) for part in path.relative_to(ROOT).parts
        ):
            text = path.read_text(errors="replace")
            assert not [word for word in words if word in text], path
