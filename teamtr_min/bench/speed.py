"""How fast the code is: kernels, sampling, a training step; beside other libraries, on one machine.

A benchmark is a list of cases. A case is some work, done by several contestants with the same inputs in one
process: ours first, then what others would write. They take turns; medians count.

    x ours   time over our time
    floor    share of the time that the work must take here at least: its FLOPs at the rate of one large
             product, or its bytes at the rate of one large copy, both measured in the same run
    apart    largest difference from our results, over the largest entry
    of       how many times the median is of: fewer where a case takes longer than SECONDS

With one thread (OMP_NUM_THREADS=1) a CPU's clock is that thread's: other work on the machine does not count.
"""

import dataclasses
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

import kernels
from teamtr_min.bench.peers import BATCH_TOKENS, plain_sample, plain_step, trl_step
from teamtr_min.config import SHIPPED, Config
from teamtr_min.engine import rng
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.sampler import Sampler
from teamtr_min.learner import Learner
from teamtr_min.rollout import Batches, agent_batches, collect
from teamtr_min.run.loading import build_team, placement
from teamtr_min.tasks import Problem, load_task
from teamtr_min.team import Rendered, Team

PROMPT, NEW = 32, 64  # tokens of `sampling`
SECONDS = 60  # of a case, after which no further repeat begins
bar = functools.partial(tqdm, delay=1, leave=False, disable=None)


class Case(NamedTuple):
    """Some work, and the functions that do it; tuples of tensors that they return are compared."""

    name: str
    contestants: dict[str, Callable]  # "ours" first
    tokens: int  # that the work is about
    flops: float  # that it cannot do without
    bytes: float = 0.0


class Machine:
    """A device, its clock, and what it can do at most here and now."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.cuda = device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else f"a CPU, {torch.get_num_threads()} threads"
        n = 8192 if self.cuda else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
        source = torch.ones(64 * n * n, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        works = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
        product, copy = map(statistics.median, self.times("machine", works, repeats=5).values())
        self.flops, self.bytes = 2 * n**3 / product, 2 * source.nbytes / copy

    def now(self) -> float:
        """Seconds, once the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.cuda or torch.get_num_threads() > 1 else time.thread_time()

    def times(self, name: str, works: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
        """Seconds of each repeat; the works take turns."""
        times = {by: [] for by in works}
        for i in range(repeats):
            if i and sum(map(sum, times.values())) > SECONDS:
                break
            for by, work in bar(works.items(), f"{name}, {i + 1} of {repeats}"):
                begin = self.now()
                work()
                times[by].append(self.now() - begin)
        return times

    def compare(self, case: Case, repeats: int) -> list[dict]:
        """A row for each contestant; one that cannot run here has the reason in `missing`."""
        rows, works = {name: {"case": case.name, "by": name} for name in case.contestants}, {}
        for name, work in bar(case.contestants.items(), f"{case.name}, warm-up"):
            try:
                got = work()  # which also warms it up
            except Exception as error:  # a peer may be missing, or refuse this shape, device or torch
                if name == "ours":
                    raise
                rows[name]["missing"] = " ".join((str(error) or type(error).__name__).split())[:40]
                continue
            works[name] = work
            if name == "ours":
                ours = got
            elif got:
                apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, ours)]
                rows[name]["apart"] = max(apart).item()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                work()
                rows[name]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        floor = max(case.flops / self.flops, case.bytes / self.bytes)
        for name, times in (found := self.times(case.name, works, repeats)).items():
            seconds, ours = (statistics.median(each) for each in (times, found["ours"]))
            rows[name] |= {"seconds": seconds, "times_ours": seconds / ours, "repeats": len(times)}
            rows[name] |= {"tokens_per_second": case.tokens / seconds, "floor_share": floor / seconds}
        return [*rows.values()]


