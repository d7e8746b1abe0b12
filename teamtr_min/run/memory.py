"""How much memory a run takes, counted before its first weight is loaded, and what fits into it.

    total = program + weights + optimizer + the larger of sampling and an update        (bytes of one process)

On CUDA it is both: caches stay for the graphs that know them. Sampling grows with the rollouts at once, an
update with the tokens of one forward pass. Both get their usual size, or what memory allows. If the longest
transcript is too much, activations are computed twice. A run that cannot fit is refused. docs/models.md
compares with measured peaks."""

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.linear_logprob import CHUNK_BYTES
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks
from teamtr_min.engine.model import ModelConfig
from teamtr_min.engine.packing import LONGEST_TREE
from teamtr_min.engine.sampler import PREFILL_TOKENS, PREFILL_TREE
from teamtr_min.files import UserError
from teamtr_min.hf.weights import has_16_bits
from teamtr_min.occupancy import update_groups
from teamtr_min.run.loading import build_team, placement
from teamtr_min.tasks import Problem, Task, tools
from teamtr_min.team import Team

LEFT_FREE = 0.1  # of what is free, for other programs
PROGRAM = 40 << 20  # parts of torch that load late, and their buffers
PROGRAM_CUDA = 160 << 20  # workspaces of the products, and the table of rounding.py
BF16_ON_CPU = 60 << 20  # compiled products: next to nothing with AVX2, about 200 MiB with AMX
FRAGMENTATION = 1.1  # freed blocks that the allocator cannot use again at once
TOKENS, TOKENS_CUDA = 4096, 16384  # usual size of a training forward; of pretrained models on CUDA
DRAW_COPIES = 4  # of (rows, V) fp32: logits, scaled, probabilities, their sums
CHUNK_COPIES = 4  # of a chunk of logits in linear_logprob
LOOKED_AT = 64  # stages whose problems are looked at, and texts: more characters are more tokens


