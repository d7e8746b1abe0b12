"""Bars: what a person sees at a terminal of some width, that it counts right, and that pipes see nothing."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from tiny import random_model, random_tokens
from toy_runs import TOY, prepared

from teamtr_min import rng, rollout
from teamtr_min.config import Config
from teamtr_min.progress import Bar, SamplingBar
from teamtr_min.rollout import Prefix, collect
from teamtr_min.sampler import Sampler
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team

ROOT = Path(__file__).resolve().parents[1]
IMPATIENT = """
import time, teamtr_min.progress as progress
progress.PATIENCE_SECONDS, progress.PERIOD_SECONDS = 0.0, 0.01
leave = progress.Bar.__exit__
progress.Bar.__exit__ = lambda *given: (time.sleep(0.1), leave(*given))  # a phase that lasts
"""


class Screen:
    """The few controls that bars use: carriage return, line feed, one line up; long lines wrap."""

    def __init__(self, columns: int):
        self.columns, self.lines, self.y, self.x = columns, [""], 0, 0

    def write(self, text: str) -> None:
        for piece in re.findall(r"\x1b\[A|.", text, flags=re.DOTALL):
            if piece == "\x1b[A":
                self.y -= 1
            elif piece == "\r":
                self.x = 0
            elif piece == "\n":
                self.y += 1
            else:
                assert piece.isprintable(), repr(piece)
                if self.x == self.columns:
                    self.y, self.x = self.y + 1, 0
                self._extend()
                line = self.lines[self.y].ljust(self.x)
                self.lines[self.y] = line[: self.x] + piece + line[self.x + 1 :]
                self.x += 1
            self._extend()

    def _extend(self) -> None:
        self.lines += [""] * (self.y + 1 - len(self.lines))

    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


def at_a_terminal(program: str, columns: int) -> tuple[list[list[str]], list[str]]:
    """What the screen shows before each return to a line's start, and in the end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    screen, frames, rest = Screen(columns), [], b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # how a terminal ends on Linux
            data = b""
        if not data:
            break
        rest += data
        *pieces, rest = rest.split(b"\r")
        for piece in pieces:
            screen.write(piece.decode())
            frames.append(screen.shown())
            screen.write("\r")
    screen.write(rest.decode())
    os.close(master)
    assert child.wait() == 0, screen.shown()
    return frames, screen.shown()


def settled(lines: list[str]) -> list[str]:
    """Without what differs from one run to the next: its directory, seconds and memory."""
    text = re.sub(r"\S*/run\d\S*", "RUN", "".join(lines))
    text = re.sub(r" +\d+ s", " S", text).replace(" ", "")
    return re.sub(r"memorypeak[\d.]+.iBof[\d.]+.iB(planned)?", "", text[text.index("taskrelay") :])


def toy_run(out: Path) -> str:
    return IMPATIENT + f"import train; train.main({[*TOY, '--stages', '1', '--out', str(out)]!r})"


