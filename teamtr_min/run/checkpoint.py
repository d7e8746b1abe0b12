"""Checkpoints: all that the rest of a run depends on, so that a run that was killed resumes to the same bits.

runs/NAME/checkpoints/000007/    after seven stages (steps of a warm start count as well)
    learner-0.safetensors ...    each learner's fp32 masters (with LoRA the adapters') and AdamW's state
    state.json                   betas, and the state of the run: lengths of its logs, results, costs
    SHA256.json                  the checksum of each of these files
"""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from teamtr_min.engine.distributed import like, whole
from teamtr_min.files import UserError, read_json, replacing, sha256, write_json
from teamtr_min.hf.weights import save_tensors
from teamtr_min.learner import Diverged, Learner, Snapshot

KEPT = 2
SUMS = "SHA256.json"


def save(directory: Path, done: int, learners: list[Learner], state: dict) -> None:
    """Write checkpoint number `done`, on disk whole or not at all, and keep the newest KEPT. All processes
    must call this: the first gathers the tensors and writes. Raises Diverged if a weight is not finite,
    OSError if the disk refuses; older checkpoints stay as they are then."""
    if not learners[0].ranks.first:
        for learner in learners:
            _tensors(learner)
        return
    with replacing(directory / "checkpoints" / f"{done:06d}") as aside:
        aside.mkdir(parents=True)
        for j, learner in enumerate(learners):
            save_tensors(_tensors(learner), aside / f"learner-{j}.safetensors")
        write_json(aside / "state.json", {"beta": [learner.beta for learner in learners], "run": state})
        write_json(aside / SUMS, {file.name: sha256(file) for file in sorted(aside.iterdir())})
    for old in _newest_first(directory)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def load(directory: Path, learners: list[Learner]) -> dict | None:
    """Restore learners from the newest undamaged checkpoint; returns its `state`, None without any. Raises
    UserError if there are checkpoints and all are damaged."""
    checkpoints, ranks = _newest_first(directory), learners[0].ranks
    for i, checkpoint in enumerate(checkpoints):
        if ranks.gather(ranks.first and _undamaged(checkpoint))[0]:  # the first rank decides
            state = read_json(checkpoint / "state.json")
            for j, learner in enumerate(learners):
                learner.beta = state["beta"][j]
                _restore(learner, checkpoint / f"learner-{j}.safetensors")
            for later in checkpoints[:i] if ranks.first else ():  # damaged, and logs are cut behind this one
                shutil.rmtree(later, ignore_errors=True)
            return state["run"]
        print(f"{checkpoint} is damaged; trying the one before", flush=True)
    if checkpoints:
        raise UserError(f"every checkpoint under {directory / 'checkpoints'} is damaged")
    return None


def _newest_first(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("[0-9]" * 6), reverse=True)


def _undamaged(checkpoint: Path) -> bool:
    try:
        return all(sha256(checkpoint / name) == value for name, value in read_json(checkpoint / SUMS).items())
    except (UserError, OSError):
        return False


def _tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """Masters and AdamW's state on the host of the first process; the others help to gather them."""
    found = {}
    for name, p in zip(learner.names, learner.masters):
        state = {f"adam.{key}.{name}": value for key, value in learner.optimizer.state[p].items()}
        for key, part in {f"master.{name}": p.detach(), **state}.items():
            tensor = whole(part)
            if key.startswith("master.") and not tensor.isfinite().all():
                raise Diverged("a weight is not finite")
            if learner.ranks.first:
                found[key] = tensor.cpu()
    return found


def _restore(learner: Learner, path: Path) -> None:
    masters, states = [], []
    with safe_open(path, "pt") as stored:
        keys = [key.split(".", 2) for key in stored.keys() if key.startswith("adam.")]
        for name, p in zip(learner.names, learner.masters):
            masters.append(like(stored.get_tensor(f"master.{name}"), p))
            own = [key for _, key, owner in keys if owner == name]
            states.append({key: like(stored.get_tensor(f"adam.{key}.{name}"), p) for key in own})
    learner.restore(Snapshot(masters, states))
    learner.offload()
