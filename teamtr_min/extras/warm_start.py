"""Warm start: supervised steps on demonstrations before stage 0. [ours]

A return can only teach what a team sometimes does. A model that never writes in the form that the task grades
is first shown some messages: next-token loss on each agent's own, in whole transcripts. They are made by the
task, read from a file, or written by another team (`--demonstrate`) and accepted by the task.
"""

import dataclasses
import gc
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import kernels
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import unsharded
from teamtr_min.files import UserError, read_jsonl, replacing, to_json
from teamtr_min.learner import Diverged, Learner
from teamtr_min.rollout import Batches, Rollouts, agent_batches, collect
from teamtr_min.run import log
from teamtr_min.run.loading import build_team
from teamtr_min.run.memory import plan_evaluation
from teamtr_min.tasks import Demonstration, Message, Problem, Task, tools
from teamtr_min.team import Team


def warm_start(run, config: Config, task: Task, team: Team, learners: list[Learner]) -> None:
    """`--warm-start` steps of every learner on `--problems` demonstrations each; the rate falls to 0."""
    if run.warm_steps_done == config.warm_start:
        return
    if config.demonstrate:
        config = dataclasses.replace(config, demonstrate="", demonstrations=demonstrate(run, config, task))
    given = read_demonstrations(config, task)
    for shown, messages in zip(given, as_rollouts(team, given).messages):
        for j in (j for learner in learners for j in learner.agents):
            length = len(team.render(j, shown.problem, messages, False).ids)
            if length > (most := team.agents[j].model.config.max_positions):
                what = f"{config.demonstrations}: transcript {shown.problem.id} has {length:,} tokens"
                raise UserError(f"{what} for agent {j}, whose model has {most:,} positions")
    run.evaluate("untrained")
    for step in range(run.warm_steps_done, config.warm_start):
        lr = config.warm_start_lr * (1 - step / config.warm_start)
        generator = rng.generator(config.seed, "demonstrations", step)
        if given:
            shown = [given[i] for i in generator.integers(len(given), size=config.problems)]
        else:
            shown = task.demonstrations(config.problems, generator)
        rollouts, none = as_rollouts(team, shown), torch.zeros(len(shown))  # no advantage is used here
        for learner in learners:
            begin = time.perf_counter()
            batches = agent_batches(team, rollouts, learner.agents, none, config.batch_tokens)
            line = {"step": step, "agents": learner.agents, "lr": lr, "tokens": batches.tokens}
            if batches.messages:
                line |= descend(learner, next_token_losses(batches), lr)
            run.log_warm_start(line, time.perf_counter() - begin)
            if step + 1 == config.warm_start:  # else the first updates would follow the demonstrations
                for state in filter(None, learner.optimizer.state.values()):
                    state["exp_avg"].zero_()
        run.end_warm_step(step)


def next_token_losses(batches: Batches) -> Iterator[Tensor]:
    """The mean of -log p over all trainable tokens in parts, for `descend`."""
    for batch in batches.own:
        hidden, head = batch.hidden(batch.model), batch.model.head  # (pairs, H), (V, H)
        yield -kernels.linear_logprob(hidden, head, batch.targets)[batch.pair].sum() / batches.tokens


def descend(learner: Learner, parts: Iterable[Tensor], lr: float) -> dict[str, float]:
    """One step on a loss that is the sum of `parts`. Returns `loss` before the step and `grad_norm` before
    clipping. An error leaves the weights of before."""
    loss = 0.0
    learner.onload()
    before = learner.snapshot()
    try:
        with unsharded(*learner.models):
            for part in parts:
                part.backward()
                learner.add_gradients()
                loss += part.item()
        loss = learner.ranks.total(loss)
        if not math.isfinite(loss):
            raise Diverged(f"the loss of a supervised step is {loss}")
        return {"loss": loss, "grad_norm": learner.step(lr)}
    except BaseException:
        learner.restore(before)
        raise
    finally:
        learner.offload()


