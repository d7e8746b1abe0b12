"""`--resume RUN --replace AGENT=MODEL`: a run of its own that goes on where RUN is, with one other agent.

RUN is only read. The new directory gets what a run that was stopped leaves: RUN's logs up to its newest
checkpoint, a line about the replacement, and a checkpoint in which the newcomer's learner is new. So what
follows is a resume like any other.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks
from teamtr_min.extras.align import align, share_vocabulary
from teamtr_min.files import UserError, lock, sha256
from teamtr_min.hf.weights import find_model, pinned
from teamtr_min.learner import Learner
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run import checkpoint, metrics
from teamtr_min.run.console import replace_text
from teamtr_min.run.directory import new_directory
from teamtr_min.run.memory import plan_training
from teamtr_min.run.system import set_threads
from teamtr_min.tasks import load_task
from teamtr_min.team import Team, load_team

PROBES = 500  # messages of the incumbent that the newcomer learns from [paper]


def replaced(config: Config, ranks: Ranks = ALONE) -> Config:
    """The configuration of the run to go on with: a new one if an agent is to be replaced."""
    if not config.replace:
        return config
    run = Path(config.resume)
    own = dataclasses.replace(config, out=config.out or f"{run}-replaced")
    directory = Path(ranks.agree(str(new_directory(own)) if ranks.first else None))
    try:
        with (run / "metrics.jsonl").open() as file:
            if ranks.first:
                lock(file)  # RUN must not move on meanwhile
            _write(run, directory, config, ranks)
        ranks.agree(None)  # what the first wrote is there for all
    except BaseException:
        if ranks.first:
            shutil.rmtree(directory)
        raise
    return Config.load(directory / "config.json", {"resume": str(directory)})


def _write(run: Path, directory: Path, config: Config, ranks: Ranks) -> None:
    """Replace the agent, and fill the new run's directory; config.json, which makes it a run, comes last."""
    begin = time.perf_counter()
    j, model = _agent_and_model(config)
    models = config.model_of_each
    models[j], incumbent = model, models[j]
    changes = {"model": ",".join(models), "resume": "", "replace": "", "align": Config.align}
    new_config = pinned(dataclasses.replace(config, out=str(directory), **changes))
    set_threads(new_config.shipped)
    task = load_task(config, training=True)
    resumed = dataclasses.replace(new_config, resume=str(directory))
    plan_training(resumed, task, ranks, beside=[incumbent])  # refuses what memory or disk cannot hold
    roles = task.roles(config.agents)
    team = load_team(config, roles, ranks=ranks)
    learners = [Learner(team, agents, config.beta) for agents in config.update_groups]
    done, log = checkpoint.load(run, learners)
    if log is None:
        raise UserError(f"{run} has no checkpoint yet; start it anew with other models")
    stages = done - config.warm_start
    if stages < 0:
        raise UserError(f"{run} is still in its warm start; resume it until that is over")
    if stages >= config.stages:
        raise UserError(
            f"{run} has done all of its {config.stages} stages; give --stages of more than {stages} "
            "to train on after the replacement"
        )
    logs = {name: _start_of(run / name, count) for name, count in log["bytes"].items()}
    (newcomer,) = load_team(config.of_one(model), roles[j : j + 1]).agents
    agents = [newcomer if k == j else agent for k, agent in enumerate(team.agents)]
    new_team = dataclasses.replace(team, agents=agents)

    held_out = task.sample_problems(config.eval_problems, rng.generator(0, "held-out"), held_out=True)
    path = rng.RngPath(config.seed, "replace", done)  # the same draws for each, so that they pair
    looked_at = {"label": "evaluating", "compact": True}
    before = collect(team, task, held_out, 1, path, **looked_at)
    evaluations = {"replaced": collect(new_team, task, held_out, 1, path, **looked_at)}
    probes, measured = [], {}
    if config.align:
        if not share_vocabulary(team.agents[j], newcomer):
            print(f"agent {j} and {model} have different vocabularies: it learns from the text of messages")
        probes = [_probe(config, task, team, done)]
        measured = align(*probes, new_team, j, config)
        evaluations["aligned"] = collect(new_team, task, held_out, 1, path, **looked_at)
    for name, after in evaluations.items():
        measured |= metrics.swap_shock(name, before, after, config.seed)
    line = metrics.measured({
        "kind": "replace",
        "stage": stages,
        "agent": j,
        "model": model,
        "accuracy_before": before.accuracy,
        **measured,
        **metrics.cost_of([before, *evaluations.values(), *probes], "replace"),
        "seconds_replace": time.perf_counter() - begin,
    })  # fmt: skip
    print(replace_text(line, newcomer.role.name), flush=True)

    if ranks.first:
        logs["metrics.jsonl"] += json.dumps(line).encode() + b"\n"
        for name, content in logs.items():
            (directory / name).write_bytes(content)
        log |= {
            "sha256": {name: sha256(directory / name) for name in logs},
            "bytes": {name: len(content) for name, content in logs.items()},
            "seconds": log["seconds"] + time.perf_counter() - begin,
        }
    learners = [_with_newcomer(learner, new_team, j, config) for learner in learners]
    checkpoint.save(directory, done, learners, log, config.keep)
    if ranks.first:
        new_config.save(directory / "config.json")


def _agent_and_model(config: Config) -> tuple[int, str]:
    number, _, model = config.replace.partition("=")
    if not (number.strip().isdecimal() and model.strip()) or "," in model:
        raise UserError(f"--replace takes AGENT=MODEL, such as 1=qwen2.5-0.5b, not {config.replace!r}")
    if int(number) >= config.agents:
        raise UserError(f"no agent {int(number)} to replace; the run's are numbered 0 to {config.agents - 1}")
    find_model(model.strip())  # or say at once that there is none
    return int(number), model.strip()


def _start_of(path: Path, count: int) -> bytes:
    """What a log held when the checkpoint was written."""
    content = path.read_bytes()[:count]
    if len(content) < count:
        raise UserError(f"{path} was cut short; nothing to resume from")
    return content


def _probe(config: Config, task, team: Team, done: int) -> Rollouts:
    """Rollouts with about PROBES messages of each agent, on problems to train on."""
    problems, count = [], -(-PROBES // config.rounds)
    while len(problems) < count:
        generator = rng.generator(config.seed, "probes", done, len(problems))
        problems += task.sample_problems(config.problems, generator)
    return collect(team, task, problems[:count], 1, rng.RngPath(config.seed, "probes", done))


def _with_newcomer(old: Learner, team: Team, j: int, config: Config) -> Learner:
    """The learner with the newcomer's weights in place of agent j's, no state of Adam and the first beta.

    Those who step together with the newcomer keep their masters and Adam's state.
    """
    if j not in old.agents:
        return old
    new, kept = Learner(team, old.agents, config.beta), dict(zip(old.names, old.masters))
    for name, master in zip(new.names, new.masters):
        if old.agents[int(name.partition(".")[0])] != j:
            master.data.copy_(kept[name].data)
            new.optimizer.state[master] = old.optimizer.state[kept[name]]
    return new
