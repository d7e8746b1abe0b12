"""Every knob, once: a flat dataclass -> command-line flags -> saved with the run as config.json."""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from teamtr_min.files import UserError
from teamtr_min.hf.hub import hub_id

SHIPPED = ("relay", "convention")  # tasks that bring a small model, of the same name


def knob(default, help: str, *, choices: tuple[str, ...] = (), pretrained=None):
    """A field with its help line. `pretrained` is the default for any model but the shipped one."""
    return field(default=default, metadata={"help": help, "choices": choices, "pretrained": pretrained})


@dataclass(frozen=True)
class Config:
    # the team
    model: str = knob(
        "relay",
        "a directory, an alias (qwen2.5-1.5b, ...) or a hub id org/name[@revision], fetched when it is new; "
        "a comma-separated list gives each agent its own; --task convention brings one",
    )
    agents: int = knob(3, "number of agents, n")
    rounds: int = knob(1, "turns per agent in one rollout")
    router: str = knob(
        "round-robin", "who speaks next: round-robin, random, or FILE.py with a function `router`"
    )
    # the task
    task: str = knob("relay", "relay, convention, gsm8k, jsonl, or FILE.py with a function `task`")
    data: str = knob("", "JSONL file of problems, or a directory with train.jsonl and test.jsonl")
    question_field: str = knob("question", "field of the JSONL that holds the problem")
    answer_field: str = knob("answer", "field of the JSONL that holds the answer")
    problems: int = knob(64, "problems per batch, P", pretrained=32)
    group: int = knob(8, "rollouts per problem, G: the group that Eq. 9 compares")
    temperature: float = knob(1.0, "of sampling, and of every log-prob", pretrained=0.8)
    max_new_tokens: int = knob(16, "longest message, in tokens", pretrained=256)
    # Algorithm 1
    stages: int = knob(50, "stages; each updates every agent once")
    occupancy: str = knob(
        "fresh",
        "when to sample: fresh, before every update; every_k, before every k-th; stale, once per stage; "
        "importance, once, and reweighted; joint, once, for one update of all agents together",
        choices=("fresh", "every_k", "stale", "importance", "joint"),
    )
    every: int = knob(2, "the k of every_k")
    resample: str = knob(
        "full",
        "what to sample again within a stage: whole rollouts, or of each only what follows the first turn "
        "of an agent that has changed",
        choices=("full", "suffix"),
    )
    order: str = knob(
        "fixed",
        "update order within a stage; random draws one per stage",
        choices=("fixed", "reversed", "random"),
    )
    inner_steps: int = knob(6, "most optimizer steps in one update")
    lr: float = knob(5e-4, "peak learning rate of AdamW; cosine decay to 0 over the run", pretrained=1e-6)
    # Eq. 9
    advantage_clip: float = knob(2.0, "bound on the normalised advantage; inert above sqrt(G-1)")
    eps_norm: float = knob(1e-6, "added to the variance of a group's returns")
    no_group_norm: bool = knob(False, "leave advantages in units of the return")
    no_advantage_clip: bool = knob(False, "leave advantages unbounded")
    # Eq. 10
    clip: float = knob(0.2, "epsilon of the ratio clip")
    ratio: str = knob(
        "message",
        "product over the message, its geometric mean, or per token",
        choices=("message", "mean", "token"),
    )
    beta: float = knob(1e-3, "weight of the KL penalty, at first or with `--kl fixed` always; 0 for none")
    # Eq. 11
    kl: str = knob(
        "hard",
        "hard: enforce the radius, penalty adapted to it; adaptive, fixed: only the penalty; none: neither",
        choices=("hard", "adaptive", "fixed", "none"),
    )
    delta: float = knob(
        0.02, "radius: most KL of one update, in nats per `kl-unit`; inf for none", pretrained=0.01
    )
    kl_estimator: str = knob(
        "k3",
        "what the radius is enforced on; all are logged that were computed",
        choices=("k1", "k3", "exact"),
    )
    kl_unit: str = knob("message", "sum over a message's tokens, or mean", choices=("message", "token"))
    # the run
    seed: int = knob(0, "decides every draw of the run")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = knob(
        "auto",
        "compute dtype over fp32 masters; auto: bf16 on a GPU, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    batch_tokens: int = knob(
        4096, "tokens per training forward; bounds memory, changes no result", pretrained=16384
    )
    batch_rows: int = knob(2048, "rollouts sampled at once; bounds memory, changes no result")
    eval_problems: int = knob(2048, "held-out problems for accuracy_start and accuracy_final", pretrained=128)
    eval_every: int = knob(0, "also measure held-out accuracy every so many stages; 0 for never")
    diagnostics: bool = knob(
        False, "estimate stale gap, occupancy shift and lower bounds of each update on rollouts of their own"
    )
    keep: int = knob(2, "checkpoints to keep, an update apart, or with diagnostics a stage")
    out: str = knob("", "directory for everything the run writes; default runs/<task>-<agents>x-<time>")
    resume: str = knob("", "directory of a run to continue, bit for bit, from its newest checkpoint")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"{f.name} is {value!r}; it must be of the kind of {f.default!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not value >= least:  # also catches NaN
                raise UserError(f"--{name.replace('_', '-')} is {value}; the least possible value is {least}")
        for name in ("lr", "temperature", "clip", "eps_norm", "beta"):
            if math.isinf(getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')} must be finite")
        if self.beta and not 1e-4 <= self.beta <= 1:
            raise UserError(f"--beta is {self.beta:g}; it lives between 1e-4 and 1, or is 0 for no penalty")
        if self.delta == 0:
            raise UserError("--delta 0 allows no change at all; give a positive radius, or inf for none")
        for f in dataclasses.fields(self):
            if f.metadata["choices"] and getattr(self, f.name) not in f.metadata["choices"]:
                wanted = ", ".join(f.metadata["choices"])
                raise UserError(
                    f"--{f.name.replace('_', '-')} {getattr(self, f.name)!r} is not one of: {wanted}"
                )
        if self.resample == "suffix" and self.occupancy not in ("fresh", "every_k"):
            raise UserError(f"--resample suffix: with --occupancy {self.occupancy} nothing is sampled again")
        if len(self.models) not in (1, self.agents):
            raise UserError(
                f"--model names {len(self.models)} models for {self.agents} agents; "
                "give one, or one per agent"
            )

    @property
    def models(self) -> list[str]:
        return [name.strip() for name in self.model.split(",")]

    def uses(self, model: str) -> bool:
        """Whether a `--model` as it was first typed names these models, which carry their commits by now."""
        given = model.split(",")
        return len(given) == len(self.models) and all(
            ours in (name.strip(), f"{hub_id(name)}@{ours.partition('@')[2]}")
            for name, ours in zip(given, self.models)
        )

    @property
    def turns(self) -> int:
        return self.agents * self.rounds

    @property
    def radius(self) -> float:
        """What Eq. 11 is enforced on; `delta` alone is what violations are counted against."""
        return self.delta if self.kl == "hard" else math.inf

    @property
    def advantage_bound(self) -> float:
        return math.inf if self.no_advantage_clip else self.advantage_clip

    @property
    def region(self) -> str:
        """What bounds an update, in words."""
        return {
            "hard": f"radius {self.delta:g} ({self.kl_estimator} per {self.kl_unit})",
            "adaptive": f"KL penalty adapted to {self.delta:g}, no radius",
            "fixed": f"KL penalty {self.beta:g}, no radius",
            "none": "no trust region",
        }[self.kl]

    @property
    def updates(self) -> list[list[int]]:
        """The updates of one stage, each by the agents that it moves; their order is another matter."""
        everyone = list(range(self.agents))
        return [everyone] if self.occupancy == "joint" else [[j] for j in everyone]

    def save(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        aside.rename(path)

    @classmethod
    def load(cls, path: Path, changes: dict | None = None) -> "Config":
        """Read a run's config.json, with `changes` to some fields."""
        try:
            return cls(**json.loads(path.read_text()) | (changes or {}))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; is {path.parent} the directory of a run?") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not the configuration of a run: {error}") from None

    @classmethod
    def from_flags(cls, argv: list[str] | None, description: str) -> "Config":
        """Parse the command line; anything unknown or impossible is a sentence and exit code 2."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        add_flags(parser, [f.name for f in dataclasses.fields(cls)])
        given = vars(parser.parse_args(argv))
        if given.get("resume"):
            return cls._resumed(given)
        config = cls.of(given)
        if "every" in given and config.occupancy != "every_k":
            raise UserError(
                "--every says how often --occupancy every_k samples; with any other it does nothing"
            )
        if "beta" in given and config.kl == "none":
            raise UserError("--beta weighs the KL penalty, and --kl none has none")
        if config.kl == "adaptive" and (config.beta == 0 or math.isinf(config.delta)):
            raise UserError("--kl adaptive needs a --beta above 0 and a finite --delta to adapt it to")
        if config.temperature == 0:
            raise UserError(
                "--temperature 0 draws the same rollout each time; a group has nothing to compare"
            )
        return config

    @classmethod
    def of(cls, given: dict) -> "Config":
        """These fields, and for the others the defaults that fit the task and the model, shipped or not."""
        task = given.get("task", "relay")
        defaults = {"model": task if task in SHIPPED else "relay"}
        if not set((defaults | given)["model"].split(",")) <= set(SHIPPED):
            fields = dataclasses.fields(cls)
            defaults |= {
                f.name: f.metadata["pretrained"] for f in fields if f.metadata["pretrained"] is not None
            }
        return cls(**defaults | given)

    @classmethod
    def _resumed(cls, given: dict) -> "Config":
        """The saved configuration of the run to resume, which flags may repeat but not change."""
        directory = given.pop("resume")
        saved = cls.load(Path(directory) / "config.json")
        changed = [
            f"--{name.replace('_', '-')} {value} (the run has {getattr(saved, name)})"
            for name, value in given.items()
            if value != getattr(saved, name) and not (name == "model" and saved.uses(value))
        ]
        if changed:
            raise UserError(f"--resume continues a run as it was started; not with {', '.join(changed)}")
        return dataclasses.replace(saved, resume=directory)


LEAST = {
    **dict.fromkeys(("agents", "rounds", "problems", "max_new_tokens", "stages", "inner_steps"), 1),
    **dict.fromkeys(("every", "batch_tokens", "batch_rows", "eval_problems", "keep"), 1),
    **dict.fromkeys(("temperature", "lr", "advantage_clip", "eps_norm", "clip", "beta", "delta", "seed"), 0),
    **{"group": 2, "eval_every": 0},
}


def add_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Add the flags of these Config fields; a flag that is not given leaves no attribute behind."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for name in names:
        f = fields[name]
        default, pretrained = f.default, f.metadata["pretrained"]
        shown = default if pretrained is None else f"{default}; {pretrained} for pretrained models"
        if type(default) is bool:
            parser.add_argument(
                "--" + name.replace("_", "-"),
                action="store_true",
                default=argparse.SUPPRESS,
                help=f.metadata["help"] + " (default off)",
            )
            continue
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            choices=f.metadata["choices"] or None,
            default=argparse.SUPPRESS,
            help=f.metadata["help"] + (f" (default {shown})" if default != "" else ""),
        )
