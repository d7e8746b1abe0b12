"""TeamTR: fine-tune a team of language models, one agent at a time, inside a KL trust region.

Algorithm 1, top to bottom. A stage updates every agent once. Before each update the team as it now is works
on the stage's problems again (fresh occupancy), so each agent learns in the contexts that its already updated
teammates produce. An update climbs Eq. 10 for a few steps, no farther than `--delta` nats of KL per message
(Eq. 11).

    python train.py                                   three small agents learn relay arithmetic in two minutes
    python train.py --delta inf --lr 2e-3 --inner-steps 20   what goes wrong without the radius
    python train.py --agents 3 --model qwen2.5-1.5b   three Qwen2.5, fetched when they are new
    torchrun --nproc-per-node 8 train.py ...          the same run by eight processes, a GPU each
"""

import gc
import sys
import time

from teamtr_min import cli
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Lost, Ranks, join
from teamtr_min.extras.diagnostics import Diagnostics, NoDiagnostics
from teamtr_min.extras.replace import replaced
from teamtr_min.extras.warm_start import warm_start
from teamtr_min.files import UserError, one_line
from teamtr_min.hf.weights import pinned
from teamtr_min.learner import Diverged, Learner, OutOfMemory, Update, evaluate
from teamtr_min.objective import group_advantages
from teamtr_min.occupancy import RolloutSource, learning_rate, update_order
from teamtr_min.rollout import AgentBatch
from teamtr_min.run.memory import plan_training
from teamtr_min.run.progress import Bar
from teamtr_min.run.run import Follower, Run
from teamtr_min.run.system import set_threads
from teamtr_min.tasks import load_task
from teamtr_min.team import load_team

HALVINGS = 10


def train(config: Config, ranks: Ranks = ALONE) -> dict:
    """Algorithm 1 [paper]. Fills the run's directory and returns its summary; with torchrun, on each rank."""
    set_threads(config.shipped)
    task = load_task(config, training=True)
    config = pinned(config)  # with the commit of each model
    config, plan = plan_training(config, task, ranks)  # refuses what memory or disk cannot hold
    print(plan, flush=True)
    team = load_team(config, task.roles(config.agents), ranks=ranks)
    for agent in team.agents:
        agent.model.checkpointing = plan.checkpointing
    learners = [Learner(team, agents, config.beta) for agents in config.update_groups]
    with (Run if ranks.first else Follower)(config, task, team, learners, plan) as run:
        warm_start(run, config, task, team, learners)
        for stage in run.stages():
            problems = task.sample_problems(config.problems, rng.generator(config.seed, "problems", stage))
            source = RolloutSource(config, task, team, problems, stage)
            diagnostics = Diagnostics(config, task, team, stage) if config.diagnostics else NoDiagnostics()
            for i, j in enumerate(update_order(config, stage)):
                learner = learners[j]
                rollouts = source.of_update(i)  # by the team as it now is, agents before j already updated
                diagnostics.before(i, learner.agents)

                begin = time.perf_counter()
                advantages = group_advantages(  # Eq. 9, (P, G)
                    rollouts.grouped_returns, config.advantage_clip, config.eps_norm, not config.no_group_norm
                ).flatten()
                batches = rollouts.batches(learner.agents, advantages * source.weights, config.batch_tokens)
                lr = learning_rate(config, stage, i, learner.agents)
                with Bar("training", len(batches) * (config.inner_steps + 1), "batches") as learner.bar:
                    outcome = update(learner, batches, config, lr)  # Eq. 10, Eq. 11
                source.updated(learner.agents)
                seconds = time.perf_counter() - begin

                run.record(stage, i, learner, rollouts, outcome, seconds, **diagnostics.after())
            run.end_stage(stage)
    return run.summary


def update(learner: Learner, batches: list[AgentBatch], config: Config, lr: float) -> Update:
    """Climb Eq. 10 for up to `inner_steps` steps, but no farther from pi_old than the radius of Eq. 11.

        pi_old ──step──> accepted ──step──> accepted ──step──> outside: back along this step, by halves

    The forward pass of each step also measures the weights that the step before it left, so monitoring costs
    one extra forward an update. Whatever is raised leaves the last accepted weights in place.
    """
    ranks = learner.ranks
    if not ranks.any(bool(batches)):  # a router may leave an agent out of every rollout
        return Update(lr=lr, beta=learner.beta)
    # Without any advantage there is nothing to climb: a step would only follow Adam's momentum. [ours]
    pulled = ranks.any(any(bool(batch.advantage.any()) for batch in batches))
    most = config.inner_steps if pulled else 0
    steps, halvings, grad_norm = 0, 0, None
    learner.onload()
    accepted = learner.snapshot()
    try:
        here, old_logps = evaluate(learner, batches, config, grad=most > 0)  # at pi_old: every ratio is 1
        first = kept = here
        while steps < most and here["kl"] <= config.radius:
            if steps:  # the step before this one stayed inside
                kept, accepted = here, learner.snapshot(into=accepted)
            grad_norm = learner.step(lr)
            steps += 1
            grad, leaves = steps < most, learner.kl_rate * steps**2 > config.radius  # by what came before
            here, _ = evaluate(learner, batches, config, old_logps, grad=grad and not leaves)
            if grad and leaves and here["kl"] <= config.radius:  # it stayed: the gradient is wanted after all
                here, _ = evaluate(learner, batches, config, old_logps, grad=True)
            learner.kl_rate = here["kl"] / steps**2
        attempted, outside = here, learner.clone_masters() if here["kl"] > config.radius else None
        while here["kl"] > config.radius and halvings < HALVINGS:  # backtracking line search
            halvings += 1
            learner.restore(accepted, toward=outside, fraction=0.5**halvings)
            here, _ = evaluate(learner, batches, config, old_logps, grad=False)
        if here["kl"] > config.radius:
            learner.restore(accepted)
            here, halvings = kept, HALVINGS + 1
    except BaseException:
        learner.restore(accepted)
        raise
    finally:
        learner.offload()
    tokens = steps * ranks.total(sum(len(batch.pair) for batch in batches))
    outcome = Update(first, attempted, here, steps, halvings, grad_norm, lr, learner.beta, tokens)
    if steps and config.kl != "fixed":
        learner.adapt_beta(attempted["kl"], config.delta)
    return outcome


def main(argv: list[str] | None = None) -> int:
    ranks, code = ALONE, 0
    try:
        ranks = join()
        train(replaced(cli.parse(argv, __doc__), ranks), ranks)
    except (UserError, OSError) as error:
        ranks.say(f"error: {one_line(error, 1000)}")
        code = 2
    except (Diverged, FloatingPointError, OutOfMemory, Lost) as error:
        ranks.say(f"stopped: {str(error).splitlines()[0]}")
        code = 1
    except KeyboardInterrupt:
        ranks.say("interrupted")
        code = 130
    return ranks.leave(code)


if __name__ == "__main__":
    cli.open_streams()
    gc.freeze()  # of 300,000 objects that stay, a collection need not look at any
    sys.exit(main())
