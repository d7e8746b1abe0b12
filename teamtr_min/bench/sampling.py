"""Sampling beside transformers' `generate`, on the same weights, and beside what this machine can do at most.

Two comparisons, each interleaved: prompts of 32 random tokens continued by a fixed number of tokens, and
whole episodes of a team (three agents, two rounds) beside a plain loop that gives transformers the transcript
anew at each turn. The floor of a batch is what it must at least take: each step reads the weights and the
cache at the rate of a large copy, and the FLOPs of all tokens run at the rate of a large product; the larger
of the two. On a CPU with one thread (OMP_NUM_THREADS=1) the clock is that thread's, so that others' work on
the machine does not count.
"""

import torch

from teamtr_min.bench.machine import REPEATS, clock_name, copy_rate, heading, interleaved, matmul_rate
from teamtr_min.bench.peers import in_transformers
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.sampler import generate
from teamtr_min.hf.weights import load_model
from teamtr_min.rollout import collect
from teamtr_min.tasks import load_task
from teamtr_min.team import Message, Team, load_team, placement

PROMPT_TOKENS = 32
SMALL_PARAMETERS = 20e6  # below: batches of up to 256 rows on a CPU too
EPISODE = {"agents": 3, "rounds": 2, "task": "relay"}


def run(flags: dict, short: bool = False) -> dict:
    """Everything that `python eval.py sampling` prints, as one object. `flags`: model, device, dtype.
    `short`: toy sizes, once."""
    model = flags.get("model", "relay")
    config = Config(**flags | {"model": model} | EPISODE)
    device, dtype = placement(config)
    ours = load_model(config.models[0], device, dtype)
    small = sum(p.numel() for p in ours.parameters()) < SMALL_PARAMETERS
    batches, new_tokens = [1, 16, 64, 256] if small or device.type == "cuda" else [16], 64
    repeats = REPEATS
    if short:
        batches, new_tokens, repeats = [3], 5, 1
    result = {
        "benchmark": "sampling",
        **heading(config),
        "clock": clock_name(device),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "copy_bytes_per_second": copy_rate(device),
        "matmul_flops_per_second": matmul_rate(device, dtype),
    }
    theirs, result["missing"] = in_transformers(ours)
    result["rows"] = [row(ours, theirs, B, new_tokens, repeats, result) for B in batches]
    result["episode"] = episode(config, 2 if short else 16, repeats) if theirs and model == "relay" else None
    return result


def row(ours: Transformer, theirs, B: int, new_tokens: int, repeats: int, machine: dict) -> dict:
    """B random prompts continued by `new_tokens`; tokens per second, ratio, and share of the floor."""
    device, V = ours.device, ours.config.vocab_size
    prompts = torch.randint(V, (B, PROMPT_TOKENS), generator=torch.Generator().manual_seed(B))

    def sample() -> None:
        generate(ours, prompts.tolist(), new_tokens)

    def sample_theirs() -> None:
        with torch.no_grad():
            ids = prompts.to(device)
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **SAMPLING)

    times = interleaved(
        {"ours": sample} | ({"transformers": sample_theirs} if theirs else {}), repeats, device
    )
    floor = floor_seconds(ours, B, new_tokens, machine)
    return {
        "rows": B,
        "tokens_per_second": {name: B * new_tokens / t for name, t in times.items()},
        "ratio": times["transformers"] / times["ours"] if theirs else None,
        "floor_share": floor / times["ours"],
    }


# Plain sampling, until the length limit: no truncation, no end token.
SAMPLING = {"do_sample": True, "top_k": 0, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}


