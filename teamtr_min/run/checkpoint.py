"""Exact resume: after every stage, or every `--checkpoint-every`, all that the rest of the run depends on.

    runs/NAME/checkpoints/000007/    seven stages done (steps of a warm start count as well)
        learner-0.safetensors ...    each learner's fp32 masters (with LoRA adapters alone) and Adam's state
        state.json                   betas, what the logs held by then, and checksums: of these files, of the
                                     logs, of LoRA's base, and of itself

Everything else, the problems, orders, routes and draws, is a function of the seed and the rng path (rng.py),
and the learning rate is one of the update's number. So a run that was killed repeats what came after its
newest checkpoint, to the same bits; with `--weights-only`, where Adam begins anew, nearly. Each checkpoint
stands alone; it is written whole or not at all.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from teamtr_min.files import UserError, read_json, replacing, sealed, sha256, unsealed
from teamtr_min.learner import Learner, Snapshot


def save(
    directory: Path, done: int, learners: list[Learner], log: dict, keep: int, moments: bool = True
) -> None:
    """Write checkpoint number `done`, which counts warm-start steps and stages; keep the newest `keep`.

    Without `moments` a third is written, and Adam starts anew behind it: a resume is not exact then. `log`
    is for `load` to give back. Of several ranks the first writes what all of them hold, so that the files are
    the same for any number of them.
    Raises UserError when the disk refuses, Diverged when a weight is not finite; the checkpoints before are
    untouched then.
    """
    root = directory / "checkpoints"
    if not all(learner.ranks.first for learner in learners):
        for learner in learners:
            _tensors(learner, moments)
        return
    try:
        root.mkdir(exist_ok=True)
        with replacing(root / f"{done:06d}") as aside:
            aside.mkdir()
            files = [aside / f"learner-{j}.safetensors" for j in range(len(learners))]
            with ThreadPoolExecutor(1) as beside:  # reads what is written while the next one is
                hashed = []
                for file, learner in zip(files, learners):
                    save_file(_tensors(learner, moments), file)
                    hashed.append(beside.submit(sha256, file))
            sums = {file.name: future.result() for file, future in zip(files, hashed)}
            state = {"beta": [learner.beta for learner in learners], "log": log, "sha256": sums}
            state["bases"] = []
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
    checkpoints, ranks = _newest_first(directory), learners[0].ranks
    for checkpoint in checkpoints:
        state = ranks.agree(_whole(checkpoint, len(learners)) if ranks.first else None)
        if state is None:
            print(f"{checkpoint} is damaged; trying the one before")
            continue
        if False:
            raise UserError(f"the base model of {directory} is not the one that it began with: restore it")
        for j, (learner, beta) in enumerate(zip(learners, state["beta"])):
            learner.beta = beta
            _restore(learner, checkpoint / f"learner-{j}.safetensors")
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


def _tensors(learner: Learner, moments: bool) -> dict[str, torch.Tensor]:
    """All of the learner's, on the first rank; every rank has to call this."""
    masters, adam = {}, {}
    for name, p in zip(learner.names, learner.masters):
        masters[f"master.{name}"] = p.detach().cpu()
        for key, value in learner.optimizer.state[p].items() if moments else ():
            adam[f"adam.{key}.{name}"] = value.cpu()
    return masters | adam


def _restore(learner: Learner, path: Path) -> None:
    """Of each tensor what this rank keeps."""
    masters, states = [], [{} for _ in learner.names]
    with safe_open(path, "pt") as stored:
        keys = [key.split(".", 2) for key in stored.keys() if key.startswith("adam.")]
        for i, name in enumerate(learner.names):
            masters.append(stored.get_tensor(f"master.{name}"))
            if True:
                moments = [moment for _, moment, owner in keys if owner == name]
                states[i] = {m: stored.get_tensor(f"adam.{m}.{name}") for m in moments}
    learner.restore(Snapshot(masters, states))
    learner.offload()
