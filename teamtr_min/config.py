"""Every knob once, one line each, and the command-line flags made of them. Loads no torch.

A knob whose default is None depends on others: see PRESETS and `Config.__post_init__`.
"""

import argparse
import dataclasses
import datetime
import difflib
import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from teamtr_min.files import UserError, read_json, write_json

SHIPPED = ("relay", "convention")  # tasks that bring a small model of the same name
LORA_LR = 10  # LoRA needs about ten times the learning rate that suits all weights
PRESETS = {
    "shipped": dict(
        task="relay", stages=50, inner_steps=6, problems=64, group=8, temperature=1.0, max_new_tokens=16,
        lr=5e-4, lr_end=0.0, delta=0.02, eval_problems=2048, warm_start=0, warm_start_lr=1e-3,
        checkpoint_every=1, clip=0.2,
    ),
    "pretrained": dict(
        task="gsm8k", stages=50, inner_steps=6, problems=32, group=8, temperature=0.8, max_new_tokens=256,
        lr=1e-6, lr_end=0.0, delta=0.01, eval_problems=128, warm_start=0, warm_start_lr=1e-4,
        checkpoint_every=1, clip=0.2,
    ),
    "sums": dict(  # pretrained on this task: a small model on a CPU
        stages=32, inner_steps=1, problems=8, temperature=1.0, max_new_tokens=24, lr=2e-5, lr_end=0.3,
        delta=0.05, eval_problems=192, warm_start=15, checkpoint_every=4,
    ),
    "floors": dict(  # a team must agree: large steps of both, which a clip of 0.2 would stop
        stages=12, problems=16, temperature=1.0, max_new_tokens=4, lr=1e-4, lr_end=1.0, delta=0.3, clip=4.0,
        eval_problems=64, warm_start=24, checkpoint_every=4,
    ),
}  # fmt: skip
PRESETS["zebra"] = PRESETS["sums"] | {"max_new_tokens": 48}