def demonstrate(run, config: Config, task: Task) -> str:
    """The path of the run's demonstrations, which a resumed run finds there: rollouts with a return of 1, and
    of equal ones one, on as many training problems as the warm start draws. All processes must call this.
    Raises UserError if memory cannot hold both teams, or if no rollout is right."""
    ranks, path = run.team.ranks, run.directory / "demonstrations.jsonl"
    name, found = ranks.gather([str(path), path.is_file()])[0]
    if found:
        return name
    draws = [rng.generator(config.seed, "demonstrate", step) for step in range(config.warm_start)]
    drawn = [problem for draw in draws for problem in task.sample_problems(config.problems, draw)]
    rollouts = play(run.team, config, task, [*{p.text: p for p in drawn}.values()])
    run.costs.update(rollouts_demonstrations=len(rollouts.messages), seconds_demonstrations=rollouts.seconds)
    lines = log.transcripts(rollouts, 0, "demonstration", count=len(rollouts.messages))
    kept = [*dict.fromkeys(to_json(line) + "\n" for line in lines if line["return"] == 1)]
    if not kept:
        fault = f"--demonstrate {config.demonstrate}: none of {len(lines):,} rollouts has a return of 1"
        helps = "a larger model, --roles that say how an answer ends, or --demonstrations of your own"
        raise UserError(f"{fault}; what helps: {helps} (docs/your-data.md)")
    if ranks.first:
        with replacing(path) as aside:
            aside.write_text("".join(kept), encoding="utf-8")
    log.say(f"{name}: {len(kept):,} different right ones of {len(lines):,} rollouts")
    ranks.gather(None)  # nobody reads before it is written
    run.removable = False
    run.checkpoint()
    return name


def play(team: Team, config: Config, task: Task, problems: list[Problem]) -> Rollouts:
    """Rollouts of the demonstrating team, with the prompts of this run; the team is freed again."""
    how, source = (config.group, rng.RngPath(config.seed, "demonstrate"), "demonstrating"), config.demonstrate
    if source == config.model:  # the team itself
        return collect(team, problems, *how)
    other = dataclasses.replace(config, model=source, lora_rank=0, batch_rows=0, drop_long=False)
    sources = other.model_of_each
    if Path(source, "metrics.jsonl").is_file():
        if (agents := Config.load(Path(source, "config.json")).agents) != config.agents:
            raise UserError(f"--demonstrate {source} has {agents} agents, this run has {config.agents}")
        sources = [Path(source, "agents", str(j)) for j in range(agents)]
    other, _ = plan_evaluation(other, task, problems, config.group, sources, team.ranks)
    rollouts = collect(build_team(other, task, team.ranks, sources), problems, *how)
    gc.collect()
    torch.cuda.empty_cache()  # without a GPU it does nothing
    return rollouts


def read_demonstrations(config: Config, task: Task) -> list[Demonstration]:
    """The lines of --demonstrations, as in transcripts.jsonl, without those of held-out problems or with a
    `return` below 1; none if the task makes demonstrations itself. Raises UserError."""
    path, found = config.demonstrations, []
    if not path and not hasattr(task, "demonstrations"):
        raise UserError(f"--warm-start: {config.task} makes no demonstrations; give --demonstrations FILE")
    for number, record in read_jsonl(path) if path else ():
        try:
            said = [m for m in record["messages"] if not config.tools or m["agent"] < config.agents]
            agents, texts = zip(*[(m["agent"], m["text"]) for m in said])  # without --tools
            problem = Problem(str(record.get("id", number)), record["text"], str(record.get("answer", "")))
            if not set(agents) <= {*range(config.agents)} or {*map(type, (problem.text, *texts))} != {str}:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            form = f'{{"text": ..., "messages": [{{"agent": 0 to {config.agents - 1}, "text": ...}}, ...]}}'
            raise UserError(f"{path}, line {number}: not a transcript, which is {form}") from None
        stopped = [bool(m.get("stopped", True)) for m in said]
        found.append((Demonstration(problem, [*texts], [*agents], stopped), record.get("return", 1) == 1))
    kept = [shown for shown, right in found if right and not task.is_held_out(shown.problem.text)]
    if gone := len(found) - len(kept):
        print(f"{path}: {gone} transcripts that are not right, or of held-out problems, are left out")
    if path and not kept:
        raise UserError(f"{path} holds no transcripts of training problems that are right")
    return kept


def as_rollouts(team: Team, demonstrations: list[Demonstration]) -> Rollouts:
    """Demonstrations as if the team had written them: a message that was not cut off has its end token."""
    transcripts, n = [], len(team.agents) - team.tools
    for shown in demonstrations:
        writers = shown.agents or [turn % n for turn in range(len(shown.messages))]
        messages = []
        ends = shown.stopped or [True] * len(writers)
        for j, text, stopped in zip(writers, shown.messages, ends, strict=True):
            chat = team.agents[j].chat  # None: a tool, whose messages nobody is trained on
            tokens = [*chat.encode(text), *[chat.end_of_message] * stopped] if chat else []
            messages.append(Message(j, tokens, text, [0.0] * len(tokens), stopped))
            for tool in range(n, len(team.agents)):
                messages += tools.spoken(tool, team.agents[tool].role, shown.problem, messages)
        transcripts.append(messages)
    problems = [shown.problem for shown in demonstrations]
    return Rollouts(problems, transcripts, torch.ones(len(problems)), group_size=1)
