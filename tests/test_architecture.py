"""The house is as ARCHITECTURE.md draws it."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
SOURCES = [ROOT / "train.py", ROOT / "eval.py"]
SOURCES += [path for folder in ("kernels", "teamtr_min") for path in (ROOT / folder).rglob("*.py")]
FLOORS = re.search(r"```\n(train.py eval.py\n.*?)```", PAGE, re.DOTALL)[1].splitlines()
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def room(module: str) -> str | None:
    """`teamtr_min.run.log` is in the room `run`; None for other packages and for a package's own face."""
    first, *rest = module.split(".")
    own = {"train": "train.py", "eval": "eval.py", "kernels": "kernels", "teamtr_min": rest and rest[0]}
    return own.get(first) or None


def imports(path: Path) -> set[str]:
    """All modules that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own == "__init__":
        return
    others = {found for module in imports(path) if (found := room(module))} - {own, "files"}
    assert own in FLOOR_OF and {other for other in others if FLOOR_OF[other] <= FLOOR_OF[own]} == set()


def test_kernels_import_torch_and_triton_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        known = {*sys.stdlib_module_names, "torch", "triton", "kernels"}
        assert {module.split(".")[0] for module in imports(path)} <= known, path


def test_the_house_stays_small():
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    method = sum(count for path, count in lines.items() if path.parent == ROOT / "teamtr_min")
    assert sum(lines.values()) <= 8892 and method <= 1300 and max(lines.values()) <= 300
