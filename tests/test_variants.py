"""Every variant of the ablation does what its flag says: what is sampled when, and what bounds an update."""

import pytest
from toy_runs import run

from teamtr_min import occupancy

pytestmark = pytest.mark.usefixtures("half_right")
SAMPLED = {  # rollouts that each update of a stage samples anew
    "--occupancy fresh": [12, 12, 12], "--min-ess 0": [12, 0, 0], "--min-ess 0.99": [12, 12, 12],
    "--occupancy stale": [12, 0, 0], "--occupancy joint": [12],
}  # fmt: skip


@pytest.mark.parametrize("flags", SAMPLED)
def test_rollouts_are_sampled_and_counted_when_the_flag_says(tmp_path, monkeypatch, flags):
    collected, collect = [], occupancy.collect
    monkeypatch.setattr(occupancy, "collect", lambda *a: collected.append(a[-1].words) or collect(*a))
    summary, updates, _ = run(tmp_path / "run", *flags.split())
    new = SAMPLED[flags]
    assert [u["rollouts"] for u in updates] == new * 2
    assert collected == [("train", stage, i) for stage in range(2) for i, count in enumerate(new) if count]
    for u in updates:
        assert (u["tokens_sampled"] > 0) == (u["seconds_sampling"] > 0) == (u["rollouts"] > 0)
    assert summary["rollouts"] == 2 * sum(new) and summary["rollouts_evaluation"] == 2 * 8
    assert summary["tokens_sampled"] == sum(u["tokens_sampled"] for u in updates)


@pytest.mark.parametrize("kl", ["hard", "adaptive", "fixed", "none"])
def test_the_kl_flag_says_what_holds_an_update_back(tmp_path, kl):
    summary, updates, _ = run(tmp_path / "run", "--kl", kl, "--delta", "0.002", "--beta", "0.1")
    assert all(u["delta"] == 0.002 and u["steps"] for u in updates) and summary["violation_rate_before"] > 0.5
    assert (max(u["kl_after"] for u in updates) <= 0.002) == (kl == "hard")
    assert any(u["halvings"] for u in updates) == (kl == "hard")
    assert (summary["violation_rate_after"] == 0) == (kl == "hard")
    betas = {u["beta"] for u in updates if u["stage"] == 1}
    assert (betas != {0.0 if kl == "none" else 0.1}) == (kl in ("hard", "adaptive"))
