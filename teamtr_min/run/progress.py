"""A bar for each phase that lasts: what is done, tokens a second, time left.

A thread of its own draws it. So the work only counts: between two decode steps no clock, terminal or device
is asked anything, and the bar lives on through a long forward pass. It shows nothing in the first second,
leaves nothing behind, and where stderr is no terminal there is no thread at all.
"""

import sys
import threading

from tqdm import tqdm

PATIENCE_SECONDS, PERIOD_SECONDS = 1.0, 0.2  # before it is shown; between two drawings


class Bar:
    """`total` steps of a phase, shown while the context lasts; outside of it counting does no more.

    A bar that is begun below another, as within a run, takes the line under it.
    """

    def __init__(self, label: str, total: float, unit: str):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.tokens = 0.0, 0
        self._thread = None

    def advance(self, steps: float = 1, tokens: int = 0) -> None:
        self.done += steps
        self.tokens += tokens

    def expect(self, steps: float) -> None:
        """So many more are certain, whatever the total said."""
        self.total = max(self.total, self.done + steps)

    def count(self) -> str:
        return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"

    def __enter__(self):
        if sys.stderr and sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._tqdm = tqdm(
                total=self.total, desc=self.label, bar_format=form, delay=PATIENCE_SECONDS, leave=False,
                miniters=0, smoothing=0, dynamic_ncols=True,
            )  # fmt: skip
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread:
            self._ended.set()
            self._thread.join()
            self._tqdm.close()
            self._thread = None

    def _draw(self) -> None:
        wait_seconds = PATIENCE_SECONDS
        while not self._ended.wait(wait_seconds):
            wait_seconds = PERIOD_SECONDS
            done, note = min(self.done, self.total), self.count()
            if self.tokens:
                note += f", {self.tokens / self._tqdm.format_dict['elapsed']:,.0f} tokens/s"
            self._tqdm.total = self.total
            self._tqdm.set_postfix_str(note, refresh=False)
            self._tqdm.update(done - self._tqdm.n)


class SamplingBar(Bar):
    """A collection: as far as its messages are, with the number of rollouts that are complete.

    Of a message that is still being written the share of the longest length counts. So the time left is the
    most that it can be if the rest goes on as fast.
    """

    def __init__(self, label: str, rollouts: int, messages: int):
        super().__init__(label, messages, "rollouts")
        self.rollouts, self.complete = rollouts, 0

    def count(self) -> str:
        return f"{self.complete:,}/{self.rollouts:,} {self.unit}"

    def begin(self, rows: int, last_turn: bool) -> None:
        """`rows` messages are about to be written; each of a last turn completes a rollout."""
        self._begun = self.done, self.complete, self.tokens, rows, last_turn

    def step(self, written: int, under_way: float, tokens: int) -> None:
        """What `Sampler.generate` tells: messages that are written, others as a share, tokens in all."""
        done, complete, before, _, last_turn = self._begun
        self.done, self.complete = done + written + under_way, complete + written * last_turn
        self.tokens = before + tokens

    def end(self, tokens: int) -> None:
        """The messages are written, in so many tokens."""
        done, complete, before, rows, last_turn = self._begun
        self.done, self.complete, self.tokens = done + rows, complete + rows * last_turn, before + tokens
