"""Exact resume: after every update (with `--diagnostics` every stage), all that the rest of the run depends
on.

    runs/NAME/checkpoints/000007/    seven updates done
        state.json                   progress, counters, betas, lengths of the logs, sha256 of the files
        agent-0.safetensors ...      each learner's fp32 masters and Adam's state
        rollouts.json                where later updates of the stage need them: the rollouts so far

Everything else, the problems, orders, routes and draws, is a function of the seed and the place (rng.py), and
the learning rate one of the update's number. A checkpoint is written aside, flushed to disk and renamed, so
the newest one is always whole; agents that did not change are hard links to the previous one's files.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from teamtr_min.files import UserError
from teamtr_min.learner import Learner, Point
from teamtr_min.rollout import Rollouts
from teamtr_min.tasks import Problem
from teamtr_min.team import Message, Team


@dataclass
class Progress:
    """Where a run stands: the next thing it does is update number `update` of stage `stage`."""

    stage: int = 0
    update: int = 0  # agents updated in this stage; with all of them only its closing line is missing
    rollouts: Rollouts | None = None  # of this stage, kept only while later updates train on them


def save(
    directory: Path, progress: Progress, learners: list[Learner], changed: set[int], log: dict, keep: int
):
    """Write the checkpoint of `progress` and drop all but the newest `keep`. `log` is what Run.state() gave.

    `changed` says which agents differ from the previous checkpoint. Raises UserError when the disk refuses;
    the checkpoints before are untouched then.
    """
    number = progress.stage * len(learners) + progress.update
    root = directory / "checkpoints"
    aside, final = root / f".{number:06d}.part", root / f"{number:06d}"
    previous = next(iter(_newest_first(directory)), None)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        sums = json.loads((previous / "state.json").read_text())["sha256"] if previous else {}
        for j, learner in enumerate(learners):
            file = f"agent-{j}.safetensors"
            if previous and j not in changed and file in sums:
                _link(previous / file, aside / file)
            else:
                save_file(_tensors(learner), aside / file)
                sums[file] = _sha256(aside / file)
        sums.pop("rollouts.json", None)
        if progress.rollouts is not None:
            (aside / "rollouts.json").write_text(json.dumps(_pack(progress.rollouts)))
            sums["rollouts.json"] = _sha256(aside / "rollouts.json")
        state = {
            "stage": progress.stage,
            "update": progress.update,
            "beta": [learner.beta for learner in learners],
            "log": log,
            "sha256": sums,
        }
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for file in aside.iterdir():
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"cannot write a checkpoint under {root}: {error}; the one before is whole, "
            f"so put this right and continue with --resume {directory}"
        ) from None
    for old in _newest_first(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def load(directory: Path, learners: list[Learner], team: Team, problems_of) -> tuple[Progress, dict]:
    """Put learners where the newest whole checkpoint stood; returns its progress and what Run.state() had
    given.

    `problems_of(stage)` draws a stage's problems again. A damaged checkpoint is passed over for the one
    before; a run that was stopped before its first checkpoint starts again. UserError when all are damaged.
    """
    checkpoints = _newest_first(directory)
    for checkpoint in checkpoints:
        state = _whole(checkpoint, len(learners))
        if state is None:
            print(f"{checkpoint} is damaged; trying the one before")
            continue
        for j, (learner, beta) in enumerate(zip(learners, state["beta"])):
            learner.beta = beta
            _restore(learner, load_file(checkpoint / f"agent-{j}.safetensors"))
        progress = Progress(state["stage"], state["update"])
        if (checkpoint / "rollouts.json").is_file():
            packed = json.loads((checkpoint / "rollouts.json").read_text())
            progress.rollouts = _unpack(packed, team, problems_of(progress.stage))
        return progress, state["log"]
    if checkpoints:
        raise UserError(
            f"every checkpoint under {directory / 'checkpoints'} is damaged; nothing to resume from"
        )
    if (directory / "agents").exists():  # starting again would write over what it has
        raise UserError(f"{directory} holds a trained team but no checkpoints; nothing to resume from")
    return Progress(), {}


def _newest_first(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("[0-9]" * 6), reverse=True)


def _whole(checkpoint: Path, agents: int) -> dict | None:
    """The checkpoint's state if all its files are there and unchanged."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        wanted = {f"agent-{j}.safetensors" for j in range(agents)} | set(state["sha256"])
        if all(_sha256(checkpoint / file) == state["sha256"].get(file) for file in wanted):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _tensors(learner: Learner) -> dict[str, torch.Tensor]:
    names = learner.names
    tensors = {f"master.{name}": p.detach().cpu() for name, p in zip(names, learner.masters)}
    for name, p in zip(names, learner.masters):
        tensors |= {f"adam.{key}.{name}": value.cpu() for key, value in learner.optimizer.state[p].items()}
    return tensors


def _restore(learner: Learner, tensors: dict[str, torch.Tensor]) -> None:
    names = learner.names
    state: dict[str, dict] = {name: {} for name in names}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, moment, name = key.split(".", 2)
            state[name][moment] = value
    learner.go(Point([tensors[f"master.{name}"] for name in names], [state[name] for name in names]))


def _pack(rollouts: Rollouts) -> dict:
    return {
        "messages": [[asdict(m) for m in messages] for messages in rollouts.messages],
        "returns": rollouts.returns.tolist(),
        "group_size": rollouts.group_size,
        "seconds": rollouts.seconds,
        "kept": rollouts.kept,
        "log_weight": rollouts.log_weight.tolist(),
    }


def _unpack(packed: dict, team: Team, problems: list[Problem]) -> Rollouts:
    group = packed["group_size"]
    return Rollouts(
        team=team,
        problems=[problem for problem in problems for _ in range(group)],
        messages=[[Message(**m) for m in messages] for messages in packed["messages"]],
        returns=torch.tensor(packed["returns"]),
        group_size=group,
        seconds=packed["seconds"],
        kept=packed["kept"],
        log_weight=torch.tensor(packed["log_weight"]),
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file or directory to disk: a rename must not outrun what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
