"""One optimizer step of each agent beside plain transformers and torch: the same rollouts, the same gradient.

The plain step is what one writes first: a row for each rollout, padded on the right, all logits, log-softmax,
the objective as `teamtr_loss` defines it, AdamW. Ours computes what rollouts have in common once
(packing.py), the last layer and the logits only where something is trained, and never holds all logits. The
advantages are drawn, so that no group has a reason to be left out of either.

The floor of a step is arithmetic alone: the FLOPs of every distinct position, once forward and twice back, at
the rate of a large product.
"""

import gc

import torch

from teamtr_min.bench.machine import REPEATS, clock_name, heading, interleaved, matmul_rate, subject
from teamtr_min.bench.measure import extra_mib
from teamtr_min.bench.peers import in_transformers
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.model import Transformer
from teamtr_min.learner import GRADIENT_NORM, Learner, evaluate
from teamtr_min.objective import teamtr_loss
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.tasks import load_task
from teamtr_min.team import load_team

BATCH_TOKENS = 4096  # of one forward pass, for both
RATE = 0.0  # a step that is made whole and changes nothing: all repeats do the same


def run(flags: dict, short: bool = False) -> dict:
    """Everything that `python eval.py training` prints, as one object. `flags`: model, device, dtype.
    `short`: toy sizes, once."""
    config = subject(flags)
    problems, repeats = (2, 1) if short else (config.problems, REPEATS)
    task = load_task(config)
    team = load_team(config, task.roles(config.agents))
    device, dtype = team.agents[0].model.device, team.agents[0].model.dtype
    chosen = task.sample_problems(problems, rng.generator(0, "problems"))
    rollouts = collect(team, task, chosen, config.group, rng.RngPath(0, "bench"))
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(rollouts.returns), generator=generator)  # (R,)
    rate = matmul_rate(device, dtype)
    return {
        "benchmark": "training",
        **heading(config),
        "clock": clock_name(device),
        "rollouts": len(rollouts.returns),
        "repeats": repeats,
        "matmul_flops_per_second": rate,
        "missing": in_transformers(team.agents[0].model)[1],
        "rows": [row(rollouts, advantages, j, config, repeats, rate) for j in range(config.agents)],
    }


def row(
    rollouts: Rollouts, advantages: torch.Tensor, j: int, config: Config, repeats: int, rate: float
) -> dict:
    """Agent j: seconds of a step by each, their ratio, gradient norms, peak memory on a GPU."""
    model = rollouts.team.agents[j].model
    gc.collect()  # the agent before had moments as well
    device = model.device
    learner = Learner(rollouts.team, [j], beta=0.0)
    learner.onload()
    batches = rollouts.batches([j], advantages, BATCH_TOKENS)
    norms = {}

    def ours() -> None:
        evaluate(learner, batches, config, grad=True)
        norms["ours"] = learner.step(RATE)

    contestants = {"ours": ours}
    theirs, _ = in_transformers(model)
    if theirs:
        parameters = list(theirs.parameters())
        for p in parameters:
            p.requires_grad_()
        optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        passes = padded_rows(rollouts, advantages, j, BATCH_TOKENS)

        def plain() -> None:
            norms["transformers"] = plain_step(theirs, optimizer, passes, config)

        try:
            plain()
            contestants["transformers"] = plain
        except torch.OutOfMemoryError:
            norms["transformers"] = None
            optimizer.zero_grad(set_to_none=True)
    times = interleaved(contestants, repeats, device)
    lengths, positions, depths = distinct(rollouts, j)
    pairs = sum(len(batch.targets) for batch in batches)
    return {
        "agent": j,
        "tokens_trained": sum(len(batch.pair) for batch in batches),
        "positions": {
            "ours": sum(batch.tokens.numel() for batch in batches),
            "distinct": positions,
            "rollouts": lengths,
        },
        "seconds": times,
        "ratio": times["transformers"] / times["ours"] if "transformers" in times else None,
        "grad_norm": norms,
        "floor_share": floor_flops(model, positions, depths, pairs) / rate / times["ours"],
        "peak_mib": {name: extra_mib(f, "cuda") for name, f in contestants.items()}
        if device.type == "cuda"
        else None,
    }


