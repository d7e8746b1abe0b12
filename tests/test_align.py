"""Stage-0: the target is the least mixture inside the radius, and the loss pulls the newcomer there alone."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny import write_tokenizer
from toy_runs import prepared

from teamtr_min import load_tokenizer
from teamtr_min.config import Config
from teamtr_min.extras import align as stage0
from teamtr_min.extras.align import align, kl_divergence, mixture, mixture_weight, share_vocabulary
from teamtr_min.hf.weights import RELAY
from teamtr_min.learner import Diverged
from teamtr_min.rollout import Rollouts
from teamtr_min.tasks import Relay
from teamtr_min.team import Agent, ChatFormat, Team, load_team

N, V = 37, 13


def two_policies(scale: float = 1.5) -> list[torch.Tensor]:
    """Log-probs (N, V) fp32; the first rows of both are the same."""
    generator = torch.Generator().manual_seed(0)
    new, incumbent = (scale * torch.randn(2, N, V, generator=generator)).log_softmax(-1)
    new[:5] = incumbent[:5]
    return [new, incumbent]


def by_lambda(new, incumbent, lam: float) -> torch.Tensor:
    """pi_target of one token by its definition, float64, probabilities."""
    p, q = new.double().exp(), incumbent.double().exp()
    product = p ** (1 / (1 + lam)) * q ** (lam / (1 + lam))
    return product / product.sum()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.double().exp().tolist()))


def test_the_mixture_is_the_geometric_mean_of_both_policies():
    new, incumbent = two_policies()
    lams = torch.rand(N, generator=torch.Generator().manual_seed(1)) * 5
    lams[:2] = 0
    got = mixture(new, incumbent, lams / (1 + lams))
    for t in range(N):
        expected = by_lambda(new[t], incumbent[t], lams[t].item()).log()
        torch.testing.assert_close(got[t].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("delta", [1e-3, 0.02, 0.3])
def test_the_target_is_the_nearest_mixture_inside_the_radius(delta):
    """Inside, and outside with a little less of the incumbent; where the newcomer is inside, the newcomer."""
    new, incumbent = two_policies()
    new[5:11] = torch.lerp(new, incumbent, 0.9)[5:11].log_softmax(-1)  # some are near, but not the same
    weight = mixture_weight(new, incumbent, delta)
    trained = 0
    for t in range(N):
        if divergence(new[t].double().exp(), incumbent[t]) <= delta:
            assert weight[t] == 0
            continue
        trained += 1
        assert 0 < weight[t] < 1
        lam = (weight[t] / (1 - weight[t])).item()
        at, less = (by_lambda(new[t], incumbent[t], x) for x in (lam, 0.999 * lam))
        assert divergence(at, incumbent[t]) <= delta + 1e-6
        assert divergence(less, incumbent[t]) > delta - 1e-6
    assert 15 < trained < N - 4


def test_more_lambda_is_nearer_to_the_incumbent():
    new, incumbent = two_policies()
    distances = torch.stack(
        [
            kl_divergence(mixture(new, incumbent, torch.full((N,), x)), incumbent)
            for x in torch.linspace(0, 1, 21)
        ]
    )  # (21, N)
    assert (distances[1:, 5:] < distances[:-1, 5:]).all() and distances[-1].abs().max() < 1e-6


def test_an_infinite_radius_holds_everybody():
    assert not mixture_weight(*two_policies(), math.inf).any()


def moved(team: Team, j: int, scale: float = 0.5) -> Team:
    """The team with another agent j: the same one, its weights disturbed."""
    newcomer = dataclasses.replace(team.agents[j], model=copy.deepcopy(team.agents[j].model))
    generator = torch.Generator().manual_seed(j)
    with torch.no_grad():
        for p in newcomer.model.parameters():
            p += scale * p.std() * torch.randn(p.shape, generator=generator)
    return dataclasses.replace(team, agents=[newcomer if k == j else a for k, a in enumerate(team.agents)])


def probes(j: int = 1, **changes) -> tuple[Config, Rollouts, Team]:
    """Rollouts of a team of two in two rounds, and the team with another agent j."""
    toy = prepared(agents=2, rounds=2, problems=3, group=3, batch_tokens=150, delta=0.02, **changes)
    return toy.config, toy.rollouts, moved(toy.rollouts.team, j)


RELAY_TEMPLATE = json.loads((RELAY / "tokenizer_config.json").read_text())["chat_template"]


def with_template(agent: Agent, directory: Path, template: str) -> None:
    """Give it the shipped tokenizer with another chat template."""
    shutil.copytree(RELAY, directory, dirs_exist_ok=True)
    (directory / "chat_template.jinja").write_text(template)
    agent.tokenizer = load_tokenizer(directory)
    agent.chat = ChatFormat(agent.tokenizer)


def log_probs(team: Team, j: int, problem, messages, temperature: float) -> list[torch.Tensor]:
    """Of each of j's messages (tokens, V), by a forward pass over the transcript alone."""
    seen = team.render(j, problem.text, messages, add_generation_prompt=False)
    logits = team.agents[j].model(torch.tensor([seen.ids]))[0].double()
    return [(logits[start - 1 : stop - 1] / temperature).log_softmax(-1) for start, stop in seen.spans]


