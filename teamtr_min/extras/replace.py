"""Replace one agent of a run by another model, after Stage-0 alignment. [paper]

    python -m teamtr_min.extras.replace --resume RUN --agent 1 --model qwen2.5-0.5b --stages 40
    python train.py --resume RUN-replaced

The first command makes a new run: RUN's logs up to its newest checkpoint, and a checkpoint in which agent 1
is the newcomer. The second resumes it as any other run.

Stage-0 first teaches the newcomer the habits of the incumbent, the agent that it replaces. At each token of
the incumbent's messages in the team's own rollouts the target is the policy nearest to the newcomer that the
team would hardly notice: [mechanism ours]

    pi_target ∝ pi_new^{1/(1+lam)} * pi_incumbent^{lam/(1+lam)},   KL(pi_target || pi_incumbent) <= delta

with the least lam >= 0, both policies frozen. The loss is KL(pi_target || newcomer), summed over a message.
A newcomer with another vocabulary learns the text of the messages instead, by next-token prediction.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from teamtr_min.config import Config, Parser
from teamtr_min.engine import rng
from teamtr_min.engine.model import Transformer
from teamtr_min.extras.diagnostics import bootstrap
from teamtr_min.extras.warm_start import as_rollouts, descend, next_token_losses
from teamtr_min.files import UserError, replacing, to_json
from teamtr_min.hf.weights import pinned
from teamtr_min.learner import Learner
from teamtr_min.occupancy import update_groups
from teamtr_min.rollout import AgentBatch, Rollouts, agent_batches, collect
from teamtr_min.run import checkpoint, log
from teamtr_min.run.loading import build_team
from teamtr_min.run.memory import plan_training
from teamtr_min.run.run import provenance, unchanged
from teamtr_min.tasks import Demonstration, WordProblems, load_task
from teamtr_min.team import Team

PROBES = 500  # messages of the incumbent that the newcomer learns from [paper]
BISECTIONS = 24  # as finely as fp32 divides [0, 1]
MOST_LOGITS = 2**25  # of a batch, unless one rollout has more: 128 MiB, and about six such tensors at once
LR_FACTOR = 4  # on --lr, which suits returns: a target for every token is a stronger signal


def mixture(new: Tensor, incumbent: Tensor, weight: Tensor) -> Tensor:
    """log pi_target (N, V) from finite log-probs (N, V); weight (N,) is lam / (1 + lam), in [0, 1]."""
    return torch.lerp(new, incumbent, weight[:, None]).log_softmax(1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats (N,), of finite log-probs (N, V)."""
    return (p.exp() * (p - q)).sum(1)


def mixture_weight(new: Tensor, incumbent: Tensor, delta: float) -> Tensor:
    """The least weight (N,) whose mixture has KL(mixture || incumbent) <= delta: 0 where `new` is inside. The
    KL falls all the way from weight 0 to 1, so bisection finds it. The weight that is returned is inside."""
    low = torch.zeros_like(new[:, 0])
    high = 1 - (kl_divergence(new, incumbent) <= delta).to(new)  # weight 1 is the incumbent; NaN is outside
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = kl_divergence(mixture(new, incumbent, middle), incumbent) <= delta
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return high


@dataclass
class Lesson:
    """One batch of the newcomer's, with what its targets are made of. Hidden states wait on the host."""

    batch: AgentBatch
    hidden: list[Tensor]  # (N, H) each, of the newcomer as it came and of the incumbent
    heads: list[Tensor]  # (V, H) each
    config: Config

    def __post_init__(self):
        self.weight = mixture_weight(*self.frozen(), self.config.delta)  # (N,)

    def log_probs(self, hidden: Tensor, head: Tensor) -> Tensor:
        """hidden (N, H), head (V, H) -> (N, V) fp32."""
        logits = F.linear(hidden.to(head.device).float(), head.float())
        return (logits / self.config.temperature).log_softmax(1)

    def frozen(self) -> list[Tensor]:
        """Log-probs (N, V) of the newcomer as it came and of the incumbent."""
        return [*map(self.log_probs, self.hidden, self.heads)]

    def loss(self, model: Transformer) -> Tensor:
        """Sum of KL(pi_target || model) over the tokens."""
        hidden, head = self.batch.hidden(model)[self.batch.pair], model.head[: len(self.heads[0])]
        return kl_divergence(mixture(*self.frozen(), self.weight), self.log_probs(hidden, head)).sum()