def padded_rows(rollouts: Rollouts, advantages: torch.Tensor, j: int, most: int) -> list[tuple]:
    """Rollouts as rows of at most `most` tokens a pass: (ids (B, T), attention mask, trained (B, T) bool,
    message (N,), advantage (M,))."""
    team, device, passes = rollouts.team, rollouts.team.agents[j].model.device, []
    seen = [
        team.render(j, problem.text, messages, add_generation_prompt=False)
        for problem, messages in zip(rollouts.problems, rollouts.messages)
    ]
    B = max(1, most // max(len(s.ids) for s in seen))
    for first in range(0, len(seen), B):
        part = seen[first : first + B]
        T = max(len(s.ids) for s in part)
        ids, mask, trained = (torch.zeros(len(part), T, dtype=torch.long) for _ in range(3))
        message, advantage = [], []
        for r, s in enumerate(part):
            ids[r, : len(s.ids)] = torch.tensor(s.ids)
            mask[r, : len(s.ids)] = 1
            for start, stop in s.spans:
                trained[r, start:stop] = 1
                message += [len(advantage)] * (stop - start)
                advantage.append(advantages[first + r].item())
        tensors = (ids, mask, trained.bool(), torch.tensor(message), torch.tensor(advantage))
        passes.append(tuple(x.to(device) for x in tensors))
    return passes


def plain_step(theirs, optimizer: torch.optim.Optimizer, passes: list[tuple], config: Config) -> float:
    """One step on Eq. 10 with transformers' forward pass; the gradient's norm before clipping."""
    messages = sum(len(advantage) for *_, advantage in passes)
    for ids, mask, trained, message, advantage in passes:
        logits = theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
        logps = (logits.float() / config.temperature).log_softmax(-1)
        logp = logps.gather(2, ids[:, 1:, None])[..., 0][trained[:, 1:]]  # (N,)
        loss, _ = teamtr_loss(logp, logp.detach(), message, advantage, clip=config.clip)
        (loss * len(advantage) / messages).backward()
    parameters = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def distinct(rollouts: Rollouts, j: int) -> tuple[int, int, int]:
    """Positions in all rollouts as agent j sees them; the distinct ones, each a different start of a
    transcript; and the sum of their depths, which is what causal attention looks at."""
    children: dict[tuple[int, int], int] = {}  # (start of a transcript, next token) -> the longer start
    total = depths = 0
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        ids = rollouts.team.render(j, problem.text, messages, add_generation_prompt=False).ids[:-1]
        total, start = total + len(ids), 0
        for depth, token in enumerate(ids, start=1):
            if (start, token) not in children:
                children[start, token] = len(children) + 1
                depths += depth
            start = children[start, token]
    return total, len(children), depths


def floor_flops(model: Transformer, positions: int, depths: int, pairs: int) -> float:
    """Of one step. In the last layer only keys and values are needed at positions that train nothing; the
    head at the `pairs` of context and token."""
    c = model.config
    layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    keys_and_values = 2 * c.hidden_size * c.kv_heads * c.head_dim
    products = (
        ((c.layers - 1) * layer + keys_and_values) * positions
        + (layer - keys_and_values + model.head.numel()) * pairs
    )  # fmt: skip
    attention = 2 * (c.layers - 1) * c.heads * c.head_dim * depths  # scores, and the sum of values
    return 3 * 2 * (products + attention)


def table(result: dict) -> str:
    lines = [
        f"{result['model']} on {result['task']}, {result['dtype']}, on {result['device']}: one step on "
        f"{result['rollouts']} rollouts; median of {result['repeats']}, in {result['clock']}",
        f"matrix rate {result['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s",
        f"{'agent':>5}{'trained':>9}{'distinct':>10}{'computed':>10}{'of rollouts':>13}{'seconds':>9}"
        f"{'transformers':>14}{'ratio':>7}{'of the floor':>14}{'gradient norms differ':>23}",
    ]
    for row in result["rows"]:
        at, norm = row["positions"], row["grad_norm"]
        none = "out of memory" if "transformers" in norm else "-"
        compared, differ = f"{none:>14}{'-':>7}", "-"
        if row["ratio"]:
            compared = f"{row['seconds']['transformers']:>14.3f}{row['ratio']:>7.2f}"
            differ = f"{abs(norm['ours'] / norm['transformers'] - 1):.0e}"
        lines.append(
            f"{row['agent']:>5}{row['tokens_trained']:>9,}{at['distinct']:>10,}{at['ours']:>10,}"
            f"{at['rollouts']:>13,}{row['seconds']['ours']:>9.3f}{compared}{row['floor_share']:>14.0%}"
            f"{differ:>23}"
        )
        if row["peak_mib"]:
            peaks = (f"{name} {mib:,.0f} MiB" for name, mib in row["peak_mib"].items())
            lines.append(f"{'':5}  most memory over weights, masters and moments: {', '.join(peaks)}")
    lines.append(
        "trained, distinct, computed, of rollouts: tokens trained on, different starts of a transcript, "
        "positions that ours computes, positions in all rollouts"
    )
    if result["missing"]:
        lines.append(result["missing"])
    if result["device"].startswith("a CPU"):
        lines.append("on a GPU: not measured yet")
    return "\n".join(lines)
