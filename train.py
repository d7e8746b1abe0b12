"""TeamTR: fine-tune a team of language models, one agent at a time, inside a KL trust region.

Algorithm 1, top to bottom. A stage updates every agent once, each under the team as it now is: an agent
learns in the contexts that its updated teammates produce. The paper samples these anew before each update
(`--occupancy fresh`); by default it reweights old rollouts while enough of them count (`--min-ess`).
An update climbs Eq. 10 for a few steps, no farther than `--delta` nats of KL per message (Eq. 11).

    python train.py                                   three small agents learn relay arithmetic in two minutes
    python train.py --occupancy fresh                 the paper's algorithm: three times the rollouts
    python train.py --delta inf --lr 2e-3 --inner-steps 20   what goes wrong without the radius
    python train.py --agents 3 --model qwen2.5-1.5b   three Qwen2.5, fetched when they are new
    torchrun --nproc-per-node 8 train.py ...          the same run by eight processes, a GPU each
"""

import gc
import sys
import time

from teamtr_min.config import Config, parse, runnable
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks, halving, memory_is_full
from teamtr_min.extras.diagnostics import Diagnostics
from teamtr_min.extras.warm_start import warm_start
from teamtr_min.hf.weights import pinned
from teamtr_min.learner import Learner, Update
from teamtr_min.objective import group_advantages
from teamtr_min.occupancy import RolloutSource, learning_rate, update_groups, update_order
from teamtr_min.rollout import Batches, agent_batches
from teamtr_min.run import log
from teamtr_min.run.loading import build_team
from teamtr_min.run.memory import plan_training
from teamtr_min.run.run import Run, check_out
from teamtr_min.tasks import load_task

HALVINGS = 10


def train(config: Config, ranks: Ranks = ALONE) -> dict:
    """Algorithm 1 [paper]. Fills the run's directory and returns its summary."""
    config = runnable(config)
    if ranks.first:
        check_out(config)
    config = pinned(config)
    task = load_task(config)
    config, plan = plan_training(config, task, ranks)  # refuses what memory cannot hold
    team = build_team(config, task, ranks)
    groups = update_groups(config, team)
    learners = [Learner(team, agents, config.first_beta, plan.offload) for agents in groups]
    for model in (model for learner in learners for model in learner.models):
        model.checkpointing = plan.checkpointing
    batch_tokens = config.batch_tokens
    with Run(config, task, team, learners, plan) as run:
        warm_start(run, config, task, team, learners)
        run.evaluate("start")
        for stage in range(run.stages_done, config.stages):
            problems = task.sample_problems(config.problems, rng.generator(config.seed, "problems", stage))
            source = RolloutSource(config, team, problems, stage)
            diagnostics = Diagnostics(config, team, stage)
            for i, number in enumerate(update_order(config, stage, len(learners))):
                learner = learners[number]
                rollouts = source.of_update(i)  # of, or reweighted to, the team as it now is
                diagnostics.before(i, learner.agents)

                begin = time.perf_counter()
                advantages = group_advantages(  # Eq. 9
                    rollouts.grouped_returns,
                    config.advantage_clip,
                    normalise=not config.no_group_norm,
                    weight=rollouts.grouped_weights,
                ).flatten()  # (R,)
                lr = learning_rate(config, (stage + i / len(learners)) / config.stages)

                def climb(tokens: int) -> Update:  # Eq. 10 and 11
                    batches = agent_batches(team, rollouts, learner.agents, advantages, tokens)  # noqa: B023
                    return update(learner, batches, config, lr)  # noqa: B023

                outcome, batch_tokens = halving(climb, batch_tokens, ranks)  # smaller where memory runs out
                source.updated(outcome.log_ratio)
                seconds = time.perf_counter() - begin

                run.log_update(stage, i, learner, rollouts, outcome, seconds, **diagnostics.after())
            run.end_stage(stage, **diagnostics.of_stage())
        run.evaluate("final")
    return run.summary


def update(learner: Learner, batches: Batches, config: Config, lr: float) -> Update:
    """Climb Eq. 10 for up to `inner_steps` steps, but no farther from pi_old than the radius of Eq. 11.

        pi_old ──step──> accepted ──step──> accepted ──step──> outside: back along this step, by halves

    The forward pass of each step also measures the weights that the step before it left. Where the next
    weights are expected to lie outside, no gradient is computed there. An error leaves the last accepted
    weights in place. If memory runs out after an accepted step, the update ends there.
    """
    if not sum(batches.weight):  # a router may leave an agent out of every rollout that has weight
        return Update(lr=lr, beta=learner.beta)
    # Without any advantage there is nothing to climb: a step would only follow Adam's momentum. [ours]
    most = config.inner_steps if batches.pulls else 0
    steps, halvings, grad_norm, spare = 0, 0, None, None
    learner.onload()
    accepted = learner.snapshot()
    try:
        first = kept = here = (learner.backward if most else learner.measure)(batches, config)  # at pi_old
        while steps < most and here.kl <= config.radius:
            if steps:  # the step before this one stayed inside
                spare, accepted = accepted, learner.snapshot(into=spare)
                kept = here
            leaves = steps and here.kl * (1 + 1 / steps) ** 2 > config.radius  # KL grows as the steps' square
            grad_norm = learner.step(lr)
            steps += 1
            here = (learner.measure if leaves or steps == most else learner.backward)(batches, config)
            if leaves and steps < most and here.kl <= config.radius:  # the gradient is wanted after all
                here = learner.backward(batches, config)
        attempted, outside = here, learner.clone_masters() if here.kl > config.radius else None
        while here.kl > config.radius and halvings < HALVINGS:  # backtracking line search
            halvings += 1
            learner.restore(accepted, toward=outside, fraction=0.5**halvings)
            here = learner.measure(batches, config)
        if here.kl > config.radius:
            learner.restore(accepted)
            here, halvings = kept, HALVINGS + 1
    except BaseException as error:
        learner.restore(accepted)
        if spare is None or learner.ranks.size > 1 or not memory_is_full(error):
            raise
        print("memory is full: an update ends with its accepted steps", file=sys.stderr)
        here = attempted = kept  # a new attempt would be from another pi_old
        steps, halvings = steps - 1, 0
    finally:
        learner.offload()
    measured = first.stats, attempted.stats, here.stats, here.log_ratio
    outcome = Update(*measured, steps, halvings, grad_norm, lr, learner.beta, steps * batches.tokens)
    if steps and config.kl in ("hard", "adaptive"):
        learner.adapt_beta(attempted.kl, config.delta)
    return outcome


def main(argv: list[str] | None = None) -> int:
    return log.program(lambda ranks: train(parse(argv, __doc__), ranks))


if __name__ == "__main__":
    gc.freeze()  # of 300,000 objects that stay, a collection need not look at any
    sys.exit(main())
