"""Stage-0: the target, the loss, and an agent that is replaced in mid-run; the old run is only read."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ready import Prepared
from safetensors.torch import load_file
from tiny import random_model, write_checkpoint, write_relabelled_tokenizer
from toy_runs import contents, refused, results, run

import train
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.extras import replace
from teamtr_min.extras.replace import align, mixture_weight
from teamtr_min.extras.warm_start import as_rollouts
from teamtr_min.hf.chat import ChatFormat, load_tokenizer
from teamtr_min.hf.weights import RELAY, load_model
from teamtr_min.learner import Diverged
from teamtr_min.rollout import collect
from teamtr_min.tasks import Role
from teamtr_min.team import Agent, Team

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    monkeypatch.setattr(replace, "PROBES", 24)


def by_lambda(new: torch.Tensor, incumbent: torch.Tensor, lam: float) -> torch.Tensor:
    """pi_target of one token by its definition, float64, probabilities."""
    p, q = new.double().exp(), incumbent.double().exp()
    product = p ** (1 / (1 + lam)) * q ** (lam / (1 + lam))
    return product / product.sum()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.double().exp().tolist()))


@pytest.mark.parametrize("delta", [1e-3, 0.02, 0.3, math.inf])
def test_the_target_is_the_nearest_mixture_inside_the_radius(delta):
    logits = 1.5 * torch.randn(2, 37, 13, generator=torch.Generator().manual_seed(0))  # tokens, vocabulary
    new, incumbent = logits.log_softmax(-1)
    new[:5] = incumbent[:5]
    new[5:11] = torch.lerp(new, incumbent, 0.9)[5:11].log_softmax(-1)
    weight = mixture_weight(new, incumbent, delta)
    for t in range(37):
        if divergence(new[t].double().exp(), incumbent[t]) <= delta:
            assert weight[t] == 0
            continue
        lam = (weight[t] / (1 - weight[t])).item()
        at, less = (by_lambda(new[t], incumbent[t], x) for x in (lam, 0.999 * lam))
        assert divergence(at, incumbent[t]) <= delta + 1e-6
        assert divergence(less, incumbent[t]) > delta - 1e-6
    assert (weight[:5] == 0).all() and (math.isinf(delta) or 15 < weight.count_nonzero() < 33)


def with_other(team: Team, j: int, scale: float = 0.5) -> Team:
    agents, generator = [*team.agents], torch.Generator().manual_seed(j)
    agents[j] = dataclasses.replace(agents[j], model=copy.deepcopy(agents[j].model))
    for p in agents[j].model.parameters():
        p.data += scale * p.data.std() * torch.randn(p.shape, generator=generator)
    return dataclasses.replace(team, agents=agents)


def probes(**changes) -> tuple[Config, object, Team, Team]:
    """Rollouts of a team of two in two rounds, the team, and the team with another agent 1."""
    ready = Prepared(rounds=2, problems=3, group=3, batch_tokens=150, **changes)
    return ready.config, ready.rollouts, ready.team, with_other(ready.team, 1)


def expected_loss(rollouts, now: Team, new: Team, old: Team, config: Config) -> tuple[torch.Tensor, int]:
    """KL(pi_target || newcomer), summed one token at a time over single transcripts; the tokens outside."""
    loss, outside = 0.0, 0
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        policies = []
        for team in (now, new, old):
            seen = team.render(1, problem, messages, add_generation_prompt=False)
            logits = team.agents[1].model(torch.tensor([seen.ids]))[0].double()
            own = torch.cat([logits[start - 1 : stop - 1] for start, stop in seen.spans])
            policies.append((own / config.temperature).log_softmax(-1))
        for p, a, b in zip(policies[0], policies[1].detach(), policies[2].detach(), strict=True):
            weight = mixture_weight(a[None], b[None], config.delta).item()
            target = by_lambda(a, b, weight / (1 - weight))
            loss, outside = loss + (target * (target.log() - p)).sum(), outside + (weight > 0)
    return loss, outside


def test_the_loss_is_that_of_a_loop_over_tokens_and_so_is_its_gradient(tmp_path):
    """In several batches; at a temperature; under way; where the newcomer has another template."""
    config, rollouts, old, team = probes(temperature=0.7)
    shutil.copytree(RELAY, tmp_path, dirs_exist_ok=True)
    template = json.loads((RELAY / "tokenizer_config.json").read_text())["chat_template"]
    for header in ("<|' +", "<|assistant|>'"):
        template = template.replace(header, f"<|user|>{header}")
    (tmp_path / "chat_template.jinja").write_text(template)
    team.agents[1].tokenizer = load_tokenizer(tmp_path)
    team.agents[1].chat = ChatFormat(team.agents[1].tokenizer)
    first = rollouts.problems[0], rollouts.messages[0]
    assert team.render(1, *first, False).ids != old.render(1, *first, False).ids
    frozen, model = with_other(team, 1, 0.0), team.agents[1].model
    taught = replace.lessons(rollouts, old, team, 1, config)
    assert len(taught) > 1
    model.load_state_dict(with_other(team, 1, 0.05).agents[1].model.state_dict())
    loss = sum(lesson.loss(model) for lesson in taught)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected, count = expected_loss(rollouts, team, frozen, old, config)
    expected.backward()
    assert sum(int(lesson.weight.count_nonzero()) for lesson in taught) == count > 20
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item())


def test_alignment_brings_the_newcomer_to_the_incumbent_and_moves_nobody_else():
    config, rollouts, old, team = probes(lr=1e-3)
    others = copy.deepcopy([team.agents[0].model.state_dict(), old.agents[1].model.state_dict()])
    line = align(rollouts, old, team, 1, config, steps=30)
    assert 0 < line["align_loss_after"] < 0.3 * line["align_loss_before"] and line["align_steps"] == 30
    assert line["shared_vocabulary"] and line["probes"] == 18 and 0.2 < line["outside"] < 1
    for model, before in zip((team.agents[0].model, old.agents[1].model), others):
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        team.agents[1].model.model.norm.weight[0] = math.inf
    with pytest.raises(Diverged):
        align(rollouts, old, team, 1, config, steps=5)


def put(run: Path, out: Path, *flags: str) -> dict:
    assert replace.main(["--resume", str(run), "--out", str(out), *flags]) == 0
    *_, line = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return line


def test_the_old_run_is_only_read_and_the_new_one_goes_on_and_resumes(stopped, tmp_path):
    before, out = contents(stopped), tmp_path / "new"
    line = put(stopped, out, "--agent", "2", "--model", "relay", "--align", "4")
    assert contents(stopped) == before
    assert (line["kind"], line["agent"], line["model"], line["stage"]) == ("replace", 2, "relay", 2)
    assert line["shared_vocabulary"] and line["probes"] == 24 and line["outside"] > 0.02
    for when in ("replaced", "aligned"):
        shock, (low, high) = line["return_before"] - line[f"return_{when}"], line[f"shock_{when}_ci"]
        assert low <= shock <= high and line[f"shock_{when}"] == pytest.approx(shock)
    metrics = (ROOT / "docs/metrics.md").read_text()
    section = metrics.partition('(`kind` is "replace")')[2].partition("\n## ")[0]
    assert not [key for key in line if key != "kind" and f"`{key}`" not in section]
    config, old = Config.load(out / "config.json"), Config.load(stopped / "config.json")
    roles, before = (json.loads((run / "config.json").read_text())["roles_in_use"] for run in (out, stopped))
    assert roles == before
    assert (config.model, config.stages) == ("relay,relay,relay", 3) and config.lr == old.lr
    assert train.main(["--resume", str(out)]) == 0
    summary, updates, stages = results(out)
    assert [u["stage"] for u in updates] == [0, 0, 0, 1, 1, 1, 2, 2, 2] and summary["stages"] == 3
    new, old = ((directory / "transcripts.jsonl").read_bytes()[:500] for directory in (out, stopped))
    assert new == old


def test_an_agent_replaced_by_itself_is_no_shock_and_starts_anew_beside_its_teammates(stopped, tmp_path):
    itself = f"{stopped}/agents/1"
    line = put(stopped, tmp_path / "new", "--agent", "1", "--model", itself, "--align", "5")
    zero = line["shock_replaced"], line["shock_aligned"], line["outside"], line["align_steps"]
    assert not any(zero) and line["shock_replaced_ci"] == [0, 0]
    assert line["return_before"] == line["return_aligned"]
    old, new = (directory / "checkpoints/000002" for directory in (stopped, tmp_path / "new"))
    for j in (0, 2):
        file = f"learner-{j}.safetensors"
        assert (old / file).read_bytes() == (new / file).read_bytes()
    before, after = (load_file(place / "learner-1.safetensors") for place in (old, new))
    weights = {f"master.0.{name}": p for name, p in load_model(itself).state_dict().items()}
    assert after.keys() == weights.keys() and all(torch.equal(after[name], p) for name, p in weights.items())
    old, new = (json.loads((place / "state.json").read_text())["beta"] for place in (old, new))
    assert new == [old[0], 1e-3, old[2]]


def test_a_newcomer_with_another_vocabulary_learns_from_text(stopped, tmp_path):
    model = random_model("llama", vocab_size=25)
    other = write_relabelled_tokenizer(write_checkpoint(tmp_path / "other", model))
    line = put(stopped, tmp_path / "new", "--agent", "0", "--model", str(other), "--align", "20")
    assert not line["shared_vocabulary"] and line["align_loss_after"] < 0.8 * line["align_loss_before"]
    assert train.main(["--resume", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new/agents/0/tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_a_newcomer_reads_each_message_of_a_tool_once(monkeypatch):
    ready = Prepared(agents=2, group=2, problems=3)
    tool = Role("Tool", "", lambda problem, messages: "ok" * (messages[-1].agent < 2))
    team = dataclasses.replace(ready.team, agents=[*ready.team.agents, Agent(tool)], tools=1)
    said = collect(team, ready.rollouts.problems[:3], 1, rng.RngPath(0, "probes"))
    first, second, third = team.agents
    other = SimpleNamespace(backend=SimpleNamespace(get_vocab=lambda **_: {}), hash="another")
    new = dataclasses.replace(team, agents=[first, dataclasses.replace(second, tokenizer=other), third])
    seen = []
    monkeypatch.setattr(replace, "as_rollouts", lambda *given: seen.append(as_rollouts(*given)) or seen[0])
    align(said, team, new, 1, ready.config, steps=1)
    texts = [[[(m.agent, m.text) for m in row] for row in rollouts.messages] for rollouts in (said, seen[0])]
    assert texts[0] == texts[1] and len(texts[0][0]) == 4


@pytest.mark.parametrize("kind", [
    "--lora-rank 2 --dtype bf16 --warm-start 3 --warm-start-lr 5e-2", "--occupancy joint"
])  # fmt: skip
def test_adapters_joint_updates_and_rates_of_their_own_are_replaced_too(half_right, tmp_path, kind):
    flags = [*kind.split(), "--agents", "2", "--eval-problems", "16", "--delta", "0.02", "--kl", "fixed"]
    run(tmp_path / "old", *flags)
    newcomer = "--agent 1 --model relay --stages 3 --align 20".split()
    line = put(tmp_path / "old", tmp_path / "new", *newcomer)
    assert line["stage"] == 2 and line["align_loss_after"] < line["align_loss_before"]
    assert train.main(["--resume", str(tmp_path / "new")]) == 0


def test_bad_input_is_a_sentence_and_changes_nothing(stopped, copy, tmp_path, capsys):
    shutil.rmtree(copy / "checkpoints")
    before, plain = contents(stopped.parent), "--agent 1 --model relay"
    for flags, sentence in {
        f"{plain} --stages 2": "has done all of its 2 stages; give --stages of more than 2",
        "--agent 3 --model relay": "--agent is a number from 0 to 2",
        f"{plain} --align -1": "--align is 0 or more",
        f"{plain} --out {stopped}": "exists; give another, or remove it first",
        f"{plain} --resume nowhere": "nowhere/config.json",
        f"{plain} --resume {copy}": "has no checkpoint of a stage yet",
    }.items():
        given = ["--resume", str(stopped), "--out", str(tmp_path / "new"), *flags.split()]
        assert sentence in refused(capsys, replace.main, *given)
    assert contents(stopped.parent) == before and not (tmp_path / "new").exists()
