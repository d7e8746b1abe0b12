"""KV-cached, batched decoding of one model over many sequences of different lengths.

A `Sampler` keeps its cache from turn to turn: it is handed whole sequences and computes only what it has not
yet seen. Live rows occupy the first slots of the cache, so every decode step works on a plain slice; a row
that has finished trades places with the last live one and leaves the batch. Where there are more rows than
slots, those that wait take the slots of those that have left, so that the batch stays full. Each token takes
one uniform that is a function of the row's key and the position alone (rng.py), so a message does not depend
on its neighbours.
"""

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.decode import draw
from teamtr_min.engine import rng
from teamtr_min.engine.decode import Decode
from teamtr_min.engine.model import KVCache, PrefillStep, Transformer
from teamtr_min.engine.packing import batches_of, pack, trees_of
from teamtr_min.files import UserError

PREFILL_TOKENS = 16384  # padded, in one forward pass over prompts
PREFILL_TREE = 512  # tokens of one prefix tree of them: attention looks at every pair of them


@dataclass(frozen=True)
class Completion:
    tokens: list[int]  # ends with a stop id exactly when `stopped`
    logprobs: list[float]  # of each token, at the sampling temperature (greedy: at temperature 1)
    stopped: bool


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stop_ids: tuple[int, ...] | list[int] = (),
) -> list[Completion]:
    """Continue every prompt; temperature 0 is greedy.

    A completion depends on the model, the seed, its own prompt and how often that prompt stood in the list
    before: not on the rest of the batch, its size or its order.
    """
    seen: dict[tuple, int] = {}
    keys = []
    for prompt in map(tuple, prompts):
        seen[prompt] = seen.get(prompt, -1) + 1
        keys.append(rng.key(seed, "generate", seen[prompt], *prompt))
    sampler = Sampler(model, len(prompts))
    return sampler.generate(range(len(prompts)), prompts, keys, max_new_tokens, temperature, stop_ids)


