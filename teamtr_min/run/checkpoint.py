"""Exact resume: after every stage, or every `--checkpoint-every`, all that the rest of the run depends on.

    runs/NAME/checkpoints/000007/    seven stages done (steps of a warm start count as well)
        learner-0.safetensors ...    each learner's fp32 masters (with LoRA adapters alone) and Adam's state
        state.json                   betas, what the logs held by then, and checksums: of these files, of the
                                     logs, of LoRA's base, and of itself

Everything else, the problems, orders, routes and draws, is a function of the seed and the rng path (rng.py),
and the learning rate is one of the update's number. So a run that was killed repeats what came after its
newest checkpoint, to the same bits. Each checkpoint stands alone; it is written whole or not at all.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from teamtr_min.files import UserError, read_json, replacing, sealed, sha256, unsealed
from teamtr_min.learner import Diverged, Learner, Snapshot


def save(directory: Path, done: int, learners: list[Learner], log: dict, keep: int) -> None:
    """Write checkpoint number `done`, which counts warm-start steps and stages; keep the newest `keep`.

    `log` is for `load` to give back. Of several ranks the first writes what all of them hold, so that the
    files are the same for any number of them.
    Raises UserError when the disk refuses, Diverged when a weight is not finite; the checkpoints before are
    untouched then.
    """
    if not all(learner.finite for learner in learners):  # nothing measures what a warm start's last step left
        raise Diverged("a weight is not finite")
    root = directory / "checkpoints"
    if not all(learner.ranks.first for learner in learners):
        for learner in learners:
            _tensors(learner)
        return
    try:
        root.mkdir(exist_ok=True)
        with replacing(root / f"{done:06d}") as aside:
            aside.mkdir()
            for j, learner in enumerate(learners):
                save_file(_tensors(learner), aside / f"learner-{j}.safetensors")
            sums = {file.name: sha256(file) for file in sorted(aside.iterdir())}
            state = {"beta": [learner.beta for learner in learners], "log": log, "sha256": sums}
            state["bases"] = [learner.bases for learner in learners]
            (aside / "state.json").write_text(json.dumps(sealed(state), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write a checkpoint under {root}: {error}; those before it are whole, "
            f"so put this right and continue with --resume {directory}"
        ) from None
    for old in _newest_first(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def load(directory: Path, learners: list[Learner]) -> tuple[int, dict | None]:
    """Put learners where the newest whole checkpoint left them; returns (done, `log`).

    A damaged checkpoint is passed over for the one before; UserError when all are. (0, None) without any.
    """
    checkpoints = _newest_first(directory)
    for checkpoint in checkpoints:
        state = _whole(checkpoint, len(learners))
        if state is None:
            print(f"{checkpoint} is damaged; trying the one before")
            continue
        if state["bases"] != [learner.bases for learner in learners]:
            raise UserError(f"the base model of {directory} is not the one that it began with: restore it")
        for j, (learner, beta) in enumerate(zip(learners, state["beta"])):
            learner.beta = beta
            _restore(learner, load_file(checkpoint / f"learner-{j}.safetensors"))
        return int(checkpoint.name), state["log"]
    if checkpoints:
        raise UserError(
            f"every checkpoint under {directory / 'checkpoints'} is damaged, or of another version; "
            "nothing to resume from"
        )
    return 0, None


def _newest_first(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("[0-9]" * 6), reverse=True)


def _whole(checkpoint: Path, learners: int) -> dict | None:
    """The checkpoint's state if all its files are there and unchanged."""
    try:
        state = unsealed(read_json(checkpoint / "state.json"), checkpoint)
        wanted = [f"learner-{j}.safetensors" for j in range(learners)]
        whole = all(sha256(checkpoint / file) == state["sha256"][file] for file in wanted)
        whole = whole and len(state["beta"]) == learners and {"log", "bases"} <= state.keys()
        return state if whole else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _tensors(learner: Learner) -> dict[str, torch.Tensor]:
    masters, adam = {}, {}
    for name, p in zip(learner.names, learner.masters):
        masters[f"master.{name}"] = p.detach().cpu()
        adam |= {f"adam.{key}.{name}": value.cpu() for key, value in learner.optimizer.state[p].items()}
    return masters | learner.ranks.to_first(adam)


def _restore(learner: Learner, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[str, dict] = {name: {} for name in learner.names}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, moment, name = key.split(".", 2)
            state[name][moment] = value
    masters = [tensors[f"master.{name}"] for name in learner.names]
    own = [owner == learner.ranks.rank for owner in learner.owners]
    learner.restore(
        Snapshot(masters, [state[name] if mine else {} for name, mine in zip(learner.names, own)])
    )
