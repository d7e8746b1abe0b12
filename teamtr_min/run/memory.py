"""How much memory there is, and how much a run will take: counted before its first weight is loaded.

    what the process may use = what it has by now + what is free, on the device that computes
    what the plan takes      = what it has by now + weights + optimizer + the larger of sampling and an update

Sampling grows with the rollouts that run at once, an update with the tokens of one forward pass. Both are set
as high as the default and the memory allow. If not even the longest transcript fits into a training forward,
each layer keeps only its input and is computed again on the way back. What cannot fit is refused.

The formulas are upper bounds; docs/models.md holds them against measured peaks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.decode import SPLIT
from kernels.linear_logprob import CHUNK_BYTES
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks
from teamtr_min.engine.lora import adapter_in, adapter_parameters
from teamtr_min.engine.model import ModelConfig
from teamtr_min.engine.packing import LONGEST_TREE
from teamtr_min.engine.sampler import PREFILL_TOKENS, PREFILL_TREE
from teamtr_min.files import UserError
from teamtr_min.hf.chat import ChatFormat, load_tokenizer
from teamtr_min.hf.weights import find_base, find_model, read_config
from teamtr_min.run.loading import placement
from teamtr_min.run.shapes import layer_parameters, layer_work, parameters, token_bytes
from teamtr_min.run.system import free_disk, free_memory, in_use, limit_from_environment, reset_peak, size
from teamtr_min.tasks import Problem
from teamtr_min.team import Team

LEFT_FREE = 0.1  # of what is free: for other programs, and for what the formulas do not know
# malloc keeps freed blocks for later, and blocks of unequal length seldom fit again.
FRAGMENTATION = 1.1
MOST_TOKENS = 4096  # per training forward
MOST_TOKENS_CUDA = 16384  # of a pretrained model there
WARM_UP = 110 << 20  # what torch loads late, on a CPU: autograd, the optimizer, buffers of its products
TOKEN_OBJECT = 100  # a sampled token and its log-prob in Python's lists
PROMPT_TOKEN = 40  # a token of a prompt, with those of compact messages made anew
DRAW_COPIES = 4  # of (rows, V) fp32 that a draw holds at once: logits, scaled, probabilities, their sums
CHUNK_COPIES = 4  # of a chunk of logits in linear_logprob and its backward
WORKSPACES = 2 * (32 << 20)  # of the library of products on CUDA: one for each stream that it has seen
CACHE_SLACK = 2.0  # the cache grows by half, and the old one is there until the new one is filled
STAGES_READ = 64  # whose problems are looked at for the longest


@dataclass(frozen=True)
class Plan:
    """Bytes of this process, on the device that computes, unless a name says otherwise."""

    device: torch.device
    budget: int  # that this process may use in all
    base: int  # that it has without a model
    weights: int
    optimizer: int  # Adam's moments, and masters that are a second copy: of all agents on a CPU, else of one
    longest: int  # tokens of the longest transcript
    rows: int  # rollouts sampled at once
    sampling: int
    tokens: int = 0  # of one training forward; 0: nothing is trained
    update: int = 0  # gradients, the points to go back to, activations
    checkpointing: bool = False
    offload: bool = False
    disk: int = 0  # for checkpoints and agents
    disk_free: int = 0

    @property
    def total(self) -> int:
        return self.base + self.weights + self.optimizer + max(self.sampling, self.update)

    def __str__(self) -> str:
        kept = f"weights {size(self.weights)}" + f", optimizer {size(self.optimizer)}" * bool(self.tokens)
        lines = [
            f"memory  {size(self.total)} planned, of {size(self.budget)} usable on {self.device}: "
            f"program {size(self.base)}, {kept}, and the larger of",
            f"        sampling {size(self.sampling)}: {self.rows:,} rows at once, "
            f"transcripts of up to {self.longest:,} tokens",
        ]
        if self.tokens:
            lines += [
                f"        an update {size(self.update)}: {self.tokens:,} tokens per forward"
                + ", activations recomputed" * self.checkpointing,
                f"disk    {size(self.disk)} for checkpoints and agents, of {size(self.disk_free)} free",
            ]
        return "\n".join(lines)


def plan_training(config: Config, task, ranks: Ranks = ALONE, beside: Sequence = ()) -> tuple[Config, Plan]:
    """`config` with `batch_rows` and `batch_tokens` set, and what the run will take, while models `beside` it
    are in memory too.

    Raises UserError when it cannot fit, with the numbers and the flags that help.
    """
    problems = task.sample_problems(config.eval_problems, rng.generator(0, "held-out"), held_out=True)
    most_rows = max(ranks.largest_share(config.problems) * config.group, ranks.largest_share(len(problems)))
    collections = {"trained": config.problems * config.group, "tested": len(problems)}
    for stage in range(min(config.stages, STAGES_READ)):
        generator = rng.generator(config.seed, "problems", stage)
        problems = [*problems, *task.sample_problems(config.problems, generator)]
    needs = needs_of(config, task, problems, [*config.model_of_each, *beside], ranks)
    needs = dataclasses.replace(needs, **collections)
    config, plan = fit_training(needs, most_rows)
    if ranks.size > 1:  # each has looked at its own memory, and all shall go through the same batches
        found = zip(*ranks.gather([config.batch_rows, config.batch_tokens, not plan.checkpointing]))
        rows, tokens, keeps = map(min, found)
        config = dataclasses.replace(config, batch_rows=rows, batch_tokens=tokens)
        plan = dataclasses.replace(plan, checkpointing=not keeps)
    refuse(plan, config)
    if needs.device.type == "cuda":
        refuse_host(needs.host())
    disk, free = needs.disk(), free_disk(Path(config.resume or config.out or "runs"))
    if disk > free:
        helps = "a lower --keep, or --out on another disk" if 2 > 1 else "--out on another disk"
        raise UserError(
            f"checkpoints and agents will take {size(disk)} of disk and {size(free)} are free: "
            + ("make room" if config.resume else f"{helps}, would help")
        )
    return config, dataclasses.replace(plan, disk=disk, disk_free=free)


def fit_training(needs: "Needs", most_rows: int) -> tuple[Config, Plan]:
    """What fits, of at most `most_rows` rollouts to sample at once; or the least there is if nothing does."""
    config, longest = needs.config, needs.longest
    cuda = needs.device.type == "cuda"
    moved = [needs.updating(agents) for agents in groups_of(config)]
    weights = needs.weights
    if config.diagnostics:  # the team as it was at the stage's start, and the agent before its update
        weights += needs.width * (sum(needs.counts) + max(moved))
    states = (max if cuda else sum)(map(needs.states, groups_of(config)))
    room = needs.budget - needs.base - weights - states
    rows = choose(config.batch_rows, Team.batch_rows, most_rows, needs.sampling, room)
    cap = MOST_TOKENS_CUDA if cuda and not config.shipped else MOST_TOKENS
    most_tokens = needs.ranks.largest_share(config.problems) * config.group * longest

    def update(tokens: int, checkpointing: bool) -> int:
        tokens = max(tokens, longest)  # a row is never cut
        return max(needs.update(agents, tokens, checkpointing) for agents in groups_of(config))

    for checkpointing in (False, True):
        takes = functools.partial(update, checkpointing=checkpointing)
        tokens = choose(config.batch_tokens, cap, most_tokens, takes, room, least=longest)
        work = takes(min(tokens, most_tokens))
        if work <= room:
            break
    plan = Plan(
        needs.device, needs.budget, needs.base, weights, states, longest, min(rows, most_rows),
        needs.sampling(min(rows, most_rows)), min(tokens, most_tokens), work, checkpointing,
    )  # fmt: skip
    return dataclasses.replace(config, batch_rows=rows, batch_tokens=tokens), plan


def plan_evaluation(
    config: Config,
    task,
    problems: list[Problem],
    k: int,
    sources: Sequence,
    loaded: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[Config, Plan]:
    """As `plan_training`, for k rollouts of every problem; `loaded`: the team is in memory already."""
    needs = needs_of(config, task, problems, sources, ranks)
    needs.weights *= not loaded
    most, room = ranks.largest_share(len(problems)) * k, needs.budget - needs.base - needs.weights
    needs.tested = len(problems) * k
    rows = min(ranks.gather(choose(config.batch_rows, Team.batch_rows, most, needs.sampling, room)))
    at_once = min(rows, most)
    plan = Plan(
        needs.device, needs.budget, needs.base, needs.weights, 0, needs.longest, at_once,
        needs.sampling(at_once),
    )  # fmt: skip
    refuse(plan, config)
    return dataclasses.replace(config, batch_rows=rows), plan


def choose(
    asked: int, most: int, useful: int, bytes_of: Callable[[int], int], room: int, least: int = 1
) -> int:
    """`asked` if it is not 0; else `most`; or if `useful` of them do not fit, `least` doubled while it fits.

    Doubled, so that a little more or less of free memory leaves the number as it is.
    """
    if asked or bytes_of(min(most, useful)) <= room:
        return asked or most
    count = least
    while bytes_of(2 * count) <= room:
        count *= 2
    return min(count, most)


@dataclass
class Needs:
    """What a team takes, by purpose, from the shapes of its models; and what there is."""

    config: Config
    device: torch.device
    width: int  # bytes of a number in the compute dtype
    models: list[ModelConfig]  # of each agent
    counts: list[int]  # parameters that each agent has for itself, and trains
    weights: int  # bytes of all
    longest: int  # tokens of the longest transcript
    base: int = 0  # bytes that the process has without a model
    budget: int = 2**62  # and that it may have
    ranks: Ranks = ALONE
    trained: int = 0  # rollouts of a collection to train on, of all ranks
    tested: int = 0  # and of one to look at

    @property
    def parts(self) -> int:
        """Ranks that every tensor is spread over."""
        return self.ranks.size if False else 1

    def gathered(self, m: ModelConfig, width: int) -> int:
        """Where weights are spread: bytes, `width` a number, of the layer in use, of the next, and of what
        is outside of layers."""
        outside = parameters(m) - m.layers * layer_parameters(m)
        return width * (2 * layer_parameters(m) + outside) * (self.parts > 1)

    def updating(self, agents: list[int]) -> int:
        """Parameters that one update moves."""
        return sum(self.counts[j] for j in agents)

    def owned(self, agents: list[int]) -> int:
        """Of these the parameters whose moments one rank keeps, at most (see `Ranks.owners`)."""
        size, count = self.ranks.size, 0
        if self.parts > 1:
            return -(-self.updating(agents) // size)
        for j in agents:
            m, n = self.models[j], self.counts[j]
            even, largest = n // size + m.hidden_size * m.intermediate_size, m.hidden_size * m.vocab_size
            count += n if size == 1 else min(n, max(even, largest))
        return count

    def states(self, agents: list[int]) -> int:
        """Bytes of Adam's two moments, and in bf16 of the fp32 masters."""
        masters = self.updating(agents) if self.parts == 1 else self.owned(agents)
        return 8 * self.owned(agents) + 4 * masters * (self.width < 4)

    def sampling(self, rows: int) -> int:
        """KV cache, draw and prefill of `rows` rollouts at once."""
        caches = [m.kv_per_token * self.width * self.longest * CACHE_SLACK for m in self.models]
        # An agent that writes once gives its cache's memory to the next; otherwise all stay.
        one_at_a_time = self.config.router == "round-robin" and self.config.rounds == 1  # Team.caches_stay
        cache = max(caches) if one_at_a_time else sum(caches)
        prefill = min(PREFILL_TOKENS, rows * self.longest)
        work = max(
            rows * m.vocab_size * 4 * DRAW_COPIES  # (rows, V) fp32
            # The mask is there twice.
            + prefill * (layer_work(m) * self.width + 5 * max(PREFILL_TREE, self.longest))
            + self._head_in_fp32(m)
            + self.gathered(m, self.width)
            + self._recorded(m, rows)
            for m in self.models
        )
        most = self.ranks.largest_share(max(self.trained, self.tested))
        lists = self._lists(prompts=most if one_at_a_time else rows)
        return math.floor((rows * cache + work) * FRAGMENTATION) + lists

    def _lists(self, prompts: int) -> int:
        """Of Python's, in host memory: what two collections wrote to train on, or one to look at, of which a
        turn is lists and the others are compact; and a turn's prompts."""
        turns = self.config.turns
        messages = max(2 * self.trained * turns, self.tested * (1 + -(-turns // 8)))
        tokens = messages * self.config.max_new_tokens * TOKEN_OBJECT
        return (tokens + prompts * self.longest * PROMPT_TOKEN) * (self.device.type != "cuda")

    def points(self, agents: list[int]) -> int:
        """Bytes of gradients and of the points to go back to: last accepted masters and moments, attempted
        masters; in bf16 also the masters' own gradient."""
        if self.parts > 1:
            return (4 + 4 + 4 + 8) * self.owned(agents)
        each = self.width + 4 + 4 + 4 * (self.width < 4)
        return self.updating(agents) * each + 8 * self.owned(agents)

    def update(self, agents: list[int], tokens: int, checkpointing: bool) -> int:
        """An update of `agents` with `tokens` padded tokens in one forward pass."""
        work = 0
        for m in (self.models[j] for j in agents):
            # The head's gradient, and the embedding's to add; with LoRA both are frozen.
            head = 2 * m.vocab_size * m.hidden_size * self.width * (not self.config.lora_rank)
            chunk = min(CHUNK_BYTES, tokens * m.vocab_size * 4) * CHUNK_COPIES
            # At worst trees are as long as they may be: a mask of all pairs of a row, and bools to make it.
            row = min(tokens, max(LONGEST_TREE, self.longest))
            token = token_bytes(m, self.width, checkpointing, lora=bool(self.config.lora_rank))
            activations = tokens * (token + row * (self.width + 3))
            old = 0
            if False:  # the old policy's final states and head
                problems = self.ranks.largest_share(self.config.problems)
                trained = problems * self.config.group * self.config.rounds
                states = min(trained * self.config.max_new_tokens, trained * self.longest)
                old = (states + m.vocab_size) * m.hidden_size * self.width
            gathered = self.gathered(m, 2 * self.width + 4)  # with gradients, and these in fp32 to be summed
            work = max(work, head + chunk + activations + old + gathered + self._head_in_fp32(m))
        return math.floor(self.points(agents) + work * FRAGMENTATION)

    def host(self) -> int:
        """On CUDA, bytes of host memory: optimizers that wait, of all ranks on this machine, and the copy of
        one while it is written."""
        waiting = 4 * sum(self.counts) + 8 * sum(map(self.owned, groups_of(self.config)))
        if self.parts > 1:  # a model is whole in host memory while it is loaded, one after the other
            waiting = 4 * max(self.counts) + self.states(list(range(len(self.counts))))
        written = 12 * max(map(self.updating, groups_of(self.config)))
        return self.ranks.on_this_machine * waiting + written

    def disk(self) -> int:
        """Masters and moments of every agent, `keep` times and once more while they are written, or as often
        as the run writes them; the agents, which a run that goes on replaces; less what that one has."""
        n, c = sum(self.counts), self.config
        checkpoints = 2 + 1  # a long warm start writes some of its own
        if not c.warm_start:
            checkpoints = min(checkpoints, -(-c.stages // c.checkpoint_every))
        need = (4 if False else 12) * n * checkpoints + (1 + bool(c.resume)) * self.width * n
        if self.config.resume:
            need -= sum(f.stat().st_size for f in Path(self.config.resume).rglob("*.safetensors"))
        return max(need, 0)

    def _recorded(self, model: ModelConfig, rows: int) -> int:
        """On CUDA what an agent's recorded decode steps keep: logits, shares of attention, and a layer."""
        splits = -(-math.ceil(CACHE_SLACK * self.longest) // SPLIT)
        shares = 4 * model.heads * (model.head_dim + 2) * splits
        row = 4 * model.vocab_size + shares + layer_work(model) * self.width
        return rows * row * (self.device.type == "cuda")

    def _head_in_fp32(self, model: ModelConfig) -> int:
        """bf16 logits are products of fp32 copies, save on CUDA."""
        copied = self.width < 4 and self.device.type != "cuda"
        return 4 * model.vocab_size * model.hidden_size * copied


def needs_of(config: Config, task, problems: list[Problem], sources: Sequence, ranks: Ranks = ALONE) -> Needs:
    """Reads the models' configurations and tokenizers, and asks the machine."""
    device, dtype = placement(config)
    directories = [find_model(source) for source in sources]
    adapters = [adapter_in(directory, config.lora_rank) for directory in directories]
    bases = [find_base(directory)[0] for directory in directories]
    models = [read_config(base) for base in bases]
    counts = [adapter_parameters(m, a) if a else parameters(m) for a, m in zip(adapters, models)]
    shared = {base: parameters(m) for base, m, a in zip(bases, models, adapters) if a}
    chats = {directory: ChatFormat(load_tokenizer(directory)) for directory in set(directories)}
    views = list(zip([chats[d] for d in directories], task.roles(config.agents)))
    longest = min(
        longest_transcript(config, views, (p.text for p in problems)), *(m.max_positions for m in models)
    )
    weights = dtype.itemsize * (sum(counts) + sum(shared.values()))
    if False and ranks.size > 1:
        weights = 4 * -(-sum(counts) // ranks.size)
    reset_peak(device)
    used = in_use(device)
    base = used + (WORKSPACES if device.type == "cuda" else WARM_UP)
    free = math.floor(free_memory(device) * (1 - LEFT_FREE))
    free //= 1 if device.type == "cuda" else ranks.on_this_machine
    budget = limit_from_environment() or used + free
    return Needs(config, device, dtype.itemsize, models, counts, weights, longest, base, budget, ranks)


def groups_of(config):
    return [[*range(config.agents)]] if config.occupancy == "joint" else [[j] for j in range(config.agents)]


def refuse(plan: Plan, config: Config) -> None:
    """UserError unless the plan fits, with the flags that help: first those that ask for more than needed."""
    if plan.total <= plan.budget:
        return
    alone = plan.base + plan.weights + plan.optimizer
    too_much = {"--batch-rows": plan.sampling, "--batch-tokens": plan.update}
    asked = {"--batch-rows": config.batch_rows > 1, "--batch-tokens": config.batch_tokens > plan.longest}
    given = [flag for flag, work in too_much.items() if asked[flag] and alone + work > plan.budget]
    parts = f"weights {size(plan.weights)}"
    if plan.tokens:
        parts += f", optimizer {size(plan.optimizer)}, an update {size(plan.update)}"
    helps = "--lora-rank, " * bool(plan.tokens and not config.lora_rank)
    helps += "fewer --agents or a smaller --model"
    if alone <= plan.budget:
        helps = f"a lower --max-new-tokens, {helps}"
    if config.resume:
        helps = "a machine with more, or an end to what else runs here"
    elif given and alone <= plan.budget:
        helps = f"a lower {' or '.join(given)}"
    raise UserError(
        f"this needs {size(plan.total)} of memory ({parts}, sampling {size(plan.sampling)}) and "
        f"{size(plan.budget)} may be used on {plan.device}: {helps} would help"
    )


def refuse_host(need: int) -> None:
    free = free_memory(torch.device("cpu"))
    if need > free:
        raise UserError(
            f"the optimizers that wait in host memory need {size(need)} and {size(free)} are free: "
            "fewer --agents or a smaller --model would help"
        )


def longest_transcript(config: Config, views: list[tuple], problems: Iterable[str]) -> int:
    """Tokens of the longest transcript that any agent can see; `views`: chat format and role of each.

    A teammate's message in another tokenizer is counted as long as in its own.
    """
    texts = sorted(set(problems), key=len)[-64:]  # tokens go with characters
    longest = 0
    for chat, role in views:
        opening = max(len(chat.opening(role.system, text)) for text in texts)
        own = len(chat.assistant_header) + 1 + len(chat.assistant_footer)
        others = max(len(chat.teammate_ids(writer.name, [])) for _, writer in views)
        longest = max(longest, opening + config.turns * (config.max_new_tokens + max(own, others)))
    return longest


def halving(work: Callable, size: int):
    """work(size), and with half the size again while memory runs out."""
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
            size //= 2
