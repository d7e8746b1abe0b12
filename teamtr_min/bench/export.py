"""A run's agents for use elsewhere: as they are, or with LoRA's adapters merged into whole checkpoints."""

import shutil
from pathlib import Path

import torch

from teamtr_min.bench.accuracy import find_subject
from teamtr_min.engine.lora import load_models, merge
from teamtr_min.files import UserError, replacing
from teamtr_min.hf.chat import load_tokenizer
from teamtr_min.hf.weights import ADAPTER_CONFIG, save_model


def run(team: str | None, whole: bool, out: str | None) -> dict:
    """Write agents 0..n-1 of `team`, or of the newest run, into a new directory; all of them or none.

    `whole` merges adapters, in fp32. Raises UserError where there is no trained team or no new directory.
    """
    subject = find_subject(team, {})
    if not subject.sources:
        raise UserError("there is no trained team to export; train one, or name a run with --team")
    directory = Path(out or Path(subject.name) / ("merged" if whole else "export"))
    if directory.exists():
        raise UserError(f"{directory} exists; give another --out, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    merged = []
    with replacing(directory) as aside:
        for j, source in enumerate(subject.sources):
            if not whole or not (source / ADAPTER_CONFIG).is_file():
                shutil.copytree(source, aside / str(j))
                continue
            model, _ = next(load_models([source], "cpu", torch.float32))
            save_model(merge(model), aside / str(j))
            load_tokenizer(source).save(aside / str(j))
            merged.append(j)
    agents = [str(directory / str(j)) for j in range(len(subject.sources))]
    return {"benchmark": "export", "team": subject.name, "agents": agents, "merged": merged}


def table(result: dict) -> str:
    how = f", with the adapters of {len(result['merged'])} merged" * bool(result["merged"])
    return f"{result['team']}: {len(result['agents'])} agents{how}:\n" + "\n".join(result["agents"])
