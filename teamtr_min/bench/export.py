"""A run's agents for use elsewhere: LoRA adapters merged into whole checkpoints, in fp32."""

import shutil
from pathlib import Path

import torch

from teamtr_min.bench.accuracy import find_team
from teamtr_min.files import UserError, replacing
from teamtr_min.hf.lora import WEIGHTS, load_models, merge
from teamtr_min.hf.weights import ADAPTER_CONFIG, save_model


def run(team: str | None, out: str | None) -> dict:
    """Write the agents of `team`, None for the newest run, into a new directory; all of them or none."""
    found = find_team(team, {})
    if not found.sources:
        raise UserError("there is no trained team to export; train one, or name a run with --team")
    directory = Path(out or Path(found.team) / "export")
    if directory.exists():
        raise UserError(f"{directory} exists; give another --out, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    sources = [source for source in found.sources if source.is_dir()]  # a tool has none
    with replacing(directory) as aside:
        shutil.copytree(Path(found.team) / "agents", aside)
        for source in (source for source in sources if (source / ADAPTER_CONFIG).is_file()):
            model, _ = next(load_models([source], "cpu", torch.float32))
            for file in (ADAPTER_CONFIG, WEIGHTS):
                (aside / source.name / file).unlink()
            save_model(merge(model), aside / source.name)
    agents = [str(directory / source.name) for source in sources]
    return {"benchmark": "export", "team": found.team, "agents": agents}


def table(result: dict) -> str:
    return "\n".join(result["agents"])