def kernel_cases(config: Config, short: bool) -> Iterator[Case]:
    """linear_logprob at hidden (N, H), weight (V, H), with both gradients."""
    device, dtype = placement(config)
    N, H, V = (8, 16, 40) if short else (16384, 1536, 151936) if device.type == "cuda" else (512, 256, 8192)
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    hidden, weight = draw(N, H).to(dtype), (draw(V, H) * 4 / H**0.5).to(dtype)  # logits spread by 4
    targets, grad = torch.arange(N, device=device) % V, draw(N)

    def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
        return -loss(weight, hidden, targets)

    def work(logprob: Callable) -> tuple[Tensor, ...]:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logp = logprob(x, w, targets)
        logp.backward(grad.to(logp.dtype))
        return logp.detach(), x.grad, w.grad

    peers = {"eager torch": eager, "torch.compile": torch.compile(eager), "liger-kernel": liger}
    works = {by: functools.partial(work, f) for by, f in {"ours": kernels.linear_logprob, **peers}.items()}
    yield Case("log-probs", works, N, 6 * N * H * V)


def sampling_cases(config: Config, short: bool) -> Iterator[Case]:
    """Random prompts of 32 tokens, 64 more of each, by a model that only speaks; the floor is products, or
    reading weights and cache."""
    (agent, *_) = build_team(config, load_task(config)).agents
    model, new = agent.model.requires_grad_(False), 5 if short else NEW
    c, head, many = model.config, model.head.numel(), config.shipped or model.device.type == "cuda"
    layers = sum(p.numel() for p in model.model.layers.parameters())
    for B in [3] if short else [1, 16, 64, 256] if many else [16]:
        prompts = torch.randint(c.vocab_size, (B, PROMPT), generator=torch.Generator().manual_seed(B))
        both = {"ours": functools.partial(sample, agent.sampler, prompts.tolist(), new)}
        both["transformers"] = functools.partial(plain_sample, model, prompts.to(model.device), new)
        flops = 2 * B * (layers * (PROMPT + new - 1) + head * new)
        cached = B * (PROMPT + new / 2) * c.kv_per_token  # mean over the steps
        yield Case(f"{B} rows", both, B * new, flops, new * model.dtype.itemsize * (layers + head + cached))


def sample(sampler: Sampler, prompts: list[list[int]], new: int) -> None:
    sampler.start(len(prompts))
    sampler.generate(range(len(prompts)), prompts, [*range(len(prompts))], new, 1.0, ())
    sampler.finish()


def training_cases(config: Config, short: bool) -> Iterator[Case]:
    """One optimizer step of each agent on the same rollouts, at a rate of 0, so that all repeats are alike.
    Advantages are drawn at random, so no group lacks them. The norms of the gradients are compared."""
    team = build_team(config, load_task(config))
    problems = team.task.sample_problems(2 if short else config.problems, rng.generator(0, "problems"))
    rollouts = collect(team, problems, config.group, rng.RngPath(0, "bench"))
    advantages = torch.randn(len(rollouts.returns), generator=torch.Generator().manual_seed(0))  # (R,)
    for j, agent in enumerate(team.agents):
        seen = [team.render(j, p, m, False) for p, m in zip(rollouts.problems, rollouts.messages)]
        rows = pad_sequence([torch.tensor(s.ids) for s in seen], batch_first=True, padding_value=-1)  # (R, T)
        pull = torch.zeros(rows.shape)  # (R, T): the advantage at the agent's tokens, else 0
        for r, s in enumerate(seen):
            pull[r, slice(*s.spans[0])] = advantages[r]
        batches = agent_batches(team, rollouts, [j], advantages, BATCH_TOKENS)
        inputs = rows.to(agent.model.device), pull.to(agent.model.device), config.temperature
        both = {"ours": functools.partial(step, Learner(team, [j], beta=0.0), batches, config)}
        both["transformers"] = functools.partial(plain_step, agent.model, *inputs)
        pairs = sum(len(batch.targets) for batch in batches.own)
        yield Case(f"agent {j}", both, batches.tokens, step_flops(agent.model, seen, pairs))
    for rank in () if config.shipped else (0, 16):
        alone = dataclasses.replace(config, agents=1, lora_rank=rank)
        team = build_team(alone, load_task(alone))
        both = {"ours": functools.partial(whole_step, team, Learner(team, [0], beta=0.0), problems, alone)}
        both["TRL's GRPOTrainer"] = functools.partial(trl_step, team, tuple(problems), alone)
        tokens = len(problems) * config.group * config.max_new_tokens
        flops = 8 * sum(p.numel() for p in team.agents[0].model.parameters()) * tokens  # of messages alone
        yield Case(f"whole step, LoRA {rank}" if rank else "whole step", both, tokens, flops)