def knob(default, help: str, *choices: str, least: float = -math.inf, most: float = 2**63 - 1):
    """A field with its help line, its choices and its bounds."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


@dataclass(frozen=True)
class Config:
    """The configuration of one run. Raises UserError, in one sentence, for a value that cannot be."""

    # fmt: off
    # the team
    model: str = knob(None, "directory, alias (qwen2.5-1.5b, ...) or hub id org/name[@revision]; a comma-separated list gives each agent its own (default: the model that ships with the task)")
    agents: int = knob(3, "number of agents", least=1, most=1000)
    rounds: int = knob(1, "turns per agent in one rollout", least=1, most=1000)
    router: str = knob("round-robin", "names the agent of the next turn: round-robin, random, or FILE.py with a function `router`")
    roles: str = knob("", "JSON file, a list of {\"name\", \"system\"}, one per agent (default: the task's roles)")
    tools: str = knob("", "names of tools that may answer after each agent's turn: calculator")
    lora_rank: int = knob(0, "rank of LoRA adapters, one per agent, on a shared frozen base; 0 trains all weights", least=0)
    # the task
    task: str = knob(None, "relay, convention, sums, sums-99, floors, zebra, zebra-2x2 to zebra-6x6 (houses x attributes), gsm8k, math, jsonl, or FILE.py with a function `task`")
    data: str = knob("", "JSONL file of problems, directory with train.jsonl and test.jsonl, or data set of the hub, org/name[@revision][:folder]")
    fields: str = knob("question,answer", "names of the two fields of the JSONL that hold problem and answer")
    drop_long: bool = knob(False, "leave out problems that are too long for the model, and say how many")
    problems: int = knob(None, "problems per stage", least=1)
    group: int = knob(None, "rollouts per problem, which Eq. 9 compares", least=2)
    temperature: float = knob(None, "of sampling, and of every log-prob", least=0)
    max_new_tokens: int = knob(None, "longest message, in tokens", least=1)
    # before Algorithm 1
    warm_start: int = knob(None, "supervised steps on demonstrations before stage 0; 15 where demonstrations are given", least=0)
    warm_start_lr: float = knob(None, "their peak learning rate, which falls to 0 (with LoRA the default is 10 times as large)", least=0)
    demonstrations: str = knob("", "JSONL file of transcripts for the warm start (default: made by the task)")
    demonstrate: str = knob("", "make them from the data: this model (directory, alias, hub id) or run plays the team on training problems, and rollouts with return 1 are kept")
    # Algorithm 1
    stages: int = knob(None, "stages; each updates every agent once", least=1)
    occupancy: str = knob(None, "rollouts an update trains on. fresh: collected before each update; corrected: reweighted to the team as it now is (see --min-ess); stale: those of the stage's start; joint: the same, for one update of all agents (default corrected)", "fresh", "corrected", "stale", "joint")
    min_ess: float = knob(None, "collect again when the effective share of the reweighted rollouts is below this; 1: before every update, the paper's Algorithm 1; 0: once a stage (default 0.5)", least=0, most=1)
    order: str = knob("fixed", "update order within a stage; random draws one per stage", "fixed", "reversed", "random")
    inner_steps: int = knob(None, "most optimizer steps in one update", least=1)
    lr: float = knob(None, "peak learning rate of AdamW, with cosine decay over the run (with LoRA the default is 10 times as large)", least=0)
    lr_end: float = knob(None, "fraction of lr at which the decay ends", least=0, most=1)
    # Eq. 9
    advantage_clip: float = knob(2.0, "bound on the normalised advantage; without weights it has no effect above sqrt(group - 1); inf for none", least=0, most=math.inf)
    no_group_norm: bool = knob(False, "leave advantages in units of the return")
    # Eq. 10
    clip: float = knob(None, "epsilon of the ratio clip", least=0)
    ratio: str = knob("message", "a ratio is the product over the message's tokens, their geometric mean (GSPO), or one per token (GRPO)", "message", "mean", "token")
    beta: float = knob(1e-3, "weight of the KL penalty, at first, or with --kl fixed always; 0 for none", least=0)
    # Eq. 11
    kl: str = knob("hard", "hard: enforce the radius, with an adapted penalty; adaptive, fixed: the penalty alone; none: neither", "hard", "adaptive", "fixed", "none")
    delta: float = knob(None, "radius: most KL of one update, in nats per --kl-unit; inf for none", least=0, most=math.inf)
    kl_estimator: str = knob("k3", "estimator that the radius is enforced on; both are logged", "k1", "k3")
    kl_unit: str = knob("message", "KL is a sum over a message's tokens, or their mean", "message", "token")
    # the run
    seed: int = knob(0, "decides every draw of the run", least=0)
    date: str = knob(None, "day that chat templates are told (default: the day on which the run begins)")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = knob("auto", "compute dtype over fp32 masters; auto: bf16 on a GPU, else fp32", "auto", "fp32", "bf16")
    batch_tokens: int = knob(0, "tokens per training forward; 0: as many as memory allows", least=0)
    batch_rows: int = knob(0, "rollouts sampled at once; 0: as many as memory allows", least=0)
    eval_problems: int = knob(None, "held-out problems of each evaluation", least=1)
    eval_every: int = knob(0, "also evaluate every so many stages; 0 for never", least=0)
    checkpoint_every: int = knob(None, "stages between checkpoints", least=1)
    diagnostics: bool = knob(False, "estimate stale gap, occupancy shift and lower bounds of each update on rollouts of their own")
    tensorboard: bool = knob(False, "also write the numbers of updates, stages and evaluations for TensorBoard, into tensorboard/ of the run (pip install tensorboard)")
    out: str = knob("", "directory for everything the run writes (default runs/TASK-AGENTSx-TIME-seedSEED)")
    resume: str = knob("", "directory of a run to continue from its newest checkpoint, to the same bits on a CPU")
    show_prompts: bool = knob(False, "print each agent's prompt of the first held-out problem, before any message is written")
    accept_changes: bool = knob(False, "with --resume: go on although data, task file, grader or template have changed")
    # fmt: on

    def __post_init__(self):
        given = {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}
        object.__setattr__(self, "given", given)  # what a resumed run must repeat

        def default(name: str, value) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen is for everyone else

        default("model", self.task if self.task in SHIPPED else "relay")
        kind = "shipped" if self.shipped else "pretrained"
        family = (self.task or "").rstrip("0123456789x-")  # of sums-99, zebra-2x2
        preset = PRESETS[kind] | (PRESETS.get(family, {}) if kind == "pretrained" else {})
        if self.demonstrations or self.demonstrate:
            preset["warm_start"] = preset["warm_start"] or 15
        lora = self.lora_rank or all(os.path.isfile(f"{model}/adapter_config.json") for model in self.models)
        for name, value in preset.items():
            default(name, value * LORA_LR if name in ("lr", "warm_start_lr") and lora else value)
        default("occupancy", "fresh" if self.min_ess == 1 else "corrected")
        default("min_ess", {"fresh": 1.0, "corrected": 0.5}.get(self.occupancy, 0.0))
        default("date", time.strftime("%Y-%m-%d"))
        for f in dataclasses.fields(self):
            check(f, getattr(self, f.name))
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"--date {self.date} is not a day such as 2026-11-30") from None
        # fmt: off
        for broken, why in (
            (self.beta and not 1e-4 <= self.beta <= 1, "--beta lies between 1e-4 and 1, or is 0 for no penalty"),
            (self.delta == 0, "--delta 0 allows no change at all; give a positive radius, or inf for none"),
            (self.min_ess != 1 and self.occupancy == "fresh", "--occupancy fresh means --min-ess 1"),
            (self.min_ess and self.occupancy in ("stale", "joint"), f"--min-ess is about --occupancy corrected; {self.occupancy} rollouts are collected once a stage"),
            (self.kl == "adaptive" and (self.beta == 0 or math.isinf(self.delta)), "--kl adaptive needs a --beta above 0 and a finite --delta to adapt it to"),
            (self.demonstrate and self.demonstrations, "--demonstrate makes the demonstrations: leave out --demonstrations"),
            ((self.demonstrate or self.demonstrations) and not self.warm_start, "demonstrations are for a warm start: give --warm-start steps"),
            (self.fields.count(",") != 1, "--fields are two names, such as question,answer"),
            (len(self.models) not in (1, self.agents), f"--model names {len(self.models)} models for {self.agents} agents; give one, or one per agent"),
        ):
            if broken:
                raise UserError(why)
        # fmt: on

    @property
    def models(self) -> list[str]:
        """Model names as given, one or one per agent."""
        return split_names(self.model)

    @property
    def model_of_each(self) -> list[str]:
        return self.models * (self.agents // len(self.models))

    @property
    def shipped(self) -> bool:
        """Whether all models come with the code."""
        return set(self.models) <= set(SHIPPED)

    @property
    def turns(self) -> int:
        return self.agents * self.rounds

    @property
    def radius(self) -> float:
        """Bound that Eq. 11 is enforced on; violations are counted against `delta` in any case."""
        return self.delta if self.kl == "hard" else math.inf

    @property
    def first_beta(self) -> float:
        return 0.0 if self.kl == "none" else self.beta

    def save(self, path: Path, **more) -> None:
        """Write config.json as strict JSON; `more` is kept beside the knobs."""
        write_json(path, dataclasses.asdict(self) | more)

    @classmethod
    def load(cls, path: Path, **changes) -> "Config":
        """Read a run's config.json; a knob that it lacks takes its default. Raises UserError."""
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        saved = {name: value for name, value in read_json(path).items() if name in kinds}
        saved |= {n: float(v) for n, v in saved.items() if kinds[n] is float and v in ("inf", "-inf")}
        return cls(**saved | changes)


