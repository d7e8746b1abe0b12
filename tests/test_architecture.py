"""The house is what ARCHITECTURE.md says: who imports whom, and what each letter of a shape means."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
FILES = [path for folder in ("kernels", "teamtr_min") for path in (ROOT / folder).rglob("*.py")]
SOURCES = [ROOT / "train.py", ROOT / "eval.py", *FILES]
FLOORS = [line.split() for line in re.search(r"```\n(eval.*?)```", PAGE, flags=re.DOTALL)[1].splitlines()]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LETTERS = dict(re.findall(r"\| ([A-Z]) \| ([^|]+?) (?=\|)", PAGE))


def room(module: str) -> str | None:
    """`teamtr_min.run.metrics` is in the room `run`; None for a package's face and for others' modules."""
    parts = module.split(".")
    if parts[0] in ("train", "eval"):
        return f"{parts[0]}.py"
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if parts[0] == "teamtr_min" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    """Rooms that a file imports, also from within functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {found for module in modules if (found := room(module))}


def own_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_room_stands_on_a_floor():
    rooms = {room(own_module(path)) for path in SOURCES} - {"__init__", None}
    assert rooms == set(FLOOR_OF)


@pytest.mark.parametrize("path", SOURCES, ids=own_module)
def test_imports_only_point_downward(path):
    own = room(own_module(path))
    if own == "__init__":
        return  # the face of teamtr_min hands names on, when asked
    wrong = [other for other in imports(path) if other != own and FLOOR_OF[other] <= FLOOR_OF[own]]
    assert not wrong, f"{own} imports {wrong}, which ARCHITECTURE.md does not put below it"


def test_kernels_import_torch_and_triton_alone():
    known = {*sys.stdlib_module_names, "torch", "triton", "kernels"}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {module.split(".")[0] for module in modules} <= known, path


@pytest.mark.parametrize("module", ["config", "cli", "files"])
def test_the_command_line_needs_no_torch(module):
    code = f"import sys, teamtr_min.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def comments(path: Path) -> str:
    """All comments and docstrings of a file."""
    text = path.read_text()
    found = [
        t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            found.append(ast.get_docstring(node) or "")
    return "\n".join(found)


@pytest.mark.parametrize("path", SOURCES, ids=own_module)
def test_each_letter_of_a_shape_is_in_the_glossary(path):
    """(B, T, H) and the like; letters that are marked as theory's stand nowhere else."""
    theory = {"theory", "studies"} & set(path.parts)
    allowed = {letter for letter, meaning in LETTERS.items() if theory or "theory only" not in meaning}
    shapes = re.findall(r"\(((?:[A-Za-z0-9 *+/]+, ?)+[A-Za-z0-9 *+/]*)\)", comments(path))
    shapes = [shape for shape in shapes if re.search(r"(^|, )[A-Z](,|$)", shape)]
    letters = {word for shape in shapes for word in re.findall(r"\b[A-Z]\b", shape)}
    assert letters <= allowed, f"{sorted(letters - allowed)} in {path.name}"
