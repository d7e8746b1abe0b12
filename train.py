"""TeamTR: fine-tune a team of language models, one agent at a time, inside a KL trust region.

Algorithm 1, top to bottom. A stage updates every agent once. Before each update the team as it now is works
on the stage's problems again (fresh occupancy), so each agent learns in the contexts that its already updated
teammates produce. An update climbs Eq. 10 for a few steps, no farther than `--delta` nats of KL per message
(Eq. 11).

    python train.py                                   three small agents learn relay arithmetic in two minutes
    python train.py --delta inf --lr 2e-3 --inner-steps 20   what goes wrong without the radius
    python train.py --agents 3 --model qwen2.5-1.5b   three Qwen2.5, fetched when they are new
"""

import sys
import time

import torch

from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.hf.weights import pinned
from teamtr_min.learner import Diverged, Learner, update_agent
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run import checkpoint
from teamtr_min.run.checkpoint import Progress
from teamtr_min.run.run import Run
from teamtr_min.schedule import learning_rate, needed_later, samples_again, unchanged_heads, update_order
from teamtr_min.tasks import load_task
from teamtr_min.team import load_team
from teamtr_min.theory.certificate import Watch


def train(config: Config) -> dict:
    """Run Algorithm 1 as `config` says; fills the run's directory and returns its summary."""
    task = load_task(config)
    config = pinned(config)
    team = load_team(config, task.roles(config.agents))
    movers = config.updates  # the agents of each update: one; with joint occupancy all
    beta = 0.0 if config.kl == "none" else config.beta
    learners = [Learner([team.agents[j].model for j in agents], beta) for agents in movers]
    held_out = task.sample_problems(config.eval_problems, rng.generator(0, "held-out"), held_out=True)
    run, progress = Run(config, team, task), Progress()

    def stage_problems(stage: int, purpose: str = "problems") -> list:
        return task.sample_problems(config.problems, rng.generator(config.seed, purpose, stage))

    def play(problems: list, group: int, *place, heads=None) -> Rollouts:
        return collect(team, problems, group, task.grade, config, place, heads)

    def held_out_accuracy(stages_done: int) -> float:
        return run.evaluated(play(held_out, 1, "held-out", stages_done), stages_done)

    def watch_of(stage: int) -> Watch:
        problems = stage_problems(stage, "diagnostics")  # not those that are trained on
        return Watch(team, lambda i: play(problems, config.group, "diagnostics", stage, i), config)

    if config.resume:
        progress, log_state = checkpoint.load(run.directory, learners, team, stage_problems)
        run.restore(log_state)
    try:
        if run.accuracy_start is None:
            run.started(held_out_accuracy(0))
            checkpoint.save(run.directory, progress, learners, set(), run.state(), config.keep)
        for stage in range(progress.stage, config.stages):
            problems, order = stage_problems(stage), update_order(config, stage)
            rollouts = progress.rollouts
            watch = watch_of(stage) if config.diagnostics else None
            for i in range(progress.update, len(movers)):
                agents, learner = movers[order[i]], learners[order[i]]
                sample = samples_again(config, i)
                if sample:  # from team^{i-1}, the agents before this one already updated
                    heads = unchanged_heads(config, rollouts, order[:i])
                    rollouts = play(problems, config.group, "train", stage, i, heads=heads)
                if watch:
                    run.diagnosed(watch.before(i, agents))

                start = time.perf_counter()
                # Eq. 9
                advantage = group_advantages(
                    rollouts.grouped_returns,
                    config.advantage_bound,
                    config.eps_norm,
                    not config.no_group_norm,
                ).flatten()  # (R,)
                if config.occupancy == "importance":
                    advantage *= rollouts.weights
                # Eq. 10, until Eq. 11 reaches the radius
                batches = [b for j in agents for b in rollouts.view(j, advantage, config.batch_tokens)]
                lr = learning_rate(config, stage * len(movers) + i)
                report = update_agent(learner, batches, config, lr)
                if config.occupancy == "importance":
                    rollouts.reweigh(batches, config.temperature)
                report["seconds_training"] = time.perf_counter() - start

                run.updated(stage, i, agents, rollouts, sample, report | (watch.after() if watch else {}))
                progress = Progress(stage, i + 1, rollouts if needed_later(config, i) else None)
                if watch and i + 1 < len(movers):
                    continue  # a diagnosis spans its stage: a checkpoint within would cut it in two
                changed = set(order) if watch else {order[i]}
                checkpoint.save(run.directory, progress, learners, changed, run.state(), config.keep)

            due = config.eval_every and (stage + 1) % config.eval_every == 0 and stage + 1 < config.stages
            run.finished_stage(stage, held_out_accuracy(stage + 1) if due else None)
            progress = Progress(stage + 1)
        return run.finish(accuracy_final=held_out_accuracy(config.stages))
    except BaseException as reason:  # whatever ends a run early, the team as it is now stays
        run.finish(stopped="interrupted" if isinstance(reason, KeyboardInterrupt) else str(reason))
        raise


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