def check(f: dataclasses.Field, value) -> None:
    """UserError unless `value` is of the field's type and within its bounds."""
    flag, rule = f"--{f.name.replace('_', '-')}", f.metadata
    if type(value) is not f.type and not (f.type is float and type(value) is int):
        raise UserError(f"{flag} is {value!r}; it must be of type {f.type.__name__}")
    if f.type in (int, float) and not value >= rule["least"]:  # also catches NaN
        raise UserError(f"{flag} is {value}; the least possible value is {rule['least']:g}")
    if f.type in (int, float) and value > rule["most"]:
        raise UserError(f"{flag} is {value}; the largest possible value is {rule['most']:g}")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{flag} {value!r} is not one of: {', '.join(rule['choices'])}")


def split_names(text: str) -> list[str]:
    """Names between commas; a directory whose name holds a comma is one name."""
    words, names = text.split(","), []
    while words:
        taken = next((n for n in range(len(words), 1, -1) if os.path.isdir(",".join(words[:n]))), 1)
        names.append(",".join(words[:taken]).strip())
        words = words[taken:]
    return names


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown flag is answered with the one that it resembles."""

    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str):
        known, _, typed = [*self._option_string_actions], *message.partition("unrecognized arguments: ")[1:]
        close = difflib.get_close_matches(typed.split("=")[0].split(" ")[0], known, n=1)
        raise UserError(message + (f"; did you mean {close[0]}?" if typed and close else ""))


def add_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Add the flags of these knobs; a flag that is not given leaves no attribute behind."""
    for f in dataclasses.fields(Config):
        if f.name not in names:
            continue
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        presets = [f"{p[f.name]:g} {kind}" for kind, p in PRESETS.items() if f.name in p and f.name != "task"]
        shown = ", ".join(presets) or f.default
        text += f" (default {shown})" if shown not in (None, "") else ""
        name = f"{{{','.join(f.metadata['choices'])}}}" if f.metadata["choices"] else f.name.upper()
        parser.add_argument(flag, type=f.type, default=argparse.SUPPRESS, help=text, metavar=name)