@pytest.fixture(scope="module")
def piped(tmp_path_factory) -> str:
    """What the toy run prints where there is no terminal."""
    command = [sys.executable, "-c", toy_run(tmp_path_factory.mktemp("piped") / "run1")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "\r" not in done.stdout and "%|" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_each_phase_of_a_run_has_its_bar_below_the_runs_and_nothing_stays(tmp_path, piped, columns):
    frames, end = at_a_terminal(toy_run(tmp_path / "run2"), columns)
    for label, count in (("sampling", "rollouts"), ("evaluating", "rollouts"), ("training", "batches")):
        pattern = rf"{label} +\d+%\|.*\| \d\d:\d\d<(\d\d:\d\d|\?), [\d,]+/[\d,]+ {count}"
        shown = [line for frame in frames for line in frame if re.match(pattern, line)]
        assert shown and all(len(line) <= columns for line in shown), label
    below = [
        f for f in frames if len(f) > 1 and re.search("^(sampling|training)", f[-1]) and "update" in f[-2]
    ]
    assert below, "the run's own bar stands above"
    assert any("tokens/s" in f[-1] for f in below)
    assert settled(end) == settled(piped.splitlines())


def test_a_bar_waits_a_second_and_leaves_the_line_as_it_was():
    program = """
import time
from teamtr_min.progress import Bar
for seconds in (0.3, 1.6):
    with Bar("counting", 4, "sheep") as bar:
        bar.advance(3, tokens=7000)
        time.sleep(seconds)
    print("slept", seconds)
"""
    frames, end = at_a_terminal(program, 60)
    assert end == ["slept 0.3", "slept 1.6"]
    lines = [line for frame in frames for line in frame if "counting" in line]
    pattern = r"counting  75%\|█+.*\| 00:01<00:00, 3/4 sheep, [4-7],\d{3} tokens/s$"
    assert lines and re.match(pattern, lines[0]), lines[:1]
    assert not any("counting" in line for frame in frames for line in frame if "slept 0.3" not in frame)


class Recorded(SamplingBar):
    made: list = []

    def __enter__(self):
        self.seen = []
        self.made.append(self)
        return super().__enter__()

    def step(self, *told):
        super().step(*told)
        self.seen.append((self.done, self.complete, self.tokens))


@pytest.mark.parametrize(
    "knobs", [{}, {"batch_rows": 5}, {"rounds": 2, "batch_rows": 5}, {"router": "random", "batch_rows": 7}]
)
def test_a_collection_counts_every_message_rollout_and_token(monkeypatch, knobs):
    monkeypatch.setattr(rollout, "SamplingBar", Recorded)
    config = Config(agents=2, problems=4, device="cpu", **knobs)
    task = Relay(config)
    team = load_team(config, task.roles(2))
    problems = task.sample_problems(4, rng.generator(0, "problems"))
    first = collect(team, task, problems, 3, rng.RngPath(0, "train"))
    prefixes = [Prefix(messages[: r % 2]) for r, messages in enumerate(first.messages)]
    again = collect(team, task, problems, 3, rng.RngPath(0, "train"), prefixes)
    for rollouts, bar in zip((first, again), Recorded.made[-2:]):
        written = sum(map(len, rollouts.messages)) - sum(rollouts.reused)
        assert bar.done == pytest.approx(bar.total) and bar.total == written
        assert bar.complete == bar.rollouts == 12 and bar.tokens == rollouts.tokens_sampled
        assert bar.seen == sorted(bar.seen) and len(set(bar.seen)) > 3


@pytest.mark.parametrize("slots", [6, 4])
def test_the_sampler_reports_only_where_it_looks_at_the_device_anyway(slots):
    model = random_model("qwen2")
    prompts, calls = random_tokens(model, 6, 4).tolist(), []
    for every in (1, 3):
        sampler = Sampler(model, 6, slots)
        sampler.check_every = every
        done = sampler.generate(
            range(6), prompts, list(range(6)), 8, 1.0, range(5), lambda *at: calls.append(at)
        )
        lengths = [len(c.tokens) for c in done]
        assert calls and len(set(lengths)) > 1
        assert len(calls) >= (max(lengths) - 1) // every and calls == sorted(calls)
        assert calls[-1][:2] == (6, 0.0) and calls[-1][2] >= sum(lengths)
        for n, (written, under_way, _) in enumerate(calls, 1):
            if slots == 6:
                gone = [c.stopped and len(c.tokens) <= 1 + every * n or 1 + every * n >= 8 for c in done]
                assert (written, under_way) == (sum(gone), gone.count(False) * (1 + every * n) / 8)
        calls.clear()


def test_an_update_counts_its_passes_and_never_more_than_it_expects():
    for lr in (1e-4, 5e-3):  # the second goes back by halves
        ready = prepared(batch_tokens=200, inner_steps=3)
        bar = ready.learner.bar = Bar("training", len(ready.batches) * 4, "batches")
        outcome = ready.update(lr)
        assert bar.done == len(ready.batches) * (outcome.steps + 1 + outcome.halvings) <= bar.total
        trained = sum(len(batch.pair) for batch in ready.batches)
        assert bar.tokens * len(ready.batches) == trained * bar.done
    assert outcome.halvings


def test_counting_beyond_the_total_moves_it():
    bar = Bar("training", 3, "batches")
    bar.advance(2)
    bar.expect(5)
    assert bar.total == 7 and bar.count() == "2/7 batches"


def test_what_is_only_looked_at_takes_little_memory():
    """The same numbers, 4 bytes each, in a compact collection."""
    config = Config(agents=2, problems=3, device="cpu")
    task = Relay(config)
    team = load_team(config, task.roles(2))
    problems = task.sample_problems(3, rng.generator(0, "problems"))
    plain, compact = (
        collect(team, task, problems, 2, rng.RngPath(0, "eval"), compact=compact) for compact in (False, True)
    )
    assert torch.equal(plain.returns, compact.returns)
    for a, b in zip(sum(plain.messages, []), sum(compact.messages, [])):
        assert (a.tokens, a.logprobs) == (list(b.tokens), list(b.logprobs)) and a.text == b.text
        assert b.tokens.itemsize == b.logprobs.itemsize == 4 and list(b.content) == a.content
