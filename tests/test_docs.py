"""What the documentation prints is what the program computes. `python -m tests.test_docs` prints it anew."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from teamtr_min.occupancy import update_order

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK, TRANSCRIPT = ROOT / "docs/walkthrough.ipynb", ROOT / "docs/transcript.md"

BETWEEN = "\n---- next cell ----\n"

# Run after the notebook's cells: each prints one block of transcript.md.
BLOCKS = [
    "team = load_team(config, task.roles(3)); message = collect(team, task, problems, 4, path).messages[0]\n"
    "show_tokens(team, 0, problems[0], message)",
    "show_tokens(team, 1, problems[0], message)",
    "show_tokens(team, 2, problems[0], message)",
    """
config = Config(agents=2, rounds=2, max_new_tokens=4, problems=1, seed=6, device="cpu")
task = load_task(config)
team = load_team(config, task.roles(2))
problems = task.sample_problems(1, rng.generator(6, "problems", 0))
rollouts = collect(team, task, problems, config.group, rng.RngPath(6, "train", 0, 0))
show_tokens(team, 0, problems[0], rollouts.messages[0])
""",
]
BLOCK = re.compile(r"^```text\n(.*?)^```$", re.M | re.S)
MEASURED = re.compile(r"-?\d+\.\d{3,}")  # settings have fewer decimals, or none


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(sources: list[str], directory: Path) -> list[str]:
    """What each source prints when all run one after the other, as one program in this directory."""
    program = f"\nprint({BETWEEN!r}, end='')\n".join(sources)
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, text=True, cwd=directory, capture_output=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return child.stdout.split(BETWEEN)


def recompute() -> tuple[dict, list[str], list[str]]:
    """The notebook, what its code cells print now, and the blocks of transcript.md."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    printed = run(sources + BLOCKS, NOTEBOOK.parent)
    return notebook, printed[: len(sources)], printed[len(sources) :]


def assert_same(committed: str, printed: str) -> None:
    """Exactly the same, except for the width of columns and one unit in a measured number's last digit."""
    for old, new in zip(committed.splitlines(), printed.splitlines(), strict=True):
        assert MEASURED.sub("x", old).split() == MEASURED.sub("x", new).split()
        for a, b in zip(MEASURED.findall(old), MEASURED.findall(new)):
            unit = 10.0 ** -len(a.partition(".")[2])
            assert float(b) == pytest.approx(float(a), rel=0, abs=1.01 * unit), (old, new)


@pytest.fixture(scope="module")
def recomputed():
    return recompute()


def test_the_notebook_prints_what_it_shows(recomputed):
    notebook, printed, _ = recomputed
    assert len(printed) > 10
    for cell, text in zip(code_cells(notebook), printed, strict=True):
        assert_same("".join(line for output in cell["outputs"] for line in output["text"]), text)


def test_the_notebook_also_starts_in_the_root():
    first = code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))[0]
    run(["".join(first["source"])], ROOT)


def test_a_run_begins_with_the_notebooks_numbers(capsys, monkeypatch, tmp_path):
    """The command and the line that the notebook's last cell quotes; the run stops after that stage."""

    def one_stage(config, stage):
        if stage:
            raise KeyboardInterrupt
        return update_order(config, stage)

    monkeypatch.setattr(train, "update_order", one_stage)
    last = "".join(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"][-1]["source"])
    command, line = (
        re.search(r"python train.py (.*)$", last, re.M)[1],
        re.search(r"^stage .*$", last, re.M)[0],
    )
    assert train.main([*command.split(), "--eval-problems", "1", "--out", str(tmp_path / "run")]) == 130
    assert line in capsys.readouterr().out


def test_the_transcripts_are_the_teams(recomputed):
    for committed, printed in zip(BLOCK.findall(TRANSCRIPT.read_text()), recomputed[2], strict=True):
        assert committed == printed


if __name__ == "__main__":
    notebook, printed, blocks = recompute()
    for count, (cell, text) in enumerate(zip(code_cells(notebook), printed), start=1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell |= {"execution_count": count, "outputs": [stream] if text else []}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    blocks = iter(blocks)
    TRANSCRIPT.write_text(BLOCK.sub(lambda _: f"```text\n{next(blocks)}```", TRANSCRIPT.read_text()))
