"""How much of what training does to fp32 masters reaches bf16 weights, by each way of rounding.

    python -m teamtr_min.studies.rounding [--model DIR --task sums --lr 1e-6] [--updates 4]

One agent climbs Eq. 10 by six steps an update, on the same rollouts and without a radius, from weights that
are bf16 numbers. After each step its weights are the masters rounded to bf16; all else is fp32. Exact KL to
the policy at the start, in nats a message, and the gain of Eq. 10's surrogate: of the rounded weights, and of
the masters. One JSON object a line.
"""

import argparse
import dataclasses
import json

import torch
from torch import Tensor

from teamtr_min import cli, rng
from teamtr_min.config import Config
from teamtr_min.learner import Learner, evaluate
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import collect
from teamtr_min.rounding import LOW, round_into
from teamtr_min.tasks import load_task
from teamtr_min.team import load_team

STEPS = 6


def nearest(x: Tensor, step: int) -> Tensor:
    return x.bfloat16().float()


def stochastic(x: Tensor, step: int) -> Tensor:
    """Up with the probability that makes the mean right, drawn anew at each step."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(LOW + 1, x.shape, generator=generator, dtype=torch.int32)
    return ((x.view(torch.int32) + drawn) & ~LOW).view(torch.float32)


def spread(x: Tensor, step: int) -> Tensor:
    """As the product does."""
    round_into(weight := x.bfloat16(), x)
    return weight.float()


WAYS = {"fp32": lambda x, step: x, "nearest": nearest, "stochastic": stochastic, "spread thresholds": spread}


@torch.no_grad()
def put(parameters: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values):
        p.copy_(value)


def study(config: Config, updates: int) -> None:
    task = load_task(config, training=True)
    problems = task.sample_problems(config.problems, rng.generator(config.seed, "problems", 0))
    team = load_team(config, task.roles(config.agents))
    for agent in team.agents:
        put(list(agent.model.parameters()), [p.bfloat16() for p in agent.model.parameters()])
    rollouts = collect(team, task, problems, config.group, rng.RngPath(config.seed, "rounding"))
    advantages = group_advantages(rollouts.grouped_returns, config.advantage_clip, config.eps_norm).flatten()
    agent = config.agents - 1
    model = team.agents[agent].model
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    for name, rounded in WAYS.items():
        put(parameters, start)
        learner = Learner(team, [agent], beta=0.0)
        batches = rollouts.batches([agent], advantages, config.batch_tokens)
        before, old = evaluate(learner, batches, config, grad=False)
        masters = start
        for update in range(1, updates + 1):
            for step in range(STEPS):
                evaluate(learner, batches, config, old, grad=True)
                put(parameters, masters)
                learner.step(config.lr)
                masters = [p.detach().clone() for p in parameters]
                put(parameters, [rounded(x, STEPS * update + step) for x in masters])
            moved = sum((p != s).sum().item() for p, s in zip(parameters, start)) / sum(
                p.numel() for p in start
            )
            here, _ = evaluate(learner, batches, config, old, grad=False)
            weights = [p.detach().clone() for p in parameters]
            put(parameters, masters)
            there, _ = evaluate(learner, batches, config, old, grad=False)
            put(parameters, weights)
            line = {"rounding": name, "update": update, "moved": moved}
            line |= {"kl": here["kl_exact"], "kl_masters": there["kl_exact"]}
            line |= {"gain": before["loss"] - here["loss"], "gain_masters": before["loss"] - there["loss"]}
            print(
                json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}),
                flush=True,
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--updates", type=int, default=4, help="(default 4)")
    cli.add_flags(parser, ["model", "agents", "task", "problems", "group", "lr", "seed"])
    flags = vars(parser.parse_args(argv))
    updates = flags.pop("updates")
    config = Config(**flags, kl_estimator="exact", batch_tokens=4096, batch_rows=256)
    study(dataclasses.replace(config, clip=1e9), updates)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
