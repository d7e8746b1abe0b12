"""Every number in the code blocks of docs/worked-example.md, computed again from the inputs on the page."""

import math
import re
from pathlib import Path

import pytest
import torch

from teamtr_min.objective import group_advantages, teamtr_loss

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "worked-example.md").read_text(encoding="utf-8")
NUMBERS = ["eps_norm", "A_clip", "eps", "radius", "kl_full_step"]
INPUTS = [*NUMBERS, "returns_a", "returns_b", "returns_c", "old_logp", "new_logp"]
BLOCK = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def computed(given: dict[str, list[float]]) -> dict[str, list[float]]:
    """name -> numbers: all that the page derives, from what it gives."""
    found, (eps_norm, clip, eps, radius, full_step) = {}, (given[name][0] for name in NUMBERS)
    for group in "abc":
        returns = torch.tensor([given[f"returns_{group}"]], dtype=torch.float64)
        found[f"sigma_{group}"] = [math.sqrt(returns.var(correction=0) + eps_norm)]
        found[f"unclipped_{group}"] = group_advantages(returns, eps_norm=eps_norm)[0].tolist()
        found[f"advantages_{group}"] = group_advantages(returns, clip, eps_norm)[0].tolist()

    old, new = (torch.tensor(given[name], dtype=torch.float64) for name in ("old_logp", "new_logp"))
    message = torch.zeros(len(new), dtype=torch.long)
    for name, sign in (("good", 1.0), ("bad", -1.0)):
        logp, advantage = new.clone().requires_grad_(), torch.tensor([sign], dtype=torch.float64)
        loss, stats = teamtr_loss(logp, old, message, advantage, clip=eps)
        loss.backward()
        found |= {f"loss_{name}": [loss.item()], f"gradient_{name}": logp.grad.tolist()}
    _, gspo = teamtr_loss(new, old, message, advantage, ratio="mean")
    found |= {"w": stats["ratio_mean"].tolist(), "w_sequence_level": gspo["ratio_mean"].tolist()}
    found |= {"k1": stats["kl_k1"].tolist(), "k3": stats["kl_k3"].tolist()}

    halvings = math.ceil(math.log(full_step / radius, 4))
    found |= {"kl_over_radius": [full_step / radius], "halvings": [halvings]}
    return found | {"step_kept": [0.5**halvings], "kl_kept": [full_step * 0.25**halvings]}


def test_every_number_on_the_page_is_right():
    """What has six decimals is rounded, and what has fewer is exact."""
    lines = [line.split(" = ") for line in "".join(BLOCK.findall(PAGE)).splitlines() if line]
    printed = {name: values.split(", ") for name, values in lines}
    assert len(printed) == len(lines) > 20, "a name stands twice"
    derived = computed({name: [float(value) for value in values] for name, values in printed.items()})
    for name in printed.keys() - set(INPUTS):
        for text, value in zip(printed[name], derived[name], strict=True):
            rounding = 0.51e-6 if len(text.partition(".")[2]) == 6 else 1e-9
            assert float(text) == pytest.approx(value, rel=0, abs=rounding), name