class Plan:
    """Bytes of this process on the device that computes, by purpose, and the sizes that fit into its memory.
    As in `build_team`, a team from `sources` only speaks."""

    def __init__(self, config: Config, task: Task, problems: list[Problem], ranks: Ranks, sources=None):
        team = build_team(config, task, ranks, sources, meta=True)
        self.config, self.ranks, self.groups = config, ranks, update_groups(config, team)
        self.models = {j: agent.model for j, agent in enumerate(team.agents) if agent.model}
        own = {j: [p for p in m.parameters() if p.requires_grad] for j, m in self.models.items()}
        self.trained = [sum(p.numel() for j in group for p in own[j]) for group in self.groups]
        self.prompt, self.longest = longest_transcript(config, team, problems)
        self.device, dtype = placement(config)
        self.cpu, self.width, self.copied = self.device.type == "cpu", dtype.itemsize, dtype != torch.float32
        used, free = in_use(self.device), int(free_memory(self.device) * (1 - LEFT_FREE))
        self.program = used + (PROGRAM + BF16_ON_CPU * self.copied if self.cpu else PROGRAM_CUDA)
        self.budget = memory_limit() or used + free // (ranks.on_this_machine if self.cpu else 1)
        self.weights = self._weights(team)
        # Adam's moments, and with bf16 the masters, of each group of agents that step together
        self.optimizers = [(8 + 4 * self.copied) * trained // ranks.size for trained in self.trained]
        self.most_rows = self.most_tokens = 0  # that there are in all
        self.rows = self.tokens = 0  # rollouts sampled at once; tokens of one training forward
        self.checkpointing = False  # activations are computed again in the backward pass
        self.offload = False  # optimizers wait in host memory between their updates
        self.warning = ""  # if the disk is too small for the checkpoints

    def fit(self, usual: int = 0, checkpointing: bool = False, offload: bool = False) -> None:
        """Choose `tokens`, unless `usual` is 0, then `rows`: as asked for, else halved until all fits."""
        config, self.rows, self.checkpointing, self.offload = self.config, 0, checkpointing, offload
        self.tokens = usual and (config.batch_tokens or max(usual, self.longest))
        while not config.batch_tokens and self.tokens > self.longest and self.total > self.budget:
            self.tokens = max(self.tokens // 2, self.longest)
        self.rows = config.batch_rows or Team.batch_rows
        while not config.batch_rows and self.rows > 1 and self.total > self.budget:
            self.rows //= 2

    @property
    def total(self) -> int:
        both, parts = sum if self.device.type == "cuda" else max, (self.sampling, self.update)
        return self.program + self.weights + self.optimizer + both(parts)

    def __str__(self) -> str:
        waits = " (one at a time; the others wait in host memory)" if self.offload else ""
        twice = ", activations computed twice" if self.checkpointing else ""
        update = f",\n        or an update {size(self.update)}: {self.tokens:,} tokens per forward{twice}"
        return (
            f"memory  {size(self.total)} planned of {size(self.budget)} usable on {self.device}: program "
            f"{size(self.program)}, weights {size(self.weights)}, optimizer {size(self.optimizer)}{waits},\n"
            f"        and sampling {size(self.sampling)}: {self.rows:,} rollouts at once, of up to "
            f"{self.longest:,} tokens{update if self.tokens else ''}{self.warning}"
        )

    def check(self) -> None:
        """UserError unless it fits, with what would help."""
        if self.total > self.budget:
            flags = "fewer --agents, a smaller --model, --lora-rank 16, a lower --max-new-tokens"
            raise UserError(f"this does not fit: {' '.join(str(self).split())}; what helps: {flags}")

    def _weights(self, team: Team) -> int:
        """Frozen bases once, and what engine/half.py packs. Several processes have a part of what is trained,
        in fp32, and in whole the agents at work. --diagnostics keeps the weights of the stage's start."""
        parameters = {id(p): p for m in self.models.values() for p in m.parameters()}.values()
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        trained, at_work = sum(self.trained), max(self.trained)
        kept = 2 * trained + at_work if self.config.diagnostics else trained
        if self.ranks.size == 1:
            speakers = [agent for agent in team.agents if agent.model and self.cpu]
            packs = [agent.model for agent in speakers if has_16_bits(agent.tokenizer.directory)]
            packed = {id(p): p.numel() for m in packs for p in m.parameters() if not p.requires_grad}
            return self.width * (frozen + kept) + 2 * sum(packed.values()) * (not self.copied)
        return self.width * (frozen + at_work) + 4 * kept // self.ranks.size

    @property
    def optimizer(self) -> int:
        return (max if self.offload else sum)(self.optimizers) if self.tokens else 0

    @property
    def sampling(self) -> int:
        """KV caches, prefill and draw of `rows` rollouts at once."""
        configs, rows = [m.config for m in self.models.values()], min(self.rows, self.most_rows)
        grows = 1 if self.cpu or self.config.rounds == 1 else 2  # a cache, from turn to turn; by half or more
        caches = [grows * rows * self.longest * m.kv_per_token * self.width for m in configs]
        # An agent that writes once frees its cache for the next; on CUDA recorded graphs keep it.
        once = self.config.router == "round-robin" and self.config.rounds == 1 and self.cpu
        prefill, mask = min(PREFILL_TOKENS, rows * self.longest), 5 * max(PREFILL_TREE, self.longest)
        draw = DRAW_COPIES * rows * 4 * max(m.vocab_size for m in configs)
        work = draw + prefill * (max(map(layer_work, configs)) * self.width + mask)
        return int(FRAGMENTATION * (work + (max(caches) if once else sum(caches))))

    @property
    def update(self) -> int:
        """Gradients, snapshots and activations of the largest update, with `tokens` in one forward pass."""
        config, width, work, tokens = self.config, self.width, {}, min(self.tokens, self.most_tokens)
        for j, m in ((j, model.config) for j, model in self.models.items()):
            lora = not self.models[j].head.requires_grad
            head = 2 * width * (not lora)  # its gradient, and the embedding's to add
            head += 4 * self.copied * self.cpu  # bf16 logits are products of fp32 copies
            head += 4 * (self.ranks.size > 1)  # in fp32, to be summed
            chunk = CHUNK_COPIES * min(CHUNK_BYTES, tokens // 2 * m.vocab_size * 4)  # half are its own
            row = min(tokens, max(self.longest, min(LONGEST_TREE, config.group * self.longest)))  # of a mask
            token = token_bytes(m, width, self.checkpointing, lora) + row * (width + 3)
            work[j] = int(FRAGMENTATION * (head * m.vocab_size * m.hidden_size + chunk + tokens * token))
        snapshots = 2 if config.inner_steps > 1 else 1  # masters and moments of accepted weights
        kept = [(4 + 12 * snapshots) * n // self.ranks.size + width * n * self.copied for n in self.trained]
        most = max(held + max(work[j] for j in group) for held, group in zip(kept, self.groups))
        return most if self.tokens else 0


def plan_training(config: Config, task: Task, ranks: Ranks = ALONE) -> tuple[Config, Plan]:
    """`config` with `batch_rows` and `batch_tokens` filled in, and the plan. Raises UserError if memory
    cannot hold the run, or if problems are too long for a model."""
    drawn = [*task.sample_problems(config.eval_problems, rng.generator(0, "held-out"), held_out=True)]
    rollouts = ranks.largest_share(config.problems) * config.group
    most_rows = max(rollouts, ranks.largest_share(len(drawn)))
    for stage in range(min(config.stages, LOOKED_AT)):  # the first stages stand for problems without end
        drawn += task.sample_problems(config.problems, rng.generator(config.seed, "problems", stage))
    drawn = task.all_problems() if hasattr(task, "all_problems") else drawn
    plan = Plan(config, task, drawn, ranks)
    # Rollouts of a problem share its prompt; messages are half as long as they may be; and half the problems
    # have equal returns, so their batches leave nothing for a backward pass.
    plan.most_tokens = rollouts * (plan.prompt // config.group + (plan.longest - plan.prompt) // 2) // 2
    plan.most_rows, usual = most_rows, TOKENS if plan.cpu or config.shipped else TOKENS_CUDA
    plan.fit(usual)
    smaller = plan.tokens < (config.batch_tokens or usual) or plan.total > plan.budget
    pinned = 2 * sum(plan.optimizers)  # at most: a pinned block has a power of two
    if smaller and not plan.cpu and ranks.size == 1 and pinned < free_memory(torch.device("cpu")):
        plan.fit(usual, offload=True)
    if plan.total > plan.budget:
        plan.fit(usual, checkpointing=True, offload=plan.offload)
    # Each process has looked at its own memory; all go through the same batches.
    rows, tokens, kept = map(min, zip(*ranks.gather([plan.rows, plan.tokens, not plan.checkpointing])))
    plan.check()
    plan.rows, plan.tokens, plan.checkpointing = rows, tokens, not kept
    out = Path(config.resume or config.out or ".").absolute()
    disk = 3 * 12 * sum(plan.trained)  # two checkpoints are kept, and one is being written
    free = shutil.disk_usage(next(filter(Path.is_dir, (out, *out.parents)))).free
    if disk > free:
        plan.warning = f"\ndisk    checkpoints take {size(disk)}, and {size(free)} are free"
    return dataclasses.replace(config, batch_rows=rows, batch_tokens=tokens), plan


def plan_evaluation(
    config: Config, task: Task, problems: list[Problem], k: int, sources: Sequence, ranks=ALONE
) -> tuple[Config, Plan]:
    """The same for k rollouts of each problem."""
    plan = Plan(config, task, problems, ranks, sources)
    plan.most_rows = ranks.largest_share(len(problems)) * k
    plan.fit()
    plan.check()
    return dataclasses.replace(config, batch_rows=min(ranks.gather(plan.rows))), plan


def longest_transcript(config: Config, team: Team, problems: list[Problem]) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest transcript that an agent can see. Problems with
    which one could outgrow a model's positions are left out with --drop-long, else refused."""
    task, prompts, lengths, overlong = team.task, [1], [1], {}
    for j, agent in ((j, agent) for j, agent in enumerate(team.agents) if agent.model):
        chat, system, limit = agent.chat, agent.role.system, agent.model.config.max_positions
        own = len(chat.assistant_header) + 1 + len(chat.assistant_footer)
        others = [len(chat.teammate_ids(other.role.name, [])) for other in team.agents]
        messages = config.turns * (config.max_new_tokens + max(own, *others))
        messages += config.turns * team.tools * (tools.LONGEST + max(others))
        room = limit - messages - len(chat.opening(system, "1"))
        texts = sorted(((task.view(p, j), p.id) for p in problems), key=lambda x: len(x[0]), reverse=True)
        for i, (text, name) in enumerate(texts):
            if i >= LOOKED_AT and 2 * len(text.encode()) < room:  # hardly any has more tokens than bytes
                break
            prompt = len(chat.opening(system, text))
            prompts.append(min(prompt, limit - messages))
            lengths.append(min(prompt + messages, limit))
            if prompt + messages > limit:
                made = f"a prompt of {prompt:,} tokens and messages of up to {messages:,}"
                overlong[name] = f"problem {name} makes {made}, but the model has {limit:,} positions"
    if overlong and config.drop_long and hasattr(task, "leave_out"):
        task.leave_out({*overlong}, "with the messages of a team they are too long for the model")
    elif overlong:
        some = f"{[*overlong.values()][0]} ({len(overlong):,} of {len(problems):,} problems are too long)"
        drop = "--drop-long leaves them out, " * hasattr(task, "leave_out")
        raise UserError(f"{some}: {drop}a lower --max-new-tokens makes room")
    return max(prompts), max(lengths)


def layer_work(m: ModelConfig) -> int:
    """Numbers of one token that come and go while a layer is computed, at most."""
    return 3 * (m.hidden_size + max(m.intermediate_size, (m.heads + m.kv_heads) * m.head_dim))


def token_bytes(m: ModelConfig, width: int, checkpointing: bool = False, lora: bool = False) -> int:
    """Activations of one token in a training forward, with gradients of the layer that is under way. A layer
    keeps the inputs of its norms; queries, keys and values before and after the rotation; attention's output
    twice; gate and up. Adapters also keep the input of the last product."""
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    layer = 2 * m.hidden_size + 4 * query + 3 * key + (2 + lora) * m.intermediate_size
    kept = m.layers * m.hidden_size + layer if checkpointing else m.layers * layer
    return (kept + layer_work(m)) * width + 32 * m.hidden_size  # fp32 below the first layer, above the last


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be had: on CUDA of the device; else what the machine has available, or less if a
    control group (version 1 or 2, any level) leaves less. `root` is where /proc and /sys lie."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - in_use(device)
    free = 1024 * fields(root / "proc/meminfo").get("MemAvailable", 1 << 40)
    for _, kinds, path in re.findall(r"(.*):(.*):/(.*)", text(root / "proc/self/cgroup")):
        top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        if kinds:
            top /= "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        for level in (top / path, *(top / path).parents):
            limit, used = (text(level / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():  # pages of files count as used, but can be given up
                free = min(free, int(limit) - int(used) + fields(level / "memory.stat").get(names[2], 0))
    return max(free, 0)


def memory_limit() -> int | None:
    """TEAMTR_MEMORY, such as 8GiB: what a process may use in all, whatever is free."""
    given = os.environ.get("TEAMTR_MEMORY", "")
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG])i?B", given, re.IGNORECASE)
    if given and not found:
        raise UserError(f"TEAMTR_MEMORY is {given!r}; it is a size such as 8GiB or 500MiB")
    return int(float(found[1]) * 1024 ** (" KMG".index(found[2].upper()))) if found else None


def in_use(device: torch.device, most: bool = False) -> int:
    """Bytes that this process holds, or the `most` that it has held: of tensors on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if most else torch.cuda.memory_allocated(device)
    return 1024 * fields(Path("/proc/self/status")).get("VmHWM" if most else "VmRSS", 0)


def size(count: float) -> str:
    """Bytes in words: 1.4 MiB."""
    power = next((p for p in (3, 2, 1) if count >= 1024**p), 0)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def fields(path: Path) -> dict[str, int]:
    """Of lines such as `name 12` or `name: 12 kB`; empty without the file."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", text(path), re.MULTILINE)}
