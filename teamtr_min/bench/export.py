"""A run's agents for use elsewhere: as they are, or with LoRA adapters merged into whole checkpoints."""

import shutil
from pathlib import Path

import torch

from teamtr_min.bench.accuracy import find_team
from teamtr_min.files import UserError, replacing
from teamtr_min.hf.lora import WEIGHTS, load_models, merge
from teamtr_min.hf.weights import ADAPTER_CONFIG, save_model


def run(team: str | None, whole: bool, out: str | None) -> dict:
    """Write the agents of `team`, None for the newest run, into a new directory; all of them or none.

    `whole` merges adapters, in fp32. Raises UserError where there is no trained team or no new directory.
    """
    found = find_team(team, {})
    if not found.sources:
        raise UserError("there is no trained team to export; train one, or name a run with --team")
    directory = Path(out or Path(found.team) / ("merged" if whole else "export"))
    if directory.exists():
        raise UserError(f"{directory} exists; give another --out, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    sources = [source for source in found.sources if source.is_dir()]  # a tool has none
    adapters = [source for source in sources if whole and (source / ADAPTER_CONFIG).is_file()]
    with replacing(directory) as aside:
        shutil.copytree(Path(found.team) / "agents", aside)
        for source in adapters:
            model, _ = next(load_models([source], "cpu", torch.float32))
            for file in (ADAPTER_CONFIG, WEIGHTS):
                (aside / source.name / file).unlink()
            save_model(merge(model), aside / source.name)
    agents = [str(directory / source.name) for source in sources]
    return {"benchmark": "export", "team": found.team, "agents": agents, "merged": len(adapters)}


def table(result: dict) -> str:
    agents = result["agents"]
    return "\n".join([f"{result['team']}: {len(agents)} agents, {result['merged']} merged", *agents])
