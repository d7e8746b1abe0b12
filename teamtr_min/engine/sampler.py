"""KV-cached, batched sampling from one model. A `Sampler` is handed whole sequences turn by turn, and only
computes what its cache does not hold yet. Each token takes one uniform that is a function of the row's key
and the position alone (rng.py), so a message does not depend on the rest of its batch."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.decode import draw
from teamtr_min.engine import half, rng
from teamtr_min.engine.cache import KVCache, Step
from teamtr_min.engine.decode import Decode
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.packing import batches_of, pack, trees_of
from teamtr_min.files import UserError

PREFILL_TOKENS = 16384  # padded, in one forward pass over prompts
PREFILL_TREE = 512  # tokens of a prefix tree of prompts: attention looks at every pair of them


@dataclass(frozen=True)
class Completion:
    tokens: list[int]  # ends with a stop id exactly when `stopped`
    logprobs: list[float]  # of each token, at the sampling temperature (greedy: at temperature 1)
    stopped: bool


def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int,
    temperature: float = 1.0, seed: int = 0, stop_ids: Collection[int] = (),
) -> list[Completion]:  # fmt: skip
    """Continue every prompt; temperature 0 is greedy. A completion depends on the model, the seed, its prompt
    and how often that prompt stood in the list before, not on the rest of the batch."""
    times = defaultdict(itertools.count)  # that a prompt stood before
    keys = [rng.key(seed, "generate", next(times[tuple(ids)]), *ids) for ids in prompts]
    sampler = Sampler(model)
    sampler.start(len(prompts))
    return sampler.generate(range(len(prompts)), prompts, keys, max_new_tokens, temperature, stop_ids)


class Sampler:
    """`start` begins a collection of some rows, a sequence each; `generate` lets some of them grow; `finish`
    ends it. Rows that grow have the first places of the cache: one that ends swaps places with the last."""

    def __init__(self, model: Transformer):
        self.model, self.prefill_tokens = model, PREFILL_TOKENS
        self.check_every = 16 if model.device.type == "cuda" else 1  # steps until the host waits for results
        self.cache: KVCache | None = None
        self.decode: Decode | None = None
        self.row_at = self.held = torch.empty(0, dtype=torch.long)

    def start(self, rows: int) -> None:
        half.prepare(self.model)
        if self.cache is None or len(self.cache.length) < rows:
            self.release()  # before more is asked for
            self.cache = KVCache(self.model, rows)
            self.decode = Decode(self.model, self.cache)
        self.cache.length.zero_()
        self.row_at = torch.arange(rows)  # (rows,) which row each place of the cache holds
        self.held = torch.zeros(rows, dtype=torch.long)  # (rows,) tokens of each row in the cache

    def finish(self) -> None:
        if self.decode is None or not self.decode.graphs:  # which, with their cache, serve the next one too
            self.release()

    def release(self) -> None:
        self.cache = self.decode = None

    @torch.inference_mode()
    def generate(
        self, rows: Sequence[int], prompts: list[list[int]], keys: list[int],
        max_new_tokens: int, temperature: float, stop_ids: Collection[int],
        progress: Callable[[int], None] = lambda messages: None,
        listen: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Continue `prompts[i]`, which row `rows[i]` has grown into, until a stop id or the length limit.
        `progress` is told how many more messages are written, `listen` each (row, token). Raises UserError
        where a sequence is too long, ValueError for a prompt that adds nothing, a temperature below 0 or an
        unknown stop id, FloatingPointError for NaN."""
        vocabulary = range(self.model.config.vocab_size)
        if not 0 <= temperature < math.inf or not all(i in vocabulary for i in stop_ids):
            raise ValueError("a temperature is at least 0 and finite, a stop id is one of the vocabulary")
        if not len(rows) or max_new_tokens < 1:
            return [Completion([], [], False) for _ in rows]
        device, count, rows = self.model.device, len(rows), torch.tensor(rows)
        lengths = torch.tensor([len(ids) for ids in prompts])  # (B,)
        if not (lengths > self.held[rows]).all():
            raise ValueError("a prompt adds no token to what the cache holds of its row")
        shortest, longest = map(int, lengths.aminmax())
        reach, most = longest + max_new_tokens, self.model.config.max_positions
        if reach > most:
            raise UserError(f"a transcript could reach {reach} tokens; the model has {most} positions")
        self.cache.reserve(max(reach, int(self.held.max()) + 1))  # at once: graphs find it in its place
        self._to_front(torch.isin(self.row_at, rows))
        message_of = torch.empty_like(self.row_at)
        message_of[rows] = torch.arange(count)
        live = message_of[self.row_at[:count]]  # place -> number of the message that is written there
        is_stop = torch.zeros(len(vocabulary), dtype=torch.bool, device=device)
        is_stop[list(stop_ids)] = True
        uniforms = rng.uniforms(keys, max_new_tokens, device).t()  # (max_new_tokens, B)
        tokens = torch.zeros(max_new_tokens, count, dtype=torch.long, device=device)
        logprobs = torch.zeros(max_new_tokens, count, device=device)

        # 1. Prefill: what the cache lacks of each prompt.
        hidden = self._prefill([prompts[i] for i in live.tolist()])  # (B, H)
        index, ended = live.to(device), torch.zeros(count, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            uniform = uniforms[t].index_select(0, index)
            if t == 0:  # 2. The first token of each message.
                token, logprob = draw(self.model.logits(hidden), uniform, temperature)
            else:  # 3. Decode: feed the last token, draw the next.
                span, even = longest + t, shortest == longest
                token, logprob = self.decode.next(token, uniform, temperature, span, even)
            tokens[t].index_copy_(0, index, token)
            logprobs[t].index_copy_(0, index, logprob)
            for drawn in zip(self.row_at.tolist(), token.tolist()) if listen else ():
                listen(*drawn)
            ended |= is_stop[token]
            if (listen or (t + 1) % self.check_every == 0) and ended.any():  # 4. What has ended leaves.
                goes_on = ~ended.cpu()
                order = self._to_front(goes_on)[: int(goes_on.sum())]
                progress(len(live) - len(order))
                live, index = live[order], index[order.to(device)]
                token, ended = token[order.to(device)], ended[order.to(device)]
                if not len(live):
                    break
                shortest, longest = map(int, lengths[live].aminmax())
        progress(len(live))

        # 5. Cut each message behind its first stop id.
        completions, stops = [], set(stop_ids)
        for ids, values in zip(tokens.t().tolist(), logprobs.t().tolist()):
            end = next((t for t, token in enumerate(ids) if token in stops), None)
            size = max_new_tokens if end is None else end + 1
            completions.append(Completion(ids[:size], values[:size], end is not None))
        if not all(math.isfinite(sum(c.logprobs)) for c in completions):
            raise FloatingPointError("the model's output is not finite: NaN, or the temperature is too low")
        written = torch.tensor([len(c.tokens) for c in completions])
        self.held[rows] = lengths + written - 1  # the last token of a message was drawn, not fed
        self.cache.length[: len(self.row_at)] = self.held[self.row_at].to(device)
        return completions

    def _to_front(self, wanted: Tensor) -> Tensor:
        """Let the wanted ones of the first places come first, by swapping. Returns the old place of each."""
        count, order = int(wanted.sum()), torch.arange(len(wanted))
        holes, fillers = (~wanted[:count]).nonzero()[:, 0], wanted[count:].nonzero()[:, 0] + count
        if len(holes):
            to, source = torch.cat([holes, fillers]), torch.cat([fillers, holes])
            order[to] = source
            self.row_at[: len(wanted)] = self.row_at[order]
            self.cache.permute(to.to(self.model.device), source.to(self.model.device))
        return order

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        """Feed what the cache lacks of each place's prompt; hidden states (B, H) after the last tokens."""
        model, cache, device = self.model, self.cache, self.model.device
        last = torch.empty(len(prompts), model.config.hidden_size, device=device, dtype=model.dtype)
        held = self.held[self.row_at[: len(prompts)]].tolist()

        # New rows as prefix trees: what prompts have in common is computed once.
        new, cost = [(p, ids) for p, ids in enumerate(prompts) if not held[p]], model.config.pairs_per_token
        trees = trees_of(new, min(self.prefill_tokens, PREFILL_TREE), cost)
        for batch in batches_of(trees, self.prefill_tokens, cost, device):
            packed = pack(batch, device)
            places = [(p, t) for p, path in packed.paths.items() for t in path]
            rows, source = torch.tensor(places, device=device).t()
            ends = torch.tensor([path[-1] for path in packed.paths.values()], device=device)
            step = Step.trees(packed.positions, packed.end, model.dtype)
            step.keep(cache, rows, packed.positions.flatten()[source], source)
            last[list(packed.paths)] = model.hidden(packed.tokens, step, ends)

        # Rows that go on, padded to the longest rest of a pass. The longest come first: memory peaks at once.
        rests = sorted(((len(ids) - held[p], p) for p, ids in enumerate(prompts) if held[p]), reverse=True)
        while rests:
            width = rests[0][0]
            group = rests[: max(1, self.prefill_tokens // width)]
            rests = rests[len(group) :]
            padded = [prompts[p][held[p] :] + [0] * (width - n) for n, p in group]
            ends = torch.tensor([b * width + n - 1 for b, (n, _) in enumerate(group)], device=device)
            starts = [held[p] for _, p in group]
            rows = torch.tensor([p for _, p in group], device=device)
            step = Step.after(cache, rows, width, max(starts) + width, even=min(starts) == max(starts))
            last[rows] = model.hidden(torch.tensor(padded, device=device), step, ends)
        cache.length[: len(prompts)] = torch.tensor([len(ids) for ids in prompts], device=device)
        return last
