"""Where the seconds of a stage go: by phase, by variant and by team size, from real runs of `train`.

Each run trains for a few stages in a directory that is thrown away, with a stopwatch on the functions below.
A function's time is its own: what it spends in another of them counts there. The first stage, in which
buffers are made, is left out. Variants and team sizes take turns, and the median over rounds counts. Grades
are drawn by a hash of what was said, so that there is something to learn, whatever the model can.
"""

import contextlib
import gc
import io
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from teamtr_min.bench.machine import heading, subject
from teamtr_min.config import SHIPPED, Config
from teamtr_min.engine.sampler import Sampler
from teamtr_min.files import UserError
from teamtr_min.learner import Learner
from teamtr_min.rollout import Rollouts
from teamtr_min.run.run import Run
from teamtr_min.tasks import load_task
from teamtr_min.team import placement

ROUNDS = 3
PHASES = {  # in the order of a stage
    "prefill": [(Sampler, "_prefill")],
    "decode": [(Sampler, "generate")],
    "packing": [(Rollouts, "batches")],
    "gradient": [],  # `evaluate` with a gradient
    "measuring": [],  # and without one
    "stepping": [(Learner, "step")],
    "moving": [(Learner, name) for name in ("snapshot", "restore", "onload", "offload")],
    "checkpoint": [(Run, "checkpoint")],
}
VARIANTS = {
    "fresh": {},
    "fresh, suffix": {"resample": "suffix"},
    "every 2": {"every": 2},
    "stale": {"occupancy": "stale"},
}
MOST_AGENTS = 8  # of a shipped model's team; a pretrained one has two


class Stopwatch:
    """Seconds by name. Of nested calls the inner one's time is not the outer one's."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.names = device, Counter(), ["rest"]
        self.mark = time.perf_counter()

    def lap(self) -> None:
        """Give the time since the last lap to the innermost name."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.total[self.names[-1]] += now - self.mark
        self.mark = now

    def timed(self, f: Callable, name_of: Callable[[dict], str]) -> Callable:
        def wrapper(*args, **kwargs):
            self.lap()
            self.names.append(name_of(kwargs))
            try:
                return f(*args, **kwargs)
            finally:
                self.lap()
                self.names.pop()

        return wrapper

    @contextlib.contextmanager
    def on(self, train) -> Iterator[None]:
        """All of PHASES, and `evaluate` where module `train` calls it."""
        kept = [(train, "evaluate", train.evaluate)]
        train.evaluate = self.timed(train.evaluate, lambda kw: "gradient" if kw["grad"] else "measuring")
        for name, functions in PHASES.items():
            for owner, function in functions:
                f = getattr(owner, function)
                kept.append((owner, function, f))
                setattr(owner, function, self.timed(f, lambda _, name=name: name))
        try:
            yield
        finally:
            for owner, function, f in kept:
                setattr(owner, function, f)


def run(train, flags: dict, short: bool = False) -> dict:
    """Everything that `python eval.py stage` prints, as one object; `train` is the module train.py, `flags`
    are model, device and dtype."""
    shipped = flags.get("model", "relay") in SHIPPED
    base = {"warm_start": 0, "stages": 3 if shipped else 2, "eval_problems": 1, "keep": 1}
    base["checkpoint_every"] = 1 if shipped else 2  # a large one takes minutes, and the last stage has one
    if short:
        base |= {"problems": 2, "group": 4, "stages": 2, "inner_steps": 1}
    rounds = ROUNDS if shipped and not short else 1
    teams = {f"fresh, {n} agents": {"agents": n} for n in range(2, MOST_AGENTS + 1)} if shipped else {}
    cases = VARIANTS | teams if shipped else {name: VARIANTS[name] for name in ("fresh", "stale")}
    if short:
        cases = dict(list(VARIANTS.items())[:2]) | dict(list(teams.items())[:1])
    config = subject(flags, **base)
    cases = {name: more for name, more in cases.items() if possible(subject(flags, **base | more))}
    found = [
        {name: one(train, subject(flags, **base | more)) for name, more in cases.items()}
        for _ in range(rounds)
    ]
    return {
        "benchmark": "stage",
        **heading(config),
        "problems": config.problems,
        "group": config.group,
        "rounds": rounds,
        "rows": [median(name, [each[name] for each in found]) for name in cases],
    }


def possible(config: Config) -> bool:
    """Whether the task is one for so many agents."""
    try:
        load_task(config)
    except UserError:
        return False
    return True


def one(train, config: Config) -> dict:
    """One run: seconds a stage by phase, tokens, memory, from the second stage on."""
    stages: list[Counter] = []
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as directory, contextlib.ExitStack() as stack:
        config = Config(**vars(config) | {"out": str(Path(directory) / "run")})
        watch = Stopwatch(placement(config)[0])
        end_stage = Run.end_stage

        def end(run: Run, stage: int, **more) -> None:
            end_stage(run, stage, **more)
            watch.lap()
            stages.append(Counter(watch.total))

        stack.enter_context(watch.on(train))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.callback(setattr, Run, "end_stage", end_stage)
        stack.callback(setattr, train, "load_task", train.load_task)
        Run.end_stage, train.load_task = end, graded_by_hash
        summary = train.train(config)
    gc.collect()  # the next run plans with the memory that is free by then
    if summary["stopped"]:
        raise UserError(f"the run stopped: {summary['stopped']}")
    count = len(stages) - 1
    spent = stages[-1] - stages[0]
    return {
        "agents": config.agents,
        "seconds": {name: spent[name] / count for name in [*PHASES, "rest"]},
        "tokens_sampled": summary["tokens_sampled"] / len(stages),
        "tokens_trained": summary["tokens_trained"] / len(stages),
        "memory_peak": summary["memory_peak"],
        "memory_planned": summary["memory_planned"],
    }


def graded_by_hash(*args, **kwargs):
    """`load_task`; but the return is 0 or 1 by what was said."""
    task = load_task(*args, **kwargs)
    task.grade = lambda problem, messages: float(sum(sum(m.tokens) for m in messages) % 2)
    return task


def median(name: str, runs: list[dict]) -> dict:
    """Of a case's runs: each number's median."""
    seconds = {phase: statistics.median(r["seconds"][phase] for r in runs) for phase in runs[0]["seconds"]}
    numbers = {key: statistics.median(r[key] for r in runs) for key in runs[0] if key != "seconds"}
    return {"name": name, **numbers, "seconds": seconds}


def table(result: dict) -> str:
    phases = [*PHASES, "rest"]
    lines = [
        f"{result['model']} on {result['task']}, {result['dtype']}, on {result['device']}: "
        f"{result['problems']} problems x {result['group']} rollouts; seconds a stage, "
        f"median of {result['rounds']} runs",
        f"{'':18}" + "".join(f"{name:>11}" for name in [*phases, "together"]) + f"{'sampled':>9}"
        f"{'trained':>9}{'peak MiB':>10}{'of plan':>9}",
    ]
    for row in result["rows"]:
        times = [row["seconds"][name] for name in phases]
        lines.append(
            f"{row['name']:18}"
            + "".join(f"{t:>11.2f}" for t in [*times, sum(times)])
            + f"{row['tokens_sampled']:>9,.0f}{row['tokens_trained']:>9,.0f}"
            f"{row['memory_peak'] / 2**20:>10,.0f}{row['memory_peak'] / row['memory_planned']:>9.0%}"
        )
    lines.append("sampled, trained: tokens a stage, the latter times optimizer steps")
    if result["device"].startswith("a CPU"):
        lines.append("on a GPU: not measured yet")
    return "\n".join(lines)