def expected_loss(rollouts: Rollouts, team: Team, frozen: Team, j: int, config: Config):
    """KL(pi_target || newcomer), summed over messages one token at a time; also the tokens outside."""
    loss, outside = 0.0, 0
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        everyone = [log_probs(t, j, problem, messages, config.temperature)
                    for t in (team, frozen, rollouts.team)]  # fmt: skip
        for now, new, incumbent in zip(*everyone):
            for t in range(len(now)):
                new_t, incumbent_t = new[t].detach(), incumbent[t].detach()
                weight = mixture_weight(new_t[None], incumbent_t[None], config.delta).item()
                target = by_lambda(new_t, incumbent_t, weight / (1 - weight))
                loss, outside = loss + (target * (target.log() - now[t])).sum(), outside + (weight > 0)
    return loss, outside


@pytest.mark.parametrize("chunk", [100, 10**6])
def test_the_loss_is_that_of_a_loop_over_tokens_and_so_is_its_gradient(monkeypatch, tmp_path, chunk):
    """In chunks of 4 tokens and in one; at a temperature; under way; with another template."""
    monkeypatch.setattr(stage0, "CHUNK_NUMBERS", chunk)
    config, rollouts, team = probes(temperature=0.7)
    with_template(team.agents[1], tmp_path, RELAY_TEMPLATE.replace("<|' +", "<|user|><|' +"))
    frozen, model = moved(team, 1, 0.0), team.agents[1].model
    zero = torch.zeros_like(rollouts.returns)
    batches = [dataclasses.replace(rollouts, team=t).batches([1], zero, 150) for t in (team, rollouts.team)]
    assert len(batches[0]) > 1
    terms, outside = stage0.mixture_terms(
        model, batches[0], rollouts.team.agents[1].model, batches[1], config
    )
    team.agents[1].model.load_state_dict(moved(team, 1, 0.05).agents[1].model.state_dict())
    loss = sum(term() for term in terms)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected, count = expected_loss(rollouts, team, frozen, 1, config)
    expected.backward()
    assert outside == count > 20 and loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item())


def test_alignment_brings_the_newcomer_to_the_incumbent_and_moves_nobody_else():
    config, rollouts, team = probes(lr=1e-3, align=30, replace="1=relay", resume="x")
    others = copy.deepcopy([team.agents[0].model.state_dict(), rollouts.team.agents[1].model.state_dict()])
    line = align(rollouts, team, 1, config)
    assert line["align_loss_after"] < 0.3 * line["align_loss_before"] and line["align_steps"] == 30
    assert line["shared_vocabulary"] and line["probes"] == 18 and 0.2 < line["outside"] < 1
    for model, before in zip((team.agents[0].model, rollouts.team.agents[1].model), others):
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_newcomer_that_is_inside_everywhere_is_not_trained():
    config, rollouts, team = probes(align=5, replace="1=relay", resume="x")
    same = moved(rollouts.team, 1, 0.0)
    before = copy.deepcopy(same.agents[1].model.state_dict())
    line = align(rollouts, same, 1, config)
    assert (line["align_steps"], line["outside"], line["tokens_trained_replace"]) == (0, 0, 0)
    assert all(torch.equal(p, before[name]) for name, p in same.agents[1].model.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_alignment():
    config, rollouts, team = probes(align=5, replace="1=relay", resume="x")
    with torch.no_grad():
        team.agents[1].model.model.norm.weight[0] = math.inf
    with pytest.raises(Diverged):
        align(rollouts, team, 1, config)


def test_vocabularies_are_shared_when_every_token_and_the_end_are(tmp_path):
    config = Config(agents=2, device="cpu")
    a, b = load_team(config, Relay(config).roles(2)).agents
    assert share_vocabulary(a, b)
    chat = copy.copy(b.chat)
    chat.end_of_message += 1
    assert not share_vocabulary(a, dataclasses.replace(b, chat=chat))
    other = load_tokenizer(write_tokenizer(tmp_path))
    assert not share_vocabulary(a, dataclasses.replace(b, tokenizer=other))