class Sampler:
    """`rows` sequences, of which up to `slots` are in the cache. Each slot is some row's: `row_at[slot]`."""

    def __init__(self, model: Transformer, rows: int, slots: int | None = None):
        slots = rows if slots is None else min(rows, slots)
        self.model = model
        self.cache = KVCache(model.config, slots, 0, model.device, model.dtype)
        self.decode = Decode(model, self.cache)
        self.row_at = list(range(slots))
        self.cached = [0] * rows  # tokens of each row that the cache holds
        self.check_every = 16 if model.device.type == "cuda" else 1  # steps between device syncs

    @torch.inference_mode()
    def generate(
        self,
        rows: list[int] | range,
        prompts: list[list[int]],
        keys: list[int],
        max_new_tokens: int,
        temperature: float,
        stop_ids: tuple[int, ...] | list[int],
        progress: Callable[[int, float, int], None] | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> list[Completion]:
        """Continue `prompts[i]`, which row `rows[i]` has grown into, until a stop id or the length limit.

        Each prompt must extend what the row's cache holds; only the rest of it is computed. `progress` is
        told now and then how many messages are written, how much of others as a share of the longest length,
        and tokens in all. Raises FloatingPointError when the model's output is not finite.
        """
        if not len(rows) or max_new_tokens < 1:
            return [Completion([], [], False) for _ in rows]
        for row, ids in zip(rows, prompts):
            if len(ids) <= self.cached[row]:
                raise ValueError(
                    f"row {row} holds {self.cached[row]} tokens; a prompt of {len(ids)} adds none"
                )
        longest_prompt, most = max(map(len, prompts)), self.model.config.max_positions
        if longest_prompt + max_new_tokens > most:
            raise UserError(
                f"a transcript of {longest_prompt} tokens and a message of up to {max_new_tokens} exceed the "
                f"{most} positions of the model; lower --max-new-tokens or --rounds"
            )
        # All at once, so that graphs find it in its place: with room behind what any row holds.
        self.cache.reserve(max(longest_prompt + max_new_tokens, max(self.cached) + 1))
        turn = _Turn(self, rows, prompts, keys, max_new_tokens, temperature, set(stop_ids), prefill_tokens)
        while turn.fill() or turn.live:
            turn.decode()
            if progress:
                progress(*turn.progress)
        completions = [_cut(*drawn, turn.stops) for drawn in zip(turn.tokens, turn.logprobs)]
        for i, row in enumerate(rows):  # the last token of a message was sampled, not fed
            self.cached[row] = len(prompts[i]) + len(completions[i].tokens) - 1
        for row in set(rows).difference(self.row_at):  # another has taken its slot
            self.cached[row] = 0
        self.cache.length.copy_(torch.tensor([self.cached[row] for row in self.row_at]))
        return completions

    def _holders(self, rows: list[int] | range) -> list[int]:
        """Move slots of `rows` to the front; which i have the first slots now, in order."""
        index_of = {row: i for i, row in enumerate(rows)}
        wanted = [row in index_of for row in self.row_at]
        count = wanted.count(True)
        self._to_front(wanted, count)
        return [index_of[row] for row in self.row_at[:count]]

    def _to_front(self, wanted: list[bool], count: int) -> list[int]:
        """Move the wanted slots, `count` of the first len(wanted), to the front by swapping pairs.

        Returns the permutation: new slot -> old slot.
        """
        holes = [slot for slot in range(count) if not wanted[slot]]
        fillers = [slot for slot in range(count, len(wanted)) if wanted[slot]]
        source = list(range(len(wanted)))
        for hole, filler in zip(holes, fillers):
            source[hole], source[filler] = filler, hole
            self.row_at[hole], self.row_at[filler] = self.row_at[filler], self.row_at[hole]
        if holes:
            device = self.model.device
            to = torch.tensor(holes + fillers, device=device)
            self.cache.permute(to, torch.tensor(fillers + holes, device=device))
        return source

    def _prefill(self, slots: range, sequences: list[list[int]], budget: int) -> Tensor:
        """Feed what the cache lacks of each slot's sequence; logits (len(slots), V) after the last token.

        A forward pass has at most `budget` tokens, padding included.
        """
        H, device = self.model.config.hidden_size, self.model.device
        last = torch.empty(slots.stop, H, device=device, dtype=self.model.dtype)
        whole = dict(zip(slots, sequences))
        self.cache.reserve(max(map(len, sequences)))
        self._begin([slot for slot in slots if not self.cached[self.row_at[slot]]], whole, budget, last)
        self._go_on([slot for slot in slots if self.cached[self.row_at[slot]]], whole, budget, last)
        return self.model.logits(last[slots.start :])

    def _begin(self, slots: list[int], sequences: dict[int, list[int]], budget: int, last: Tensor) -> None:
        """Slots with an empty cache, as prefix trees: what their sequences have in common, such as the system
        prompt, a problem and what teammates said alike, is computed once."""
        device, pairs_per_token = self.model.device, self.model.config.pairs_per_token
        new = [(slot, sequences[slot]) for slot in slots]
        trees = trees_of(new, min(budget, PREFILL_TREE), pairs_per_token)
        for rows in batches_of(trees, budget, pairs_per_token, device):
            packed = pack(rows, device)
            source = torch.tensor([t for path in packed.paths.values() for t in path], device=device)
            to = torch.tensor([slot for slot, path in packed.paths.items() for _ in path], device=device)
            where = torch.tensor([path[-1] for path in packed.paths.values()], device=device)
            step = PrefillStep(packed.positions, packed.end, where, self.model.dtype, self.cache, source, to)
            done = torch.tensor(list(packed.paths), device=device)
            last[done] = self.model.hidden(packed.tokens, packed=step)  # (slots, H)
            self.cache.length[done] = packed.positions.flatten()[where] + 1

    def _go_on(self, slots: list[int], sequences: dict[int, list[int]], budget: int, last: Tensor) -> None:
        """Slots whose cache holds a start, padded to the most that one of a pass lacks."""
        device = self.model.device
        held = {slot: self.cached[self.row_at[slot]] for slot in slots}
        rest = {slot: sequences[slot][held[slot] :] for slot in slots}
        slots = sorted(slots, key=lambda slot: len(rest[slot]))
        while slots:  # the longest come first, so that memory peaks at once or never
            width = len(rest[slots[-1]])
            group = slots[-max(1, budget // width) :]
            slots = slots[: len(slots) - len(group)]
            padded = torch.tensor(
                [rest[slot] + [0] * (width - len(rest[slot])) for slot in group], device=device
            )
            rows = torch.tensor(group, device=device)
            lengths = torch.tensor([len(rest[slot]) for slot in group], device=device)
            starts = {held[slot] for slot in group}
            self.cache.reserve(max(starts) + width, starts.pop() if len(starts) == 1 else None)
            ends = torch.arange(len(group), device=device) * width + lengths - 1
            last[rows] = self.model.hidden(padded, self.cache, rows, where=ends)  # (rows, H)
            self.cache.length[rows] += lengths


class _Turn:
    """One call of `Sampler.generate`: message i is that of rows[i]. Some are being written, others wait."""

    def __init__(
        self,
        sampler: Sampler,
        rows: list[int] | range,
        prompts: list[list[int]],
        keys: list[int],
        max_new_tokens: int,
        temperature: float,
        stops: set[int],
        prefill_tokens: int,
    ):
        self.sampler, self.rows, self.prompts, self.keys = sampler, rows, prompts, keys
        self.max_new_tokens, self.temperature, self.stops = max_new_tokens, temperature, stops
        self.prefill_tokens = prefill_tokens
        slots, device = len(sampler.row_at), sampler.model.device
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.logprobs: list[list[float]] = [[] for _ in rows]
        self.waiting = collections.deque(range(len(rows)))
        self.live: list[int] = []  # slot -> message
        self.step = self.written = 0  # decode steps; tokens of messages that are done
        self.came: list[int] = []  # slot -> the step at which its message began
        self.last = torch.empty(0, dtype=torch.long, device=device)  # (live,) the last token of each
        # What each slot draws with at decode step s stands in row s % max_new_tokens.
        self.uniforms = torch.empty(max_new_tokens, slots, device=device)
        self.refill = -(-slots // 4)  # they come together, for what they have in common is computed once
        held = sampler._holders(rows)
        if held:
            self.waiting = collections.deque(sorted(set(self.waiting).difference(held)))
            self.enter(held)

    @property
    def progress(self) -> tuple[int, float, int]:
        """Messages written, how much of others as a share of the longest length, and tokens in all."""
        under_way = len(self.live) * (self.step + 1) - sum(self.came)
        done = len(self.rows) - len(self.waiting) - len(self.live)
        return done, under_way / self.max_new_tokens, self.written + under_way

    def fill(self) -> bool:
        """Give free slots to messages that wait, if there are enough of both; whether it did."""
        slots, begun = len(self.sampler.row_at), len(self.live)
        count = min(slots - begun, len(self.waiting))
        if count == 0 or slots - begun < self.refill:
            return False
        coming = [self.waiting.popleft() for _ in range(count)]
        for slot, i in enumerate(coming, begun):
            self.sampler.cached[self.sampler.row_at[slot]] = 0
            self.sampler.row_at[slot] = self.rows[i]
        self.enter(coming)
        return True

    def enter(self, coming: list[int]) -> None:
        """Begin messages whose rows have the slots behind the live ones: feed prompts, draw first tokens."""
        begun, sampler = len(self.live), self.sampler
        slots = range(begun, begun + len(coming))
        logits = sampler._prefill(slots, [self.prompts[i] for i in coming], self.prefill_tokens)  # (new, V)
        keys = [self.keys[i] for i in coming]
        uniforms = rng.uniforms(keys, self.max_new_tokens, logits.device)  # (new, max_new_tokens)
        first = draw(logits, uniforms[:, 0], self.temperature)
        self.uniforms[:, slots.start : slots.stop] = uniforms.roll(self.step - 1, 1).t()
        self.last = torch.cat([self.last, first[0]])
        self.live, self.came = self.live + coming, self.came + [self.step] * len(coming)
        self._take([first], begun)

    def decode(self) -> None:
        """As many steps as the host need not look at what was drawn; then messages that have ended leave."""
        if not self.live:
            return
        sampler, live = self.sampler, len(self.live)
        # Tokens that the cache holds of each slot are this and the step's number.
        lengths = [len(self.prompts[i]) - came for i, came in zip(self.live, self.came)]
        longest, even = max(lengths), min(lengths) == max(lengths)  # if even without a mask: all is seen
        draws = []
        for _ in range(min(sampler.check_every, self.max_new_tokens - 1 - (self.step - min(self.came)))):
            start = longest + self.step
            sampler.cache.reserve(start + 1, start if even else None)
            uniform = self.uniforms[self.step % self.max_new_tokens, :live]
            draws.append(sampler.decode.next(self.last, uniform, self.temperature))
            self.last = draws[-1][0]
            self.step += 1
        self._take(draws, 0)

    def _take(self, draws: list[tuple[Tensor, Tensor]], start: int) -> None:
        """Add what the slots from `start` on have drawn; messages that have ended leave their slots."""
        tokens, logprobs = (_rows(torch.stack(x, 1)) for x in zip(*draws))  # (slots, steps)
        goes_on = [True] * start
        for slot, i in enumerate(self.live[start:], start):
            drawn = tokens[slot - start]
            self.tokens[i] += drawn
            self.logprobs[i] += logprobs[slot - start]
            full = self.step - self.came[slot] + 1 == self.max_new_tokens
            goes_on.append(not full and self.stops.isdisjoint(drawn))
            if not goes_on[slot]:
                self.written += len(self.tokens[i])
        count = goes_on.count(True)
        if count < len(goes_on):
            source = self.sampler._to_front(goes_on, count)[:count]
            self.live, self.came = [self.live[s] for s in source], [self.came[s] for s in source]
            index = torch.tensor(source, device=self.last.device, dtype=torch.long)
            self.last = self.last[index]
            self.uniforms[:, :count] = self.uniforms[:, index]


def _rows(x: Tensor) -> list[list]:
    """As `tolist`, which takes its time for each row."""
    flat, width = x.flatten().tolist(), x.shape[1]
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def _cut(tokens: list[int], logprobs: list[float], stops: set[int]) -> Completion:
    """The draws of one row, up to its first stop id."""
    end = next((t + 1 for t, token in enumerate(tokens) if token in stops), None)
    if not all(v > -math.inf for v in logprobs[:end]):  # also catches NaN
        raise FloatingPointError(
            "the model's output is not finite: its weights hold NaN, or the temperature is too low"
        )
    return Completion(tokens[:end], logprobs[:end], end is not None)
