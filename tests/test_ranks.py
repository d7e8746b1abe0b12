"""A run is the same for any number of processes, and ends as a whole when one of them does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import evaluate
from safetensors.torch import load_file
from several_runs import commands, together
from test_memory import SHAPES
from toy_runs import results

import train
from teamtr_min.config import Config
from teamtr_min.engine.distributed import ALONE, Ranks, join
from teamtr_min.engine.model import ModelConfig
from teamtr_min.run.memory import Needs
from teamtr_min.run.shapes import parameters
from teamtr_min.run.system import size

ROOT = Path(__file__).parents[1]
TOY = "--agents 2 --stages 3 --problems 5 --group 4 --inner-steps 2 --keep 3 --device cpu".split()
TOY += "--eval-problems 7 --lr 3e-5 --delta 8e-5".split()
EVAL = ["relay", "--problems", "5", "--k", "2", "--again", "--json"]


def torchrun(processes: int, *command: str, **options) -> subprocess.Popen:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*program, *command], cwd=ROOT, env=environment, **pipes, **options)


def stop_after(stages: int, run: Path, out: Path) -> Path:
    """A copy of the run as a kill after so many stages leaves it."""
    shutil.copytree(run, out)
    for later in range(stages + 1, 4):
        shutil.rmtree(out / "checkpoints" / f"{later:06d}", ignore_errors=True)
    shutil.rmtree(out / "agents")
    (out / "summary.json").unlink()
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """The same toy run by one process, by two and by three; and one that went on with 2, 1 and 3."""
    root = tmp_path_factory.mktemp("ranks")
    assert train.main([*TOY, "--out", str(root / "1")]) == 0
    evaluation = ["eval", *EVAL, "--team", str(root / "1")]
    said = together(2, root, commands, ["train", *TOY, "--out", str(root / "2")], evaluation)
    one = stop_after(1, root / "2", root / "2-1")
    assert train.main(["--resume", str(one)]) == 0
    three = stop_after(2, one, root / "2-1-3")
    others = ["train", *TOY, "--out", str(root / "3")], ["train", "--resume", str(three)]
    together(3, root, commands, *others)
    return {"root": root, "said": said}


def transcripts(out: Path, stage: int) -> list[dict]:
    lines = map(json.loads, (out / "transcripts.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage]


@pytest.mark.parametrize("name", ["2", "3", "2-1-3"])
def test_any_number_of_processes_trains_the_same_team(runs, name):
    """5 problems, 7 held out: uneven shares. A resume may have another number of processes, each time."""
    alone, shared = runs["root"] / "1", runs["root"] / name
    assert transcripts(shared, 0) == transcripts(alone, 0) and len(transcripts(alone, 0)) > 4
    updates = [results(out)[1] for out in (alone, shared)]
    for one, other in zip(*updates, strict=True):
        for key in ("accuracy", "return_mean", "messages", "tokens_sampled", "tokens_trained", "steps"):
            assert one[key] == other[key], key
        for key in {key for key in one if not key.startswith(("kind", "seconds"))}:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    assert any(u["steps"] == 2 for u in updates[0]) and any(u["halvings"] for u in updates[0])
    for j in range(2):
        a, b = (load_file(out / "agents" / str(j) / "model.safetensors") for out in (alone, shared))
        assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5
    assert sorted(path.name for path in (shared / "checkpoints").iterdir()) == ["000001", "000002", "000003"]


def test_checkpoints_do_not_depend_on_the_number_of_processes(runs):
    """All tensors are there: masters, and moments that several ranks kept."""
    for j in range(2):
        files = [runs["root"] / n / "checkpoints/000003" / f"learner-{j}.safetensors" for n in "123"]
        one, *others = map(load_file, files)
        assert any(name.startswith("adam.exp_avg.") for name in one)
        for other in others:
            assert one.keys() == other.keys()
            for name, x in one.items():
                torch.testing.assert_close(other[name], x, rtol=0, atol=1e-3 * x.abs().max().item())


def test_two_processes_evaluate_as_one_does_and_only_the_first_speaks(runs, capsys, monkeypatch):
    *lines, said, payload = runs["said"]
    shared = json.loads(said)
    alone = evaluate(capsys, *EVAL[:-1], "--team", str(runs["root"] / "1"))
    for key in ("avg_at_k", "pass_at_k", "avg_at_k_ci", "tokens_sampled", "team_hash", "task_hash"):
        assert shared[key] == alone[key]
    assert sum(line.startswith("stage ") for line in lines) == 3 and payload.startswith("payload ")


def test_the_bytes_of_an_update_are_those_of_docs_scale(runs):
    """4 a parameter are added up at each step, and 4 sent by who owns it; 4 a tensor say who has any."""
    payload = json.loads(runs["said"][-1].removeprefix("payload "))
    agent = runs["root"] / "2" / "agents" / "0"
    tensors = load_file(agent / "model.safetensors").values()
    n, steps = sum(x.numel() for x in tensors), sum(u["steps"] for u in results(runs["root"] / "2")[1])
    assert steps > 6
    assert payload["broadcast"] == 4 * n * steps
    assert payload["sum"] == (4 * n + 4 * len(tensors)) * steps


def row_of_scale(name: str, m: ModelConfig, processes: int) -> str:
    """As docs/scale.md has it: three agents in bf16, on one of so many GPUs."""
    n, config = parameters(m), Config(model=name, agents=3, device="cuda")
    ranks = Ranks(0, processes, processes)
    needs = Needs(config, torch.device("cuda"), 2, [m] * 3, [n] * 3, 6 * n, longest=1, ranks=ranks)
    parts = needs.weights, needs.states([0]), needs.points([0])
    cells = [name, str(processes), f"{needs.owned([0]) / 1e6:,.0f} M", *map(size, parts), size(sum(parts))]
    return f"| {' | '.join([*cells, f'{12 * n * (processes - 1) / processes / 1e9:.1f} GB'])} |"


def test_the_table_of_scale_follows_from_the_plan():
    page = (ROOT / "docs" / "scale.md").read_text()
    for name in ("qwen2.5-1.5b", "qwen2.5-7b"):
        for processes in (1, 8, 64, 512):
            assert row_of_scale(name, SHAPES[name], processes) in page


@pytest.mark.parametrize("m", [SHAPES["qwen2.5-1.5b"], SHAPES["qwen2.5-7b"]])
def test_a_plan_counts_no_fewer_moments_than_a_rank_keeps(m):
    """Against the tensors of the architecture, spread as they are in a run."""
    query, key, h, i = m.heads * m.head_dim, m.kv_heads * m.head_dim, m.hidden_size, m.intermediate_size
    layer = [h * query, h * key, h * key, query * h, query, key, key, h * i, h * i, i * h, h, h]
    tensors = [m.vocab_size * h] * (2 - m.tied) + layer * m.layers + [h]
    assert sum(tensors) == parameters(m)
    for processes in (2, 8, 64):
        ranks, loads = Ranks(0, processes), [0] * processes
        for owner, count in zip(ranks.owners(tensors), tensors):
            loads[owner] += count
        needs = Needs(Config(), torch.device("cuda"), 2, [m], [sum(tensors)], 0, longest=1, ranks=ranks)
        assert max(loads) <= needs.owned([0]) < 1.2 * max(loads)


def test_shares_are_whole_even_and_in_order():
    for processes in (1, 2, 3, 7):
        shares = [Ranks(rank, processes).share(5) for rank in range(processes)]
        assert [i for share in shares for i in share] == list(range(5))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_no_rank_owns_much_more_than_another():
    sizes = [100, 7, 7, 7, 30, 30, 50, 60, 1]
    owners = Ranks(0, 3).owners(sizes)
    loads = [sum(size for size, owner in zip(sizes, owners) if owner == rank) for rank in range(3)]
    assert loads == [100, 97, 95] and ALONE.owners(sizes) == [0] * 9


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() is ALONE and not torch.distributed.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def start(out: Path, *flags: str) -> tuple[subprocess.Popen, list[int]]:
    """torchrun with two processes in a run that would not end; their ids, once it has a checkpoint."""
    child = torchrun(2, "train.py", *TOY, "--stages", "100000", "--out", str(out), *flags, process_group=0)
    while not list(out.glob("checkpoints/[0-9]*")):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    ids = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return child, sorted(map(int, ids))


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def ending(child: subprocess.Popen, ids: list[int]) -> tuple[float, str]:
    """Seconds until the processes of the run have ended, and what was said on stderr."""
    begin = time.perf_counter()
    while not all(map(ended, ids)):
        assert time.perf_counter() - begin < 300
        time.sleep(0.1)
    seconds = time.perf_counter() - begin
    _, err = child.communicate(timeout=300)  # torchrun's own report takes a while on a busy machine
    assert child.returncode
    return seconds, err


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_dies_all_end_within_30_seconds_with_one_sentence(tmp_path, killed):
    child, ids = start(tmp_path / "run")
    os.kill(ids[killed], signal.SIGKILL)
    seconds, err = ending(child, ids)
    assert seconds < 30
    assert err.count("stopped: a process of this run has ended") == 1
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert (newest / "state.json").exists()


def test_ctrl_c_ends_all_and_the_first_still_saves_the_team(tmp_path):
    child, ids = start(tmp_path / "run")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal sends it: to torchrun and to its processes
    _, err = ending(child, ids)
    assert err.splitlines().count("interrupted") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "interrupted"
    assert (tmp_path / "run" / "agents" / "1").is_dir()


TASK = """
import os
from teamtr_min.tasks import Relay
class Fails(Relay):
    def grade(self, problem, messages):
        if os.environ.get("RANK") == "1":
            raise ValueError("no grade today")
        return super().grade(problem, messages)
task = Fails
"""


def test_an_error_on_one_process_ends_all_with_its_sentence(tmp_path):
    (tmp_path / "own.py").write_text(TASK)
    flags = [*TOY, "--task", str(tmp_path / "own.py"), "--model", "relay"]
    child = torchrun(2, "train.py", *flags, "--out", str(tmp_path / "run"))
    _, err = child.communicate(timeout=120)
    assert child.returncode and "no grade today" in err and "a process of this run has ended" not in err
