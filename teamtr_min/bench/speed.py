"""How fast the code is: kernels, sampling, a training step, a stage; beside other libraries, on one machine.

A benchmark is a list of cases, in one form of table. A case is some work, done by several contestants with
the same inputs in one process: ours first, then what others would write. They take turns; medians count.

    x ours   time over our time
    floor    share of the time that the work must take here at least: its FLOPs at the rate of one large
             product, or its bytes at the rate of one large copy, both measured in the same run
    error    largest difference from float64, or where that is not computed from ours, over the largest entry

With one thread (OMP_NUM_THREADS=1) a CPU's clock is that thread's: other work on the machine does not count.
"""

import functools
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import kernels
from teamtr_min.config import SHIPPED, Config
from teamtr_min.engine import rng
from teamtr_min.engine.model import Transformer, checkpoint_tensors
from teamtr_min.engine.sampler import Sampler
from teamtr_min.files import UserError
from teamtr_min.hf.weights import config_json
from teamtr_min.learner import GRADIENT_NORM, Learner
from teamtr_min.objective import teamtr_loss, trust_region_loss
from teamtr_min.rollout import Batches, Rollouts, agent_batches, collect
from teamtr_min.run.loading import build_team, placement
from teamtr_min.run.log import read_log
from teamtr_min.tasks import Sums, load_task
from teamtr_min.team import Team

TRAIN = Path(__file__).parents[2] / "train.py"
PROMPT, NEW = 32, 64  # tokens of `sampling`
BATCH_TOKENS = 4096  # of a forward pass of `training`, for all contestants
VARIANTS = {"fresh": [], "corrected": ["--min-ess", "0.5"], "stale": ["--occupancy", "stale"]}  # of `stage`


class Case(NamedTuple):
    """Some work, and the functions that do it; tuples of tensors that they return are compared."""

    name: str
    contestants: dict[str, Callable]  # "ours" first
    tokens: int  # that the work is about
    flops: float = 0.0  # that it cannot do without
    bytes: float = 0.0
    exact: Callable | None = None  # the same in float64


class Machine:
    """A device, its clock, and what it can do at most here and now."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.cuda = device, device.type == "cuda"
        n = 8192 if self.cuda else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
        source = torch.ones(64 * n * n, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = self.medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats=5)
        self.flops, self.bytes = 2 * n**3 / seconds["product"], 2 * source.nbytes / seconds["copy"]
        self.name = torch.cuda.get_device_name() if self.cuda else f"a CPU, {torch.get_num_threads()} threads"

    def now(self) -> float:
        """Seconds, once the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.cuda or torch.get_num_threads() > 1 else time.thread_time()

    def medians(self, works: dict[str, Callable], repeats: int) -> dict[str, float]:
        """Seconds of each; they take turns."""
        times = {name: [] for name in works}
        for _ in range(repeats):
            for name, work in works.items():
                begin = self.now()
                work()
                times[name].append(self.now() - begin)
        return {name: statistics.median(each) for name, each in times.items()}

    def compare(self, case: Case, repeats: int) -> list[dict]:
        """A row for each contestant; one that cannot run here has the reason in `missing`."""
        rows = {name: {"case": case.name, "by": name} for name in case.contestants}
        works, right = {}, case.exact() if case.exact else None
        for name, work in case.contestants.items():
            try:
                got = work()  # which also warms it up
            except Exception as error:  # a peer may be missing, or refuse this shape, device or torch
                if name == "ours":
                    raise
                rows[name]["missing"] = " ".join((str(error) or type(error).__name__).split())[:40]
                continue
            works[name], right = work, got if right is None else right
            if isinstance(got, tuple):
                off = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, right)]
                rows[name]["error"] = max(off)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                work()
                rows[name]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        floor, times = max(case.flops / self.flops, case.bytes / self.bytes), self.medians(works, repeats)
        for name, seconds in times.items():
            rows[name] |= {"seconds": seconds, "times_ours": seconds / times["ours"]}
            rows[name] |= {"tokens_per_second": case.tokens / seconds, "floor_share": floor / seconds or None}
        return [*rows.values()]