def parse(argv: list[str] | None, description: str) -> Config:
    """The configuration that train.py's flags describe. Raises UserError for flags that cannot be."""
    parser = Parser(description)
    add_flags(parser, [f.name for f in dataclasses.fields(Config)])
    given = vars(parser.parse_args(argv))
    return resumed(given) if "resume" in given else Config(**given)


def runnable(config: Config) -> Config:
    """What train() runs: `config`, or the saved one that it resumes. Raises UserError for what cannot be."""
    if config.resume:
        config = resumed({**config.given})
    if config.temperature == 0:
        raise UserError("--temperature 0 draws the same rollout each time; a group has nothing to compare")
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    return config


def resumed(given: dict) -> Config:
    """The saved configuration of the run to resume; flags may repeat it but not change it."""
    own = {name: given.pop(name) for name in ("resume", "accept_changes", "show_prompts") if name in given}
    saved = Config.load(Path(own["resume"]) / "config.json", **own)
    for name in {"model", "data", "demonstrate"} & given.keys():  # saved with a commit, or as absolute paths
        then, now = (re.sub("@[0-9a-f]{40}", "", text) for text in (getattr(saved, name), given[name]))
        if then in (now, os.path.abspath(now), os.path.realpath(now)):
            del given[name]
    others = {name: value for name, value in given.items() if value != getattr(saved, name)}
    changed = [f"--{n.replace('_', '-')} {v} (the run has {getattr(saved, n)})" for n, v in others.items()]
    if changed:
        raise UserError(f"--resume continues a run as it was started, not with {', '.join(changed)}")
    return saved
