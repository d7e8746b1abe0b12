"""Makes the small models that ship: `python -m teamtr_min.studies.pretrain` rewrites teamtr_min/assets/relay in
minutes, and with `--task convention` its sister.

Relay: transcripts of 1 to 8 operations, written by solvers of two kinds: a few are careful and nearly always
right, most are careless and put a random digit in two steps out of three. A model of this mixture knows every
step and gets it right about half of the time, as a pretrained model that can but often does not.
Reinforcement has something to find.

Convention: transcripts of 2 to 4 operations by solvers that are always right, each message in a code of its
own. Which code is likelier depends on the turn alone (Convention.starting_habits), so that agents start with
opposite habits: an agent is not told its own name, but sees how many have spoken before it. In half of the
transcripts a sign behind the problem says which code all messages are in; training problems never have one.
It makes the code one thing that the model knows, where it would otherwise learn a habit for each sum.

Reproducible: the same seed, thread count and torch give the same bits.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.hf.tokenizer import load_tokenizer
from teamtr_min.hf.weights import ASSETS, save_model
from teamtr_min.model import ModelConfig, Transformer
from teamtr_min.rollout import collect
from teamtr_min.tasks import Convention, Relay, load_task
from teamtr_min.team import load_team


@dataclass(frozen=True)
class Course:
    """What a model is shown."""

    task: type[Relay]
    careful: float  # share of careful solvers
    right: tuple[float, float]  # P(a step is meant to be right) of careless and careful solvers
    steps: int  # of the optimizer


COURSES = {
    "relay": Course(Relay, 0.12, (0.35, 0.97), 3000),
    "convention": Course(Convention, 1.0, (1.0, 1.0), 1500),
}
STUDY = 0.5  # share of the steps in which all solvers are careful
NAMES = "ABCDEFGH"
SPECIAL = ["<|unk|>", "<|end|>", "<|user|>", "<|assistant|>"]
# One token per header; a system prompt is passed over, since this model reads nothing but chains.
TEMPLATE = (
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """One token per character, per header and per writer's name."""
    characters = list("0123456789+-*")
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(f"{name}:\n", normalized=False) for name in NAMES])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "unk_token": "<|unk|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def transcript(generator: np.random.Generator, course: Course, careful: float) -> str:
    """One rollout as some agent sees it, rendered: the viewer's messages as assistant, the others' by name.

    `careful` is the share of careful solvers.
    """
    operations = int(generator.integers(course.task.least_turns, course.task.most_turns + 1))
    task = course.task(Config(agents=operations))
    chain = task.sample_problems(1, generator)[0].text
    agents = operations if generator.random() < 0.7 else int(generator.integers(1, operations + 1))
    viewer = int(generator.integers(agents))
    right = course.right[generator.random() < careful]
    mark = task.mark(generator)
    text = f"<|user|>{chain}{mark}<|end|>"
    for turn in range(operations):
        chain = task.demonstration(chain, turn, mark, generator)
        if generator.random() >= right:
            chain = str(generator.integers(10)) + chain[1:]
        writer = turn % agents
        header = "<|assistant|>" if writer == viewer else f"<|user|>{NAMES[writer]}:\n"
        text += f"{header}{chain}<|end|>"
    return text


def batches(
    tokenizer, generator: np.random.Generator, rows: int, course: Course, careful: float, parts: int = 4
):
    """`rows` new transcripts as `parts` batches of similar length: tokens and targets, both (rows / parts,
    T).

    Targets are -100 wherever the next token is no part of a message.
    """
    encoded = sorted((tokenizer.encode(transcript(generator, course, careful)) for _ in range(rows)), key=len)
    end, names = tokenizer.encode("<|end|>")[0], {tokenizer.encode(f"{name}:\n")[0] for name in NAMES}
    headers = names | set(tokenizer.encode("<|user|><|assistant|>"))
    for part in range(parts):
        group = encoded[part * rows // parts : (part + 1) * rows // parts]
        tokens = torch.zeros(len(group), max(map(len, group), default=0), dtype=torch.long)
        targets = torch.full_like(tokens, -100)
        for row, ids in enumerate(group):
            tokens[row, : len(ids)] = torch.tensor(ids)
            for t in range(ids.index(end), len(ids) - 1):  # the problem itself is given, not learned
                if ids[t + 1] not in headers:
                    targets[row, t] = ids[t + 1]
        yield tokens, targets


def initial_model(vocab_size: int, seed: int) -> Transformer:
    """89k parameters with the usual small normal weights, deeper writes scaled down."""
    torch.manual_seed(seed % 2**63)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 168,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
    }
    config = ModelConfig("qwen2", vocab_size, **shape, max_positions=512)
    model = Transformer(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.08 / (2 if "o_proj" in name or "down_proj" in name else 1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", choices=COURSES, default="relay", help="which model (default relay)")
    parser.add_argument("--out", type=Path, help="directory to write (default: the shipped model's)")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (default 3000 for relay, 1500 for convention)"
    )
    parser.add_argument("--rows", type=int, default=128, help="transcripts per step (default 128)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default 4e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-problems", type=int, default=2048, help="held-out problems per team size")
    args = parser.parse_args(argv)
    course, out = COURSES[args.task], args.out or ASSETS / args.task
    args.steps = course.steps if args.steps is None else args.steps
    if min(args.steps, args.rows, args.eval_problems) < 1:
        parser.error("--steps, --rows and --eval-problems must be at least 1")

    start = time.perf_counter()
    write_tokenizer(out)
    tokenizer = load_tokenizer(out)
    model = initial_model(tokenizer.vocab_size, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    bar = tqdm(range(args.steps), desc="pretrain", disable=None)
    for step in bar:
        # Arithmetic is learned from careful solvers alone, then the careless ones join: three times faster.
        careful = course.careful if step >= STUDY * args.steps else 1.0
        parts = list(
            batches(tokenizer, rng.generator(args.seed, "pretrain", step), args.rows, course, careful)
        )
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
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    save_model(model, out)
    count = sum(p.numel() for p in model.parameters())
    print(f"{out}: {count:,} parameters, loss {loss:.3f}, {time.perf_counter() - start:.0f} s")
    for agents in range(course.task.least_turns, course.task.most_turns + 1):
        config = Config(task=args.task, model=str(out), agents=agents, seed=args.seed, device="cpu")
        accuracy = start_accuracy(config, args.eval_problems)
        print(f"start accuracy, {agents} agent{'s' * (agents > 1)}: {accuracy:.3f}")


def start_accuracy(config: Config, count: int) -> float:
    """Accuracy on held-out problems of a team of copies of `config.model`."""
    task = load_task(config)
    problems = task.sample_problems(count, rng.generator(0, "held-out"), held_out=True)
    team = load_team(config, task.roles(config.agents))
    return collect(team, task, problems, 1, rng.Path(config.seed, "held-out", 0)).accuracy


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