@functools.cache
def in_transformers(model: Transformer):
    """The same weights, shared and not copied, in transformers' class. Raises ModuleNotFoundError."""
    transformers = importlib.import_module("transformers")
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**config_json(model.config, model.dtype))
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(checkpoint_tensors(model), strict=False, assign=True)
    theirs.tie_weights()
    # Rope's angles are computed when a model is built, and have no data on "meta": build that part again.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(model.device)
    return theirs.eval().requires_grad_()


# Kernels


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return -loss(weight, hidden, targets)


LOGPROBS = {
    "ours": kernels.linear_logprob, "eager torch": eager, "torch.compile": torch.compile(eager),
    "F.linear_cross_entropy": fused, "liger-kernel": liger,
}  # fmt: skip


def kernel_cases(device: torch.device, dtype: torch.dtype, short: bool) -> Iterator[Case]:
    """linear_logprob at hidden (N, H), weight (V, H), and the loss."""
    N, H, V = (8, 16, 40) if short else (16384, 1536, 151936) if device.type == "cuda" else (512, 256, 8192)
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    hidden, weight = draw(N, H).to(dtype), (draw(V, H) * 4 / H**0.5).to(dtype)  # logits spread by 4
    tokens = torch.arange(N, device=device)
    grad, old, advantage = draw(N), -draw(N).abs(), draw(-(-N // 64))

    def forward(f: Callable) -> tuple:
        with torch.no_grad():
            return (f(hidden, weight, tokens % V),)

    def both(f: Callable, dtype: torch.dtype = dtype) -> tuple:
        x, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        logp = f(x, w, tokens % V)
        logp.backward(grad.to(logp.dtype))
        return logp.detach(), x.grad, w.grad

    def exact(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return (x @ w.t()).log_softmax(1).gather(1, targets[:, None])[:, 0]

    def loss(f: Callable) -> tuple:
        new = (old + 0.01).requires_grad_()
        value, _ = f(new, old, tokens // 64, advantage, beta=0.1)
        value.backward()
        return value.detach()[None], new.grad

    def each(work: Callable, of: dict[str, Callable]) -> dict[str, Callable]:
        return {name: functools.partial(work, f) for name, f in of.items()}

    right = functools.partial(both, exact, torch.float64) if device.type == "cpu" else None  # else too large
    losses = {"ours": trust_region_loss, "by definition": teamtr_loss}
    yield Case("log-probs", each(forward, LOGPROBS), N, 2 * N * H * V)
    yield Case("and gradients", each(both, LOGPROBS), N, 6 * N * H * V, exact=right)
    yield Case("Eq. 10, gradient", each(loss, losses), N, bytes=16 * N)


# Sampling


def sampling_cases(team: Team, config: Config, short: bool) -> Iterator[Case]:
    """Random prompts of 32 tokens, 64 more of each; the floor is products, or reading weights and cache."""
    model = team.agents[0].model
    c, head, many = model.config, model.head.numel(), config.shipped or model.device.type == "cuda"
    layers = sum(p.numel() for p in model.model.layers.parameters())
    for B in [3] if short else [1, 16, 64, 256] if many else [16]:
        new, g = 5 if short else NEW, torch.Generator().manual_seed(B)
        prompts = torch.randint(c.vocab_size, (B, PROMPT), generator=g)
        both = {"ours": functools.partial(sample, team.agents[0].sampler, prompts.tolist(), new)}
        both["transformers"] = functools.partial(plain_sample, model, prompts.to(model.device), new)
        flops = 2 * B * (layers * (PROMPT + new - 1) + head * new)
        cached = B * (PROMPT + new / 2) * c.kv_per_token  # mean over the steps
        yield Case(f"{B} rows", both, B * new, flops, new * model.dtype.itemsize * (layers + head + cached))


def sample(sampler: Sampler, prompts: list[list[int]], new: int) -> None:
    sampler.start(len(prompts))
    sampler.generate(range(len(prompts)), prompts, [*range(len(prompts))], new, 1.0, ())
    sampler.finish()


@torch.no_grad()
def plain_sample(model: Transformer, prompts: Tensor, new: int) -> None:
    how = {"do_sample": True, "top_k": 0, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    in_transformers(model).generate(prompts, attention_mask=mask, max_new_tokens=new, **how)


# A training step


def training_cases(team: Team, config: Config, short: bool) -> Iterator[Case]:
    """One optimizer step of each agent on the same rollouts, at a rate of 0, so that all repeats are alike.

    The plain step has a row for each rollout, padded on the right, all logits and AdamW. Ours computes what
    rollouts have in common once, and logits only where something is trained. Advantages are drawn at random,
    so no group lacks them. The norms of the gradients are compared.
    """
    problems = team.task.sample_problems(2 if short else config.problems, rng.generator(0, "problems"))
    rollouts = collect(team, problems, config.group, rng.RngPath(0, "bench"))
    advantages = torch.randn(len(rollouts.returns), generator=torch.Generator().manual_seed(0))  # (R,)
    for j, agent in enumerate(team.agents):
        batches = agent_batches(team, rollouts, [j], advantages, BATCH_TOKENS)
        rows = [*padded_rows(team, rollouts, advantages, j)]
        ours = functools.partial(step, Learner(team, [j], beta=0.0), batches, config)
        plain = functools.partial(plain_step, agent.model, rows, config.temperature)
        flops = step_flops(team, rollouts, j, sum(len(batch.targets) for batch in batches.own))
        yield Case(f"agent {j}", {"ours": ours, "transformers": plain}, batches.tokens, flops)


def step(learner: Learner, batches: Batches, config: Config) -> tuple[Tensor]:
    learner.backward(batches, config)
    return (torch.tensor([learner.step(lr=0.0)]),)


def padded_rows(team: Team, rollouts: Rollouts, advantages: Tensor, j: int) -> Iterator[list[Tensor]]:
    """Of each pass: ids (B, T), padded by -1, what is trained (B, T) bool, and advantages (B,)."""
    seen = [team.render(j, p, m, False) for p, m in zip(rollouts.problems, rollouts.messages)]
    trained = [[any(a <= t < b for a, b in s.spans) for t in range(len(s.ids))] for s in seen]
    B, device = max(1, BATCH_TOKENS // max(map(len, trained))), team.agents[j].model.device
    for first in range(0, len(seen), B):
        part = slice(first, first + B)
        columns = ([s.ids for s in seen[part]], -1), (trained[part], False)
        padded = [pad_sequence([*map(torch.tensor, rows)], True, value) for rows, value in columns]
        yield [x.to(device) for x in (*padded, advantages[part])]


@functools.lru_cache(maxsize=1)  # the moments of one agent at a time
def adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)


def plain_step(ours: Transformer, passes: list[list[Tensor]], temperature: float) -> tuple[Tensor]:
    """One step on Eq. 10, whose gradient at pi_old is that of a message's log-prob times its advantage.

    Each rollout holds one message of the agent. Returns the norm of the gradient before clipping.
    """
    model, messages = in_transformers(ours), sum(len(advantage) for *_, advantage in passes)
    for ids, trained, advantage in passes:
        mask, ids = (ids >= 0).long(), ids.clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (B, T-1, V)
        logp = (logits.float() / temperature).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        (-(logp * trained[:, 1:]).sum(1) @ advantage / messages).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    adamw(model).step()
    adamw(model).zero_grad(set_to_none=True)
    return (norm.cpu()[None],)


def step_flops(team: Team, rollouts: Rollouts, j: int, pairs: int) -> float:
    """FLOPs of products, forward once and back twice: of all layers but the last at every distinct position
    (each start of a transcript), of the last one and of the head at the trained `pairs` of context and token.
    """
    starts: dict[tuple[int, int], int] = {}  # (start of a transcript, next token) -> the longer start
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        start = 0
        for token in team.render(j, problem, messages, False).ids[:-1]:
            start = starts.setdefault((start, token), len(starts) + 1)
    model, layers = team.agents[j].model, team.agents[j].model.model.layers
    layer = sum(p.numel() for p in layers[0].parameters())
    return 6 * ((len(layers) - 1) * layer * len(starts) + (layer + model.head.numel()) * pairs)


# A stage


def task(config: Config) -> Sums:
    """For `--task speed.py`: sums, graded by a hash of what was said, so that any model has what to learn."""
    sums = Sums(config)
    sums.grade = lambda problem, messages: float(sum(sum(m.tokens) for m in messages) % 2)
    return sums


def stage_rows(config: Config, flags: dict, short: bool) -> Iterator[dict]:
    """Seconds a stage of `python train.py` by phase, as it logs them."""
    what = flags | {"stages": 3, "eval_problems": 1, "warm_start": 0}
    what |= {"problems": 2, "group": 4, "stages": 2, "inner_steps": 1} if short else {}
    what |= {} if config.shipped else {"task": __file__}
    words = [word for name, value in what.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for variant, more in [*VARIANTS.items()][: 2 if short else None]:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "run"
            command = [sys.executable, TRAIN, *words, *more, "--out", out]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"train.py ended with {done.returncode}: {done.stderr[-300:]}")
            lines = read_log(out / "metrics.jsonl")
        yield from ({"case": variant, **row} for row in phases(lines))


def phases(lines: list[dict]) -> Iterator[dict]:
    """From metrics.jsonl: seconds of a stage by purpose, without the first one, which makes buffers."""
    updates = [line for line in lines if line["kind"] == "update" and line["stage"] > 0]
    ends = [line["seconds"] for line in lines if line["kind"] == "stage"]
    stages, rest = len(ends) - 1, ends[-1] - ends[0]
    for phase, count in (("sampling", "tokens_sampled"), ("training", "tokens_trained")):
        spent = sum(update[f"seconds_{phase}"] for update in updates)
        rest -= spent
        rate = sum(update[count] for update in updates) / spent if spent else None
        yield {"by": phase, "seconds": spent / stages, "tokens_per_second": rate}
    yield {"by": "the rest", "seconds": rest / stages}


# All


def run(name: str, flags: dict, short: bool = False) -> dict:
    """What `eval.py NAME --json` prints. `flags`: model, device, dtype; `short`: toy sizes, once."""
    if wrong := sorted(flags.keys() - {"model", "device", "dtype"}):
        raise UserError(f"--{wrong[0].replace('_', '-')} has no effect on {name}")
    model = flags.get("model", "relay")
    shipped = model in SHIPPED
    what = flags | {"model": model, "task": model if shipped else "sums", "agents": 3 if shipped else 2}
    device, dtype = placement(Config(**what))
    if not shipped and device.type == "cuda":  # as one trains a pretrained model on a GPU
        what |= {"problems": 32, "group": 8, "max_new_tokens": 256, "inner_steps": 6, "temperature": 0.8}
    config, machine = Config(**what), Machine(device, dtype)
    repeats = 1 if short else 20 if name == "kernels" else 5
    if name == "stage":
        rows = [*stage_rows(config, what, short)]
    else:
        if name == "kernels":
            cases = kernel_cases(device, dtype, short)
        else:
            team = build_team(config, load_task(config))
            cases = {"sampling": sampling_cases, "training": training_cases}[name](team, config, short)
        rows = [row for case in cases for row in machine.compare(case, repeats)]
    return {
        "benchmark": name, "model": model, "device": machine.name, "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__, "flops_per_second": machine.flops, "bytes_per_second": machine.bytes,
        "repeats": repeats, "rows": rows,
    }  # fmt: skip


COLUMNS = {  # of a row: title, width, form, factor
    "seconds": ("ms", 9, ",.2f", 1e3),
    "tokens_per_second": ("tokens/s", 11, ",.0f", 1),
    "times_ours": ("x ours", 7, ".2f", 1),
    "floor_share": ("floor", 6, ".0%", 1),
    "error": ("error", 7, ".0e", 1),
    "peak_mib": ("MiB", 8, ",.0f", 1),
}


def table(result: dict) -> str:
    r, columns = result, {k: how for k, how in COLUMNS.items() if any(k in row for row in result["rows"])}
    rates = f"{r['flops_per_second'] / 1e12:.3g} TFLOP/s, {r['bytes_per_second'] / 1e9:.3g} GB/s"
    lines = [
        f"{r['benchmark']}, {r['model']}, {r['dtype']}, on {r['device']}, median of {r['repeats']}",
        f"{rates:39}" + "".join(f"{title:>{width}}" for title, width, *_ in columns.values()),
    ]
    for row, above in zip(r["rows"], [{"case": ""}, *r["rows"]]):
        case = "" if above["case"] == row["case"] else row["case"]
        line = f"{case:16} {row['by']:22}{row.get('missing', '')}"
        for key, (_, width, form, factor) in columns.items():
            line += f"{row[key] * factor:>{width}{form}}" if row.get(key) is not None else " " * width
        lines.append(line.rstrip())
    return "\n".join(lines)
