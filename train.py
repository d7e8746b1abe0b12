"""TeamTR: fine-tune a team of language models, one agent at a time, inside a KL trust region.

Algorithm 1, top to bottom. A stage updates every agent once. Before each update the team as it now is works
on the stage's problems again (fresh occupancy), so each agent learns in the contexts that its already updated
teammates produce. An update climbs Eq. 10 for a few steps, no farther than `--delta` nats of KL per message
(Eq. 11).

    python train.py                                   three small agents learn relay arithmetic in two minutes
    python train.py --delta inf --lr 2e-3 --inner-steps 20   what goes wrong without the radius
    python train.py --agents 3 --model qwen2.5-1.5b   three Qwen2.5 from the Hugging Face cache
"""

import math
import sys
import time

import torch

from teamtr_min import checkpoint, rng
from teamtr_min.checkpoint import Progress
from teamtr_min.config import Config, UserError
from teamtr_min.log import Run
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.tasks import load_task
from teamtr_min.team import load_team
from teamtr_min.update import Diverged, Learner, update_agent


def train(config: Config) -> dict:
    """Run Algorithm 1 as `config` says; fills the run's directory and returns its summary."""
    task = load_task(config)
    team = load_team(config, task.roles(config.agents))
    learners = [Learner(agent.model, config.beta) for agent in team.agents]
    held_out = task.draw(config.eval_problems, rng.generator(0, "held-out"), held_out=True)
    run, progress = Run(config, team), Progress()

    def stage_problems(stage: int) -> list:
        return task.draw(config.problems, rng.generator(config.seed, "problems", stage))

    def play(problems: list, group: int, *place) -> Rollouts:
        return collect(team, problems, group, task.grade, config, place)

    def held_out_accuracy(stages_done: int) -> float:
        return run.evaluated(play(held_out, 1, "held-out", stages_done), stages_done)

    if config.resume:
        progress, log_state = checkpoint.load(run.directory, learners, team, stage_problems)
        run.restore(log_state)
    try:
        if run.accuracy_start is None:
            run.started(held_out_accuracy(0))
        for stage in range(progress.stage, config.stages):
            problems, order = stage_problems(stage), update_order(config, stage)
            rollouts = progress.rollouts
            for i in range(progress.update, config.agents):
                sample_again = rollouts is None or config.occupancy == "fresh"
                if sample_again:  # from team^{i-1}, the agents before this one already updated
                    rollouts = play(problems, config.group, "train", stage, i)

                agent, start = order[i], time.perf_counter()
                # Eq. 9
                returns = rollouts.grouped_returns  # (P, G)
                advantage = group_advantages(
                    returns, config.advantage_clip, config.eps_norm
                ).flatten()  # (R,)
                # Eq. 10, until Eq. 11 reaches the radius
                batches = rollouts.view(agent, advantage, config.batch_tokens)
                lr = learning_rate(config, stage * config.agents + i)
                report = update_agent(learners[agent], batches, config, lr)
                report["seconds_training"] = time.perf_counter() - start
                if hasattr(task, "measure"):
                    report |= task.measure(rollouts.problems, rollouts.messages)
                run.updated(stage, i, agent, rollouts, sample_again, report)

                needed = config.occupancy == "stale" and i + 1 < config.agents
                progress = Progress(stage, i + 1, rollouts if needed else None)
                checkpoint.save(run.directory, progress, learners, {agent}, run.state(), config.keep)

            due = config.eval_every and (stage + 1) % config.eval_every == 0 and stage + 1 < config.stages
            run.finished_stage(stage, held_out_accuracy(stage + 1) if due else None)
            progress = Progress(stage + 1)
        return run.finish(accuracy_final=held_out_accuracy(config.stages))
    except BaseException as reason:  # whatever ends a run early, the team as it is now stays
        run.finish(stopped="interrupted" if isinstance(reason, KeyboardInterrupt) else str(reason))
        raise


def update_order(config: Config, stage: int) -> list[int]:
    """The agents in the order in which this stage updates them; the guarantee holds for any [paper]."""
    order = list(range(config.agents))
    if config.order == "reversed":
        order.reverse()
    elif config.order == "random":
        rng.generator(config.seed, "order", stage).shuffle(order)
    return order


def learning_rate(config: Config, update: int) -> float:
    """Cosine decay from lr to 0 over all updates of the run."""
    return 0.5 * config.lr * (1 + math.cos(math.pi * update / (config.stages * config.agents)))


def main(argv: list[str] | None = None) -> int:
    try:
        train(Config.from_flags(argv, __doc__))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Diverged, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"stopped: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without the plot's characters
    sys.exit(main())
