"""A whole training run, each update audited: `python tests/audit_radius.py --seed 0` (flags as train.py).

After every update the KL between the agent before and after it is computed again from nothing but the two
models and the rollouts, one rollout at a time, in float64, by code that shares nothing with the update's own
monitor. Takes a few minutes longer than the run itself; the tests do the same for single updates.
"""

import copy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from test_update import kl_by_loop  # noqa: E402

import train  # noqa: E402
from teamtr_min.occupancy import RolloutSource  # noqa: E402


class Audited(RolloutSource):
    """Knows every update's rollouts just before it, and its agents just after."""

    found = []  # (KL, delta) of each update

    def of_update(self, i):
        self.latest = super().of_update(i)
        self.before = [copy.deepcopy(agent.model) for agent in self.team.agents]
        return self.latest

    def updated(self, agents):
        for j in agents:
            models = self.before[j], self.team.agents[j].model
            kl = kl_by_loop(*models, self.latest, j, self.config)[self.config.kl_estimator]
            self.found.append((kl, self.config.delta))
        super().updated(agents)


if __name__ == "__main__":
    train.RolloutSource = Audited
    code = train.main()
    if not Audited.found:
        sys.exit(code)
    outside = sum(kl > delta * (1 + 1e-4) for kl, delta in Audited.found)
    largest = max(kl for kl, _ in Audited.found)
    print(f"audited {len(Audited.found)} updates: {outside} outside their radius, largest KL {largest:.6f}")
    sys.exit(code or outside > 0)
