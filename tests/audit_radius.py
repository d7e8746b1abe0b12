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
from teamtr_min.rollout import Rollouts  # noqa: E402

if __name__ == "__main__":
    update, view = train.update_agent, Rollouts.view
    last, audited = {}, []

    def remember(rollouts, agent, *rest):
        last.update(rollouts=rollouts, agent=agent)
        return view(rollouts, agent, *rest)

    def audit(learner, batches, config, lr):
        before = copy.deepcopy(learner.models[0])
        report = update(learner, batches, config, lr)
        team = last["rollouts"].team
        kl = kl_by_loop(before, learner.models[0], last["rollouts"], team, last["agent"], config)
        audited.append((kl[config.kl_estimator], report["kl_after"], config.delta))
        return report

    Rollouts.view, train.update_agent = remember, audit
    code = train.main()
    if not audited:
        sys.exit(code)
    outside = sum(kl > delta * (1 + 1e-4) for kl, _, delta in audited)
    gap = max(abs(kl - reported) for kl, reported, _ in audited)
    print(
        f"audited {len(audited)} updates: {outside} outside their radius, "
        f"largest KL {max(kl for kl, *_ in audited):.6f}, largest difference from the reported KL {gap:.2e}"
    )
    sys.exit(code or outside > 0)
