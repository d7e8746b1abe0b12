"""When things happen in a run: who is updated when, on which rollouts, at which learning rate.

The variants of SPEC's ablation differ here and in a few numbers of config.py; train.py is the same for all.
"""

import math

from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.rollout import Head, Rollouts


def update_order(config: Config, stage: int) -> list[int]:
    """The order in which this stage makes its updates; the guarantee holds for any [paper]."""
    order = list(range(len(config.updates)))
    if config.order == "reversed":
        order.reverse()
    elif config.order == "random":
        rng.generator(config.seed, "order", stage).shuffle(order)
    return order


def learning_rate(config: Config, update: int) -> float:
    """Cosine decay from lr to 0 over all updates of the run."""
    return 0.5 * config.lr * (1 + math.cos(math.pi * update / (config.stages * len(config.updates))))


def samples_again(config: Config, i: int) -> bool:
    """Whether update number `i` of a stage begins with new rollouts."""
    return i % sampling_interval(config) == 0


def sampling_interval(config: Config) -> int:
    """Updates that share one collection of rollouts."""
    return {"fresh": 1, "every_k": config.every}.get(config.occupancy, config.agents)


def needed_later(config: Config, i: int) -> bool:
    """Whether what update number `i` trained on serves a later one of its stage, and so must be kept."""
    another = i + 1 < len(config.updates)
    return another and (config.resample == "suffix" or not samples_again(config, i + 1))


def unchanged_heads(config: Config, rollouts: Rollouts | None, done: list[int]) -> list[Head] | None:
    """With `--resample suffix`, the start of each latest rollout that the team as it now is would write
    alike.

    It ends before the first turn of any agent that was updated since; `done` are this stage's updates so far.
    The law of these starts is the new team's only marginally, not given the team, whose earlier updates were
    fitted to them. [ours]
    """
    if config.resample == "full" or not done:
        return None
    return rollouts.before(
        {j for update in done[-sampling_interval(config) :] for j in config.updates[update]}
    )