def whole_step(team: Team, learner: Learner, problems: list[Problem], config: Config) -> None:
    """Sample, grade and make one step, at a rate of 0; with the pass that measures the KL."""
    rollouts = collect(team, problems, config.group, rng.RngPath(0, "bench"))
    advantages = torch.randn(len(rollouts.returns), generator=torch.Generator().manual_seed(0))  # (R,)
    batches = agent_batches(team, rollouts, learner.agents, advantages, BATCH_TOKENS)
    step(learner, batches, config)
    learner.measure(batches, config)


def step(learner: Learner, batches: Batches, config: Config) -> tuple[Tensor]:
    learner.backward(batches, config)
    return (torch.tensor([learner.step(lr=0.0)]),)


def step_flops(model: Transformer, seen: list[Rendered], pairs: int) -> float:
    """FLOPs of products, forward once and back twice: of all layers but the last at each distinct start of a
    transcript, of the last one and of the head at the trained `pairs` of context and token."""
    starts: dict[tuple[int, int], int] = {}  # (start of a transcript, next token) -> the longer start
    for rendered in seen:
        start = 0
        for token in rendered.ids[:-1]:
            start = starts.setdefault((start, token), len(starts) + 1)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    return 6 * ((model.config.layers - 1) * layer * len(starts) + (layer + model.head.numel()) * pairs)


BENCHMARKS = {"kernels": kernel_cases, "sampling": sampling_cases, "training": training_cases}


def run(name: str, flags: dict, short: bool = False) -> dict:
    """What `eval.py NAME --json` prints. `flags`: model, device, dtype; `short`: toy sizes, once."""
    model = flags.get("model", "relay")
    shipped = model in SHIPPED
    what = {"task": model, "agents": 3} if shipped else {"task": "sums", "agents": 2, "problems": 2}
    what |= flags | {"model": model}
    device, dtype = placement(Config(**what))
    if not shipped and device.type == "cuda":  # as one trains a pretrained model on a GPU
        what |= {"problems": 32, "group": 8, "max_new_tokens": 256, "temperature": 0.8}
    machine, repeats = Machine(device, dtype), 1 if short else 20 if name == "kernels" else 5
    cases = BENCHMARKS[name](Config(**what), short)
    return {
        "benchmark": name, "model": model, "device": machine.name, "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__, "flops_per_second": machine.flops, "bytes_per_second": machine.bytes,
        "rows": [row for case in cases for row in machine.compare(case, repeats)],
    }  # fmt: skip


COLUMNS = {  # of a row: title, width, form, factor
    "seconds": ("ms", 9, ",.2f", 1e3),
    "tokens_per_second": ("tokens/s", 11, ",.0f", 1),
    "times_ours": ("x ours", 7, ".2f", 1),
    "floor_share": ("floor", 6, ".0%", 1),
    "apart": ("apart", 7, ".0e", 1),
    "repeats": ("of", 3, "d", 1),
    "peak_mib": ("MiB", 8, ",.0f", 1),
}


def table(result: dict) -> str:
    rates = f"{result['flops_per_second'] / 1e12:.3g} TFLOP/s, {result['bytes_per_second'] / 1e9:.3g} GB/s"
    lines = [
        "{benchmark}, {model}, {dtype}, on {device}".format(**result),
        f"{rates:39}" + "".join(f"{title:>{width}}" for title, width, *_ in COLUMNS.values()),
    ]
    for row in result["rows"]:
        line = f"{row['case']:16} {row['by']:22}{row.get('missing', '')}"
        for key, (_, width, form, factor) in COLUMNS.items():
            line += f"{row[key] * factor:>{width}{form}}" if key in row else " " * width
        lines.append(line.rstrip())
    return "\n".join(lines)
