"""Every knob, once: a flat dataclass. cli.py makes flags of it; a run keeps it as config.json."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from teamtr_min.files import UserError, one_line, read_json, sealed, unsealed, write_json

SHIPPED = ("relay", "convention")  # tasks that bring a small model, of the same name
LORA_LR = 10  # what LoRA needs of a learning rate that suits all weights
PRESET = None  # the default of a knob that depends on the kind of model:
PRESETS = {
    "shipped": {
        "task": "relay",
        "stages": 50,
        "inner_steps": 6,
        "problems": 64,
        "group": 8,
        "temperature": 1.0,
        "max_new_tokens": 16,
        "lr": 5e-4,
        "lr_end": 0.0,
        "delta": 0.02,
        "eval_problems": 2048,
        "warm_start": 0,
        "warm_start_lr": 1e-3,
        "checkpoint_every": 1,
    },
    "pretrained": {  # any other model
        "task": "gsm8k",
        "stages": 50,
        "inner_steps": 6,
        "problems": 32,
        "group": 8,
        "temperature": 0.8,
        "max_new_tokens": 256,
        "lr": 1e-6,
        "lr_end": 0.0,
        "delta": 0.01,
        "eval_problems": 128,
        "warm_start": 0,
        "warm_start_lr": 1e-4,
        "checkpoint_every": 1,
    },
}
TASK_PRESETS = {  # and on the task: what pretrained models do there in place of the above
    "sums": {  # a small model, on a CPU
        "stages": 32,
        "inner_steps": 1,
        "problems": 8,
        "group": 8,
        "temperature": 1.0,
        "max_new_tokens": 24,
        "lr": 2e-5,
        "lr_end": 0.3,
        "delta": 0.05,
        "eval_problems": 192,
        "warm_start": 15,
        "checkpoint_every": 4,
    },
}


MOST = 2**31 - 1  # of any count


def knob(default, help: str, *, choices: tuple[str, ...] = (), least=-math.inf, most=MOST, finite=False):
    """A field with its help line and the values that it may take; `most` is for whole numbers."""
    rule = {"help": help, "choices": choices, "least": least, "most": most, "finite": finite}
    return field(default=default, metadata=rule)


@dataclass(frozen=True)
class Config:
    """Raises UserError, in one sentence, for a value that cannot be."""

    # the team
    model: str = knob(
        PRESET,
        "a directory, an alias (qwen2.5-1.5b, ...) or a hub id org/name[@revision], fetched when it is new; "
        "a comma-separated list gives each agent its own (default: relay; with --task convention its own)",
    )
    agents: int = knob(3, "number of agents", least=1)
    rounds: int = knob(1, "turns per agent in one rollout", least=1)
    router: str = knob(
        "round-robin", "who takes the next turn: round-robin, random, or FILE.py with a function `router`"
    )
    lora_rank: int = knob(
        0, "rank of LoRA adapters, one an agent, on a frozen base that they share; 0: all weights", least=0
    )
    lora_alpha: float = knob(
        PRESET, "an adapter's output is scaled by alpha / rank (default twice the rank)", least=0, finite=True
    )
    # the task
    task: str = knob(
        PRESET,
        "relay, convention, gsm8k, math, sums, jsonl, or FILE.py with a function `task`",
    )
    data: str = knob("", "JSONL file of problems, or a directory with train.jsonl and test.jsonl")
    question_field: str = knob("question", "field of the JSONL that holds the problem")
    answer_field: str = knob("answer", "field of the JSONL that holds the answer")
    problems: int = knob(PRESET, "problems per batch", least=1)
    group: int = knob(PRESET, "group size: rollouts per problem, which Eq. 9 compares", least=2)
    temperature: float = knob(PRESET, "of sampling, and of every log-prob", least=0, finite=True)
    max_new_tokens: int = knob(PRESET, "longest message, in tokens", least=1)
    # before Algorithm 1
    warm_start: int = knob(PRESET, "supervised steps on demonstrations before stage 0", least=0)
    warm_start_lr: float = knob(
        PRESET,
        "their peak learning rate, which falls to 0 (the default is ten times as much with LoRA)",
        least=0,
        finite=True,
    )
    demonstrations: str = knob(
        "",
        "JSONL of transcripts for the warm start, each with `text` and `messages` (default: the task's own)",
    )
    # Algorithm 1
    stages: int = knob(PRESET, "stages; each updates every agent once", least=1)
    occupancy: str = knob(
        "fresh",
        "what an update trains on. fresh: on-policy rollouts, collected anew before each; stale: those of "
        "the stage's start; importance: the same, reweighted; joint: the same, for one update of all agents",
        choices=("fresh", "stale", "importance", "joint"),
    )
    every: int = knob(1, "with fresh occupancy: collect before every so many updates", least=1)
    resample: str = knob(
        "full",
        "what to collect again within a stage: whole rollouts, or of each only what follows the first turn "
        "of an agent that has changed",
        choices=("full", "suffix"),
    )
    order: str = knob(
        "fixed",
        "update order within a stage; random draws one per stage",
        choices=("fixed", "reversed", "random"),
    )
    inner_steps: int = knob(PRESET, "most optimizer steps in one update", least=1)
    lr: float = knob(
        PRESET,
        "peak learning rate of AdamW, which decays as a cosine over the run (the default is ten times as "
        "much with LoRA)",
        least=0,
        finite=True,
    )
    lr_scale: str = knob(
        "",
        "comma-separated factors on lr, one per agent, for unequal models (default: 1 each)",
    )
    lr_end: float = knob(PRESET, "fraction of lr at which the decay ends", least=0, finite=True)
    # Eq. 9
    advantage_clip: float = knob(
        2.0, "bound on the normalised advantage; inert above sqrt(group - 1); inf for none", least=0
    )
    eps_norm: float = knob(1e-6, "added to the variance of a group's returns", least=0, finite=True)
    no_group_norm: bool = knob(False, "leave advantages in units of the return")
    # Eq. 10
    clip: float = knob(0.2, "epsilon of the ratio clip", least=0, finite=True)
    ratio: str = knob(
        "message",
        "product over the message's tokens, their geometric mean (GSPO's), or one ratio per token (GRPO's)",
        choices=("message", "mean", "token"),
    )
    beta: float = knob(
        1e-3,
        "weight of the KL penalty, at first or with `--kl fixed` always; 0 for none",
        least=0,
        finite=True,
    )
    # Eq. 11
    kl: str = knob(
        "hard",
        "hard: enforce the radius, with a penalty adapted to it; adaptive, fixed: only the penalty",
        choices=("hard", "adaptive", "fixed"),
    )
    delta: float = knob(PRESET, "radius: most KL of one update, in nats per `kl-unit`; inf for none", least=0)
    kl_estimator: str = knob(
        "k3",
        "what the radius is enforced on; all are logged that were computed",
        choices=("k1", "k3"),
    )
    kl_unit: str = knob("message", "sum over a message's tokens, or mean", choices=("message", "token"))
    # the run
    seed: int = knob(0, "decides every draw of the run", least=0, most=2**63 - 1)
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = knob(
        "auto",
        "compute dtype over fp32 masters; auto: bf16 on a GPU, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    shard: bool = knob(
        False,
        "with torchrun: spread each model's weights over the processes, where they do not fit one device",
    )
    batch_tokens: int = knob(
        0, "tokens per training forward, which changes no result; 0: as many as memory allows", least=0
    )
    batch_rows: int = knob(
        0, "rollouts sampled at once, which changes no result; 0: as many as memory allows", least=0
    )
    eval_problems: int = knob(PRESET, "held-out problems for accuracy_start and accuracy_final", least=1)
    eval_every: int = knob(0, "also measure held-out accuracy every so many stages; 0 for never", least=0)
    diagnostics: bool = knob(
        False, "estimate stale gap, occupancy shift and lower bounds of each update on rollouts of their own"
    )
    checkpoint_every: int = knob(
        PRESET, "stages between checkpoints, and so the most that a resumed run does again", least=1
    )
    keep: int = knob(2, "checkpoints to keep", least=1)
    weights_only: bool = knob(
        False, "checkpoints without Adam's moments, a third as large; a resumed run begins those anew"
    )
    out: str = knob("", "directory for everything the run writes; default runs/<task>-<agents>x-<time>")
    resume: str = knob(
        "",
        "directory of a run to continue from its newest checkpoint, bit for bit unless --weights-only",
    )
    replace: str = knob(
        "",
        "AGENT=MODEL, with --resume RUN: go on in a directory of its own (--out, default RUN-replaced), this "
        "agent, from 0, replaced by another model; --stages may be raised",
    )
    align: int = knob(
        50, "with --replace: steps that teach the newcomer its forerunner's habits; 0 for none", least=0
    )

    def __post_init__(self):
        if self.model is PRESET:
            object.__setattr__(self, "model", self.task if self.task in SHIPPED else "relay")
        kind = "shipped" if self.shipped else "pretrained"
        presets = PRESETS[kind] | (TASK_PRESETS.get(self.task, {}) if kind == "pretrained" else {})
        for name, value in presets.items():  # frozen is for everyone else
            if getattr(self, name) is PRESET:
                scale = LORA_LR if name in ("lr", "warm_start_lr") and self.lora_rank else 1
                object.__setattr__(self, name, value * scale)
        if self.lora_alpha is PRESET:
            object.__setattr__(self, "lora_alpha", 2.0 * self.lora_rank)
        for f in dataclasses.fields(self):
            check(f, getattr(self, f.name))
        if self.beta and not 1e-4 <= self.beta <= 1:
            raise UserError(f"--beta is {self.beta:g}; it lives between 1e-4 and 1, or is 0 for no penalty")
        if self.lr_end > 1:
            raise UserError(f"--lr-end is {self.lr_end:g}; it is a fraction of --lr, from 0 to 1")
        if len(set(self.lr_scales)) > 1 and self.occupancy == "joint":
            raise UserError("--lr-scale: with --occupancy joint all agents take one step, at one rate")
        if bool(self.lora_rank) != bool(self.lora_alpha):
            raise UserError("--lora-rank and --lora-alpha are both positive, or left out for all weights")
        if self.delta == 0:
            raise UserError("--delta 0 allows no change at all; give a positive radius, or inf for none")
        if self.kl == "adaptive" and (self.beta == 0 or math.isinf(self.delta)):
            raise UserError("--kl adaptive needs a --beta above 0 and a finite --delta to adapt it to")
        if self.every > 1 and self.occupancy != "fresh":
            raise UserError(
                f"--every says how often fresh rollouts are collected; with --occupancy {self.occupancy} "
                "it does nothing"
            )
        if self.resample == "suffix" and self.occupancy != "fresh":
            raise UserError(f"--resample suffix: with --occupancy {self.occupancy} nothing is sampled again")
        if self.replace and not self.resume:
            raise UserError("--replace changes a run that is there: name it by --resume RUN")
        if self.align != Config.align and not self.replace:
            raise UserError("--align is about a newcomer: it goes with --resume RUN --replace AGENT=MODEL")
        if len(self.models) not in (1, self.agents):
            raise UserError(
                f"--model names {len(self.models)} models for {self.agents} agents; "
                "give one, or one per agent"
            )

    @property
    def models(self) -> list[str]:
        """As named: one, or one per agent."""
        return [name.strip() for name in self.model.split(",")]

    @property
    def model_of_each(self) -> list[str]:
        """One per agent."""
        return self.models * (self.agents // len(self.models))

    @property
    def shipped(self) -> bool:
        """Whether all models come with the code."""
        return set(self.models) <= set(SHIPPED)

    def of_one(self, model: str, **changes) -> "Config":
        """For a team of this one model's agent, alike in all else."""
        return dataclasses.replace(self, model=model, agents=1, lr_scale="", **changes)

    @property
    def lr_scales(self) -> list[float]:
        """One factor per agent."""
        words = self.lr_scale.split(",") if self.lr_scale else ["1"] * self.agents
        try:
            scales = [float(word) for word in words]
        except ValueError:
            scales = []
        if len(scales) != self.agents or not all(0 < scale < math.inf for scale in scales):
            raise UserError(
                f"--lr-scale is {one_line(repr(self.lr_scale), 80)}; give {self.agents} positive numbers, "
                "one per agent"
            )
        return scales

    @property
    def turns(self) -> int:
        return self.agents * self.rounds

    @property
    def radius(self) -> float:
        """What Eq. 11 is enforced on; `delta` alone is what violations are counted against."""
        return self.delta if self.kl == "hard" else math.inf

    @property
    def update_groups(self) -> list[list[int]]:
        """The updates of one stage, each by the agents that step together: one, or all of them."""
        everyone = list(range(self.agents))
        return [everyone] if self.occupancy == "joint" else [[j] for j in everyone]

    def save(self, path: Path) -> None:
        write_json(path, sealed(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Path, changes: dict | None = None) -> "Config":
        """Read a run's config.json, with `changes` to some fields."""
        if not path.is_file():
            raise UserError(f"{path}: No such file; is {path.parent} the directory of a run?")
        raw, fields = read_json(path), {f.name for f in dataclasses.fields(cls)}
        if raw.keys() - {"seal"} != fields:
            lacks, has = (
                ", ".join(sorted(names - {"seal"})) for names in (fields - raw.keys(), raw.keys() - fields)
            )
            raise UserError(
                f"{path} is not the configuration of a run of this version (missing: {lacks or 'nothing'}; "
                f"unknown: {has or 'nothing'})"
            )
        return cls(**unsealed(raw, path) | (changes or {}))


def check(f: dataclasses.Field, value) -> None:
    """UserError unless `value` is of the field's kind and within its bounds."""
    flag, rule = f"--{f.name.replace('_', '-')}", f.metadata
    if type(value) is not f.type and not (f.type is float and type(value) is int):
        raise UserError(f"{f.name} is {one_line(repr(value))}; it must be of type {f.type.__name__}")
    if type(value) is int and value > rule["most"]:
        raise UserError(f"{flag} is {one_line(value, 40)}; the largest possible value is {rule['most']}")
    if f.type in (int, float) and not value >= rule["least"]:  # also catches NaN
        raise UserError(f"{flag} is {value}; the least possible value is {rule['least']}")
    if rule["finite"] and math.isinf(value):
        raise UserError(f"{flag} must be finite")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{flag} {one_line(repr(value))} is not one of: {', '.join(rule['choices'])}")