def floor_seconds(model: Transformer, B: int, new_tokens: int, machine: dict) -> float:
    """What prompts and steps take if nothing but memory, or nothing but arithmetic, limits them."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - (
        0 if c.tied else model.model.embed_tokens.weight.numel()
    )
    size = torch.empty(0, dtype=model.dtype).element_size()
    span = PROMPT_TOKENS + new_tokens / 2  # mean over the steps
    step_bytes = size * (weights + B * span * c.kv_per_token)
    fed = PROMPT_TOKENS + new_tokens - 1
    products = 2 * (weights - model.head.numel()) * fed + 2 * model.head.numel() * new_tokens
    attention = 4 * c.layers * c.heads * c.head_dim * fed * (fed + 1) / 2
    return max(
        new_tokens * step_bytes / machine["copy_bytes_per_second"],
        B * (products + attention) / machine["matmul_flops_per_second"],
    )


def episode(config: Config, problems: int, repeats: int) -> dict:
    """Seconds of one episode of 8 rollouts per problem, ours and by a plain loop over transformers."""
    task = load_task(config)
    team = load_team(config, task.roles(config.agents))
    chosen = task.sample_problems(problems, rng.generator(0, "problems"))
    theirs = [in_transformers(agent.model)[0] for agent in team.agents]
    path = rng.RngPath(0, "bench")
    times = interleaved(
        {
            "ours": lambda: collect(team, task, chosen, 8, path),
            "transformers": lambda: plain_episode(team, theirs, [p for p in chosen for _ in range(8)]),
        },
        repeats,
        team.agents[0].model.device,
    )
    return {
        "rollouts": 8 * problems,
        **EPISODE,
        "seconds": times,
        "ratio": times["transformers"] / times["ours"],
    }


@torch.no_grad()
def plain_episode(team: Team, theirs: list, problems: list) -> list[list[Message]]:
    """All turns, each by one call of transformers' `generate` on whole transcripts, padded on the left."""
    transcripts: list[list[Message]] = [[] for _ in problems]
    for turn in range(team.turns):
        j = turn % len(team.agents)
        agent = team.agents[j]
        ends = agent.chat.end_tokens
        prompts = [
            team.render(j, p.text, messages, add_generation_prompt=True).ids
            for p, messages in zip(problems, transcripts)
        ]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=agent.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=ids.device)
        options = SAMPLING | {"eos_token_id": [*ends], "temperature": team.temperature}
        drawn = theirs[j].generate(ids, attention_mask=mask, max_new_tokens=team.max_new_tokens, **options)
        for messages, tokens in zip(transcripts, drawn[:, width:].tolist()):
            length = next((t for t, token in enumerate(tokens, 1) if token in ends), None)
            stopped, tokens = length is not None, tokens[:length]
            text = agent.tokenizer.decode_batch([tokens[: len(tokens) - stopped]])[0]
            messages.append(Message(j, tokens, text, [], stopped))
    return transcripts


def table(result: dict) -> str:
    lines = [
        f"{result['model']}, {result['dtype']}, on {result['device']}: prompts of {result['prompt_tokens']} "
        f"tokens, {result['new_tokens']} new ones; median of {result['repeats']}, in {result['clock']}",
        f"copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix rate "
        f"{result['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s",
        f"{'rows':>6}{'tokens/s':>12}{'transformers':>14}{'ratio':>8}{'of the floor':>14}",
    ]
    for row in result["rows"]:
        rates = row["tokens_per_second"]
        compared = (
            f"{rates['transformers']:>14,.0f}{row['ratio']:>8.2f}" if row["ratio"] else f"{'-':>14}{'-':>8}"
        )
        lines.append(f"{row['rows']:>6}{rates['ours']:>12,.0f}{compared}{row['floor_share']:>14.0%}")
    if result["missing"]:
        lines.append(result["missing"])
    if episode := result["episode"]:
        ours, theirs = (episode["seconds"][name] for name in ("ours", "transformers"))
        lines.append(
            f"an episode of {episode['rollouts']} rollouts, {episode['agents']} agents, {episode['rounds']} "
            f"rounds: {ours:.2f} s; a plain loop over transformers {theirs:.2f} s, "
            f"ratio {episode['ratio']:.2f}"
        )
    if result["device"].startswith("a CPU"):
        lines.append("on a GPU: not measured yet")
    return "\n".join(lines)
