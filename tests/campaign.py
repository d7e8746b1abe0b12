"""A campaign of random faults on toy runs: `python -m tests.campaign --seed S --minutes M`.

Each case harms one thing and calls the program as a person would. It must give the right result, or one
sentence and exit code 1 or 2, within 60 seconds of computing and its memory, and lose nothing: what was
stopped resumes to the bits of a run that nobody disturbed.

A case is a function of the seed, its kind and its number: `--only killed:7` repeats one. `--long` goes on
until there were 100 kills, 2,000 damaged files and 1,000 texts; `--cases killed=5,hostile_texts=20` counts
otherwise. Ctrl-C, or SIGTERM, ends it early; the table is printed all the same.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}  # nobody listens there
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TEAMTR_KERNELS", "torch")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  which the first optimizer step would import
from campaign_cases import LONG, SECONDS, SHARES, Fault, Place, computed, mounts  # noqa: E402
from tqdm import tqdm  # noqa: E402

MEMORY = 3 << 30  # bytes of address space that a case may take beyond what its process begins with
SILENCE_SECONDS = 900  # on the clock, until a case counts as hung: a busy machine may starve it for long
SECONDS_BETWEEN_LINES = 600  # of progress, where there is no terminal
KINDS = {case.__name__: case for case in SHARES}


class Tally:
    """What became of the cases, and a bar where somebody watches."""

    def __init__(self, seed: int, expected: int | None):
        self.seed, self.failures = seed, []
        self.counts = {name: collections.Counter() for name in KINDS}
        self.seconds = collections.Counter()
        self.bar, self.spoke = tqdm(total=expected, unit="case", disable=None), time.monotonic()

    def add(self, kind: str, number: int, outcome: str, seconds: float, why: str) -> None:
        self.counts[kind][outcome] += 1
        self.seconds[kind] += seconds
        if outcome == "failed":
            self.failures.append(f"{kind}:{number}: {why}")
            tqdm.write(self.failures[-1], file=sys.stderr)
        self.bar.set_postfix_str(f"{kind}, {len(self.failures)} failed", refresh=False)
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.spoke > SECONDS_BETWEEN_LINES:
            self.spoke = time.monotonic()
            print(self.last_line, file=sys.stderr, flush=True)

    @property
    def last_line(self) -> str:
        return (
            f"seed {self.seed}: {self.total:,} cases, {len(self.failures)} failed, "
            f"{self.seconds.total():,.0f} CPU seconds"
        )

    @property
    def total(self) -> int:
        return sum(count.total() for count in self.counts.values())

    def table(self) -> str:
        lines = ["| case | cases | right | refused in one sentence | failed | CPU seconds |"]
        lines.append("|---|---|---|---|---|---|")
        for kind, count in self.counts.items():
            numbers = (count.total(), count["right"], count["refused"], count["failed"])
            if count:
                shown = " | ".join(f"{number:,}" for number in numbers)
                lines.append(f"| {kind.replace('_', ' ')} | {shown} | {self.seconds[kind]:,.0f} |")
        return "\n".join([*lines, "", self.last_line])


def series(kind: str, numbers: list[int], seed: int, folder: Path, until: float, report: int) -> None:
    """In a child: some cases, each of which reports its beginning and its end."""
    for number, name in ((0, os.devnull), (1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_RDWR), number)
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for number in numbers:
        if time.monotonic() > until:
            return
        begin, why, outcome = computed(), "", "failed"
        resource.setrlimit(resource.RLIMIT_CPU, (int(begin) + SECONDS + 1, hard))
        place = folder / f"{kind}-{number}"
        place.mkdir()
        tell(report, number=number)
        try:
            outcome = KINDS[kind](Place(place, random.Random(f"{seed} {kind} {number}"), folder))
        except Fault as fault:
            why = str(fault)
        except Exception:  # of the campaign itself
            why = traceback.format_exc()[-1000:]
        tell(report, number=number, outcome=outcome, seconds=computed() - begin, why=why)
        shutil.rmtree(place, ignore_errors=True)


def tell(report: int, **what) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


def run_series(kind: str, numbers: list[int], tally: Tally, folder: Path, until: float) -> None:
    """The cases, in as many children as it takes: one that dies takes its case along, not the others."""
    while numbers and time.monotonic() < until:
        reports, report = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setpgid(0, 0)  # not a session of its own, which would be scheduled by itself
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                series(kind, numbers, tally.seed, folder, until, report)
                os._exit(0)
            os._exit(1)
        os.close(report)
        begun, silent, pending = None, False, b""
        try:
            while not silent:
                silent = not select.select([reports], [], [], SILENCE_SECONDS)[0]
                piece = b"" if silent else os.read(reports, 1 << 16)
                if not piece:
                    break
                *lines, pending = (pending + piece).split(b"\n")
                for told in map(json.loads, lines):
                    begun = told["number"]
                    if "outcome" in told:
                        tally.add(kind, begun, told["outcome"], told["seconds"], told["why"])
                        numbers, begun = [number for number in numbers if number != begun], None
        finally:
            os.close(reports)
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    end(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
        if begun is None and (status == 0 or not numbers):
            return
        victim = numbers[0] if begun is None else begun
        ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
        why = f"no sign of life for {SILENCE_SECONDS} s" if silent else f"its process ended by {ended}"
        tally.add(kind, victim, "failed", used.ru_utime + used.ru_stime, why)
        numbers = [number for number in numbers if number != victim]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="how long; 2 where nothing is counted")
    parser.add_argument("--long", action="store_true", help="100 kills, 2,000 damaged files, 1,000 texts")
    parser.add_argument("--cases", help="so many of each kind: killed=5,hostile_texts=20")
    parser.add_argument("--only", help="one case, as its failure is printed: KIND:NUMBER")
    args = parser.parse_args()
    wanted = {kind.__name__: count for kind, count in LONG.items()} if args.long else {}
    for word in args.cases.split(",") if args.cases else []:
        kind, _, count = word.partition("=")
        wanted[kind] = int(count)
    first = collections.Counter()
    if args.only:
        kind, _, number = args.only.partition(":")
        if not number.isdigit():
            parser.error(f"--only is KIND:NUMBER, not {args.only}")
        wanted, first[kind] = {kind: 1}, int(number)
    if unknown := wanted.keys() - KINDS.keys():
        parser.error(f"no kind {', '.join(unknown)}; there is: {', '.join(KINDS)}")
    until = time.monotonic() + 60 * (args.minutes or (math.inf if wanted else 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk that is quick to write to
    tqdm.monitor_interval = 0  # no thread: this process forks
    tally = Tally(args.seed, sum(wanted.values()) or None)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        os.chdir(folder)  # results of evaluations are kept there
        if not mounts():
            print("read_only_disk is left out: this system lets a process have no disk of its own")
            wanted.pop("read_only_disk", None)
            SHARES.pop(KINDS.pop("read_only_disk"))
        try:
            while time.monotonic() < until:
                for kind, share in SHARES.items():
                    name = kind.__name__
                    done = tally.counts[name].total()
                    count = min(share, wanted.get(name, 0) - done) if wanted else share
                    numbers = [first[name] + done + i for i in range(count)]
                    run_series(name, numbers, tally, Path(folder), until)
                if wanted and tally.total >= sum(wanted.values()):
                    break
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
    tally.bar.close()
    print(tally.table())
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
