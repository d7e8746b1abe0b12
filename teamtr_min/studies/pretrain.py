"""Make the models that ship, in minutes each: relay's (`--task convention`: the other one).

    python -m teamtr_min.studies.pretrain        rewrites teamtr_min/assets/relay

A model learns to predict the next token of transcripts that made-up solvers write. The same thread count and
torch version give the same bits.

Relay: a few solvers are nearly always right; most put a random digit in two steps out of three. Convention:
solvers are always right; the code of each message is drawn, with odds that depend on the turn alone. In half
of its transcripts a hint behind the problem names the code of all messages; runs never have a hint.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.model import ModelConfig, Transformer
from teamtr_min.hf.chat import Tokenizer, load_tokenizer
from teamtr_min.hf.weights import ASSETS, save_model
from teamtr_min.tasks import Convention, Relay


class Course(NamedTuple):
    task: type[Relay]
    steps: int  # of the optimizer
    careful: float  # share of careful solvers
    right: tuple[float, float]  # P(a step is meant to be right) of careless and careful solvers


COURSES = {
    "relay": Course(Relay, 3000, 0.12, (0.35, 0.97)),
    "convention": Course(Convention, 1500, 1.0, (1.0, 1.0)),
}
ROWS = 128  # transcripts per step
PARTS = 4  # batches of similar length
PEAK_LR = 4e-3


def transcript(generator: np.random.Generator, course: Course, careful: float) -> str:
    """One rollout as one of its agents sees it: own messages as assistant, the others' by name."""
    operations = int(generator.integers(course.task.least_turns, course.task.most_turns + 1))
    task = course.task(Config(agents=operations))
    chain = task.sample_problems(1, generator)[0].text
    agents = operations if generator.random() < 0.7 else int(generator.integers(1, operations + 1))
    viewer = int(generator.integers(agents))
    right = course.right[generator.random() < careful]
    hint = ("", "", "-", "+")[generator.integers(4)] if course.task is Convention else ""
    text = f"<|user|>{chain}{hint}<|end|>"
    for turn in range(operations):
        if course.task is Convention:
            code_1 = {"-": 0.0, "+": 1.0}.get(hint, Convention.starting_habits[turn % 2])  # its chance
            chain = Convention.step(chain, turn, int(generator.random() < code_1))
        else:
            chain = Relay.step(chain)
        if generator.random() >= right:
            chain = str(generator.integers(10)) + chain[1:]
        name = task.agent_names[turn % agents]
        text += ("<|assistant|>" if turn % agents == viewer else f"<|user|>{name}:\n") + f"{chain}<|end|>"
    return text


def batches(tokenizer: Tokenizer, transcripts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, both (B, T). Targets are -100 where the next token is no part of a message."""
    encoded = sorted(map(tokenizer.encode, transcripts), key=len)
    (end,) = tokenizer.encode("<|end|>")
    headers = tokenizer.encode("<|user|><|assistant|>" + "".join(f"{n}:\n" for n in Relay.agent_names))
    for first in range(0, ROWS, ROWS // PARTS):
        batch = encoded[first : first + ROWS // PARTS]
        tokens = torch.zeros(len(batch), len(batch[-1]), dtype=torch.long)
        targets = torch.full_like(tokens, -100)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
            for t in range(ids.index(end), len(ids) - 1):  # the problem is given, not learned
                if ids[t + 1] not in headers:
                    targets[row, t] = ids[t + 1]
        yield tokens, targets


def initial_model(vocab_size: int) -> Transformer:
    """91k parameters: small normal weights, halved where they write to the residual stream; biases 0."""
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=168, layers=2, heads=4, kv_heads=2, head_dim=16)
    model = Transformer(ModelConfig("qwen2", vocab_size, **shape, max_positions=512))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.08 / (2 if "o_proj" in name or "down_proj" in name else 1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    return model


def train(model: Transformer, tokenizer: Tokenizer, course: Course) -> float:
    """Train `model` on ROWS new transcripts a step; returns the last loss, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = OneCycleLR(optimizer, PEAK_LR, total_steps=course.steps, pct_start=0.05)  # also of a beta
    for step in tqdm(range(course.steps), desc="pretrain", disable=None):
        # Arithmetic is learned from careful solvers alone, then the careless ones join: three times faster.
        careful = course.careful if step >= course.steps / 2 else 1.0
        generator = rng.generator(0, "pretrain", step)
        parts = list(batches(tokenizer, [transcript(generator, course, careful) for _ in range(ROWS)]))
        count = sum((targets >= 0).sum() for _, targets in parts)
        optimizer.zero_grad()
        loss = 0.0
        for tokens, targets in parts:
            logits = model(tokens)  # (B, T, V)
            part = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / count
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=COURSES, default="relay", help="which model (default relay)")
    task = parser.parse_args().task
    tokenizer = load_tokenizer(ASSETS / task)  # one token per character, header and writer's name
    model = initial_model(tokenizer.vocab_size)
    loss = train(model, tokenizer, COURSES[task])
    save_model(model, ASSETS / task)
    print(f"{task}: loss {loss:.3f}; next: python eval.py {task} --model {task}")


if __name__ == "__main__":
    main()
