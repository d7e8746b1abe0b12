"""TeamTR in one small file: Algorithm 1 with plain sampling, Eq. 9 to 11 and backtracking.

    python docs/minimal.py             `python train.py --occupancy fresh`, slowly

It knows one device and one agent per turn, and nothing else. Everything that train.py has more is
here left out, and this is what it buys:

    KV cache, equal prompts fed once           256 rollouts of relay 14 times as fast
    prefix trees, log-probs without logits     an update 30 times as fast, and long messages fit
    bf16 with fp32 masters, LoRA, FSDP         models that do not fit otherwise
    reweighted rollouts (--min-ess)            one collection a stage instead of one an update
    checkpoints, logs, evaluation, refusals    a run that can be stopped, read and trusted

The first update of both has the same rollouts, the same KL and the same weights: a test compares them.
"""

import copy
import math

import torch
from torch import Tensor

from teamtr_min import load_model, load_tokenizer
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.model import Transformer
from teamtr_min.hf.chat import ChatFormat
from teamtr_min.tasks import Relay
from teamtr_min.tasks.task import Message, Problem

CLIP, BETA, HALVINGS = 0.2, 1e-3, 10


class Minimal:
    """A team of small agents on relay: their models, an optimizer each, and their common chat format."""

    def __init__(self, config: Config):
        self.config, self.task = config, Relay(config)
        self.models = [load_model(name) for name in config.model_of_each]
        how = {"lr": config.lr, "betas": (0.9, 0.99), "weight_decay": 0}
        self.optimizers = [torch.optim.AdamW(model.parameters(), **how) for model in self.models]
        self.betas = [BETA] * config.agents
        self.tokenizer = load_tokenizer(config.models[0])
        self.chat, self.roles = ChatFormat(self.tokenizer), self.task.roles(config.agents)

    def view(self, j: int, problem: Problem, messages: list[Message]) -> list[int]:
        """The transcript as agent j sees it, up to the header of its next message."""
        ids = list(self.chat.opening(self.roles[j].system, problem.text))
        for m in messages:
            if m.agent == j:
                close = [] if m.stopped else [self.chat.end_of_message]
                ids += [*self.chat.assistant_header, *m.tokens, *close, *self.chat.assistant_footer]
            else:
                ids += self.chat.teammate_ids(self.roles[m.agent].name, m.content)
        return ids + list(self.chat.assistant_header)

    @torch.no_grad()
    def write(self, j: int, prompts: list[list[int]], keys: list[int]) -> list[Message]:
        """One message of agent j after each prompt, every token by a forward pass over the whole text."""
        config, rows, done = self.config, [list(p) for p in prompts], [False] * len(prompts)
        uniforms = rng.uniforms(keys, config.max_new_tokens)  # (R, max_new_tokens)
        for t in range(config.max_new_tokens):
            logits = last_logits(self.models[j], rows) / config.temperature  # (R, V)
            cumulative = logits.softmax(-1).cumsum(-1)
            passed = uniforms[:, t : t + 1] * cumulative[:, -1:]  # (R, 1)
            drawn = torch.searchsorted(cumulative, passed, right=True)[:, 0]  # (R,)
            for r, token in enumerate(drawn.clamp(max=logits.shape[1] - 1).tolist()):
                if not done[r]:
                    rows[r].append(token)
                    done[r] = token in self.chat.end_tokens
        said = [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
        texts = [self.tokenizer.decode(ids[:-1] if end else ids) for ids, end in zip(said, done)]
        return [Message(j, ids, text, [], end) for ids, text, end in zip(said, texts, done)]

    def collect(self, problems: list[Problem], path: rng.RngPath) -> tuple[list[list[Message]], Tensor]:
        """G rollouts of every problem by the team as it now is, and their returns (R,)."""
        repeated = [p for p in problems for _ in range(self.config.group)]
        rollouts: list[list[Message]] = [[] for _ in repeated]
        for turn in range(self.config.turns):
            j = turn % self.config.agents
            prompts = [self.view(j, p, messages) for p, messages in zip(repeated, rollouts)]
            keys = [path.key("rollout", r, turn) for r in range(len(repeated))]
            for messages, message in zip(rollouts, self.write(j, prompts, keys)):
                messages.append(message)
        return rollouts, torch.tensor([self.task.grade(p, m) for p, m in zip(repeated, rollouts)])

    def log_probs(self, j: int, problems: list[Problem], rollouts: list[list[Message]]) -> list[Tensor]:
        """For each message of agent j, in order: log-probs (U,) of its tokens, with their graph."""
        found = []
        for r, messages in enumerate(rollouts):
            problem = problems[r // self.config.group]
            for turn in (t for t, m in enumerate(messages) if m.agent == j):
                context, tokens = self.view(j, problem, messages[:turn]), messages[turn].tokens
                logits = self.models[j](torch.tensor([context + tokens]))[0]  # (T, V)
                logits = logits[len(context) - 1 : -1] / self.config.temperature  # (U, V): t predicts t + 1
                found.append(logits.log_softmax(-1)[range(len(tokens)), tokens])
        return found

    def update(self, j: int, problems: list[Problem], rollouts: list, advantages: Tensor) -> dict:
        """Climb Eq. 10 for up to `inner_steps` steps, and go back where Eq. 11 leaves its radius."""
        config, model, optimizer = self.config, self.models[j], self.optimizers[j]
        owner = [r for r, messages in enumerate(rollouts) for m in messages if m.agent == j]
        A = advantages[owner]  # (M,)
        with torch.no_grad():
            old = self.log_probs(j, problems, rollouts)

        def objective() -> tuple[Tensor, float]:
            """(minus Eq. 10, Eq. 11's KL by k3)."""
            log_ratio = [new - was for new, was in zip(self.log_probs(j, problems, rollouts), old)]
            w = torch.stack([x.sum() for x in log_ratio]).exp()  # (M,) full product over a message's tokens
            kl = torch.stack([(x.expm1() - x).sum() for x in log_ratio]).mean()
            surrogate = torch.minimum(w * A, w.clamp(1 - CLIP, 1 + CLIP) * A).mean()
            return self.betas[j] * kl - surrogate, kl.item()

        def state() -> tuple:
            return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

        accepted, steps, halvings, kl, attempted = state(), 0, 0, 0.0, 0.0
        for _ in range(config.inner_steps if advantages.any() else 0):
            optimizer.zero_grad()
            objective()[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            with torch.no_grad():
                attempted = kl = objective()[1]
            if kl > config.delta:
                break
            accepted = state()
        outside = copy.deepcopy(model.state_dict())
        while kl > config.delta and halvings <= HALVINGS:  # backtracking line search
            halvings += 1
            fraction = 0.5**halvings if halvings <= HALVINGS else 0.0
            model.load_state_dict({n: w.lerp(outside[n], fraction) for n, w in accepted[0].items()})
            optimizer.load_state_dict(accepted[1])
            with torch.no_grad():
                kl = objective()[1]
        if steps:  # [ours] beta follows the overshoot
            over = attempted / config.delta
            self.betas[j] *= 1.5 if over > 1.5 else 1 / 1.5 if over < 1 / 1.5 else 1
            self.betas[j] = min(max(self.betas[j], 1e-4), 1.0)
        return {"steps": steps, "halvings": halvings, "attempted": attempted, "kl": kl}

    def stage(self, stage: int) -> None:
        """Algorithm 1 [paper]: update every agent once, each on rollouts of the team as it then is."""
        config = self.config
        problems = self.task.sample_problems(config.problems, rng.generator(config.seed, "problems", stage))
        for j in range(config.agents):
            rollouts, returns = self.collect(problems, rng.RngPath(config.seed, "train", stage, j))
            advantages = group_advantages(returns.view(-1, config.group)).flatten()
            done = (stage + j / config.agents) / config.stages
            self.optimizers[j].param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * done))
            outcome = self.update(j, problems, rollouts, advantages)
            print(f"stage {stage + 1} agent {j} return {returns.mean():.3f} {outcome}", flush=True)


def group_advantages(returns: Tensor) -> Tensor:
    """Eq. 9 [paper]: returns (P, G) -> advantages (P, G). A group of equal returns has none."""
    centred = returns - returns.mean(1, keepdim=True)
    sigma = (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    equal = returns.amax(1, keepdim=True) == returns.amin(1, keepdim=True)
    return torch.where(equal, 0.0, (centred / sigma).clamp(-2, 2))


def last_logits(model: Transformer, rows: list[list[int]]) -> Tensor:
    """(R, V) logits after the last token of each row; shorter rows are padded on the right."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return model(tokens)[range(len(rows)), [len(row) - 1 for row in rows]]


if __name__ == "__main__":
    team = Minimal(Config())
    for stage in range(team.config.stages):
        team.stage(stage)
