"""KV-cached, batched decoding of one model over many sequences of different lengths.

A `Sampler` keeps its cache from turn to turn: it is handed whole sequences and computes only what it has not
yet seen. Live rows occupy the first slots of the cache, so every decode step works on a plain slice; a row
that has finished trades places with the last live one and leaves the batch. Each token takes one uniform that
is a function of the row's key and the position alone (rng.py), so a message does not depend on its
neighbours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teamtr_min import rng
from teamtr_min.decode import Decode
from teamtr_min.files import UserError
from teamtr_min.model import KVCache, PrefillStep, Transformer
from teamtr_min.packing import pack, rows_of, trees_of

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


def sample_token(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution, and its log-prob.

    logits (B, V) fp32, uniform (B,) in [0, 1) -> tokens (B,) int64, logprobs (B,) fp32. Temperature 0: the
    argmax.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    p = logits.softmax(-1)  # (B, V)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # (B, 1)
    else:
        cumulative = p.cumsum(-1)  # (B, V)
        target = uniform[:, None] * cumulative[:, -1:]  # rounding leaves the last entry near 1, not at it
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()


def sample_token_reference(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What `sample_token` computes, one row and one token at a time, in float64."""
    tokens, logprobs = [], []
    for row, u in zip(logits.double(), uniform.double()):
        logp = (row / (temperature or 1.0)).log_softmax(0)  # (V,)
        token = int(row.argmax())
        if temperature != 0:
            token = next(v for v in range(len(row)) if u < logp[: v + 1].exp().sum() or v + 1 == len(row))
        tokens.append(token)
        logprobs.append(logp[token])
    return torch.tensor(tokens), torch.stack(logprobs).float()


class Sampler:
    """`rows` sequences and their cache. Each of the caller's rows lives in some slot: `row_at[slot]`."""

    def __init__(self, model: Transformer, rows: int):
        self.model = model
        self.cache = KVCache(model.config, rows, 0, model.device, model.dtype)
        self.decode = Decode(model, self.cache)
        self.row_at = list(range(rows))
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
        progress: Callable[[int, int], None] | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> list[Completion]:
        """Continue `prompts[i]`, which row `rows[i]` has grown into, until a stop id or the length limit.

        Each prompt must extend what the row's cache holds; only the rest of it is computed. `progress` is
        told now and then how many steps are done and how many rows go on. Raises FloatingPointError when the
        model's output is not finite.
        """
        if not len(rows) or max_new_tokens < 1:
            return [Completion([], [], False) for _ in rows]
        for row, ids in zip(rows, prompts):
            if len(ids) <= self.cached[row]:
                raise ValueError(
                    f"row {row} holds {self.cached[row]} tokens; a prompt of {len(ids)} adds none"
                )
        longest, most = max(map(len, prompts)), self.model.config.max_positions
        if longest + max_new_tokens > most:
            raise UserError(
                f"a transcript of {longest} tokens and a message of up to {max_new_tokens} exceed the {most} "
                "positions of the model; lower --max-new-tokens or --rounds"
            )
        device, live = self.model.device, len(rows)
        index_of = {row: i for i, row in enumerate(rows)}
        wanted = [row in index_of for row in self.row_at]
        self._to_front(wanted, live)
        request = [index_of[row] for row in self.row_at[:live]]  # slot -> i

        # (max_new_tokens, live): a row for each step, a column for each slot
        uniforms = rng.uniforms([keys[i] for i in request], max_new_tokens, device).t().contiguous()
        stops, fresh = set(stop_ids), []
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        # All at once, so that graphs find it in its place: with room behind what any row holds.
        self.cache.reserve(max(longest + max_new_tokens, max(self.cached) + 1))
        logits = self._prefill([prompts[i] for i in request], prefill_tokens)  # (live, V)
        token, logprob = sample_token(logits, uniforms[0], temperature)  # (live,)
        for step in range(max_new_tokens):
            fresh.append((token, logprob))
            last = step + 1 == max_new_tokens
            if last or len(fresh) == self.check_every:  # only now does the host wait for the device
                drawn, logps = (_rows(torch.stack(x, 1)) for x in zip(*fresh))  # (live, steps)
                fresh = []
                for slot, i in enumerate(request):
                    tokens[i] += drawn[slot]
                    logprobs[i] += logps[slot]
                goes_on = [stops.isdisjoint(ids) for ids in drawn]
                live = goes_on.count(True)
                if last or live == 0:
                    break
                if live < len(goes_on):
                    source = self._to_front(goes_on, live)[:live]
                    request = [request[slot] for slot in source]
                    index = torch.tensor(source, device=device)
                    token, uniforms = token[index], uniforms[:, index]
                if progress:
                    progress(step + 1, live)
            lengths = {len(prompts[i]) for i in request}
            start = lengths.pop() + step if len(lengths) == 1 else None  # without a mask all in sight is seen
            self.cache.reserve(longest + step + 1 if start is None else start + 1, start)
            token, logprob = self.decode.next(token, uniforms[step + 1], temperature, sample_token)

        completions = [_cut(*drawn, stops) for drawn in zip(tokens, logprobs)]
        for i, row in enumerate(rows):  # the last token of a message was sampled, not fed
            self.cached[row] = len(prompts[i]) + len(completions[i].tokens) - 1
        self.cache.length.copy_(torch.tensor([self.cached[row] for row in self.row_at]))
        return completions

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

    def _prefill(self, sequences: list[list[int]], budget: int) -> Tensor:
        """Feed what the cache lacks of each slot's sequence; logits (B, V) after the last token.

        A forward pass has at most `budget` tokens, padding included.
        """
        H, device = self.model.config.hidden_size, self.model.device
        last = torch.empty(len(sequences), H, device=device, dtype=self.model.dtype)
        known = [self.cached[row] > 0 for row in self.row_at[: len(sequences)]]
        self.cache.reserve(max(map(len, sequences)))
        self._begin([slot for slot, held in enumerate(known) if not held], sequences, budget, last)
        self._go_on([slot for slot, held in enumerate(known) if held], sequences, budget, last)
        return self.model.logits(last)

    def _begin(self, slots: list[int], sequences: list[list[int]], budget: int, last: Tensor) -> None:
        """Slots with an empty cache, as prefix trees: what their sequences have in common, such as the system
        prompt, a problem and what teammates said alike, is computed once."""
        device, pairs_per_token = self.model.device, self.model.config.pairs_per_token
        new = [(slot, sequences[slot]) for slot in slots]
        trees = trees_of(new, min(budget, PREFILL_TREE), pairs_per_token)
        for rows in rows_of(trees, budget, device):
            packed = pack(rows, device)
            source = torch.tensor([t for path in packed.paths.values() for t in path], device=device)
            to = torch.tensor([slot for slot, path in packed.paths.items() for _ in path], device=device)
            where = torch.tensor([path[-1] for path in packed.paths.values()], device=device)
            step = PrefillStep(packed.positions, packed.end, where, self.model.dtype, self.cache, source, to)
            done = torch.tensor(list(packed.paths), device=device)
            last[done] = self.model.hidden(packed.tokens, packed=step)  # (slots, H)
            self.cache.length[done] = packed.positions.flatten()[where] + 1

    def _go_on(self, slots: list[int], sequences: list[list[int]], budget: int, last: Tensor) -> None:
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
