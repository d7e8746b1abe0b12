"""The command line: every field of Config as a flag."""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

from teamtr_min.config import PRESET, PRESETS, TASK_PRESETS, Config
from teamtr_min.files import UserError
from teamtr_min.hf.hub import hub_id

SHORTHANDS = {  # (flag, value) -> the fields that it stands for
    ("occupancy", "every_k"): {"occupancy": "fresh", "every": 2},
    ("kl", "none"): {"kl": "fixed", "beta": 0.0},
    ("no_advantage_clip", True): {"advantage_clip": math.inf},
}


def open_streams() -> None:
    """Output that the shell has closed (`>&-`) goes nowhere; a terminal without some character gets a `?`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the program's whole life
        getattr(sys, name).reconfigure(errors="replace")


def parse(argv: list[str] | None, description: str) -> Config:
    """The configuration of a run; anything unknown or impossible is a sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_flags(parser, [f.name for f in dataclasses.fields(Config)])
    given = expand(vars(parser.parse_args(argv)))
    config = resumed(given) if given.get("resume") else Config(**given)
    if config.temperature == 0:
        raise UserError("--temperature 0 draws the same rollout each time; a group has nothing to compare")
    if config.shard:
        whole = {"lora-rank": config.lora_rank, "diagnostics": config.diagnostics}
        whole["occupancy joint"] = config.occupancy == "joint"
        if wrong := [flag for flag, given in whole.items() if given]:
            raise UserError(f"--shard does not go together with --{wrong[0]}")
    return config


def add_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Add the flags of these fields of Config; a flag that is not given leaves no attribute behind."""
    for f in dataclasses.fields(Config):
        if f.name not in names:
            continue
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            _switch(parser, flag, f"{text} (default off)")
            continue
        shown = f.default
        if f.name in PRESETS["shipped"]:
            kinds = {"": PRESETS["shipped"], " for pretrained models": PRESETS["pretrained"]}
            kinds |= {f" on {task}": preset for task, preset in TASK_PRESETS.items() if f.name in preset}
            shown = "; ".join(f"{preset[f.name]}{kind}" for kind, preset in kinds.items())
        spellings = [value for name, value in SHORTHANDS if name == f.name]
        parser.add_argument(
            flag,
            type=f.type,
            choices=[*f.metadata["choices"], *spellings] or None,
            default=argparse.SUPPRESS,
            help=text + (f" (default {shown})" if shown not in ("", PRESET) else ""),
        )
        if f.name == "advantage_clip":
            _switch(parser, "--no-advantage-clip", "the same as --advantage-clip inf")


def _switch(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)


def expand(given: dict) -> dict:
    """The fields of Config that these flags set, shorthands written out."""
    given = dict(given)
    for (name, value), meaning in SHORTHANDS.items():
        if given.get(name) != value:
            continue
        del given[name]
        for key, meant in meaning.items():
            if given.setdefault(key, meant) != meant and key != "every":  # `every_k` leaves the k open
                flag = f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
                raise UserError(f"{flag} means --{key.replace('_', '-')} {meant:g}; leave one of them out")
    return given


def resumed(given: dict) -> Config:
    """The saved configuration of the run to resume, which flags may repeat but not change."""
    directory = given.pop("resume")
    saved, own = Config.load(Path(directory) / "config.json"), {}
    if "shard" in given:  # which changes no more than rounding
        own = {"shard": given.pop("shard")}
    if "replace" in given:  # a run of its own, and work on whole weights
        own = {"out": "", "shard": False} | {
            n: given.pop(n) for n in ("replace", "align", "out", "stages") if n in given
        }
    changed = [
        f"--{name.replace('_', '-')} {value} (the run has {getattr(saved, name)})"
        for name, value in given.items()
        if value != getattr(saved, name) and not (name == "model" and same_models(value, saved.models))
    ]
    if changed:
        raise UserError(f"--resume continues a run as it was started; not with {', '.join(changed)}")
    return dataclasses.replace(saved, resume=directory, **own)


def same_models(typed: str, pinned: list[str]) -> bool:
    """Whether a `--model` as it was first typed names these models, which carry their commits by now."""
    names = typed.split(",")
    return len(names) == len(pinned) and all(
        ours in (name.strip(), f"{hub_id(name)}@{ours.partition('@')[2]}")
        for name, ours in zip(names, pinned)
    )
