"""The architecture: imports inside compat run one way, room by room, and never in a circle.

The docstrings of compat and ci are tested too: each opens with what it is about, or with a verb.
"""

import ast
import graphlib
import re
from importlib import import_module
from pathlib import Path

import pytest

import compat

ROOT = Path(compat.__file__).parents[1]
# A room may import from the lines below its own, and in its own line only from itself.
ORDER = [
    {"__main__"},
    {"jobs"},
    {"default_model"},
    {"hooks"},
    {"stream"},
    {"families"},
    {"installed", "ops"},
    {"errors"},
]
PUBLIC = ["compat", "compat.errors", "compat.ops"]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in (ROOT / "compat").rglob("*.py")}


def imports(path):
    """Return the modules of compat that a file imports, at any depth, but not for types alone."""
    found, waiting = set(), [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name and name in MODULES}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def room(name):
    return name.split(".")[1] if "." in name else name


def test_every_folder_is_a_room_in_the_order():
    rooms = {room(name) for name in MODULES} - {"compat"}
    assert rooms == set().union(*ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    level = {each: place for place, rooms in enumerate(ORDER) for each in rooms}
    own = room(name)
    for other in {room(other) for other in GRAPH[name]} - {own, "compat"}:
        assert own != "compat", "the package itself imports what it is asked for, when it is"
        assert level[other] > level[own], f"{name} imports {other}"


def test_no_circle():
    list(graphlib.TopologicalSorter(GRAPH).static_order())


def users():
    return [*MODULES.values(), *(ROOT / "ci").rglob("*.py"), ROOT / "noxfile.py"]


@pytest.mark.parametrize("path", users(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_outside_imports_a_rooms_own_modules(path):
    own = room(name_of(path)) if path in MODULES.values() else None
    for name in imports(path) - set(PUBLIC):
        if room(name) == own or name.count(".") < 2:
            continue
        face = getattr(import_module(f"compat.{room(name)}"), "__all__", [])
        assert name.split(".")[2] in face, f"{path} imports {name}"


def test_what_is_public_is_there():
    for name in ["compat", "compat.errors", "compat.ops"]:
        module = import_module(name)
        for public in module.__all__:
            assert f"{name}.{public}" in MODULES or hasattr(module, public)
    assert sorted(compat.__all__) == compat.__all__ == dir(compat)


@pytest.mark.parametrize("name", ["families", "hooks", "installed", "jobs", "stream"])
def test_a_rooms_face_is_there(name):
    face = import_module(f"compat.{name}").__all__
    assert all(f"compat.{name}.{module}" in MODULES for module in face)


# A docstring that opens so has to be read twice.
QUESTION = re.compile(r"(What|That|Whether|Why|How|Where|Which|While|The same)\b")


@pytest.mark.parametrize("path", users(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_their_subject(path):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    found = [text.partition("\n")[0] for text in texts if QUESTION.match(text)]
    assert not found
