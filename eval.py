"""How often a team is right, what it says, how fast the code is, and what a run did.

python eval.py relay                    the newest run under runs/, or without one the untrained team
python eval.py relay --team runs/NAME --k 8     a run by name; eight rollouts per problem
python eval.py gsm8k math500 --team runs/A,runs/B   each on each, in one table
python eval.py relay --mode solo        one agent taking every turn
python eval.py relay --mode vote --k 8  the answer that most of eight rollouts give
python eval.py mine.py --samples F      your task; every transcript and its return go to F, as JSONL
python eval.py jsonl --model DIR --data FILE    your own word problems
python eval.py ask "7+8*3-4"            a team answers; without a question at a prompt, with --web on a page
python eval.py report --team runs/NAME  figures, and a page with the transcripts; RUN,RUN: side by side
python eval.py kernels sampling training    how fast, beside other libraries and the machine's limits
python eval.py gpu                      these three on a GPU
python eval.py occupancy --short        what fresh rollouts and the radius are worth; in full it takes hours
torchrun --nproc-per-node 8 eval.py gsm8k --team runs/NAME      the same by eight processes, a GPU each

With a run, its own values are the defaults of the flags from --model on.
"""

import gc
import itertools
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from teamtr_min.bench import accuracy, ask, report, speed
from teamtr_min.config import Parser, add_flags, split_names
from teamtr_min.engine.distributed import Ranks
from teamtr_min.files import UserError, to_json
from teamtr_min.run import log
from teamtr_min.studies import occupancy
from teamtr_min.tasks import LISTED, TASKS

OTHERS = (*speed.BENCHMARKS, "gpu", "occupancy", "report")  # benchmarks that are no task
KNOWN = ", ".join([LISTED, *OTHERS])
TEAM_FLAGS = """model agents rounds router roles tools fields drop_long show_prompts temperature
    max_new_tokens seed device dtype batch_rows""".split()
READ_BY = {  # what reads which flags; --json has an effect on all
    "task": "team mode k seeds problems data shots samples".split() + TEAM_FLAGS,
    "ask": """team k web port model agents rounds router roles tools temperature max_new_tokens seed device
        dtype""".split(),
    "report": ["team", "out", "csv"], "occupancy": ["out", "short", "jobs"],
    **dict.fromkeys([*speed.BENCHMARKS, "gpu"], ["short", "model", "device", "dtype"]),
}  # fmt: skip
Results = Iterator[tuple[dict, str]]  # what --json prints, and the same for people


def main(argv: list[str] | None = None) -> int:
    def work(ranks: Ranks) -> None:
        args, flags = parse(argv)
        for result, text in results(args, flags, ranks):
            if ranks.first:
                print(to_json(result) if args.json else text, flush=True)

    return log.program(work)


def parse(argv: list[str] | None) -> tuple[Namespace, dict]:
    """All flags, and those of them that are fields of Config. Raises UserError for what cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    names = f"{KNOWN}, FILE.py with a task, or ask and a question (default: the task of the run)"
    modes = "; ".join(f"{name}: {what}" for name, what in accuracy.MODES.items())
    add("benchmarks", nargs="*", metavar="benchmark", help=names)
    add("--team", default="", help="a run, or RUN,RUN,... (default: the newest under runs/)")
    add("--mode", choices=accuracy.MODES, default="team", help=f"{modes} (default team)")
    add("--k", type=int, default=1, help="rollouts per problem and seed: avg@k, pass@k (default 1)")
    add("--seeds", type=int, default=1, help="repeat with so many seeds from --seed on (default 1)")
    add("--problems", "--limit", type=int, help="held-out problems (default 2048; of a --data file all)")
    add("--data", help="JSONL of problems to take instead of the held-out ones")
    add("--shots", type=int, default=0, help="training problems with their answers before each problem")
    add("--json", action="store_true", help="print one JSON object per result, nothing else")
    add("--samples", help="file for every transcript: prompts, messages, answers, return, as JSONL")
    add("--csv", action="store_true", help="report: also updates.csv and stages.csv")
    add("--short", action="store_true", help="speed and occupancy: toy sizes, for the form of the tables")
    add("--web", action="store_true", help="ask: on a page, http://127.0.0.1:PORT")
    add("--port", type=int, default=8000, help="ask --web: its port (default 8000; 0: any that is free)")
    add("--out", help="report, occupancy: directory for what they write")
    add("--jobs", type=int, default=os.cpu_count(), help="occupancy: runs at once (default: one per CPU)")
    add_flags(parser, TEAM_FLAGS)
    args = parser.parse_intermixed_args(argv)
    kinds = args.benchmarks[:1] if args.benchmarks[:1] == ["ask"] else args.benchmarks or ["task"]
    read = {"benchmarks", "json"}.union(*(READ_BY.get(kind, READ_BY["task"]) for kind in kinds))
    given = (name for name, value in vars(args).items() if value != parser.get_default(name))
    if idle := sorted({*given} - read):
        raise UserError(f"--{idle[0].replace('_', '-')} has no effect on {', '.join(kinds)}")
    if min(args.k, args.seeds, args.shots + 1, 1 if args.problems is None else args.problems) < 1:
        raise UserError("--k, --seeds and --problems must be at least 1, --shots at least 0")
    return args, {name: value for name, value in vars(args).items() if name in TEAM_FLAGS}


def results(args: Namespace, flags: dict, ranks: Ranks) -> Results:
    """Every result as it comes. Raises UserError for wrong names before anything is loaded."""
    words, teams = args.benchmarks, [team for team in split_names(args.team) if team] or [None]
    if words[:1] == ["ask"]:
        if len(teams) > 1:
            raise UserError("ask takes one run: --team RUN")
        return (yield from ask.run(words[1:], args, flags) if ranks.first else ())
    if unknown := [name for name in words if name not in (*TASKS, *OTHERS) and not Path(name).is_file()]:
        raise UserError(f"no benchmark {unknown[0]}: give {KNOWN}, ask, or FILE.py with a task")
    if args.mode in ("best_of", "vote") and args.k < 2:
        raise UserError(f"--mode {args.mode} chooses among rollouts; give --k of at least 2")
    exams = []
    for team, name in itertools.product(teams, [name for name in words or [None] if name not in OTHERS]):
        exam = accuracy.find_team(team, flags, name)
        exams.append(accuracy.prepare(exam, name, args.problems, args.data, args.shots))
    yield from accuracy.run(exams, args, ranks)
    for name in [name for name in words if name in OTHERS and ranks.first]:
        if name == "report":
            result = report.run(split_names(args.team), args.out, args.csv)
            yield result, f"{result['team']}: {result['state']}\n  {result['report']}"
        elif name == "occupancy":
            result = occupancy.run(Path(args.out or "runs/occupancy"), args.short, args.jobs)
            yield result, occupancy.table(result)
        elif name == "gpu" and not torch.cuda.is_available():
            raise UserError("eval.py gpu measures a CUDA device, and torch sees none here")
        else:
            for benchmark in speed.BENCHMARKS if name == "gpu" else [name]:
                result = speed.run(benchmark, flags, args.short)
                yield result, speed.table(result)


if __name__ == "__main__":
    gc.freeze()  # of 300,000 objects that stay, a collection need not look at any
    sys.exit(main())