@torch.no_grad()
def lessons(rollouts: Rollouts, old: Team, new: Team, j: int, config: Config) -> list[Lesson]:
    """The incumbent's messages in rollouts of team `old`, as batches of agent j of team `new`. Templates and
    packing of the two may differ, so hidden states are matched by rollout and turn."""
    models, none = [team.agents[j].model for team in (new, old)], torch.zeros_like(rollouts.returns)
    vocabulary = min(len(model.head) for model in models)  # one may have padding past it
    heads = [model.head.detach()[:vocabulary].clone() for model in models]
    tokens = min(config.batch_tokens, MOST_LOGITS // vocabulary)
    own, its = (agent_batches(team, rollouts, [j], none, tokens).own for team in (new, old))
    seen, found = {}, []  # (rollout, turn) -> the incumbent's hidden states (tokens, H) of that message
    for batch in its:
        hidden, lengths = batch.hidden(models[1])[batch.pair].cpu(), torch.bincount(batch.message).tolist()
        seen |= zip(zip(batch.rollout.tolist(), batch.turn.tolist()), hidden.split(lengths))
    for batch in own:
        incumbents = torch.cat([seen[place] for place in zip(batch.rollout.tolist(), batch.turn.tolist())])
        hidden = [batch.hidden(models[0])[batch.pair].cpu(), incumbents]
        found.append(Lesson(batch, hidden, heads, config))
    return found


def align(rollouts: Rollouts, old: Team, new: Team, j: int, config: Config, steps: int) -> dict:
    """Train agent j of team `new` on rollouts of team `old`, in that many full-batch steps, none if it is
    inside everywhere. Returns its part of the line in metrics.jsonl. Raises Diverged."""
    learner, messages, outside = Learner(new, [j], beta=0.0), len(rollouts.by([j])), 1.0
    agents = old.agents[j], new.agents[j]
    vocabularies = [agent.tokenizer.backend.get_vocab(with_added_tokens=True) for agent in agents]
    shared = vocabularies[0] == vocabularies[1]  # the same tokens under the same ids
    shared &= agents[0].chat.end_of_message == agents[1].chat.end_of_message
    if shared:
        taught = lessons(rollouts, old, new, j, config)
        outside = torch.cat([lesson.weight for lesson in taught]).gt(0).float().mean().item()
    else:  # the texts are demonstrations
        rows = zip(rollouts.problems, rollouts.messages)
        shown = [
            Demonstration(p, *zip(*[(m.text, m.agent, m.stopped) for m in row if m.agent < config.agents]))
            for p, row in rows
        ]
        none = torch.zeros_like(rollouts.returns)
        batches = agent_batches(new, as_rollouts(new, shown), [j], none, config.batch_tokens)
    model, steps, losses = learner.models[0], steps if outside else 0, []
    for left in range(steps, -1, -1):  # the last, at a rate of 0, changes nothing
        parts = (lesson.loss(model) / messages for lesson in taught) if shared else next_token_losses(batches)
        losses.append(descend(learner, parts, LR_FACTOR * config.lr * left / max(steps, 1))["loss"])
    return {
        "shared_vocabulary": shared, "probes": messages, "outside": outside, "align_steps": steps,
        "align_loss_before": losses[0], "align_loss_after": losses[-1],
    }  # fmt: skip


def replace(run: Path, j: int, changed: Config, steps: int) -> dict:
    """Make the run `changed.out`, which is `run` with the j-th model of `changed` as agent j, after `steps`
    of alignment. Returns the line for metrics.jsonl. After an error nothing is written."""
    begin, task, incumbents = time.perf_counter(), load_task(changed), Config.load(run / "config.json")
    changed, _ = plan_training(changed, task)  # refuses what memory cannot hold
    old = build_team(dataclasses.replace(changed, model=incumbents.model), task)
    learners = [Learner(old, agents, changed.first_beta) for agents in update_groups(changed, old)]
    state = checkpoint.load(run, learners)
    if state is None or state["warm_steps_done"] < changed.warm_start:
        raise UserError(f"{run} has no checkpoint of a stage yet: start a new run with other models")
    logs = {file: (run / file).read_bytes()[:length] for file, length in state["bytes"].items()}
    stage, name = state["stages_done"], changed.model_of_each[j]
    if stage >= changed.stages:
        raise UserError(f"{run} has done all of its {stage} stages; give --stages of more than {stage}")
    alone = dataclasses.replace(changed, agents=1, model=name, roles="", tools="")
    (newcomer,) = build_team(alone, WordProblems(alone, read=False)).agents
    newcomer.role = old.agents[j].role
    new = dataclasses.replace(old, agents=[*old.agents[:j], newcomer, *old.agents[j + 1 :]])

    held_out = task.sample_problems(changed.eval_problems, rng.generator(0, "held-out"), held_out=True)
    unchanged(run, provenance(changed, old, held_out[0]))
    path = rng.RngPath(changed.seed, "replace", stage)  # the same draws for each team, so that they pair
    line = {"kind": "replace", "stage": stage, "agent": j, "model": name}
    before = collect(old, held_out, 1, path).returns
    replaced = collect(new, held_out, 1, path).returns
    draws = range(-(-PROBES // (changed.rounds * changed.problems)))
    draws = [rng.generator(changed.seed, "probes", stage, i) for i in draws]
    problems = [problem for draw in draws for problem in task.sample_problems(changed.problems, draw)]
    probes = collect(old, problems, 1, rng.RngPath(changed.seed, "probes", stage))
    line |= align(probes, old, new, j, changed, steps)
    aligned = collect(new, held_out, 1, path).returns
    line["return_before"] = before.mean().item()
    for when, returns in (("replaced", replaced), ("aligned", aligned)):
        line[f"return_{when}"] = returns.mean().item()
        shock = bootstrap(torch.mean, before - returns, group=1, seed=stage)
        line[f"shock_{when}"], line[f"shock_{when}_ci"] = shock
    line["seconds_replace"] = time.perf_counter() - begin
    logs["metrics.jsonl"] += (to_json(line) + "\n").encode()
    state["bytes"] = {file: len(content) for file, content in logs.items()}
    state["seconds"] += line["seconds_replace"]
    # Adam and masters start anew for the newcomer, and for agents that step together with it.
    learners = [Learner(new, o.agents, changed.first_beta) if j in o.agents else o for o in learners]
    Path(changed.out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(changed.out)) as aside:
        aside.mkdir()
        for file, content in logs.items():
            (aside / file).write_bytes(content)
        checkpoint.save(aside, changed.warm_start + stage, learners, state)
        changed.save(aside / "config.json", **provenance(changed, new, held_out[0]))
    return line


def command(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--resume", type=Path, required=True, metavar="RUN", help="directory of the run")
    add("--agent", type=int, required=True, help="number of the agent, counted from 0")
    add("--model", required=True, help="directory, alias or hub id of the newcomer")
    add("--align", type=int, default=50, metavar="STEPS", help="steps of alignment (default 50)")
    add("--out", help="directory of the new run (default RUN-replaced)")
    add("--stages", type=int, help="stages of the new run, RUN's included (default RUN's)")
    args = parser.parse_args(argv)
    out = args.out or f"{args.resume}-replaced"
    config = Config.load(args.resume / "config.json", batch_tokens=0, batch_rows=0, out=out)
    if not 0 <= args.agent < config.agents or args.align < 0:
        raise UserError(f"--agent is a number from 0 to {config.agents - 1}, --align is 0 or more")
    if Path(out).exists():
        raise UserError(f"--out {out} exists; give another, or remove it first")
    models = config.model_of_each
    models[args.agent] = args.model
    changes = {"model": ",".join(models), "stages": args.stages or config.stages}
    line = replace(args.resume, args.agent, pinned(dataclasses.replace(config, **changes)), args.align)
    for when in ("replaced", "aligned"):
        shock, (low, high) = line[f"shock_{when}"], line[f"shock_{when}_ci"]
        print(f"agent {args.agent} {when}: held-out return {line['return_before']:.3f} -> "
              f"{line[f'return_{when}']:.3f}, swap shock {shock:+.3f} [{low:+.3f}, {high:+.3f}]")  # fmt: skip
    print(f"next: python train.py --resume {out}")


def main(argv: list[str] | None = None) -> int:
    return log.program(lambda ranks: command(argv))


if __name__ == "__main__":
    sys.exit(main())
