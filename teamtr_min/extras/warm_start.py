"""Warm start: supervised steps on demonstrations before stage 0. [ours]

A reward can only teach what a team sometimes does. A model that never writes a message in the form which the
task grades gets no reward at all, so it is first shown some: plain next-token loss on each agent's own
messages in whole transcripts, by the masters and the optimizer that train it from then on.
"""

import json
import time

import torch

import kernels
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import unsharded
from teamtr_min.engine.model import Transformer
from teamtr_min.files import UserError, plain_file
from teamtr_min.learner import Diverged, Learner, keep_company
from teamtr_min.rollout import Batches, Rollouts, agent_batches
from teamtr_min.tasks import Demonstration, Problem, Task
from teamtr_min.team import Message, Team


def warm_start(run, config: Config, task: Task, team: Team, learners: list[Learner]) -> None:
    """`--warm-start` steps of every learner on `--problems` demonstrations each; the rate falls to 0."""
    if not config.warm_start:
        return
    source = Demonstrations(config, task)
    run.evaluate("untrained")
    for step in range(run.warm_steps_done, config.warm_start):
        lr = config.warm_start_lr * (1 - step / config.warm_start)
        shown = as_rollouts(team, source.draw(config.problems, step))
        for learner in learners:
            begin = time.perf_counter()
            batches = agent_batches(
                team, shown, learner.agents, torch.zeros(len(shown.returns)), config.batch_tokens
            )
            line = imitate(learner, batches, lr) if batches.messages else {"tokens": 0}
            seconds = time.perf_counter() - begin
            run.log_warm_start({"step": step, "agents": learner.agents, "lr": lr, **line}, seconds)


def imitate(learner: Learner, batches: Batches, lr: float) -> dict[str, float]:
    """One step on the mean of -log p over all trainable tokens.

    Returns `loss` in nats per token before the step, `grad_norm` before clipping, and the count of `tokens`.
    An error, Diverged or Ctrl-C included, leaves the weights of before.
    """
    loss = 0.0
    learner.onload()
    before = learner.snapshot()
    try:
        with unsharded(*learner.models):
            for batch in batches.own:
                if isinstance(batch, Transformer):
                    keep_company(batch)
                    continue
                hidden = batch.hidden(batch.model)  # (pairs, H)
                logp = kernels.linear_logprob(hidden, batch.model.head, batch.targets)[batch.pair]  # (N,)
                part = -logp.sum() / batches.tokens
                part.backward()
                learner.add_gradients()
                loss += part.item()
        loss = learner.ranks.total(loss)
        if not loss < float("inf"):
            raise Diverged(f"the loss of the warm start is {loss}")
        return {"loss": loss, "grad_norm": learner.step(lr), "tokens": batches.tokens}
    except BaseException:
        learner.restore(before)
        raise
    finally:
        learner.offload()


class Demonstrations:
    """Where demonstrations come from: the task makes them, or they are lines of a file (`--demonstrations`).

    A line is an object with `text` and `messages`, a list of {"agent", "text"}: as in transcripts.jsonl.
    """

    def __init__(self, config: Config, task: Task):
        self.config, self.task, self.lines = config, task, None
        if config.demonstrations:
            self.lines = read_demonstrations(config.demonstrations, config.agents)
        elif not callable(getattr(task, "demonstrations", None)):
            raise UserError(
                f"--warm-start: {config.task} makes no demonstrations; give some with --demonstrations FILE"
            )

    def draw(self, count: int, step: int) -> list[Demonstration]:
        generator = rng.generator(self.config.seed, "demonstrations", step)
        if self.lines is None:
            return self.task.demonstrations(count, generator)
        return [self.lines[i] for i in generator.integers(len(self.lines), size=count)]


def read_demonstrations(path: str, agents: int) -> list[Demonstration]:
    """A JSONL file of transcripts; errors name the line."""
    try:
        lines = plain_file(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            problem = Problem(str(record.get("id", number)), record["text"], str(record.get("answer", "")))
            said = [(message["agent"], message["text"]) for message in record["messages"]]
            if not said or not isinstance(problem.text, str):
                raise ValueError
            if not all(type(j) is int and 0 <= j < agents and isinstance(text, str) for j, text in said):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{path}, line {number}: not a transcript, which is "
                f'{{"text": ..., "messages": [{{"agent": 0 to {agents - 1}, "text": ...}}, ...]}}'
            ) from None
        found.append(Demonstration(problem, [text for _, text in said], [j for j, _ in said]))
    if not found:
        raise UserError(f"{path} holds no transcripts")
    return found


def as_rollouts(team: Team, demonstrations: list[Demonstration]) -> Rollouts:
    """Demonstrations as if the team had written them: each message closed by its writer's end token."""
    transcripts = []
    for shown in demonstrations:
        writers = shown.agents or [turn % len(team.agents) for turn in range(len(shown.messages))]
        if max(writers, default=0) >= len(team.agents):
            raise UserError(f"a demonstration has a message of agent {max(writers)}, whom the team lacks")
        messages = []
        for j, text in zip(writers, shown.messages):
            chat = team.agents[j].chat
            tokens = [*chat.encode(text), chat.end_of_message]
            messages.append(Message(j, tokens, text, [0.0] * len(tokens), stopped=True))
        transcripts.append(messages)
    count = len(transcripts)
    problems = [shown.problem for shown in demonstrations]
    return Rollouts(problems, transcripts, torch.ones(count), 1)
