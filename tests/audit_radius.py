"""A whole training run, each update audited: `python tests/audit_radius.py --seed 0` (flags as train.py).

After every update the KL between the agents before and after it is computed again from nothing but the
models and the rollouts, one rollout at a time, in float64. Takes a few minutes longer than the run itself.
"""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

import train  # noqa: E402
from teamtr_min.team import Team  # noqa: E402


def kl_by_loop(old, new, team: Team, rollouts, agent: int, config, dtype=torch.float64) -> dict[str, float]:
    """Eq. 11 from nothing but the two models and the transcripts: one rollout at a time, in `dtype`."""
    old, new = copy.deepcopy(old).to(dtype), copy.deepcopy(new).to(dtype)
    k1, k3, mass, weights = [], [], [], rollouts.weights
    weights = [1.0] * len(rollouts.messages) if weights is None else weights.tolist()
    for problem, messages, weight in zip(rollouts.problems, rollouts.messages, weights):
        seen = team.render(agent, problem, messages, add_generation_prompt=False)
        tokens = torch.tensor([seen.ids])
        with torch.no_grad():
            logp = [(m(tokens)[0].double() / config.temperature).log_softmax(-1) for m in (old, new)]
        for start, stop in seen.spans:
            unit = (stop - start if config.kl_unit == "token" else 1) / weight
            mass.append(weight)
            terms = [[p[t - 1, seen.ids[t]].item() for p in logp] for t in range(start, stop)]
            k1.append(sum(o - n for o, n in terms) / unit)
            k3.append(sum(math.expm1(n - o) - (n - o) for o, n in terms) / unit)
    return {"k1": sum(k1) / sum(mass), "k3": sum(k3) / sum(mass)}


def audit(argv: list[str] | None = None) -> tuple[int, list[float]]:
    found, latest, update, of_update = [], [], train.update, train.RolloutSource.of_update

    def remembered(source, i):
        latest[:] = source.team, of_update(source, i)
        return latest[1]

    def audited(learner, batches, config, lr):
        before = copy.deepcopy(learner.models)
        outcome = update(learner, batches, config, lr)
        for j, old, new in zip(learner.agents, before, learner.models):
            found.append(kl_by_loop(old, new, *latest, j, config)[config.kl_estimator])
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.RolloutSource, "of_update", remembered)
        patch.setattr(train, "update", audited)
        return train.main(argv), found


if __name__ == "__main__":
    code, found = audit()
    print(f"audited {len(found)} updates, largest KL {max(found, default=0):.6f}")
    sys.exit(code)
