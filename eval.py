"""Benchmarks: how often a team is right, and how fast the kernels are.

python eval.py relay                    the newest run under runs/, or without one the shipped team
python eval.py relay --team runs/NAME   a trained team
python eval.py relay --agents 5 --k 8   an untrained team of five, eight rollouts per problem
python eval.py relay --mode solo        one agent taking every turn, beside the team at equal tokens
python eval.py relay --mode vote --k 8  the answer that most of eight rollouts give
python eval.py convention --agents 2    the other shipped task, its untrained team
python eval.py gsm8k math500 --team runs/A,runs/B   each on each, in one table; --again measures anew
python eval.py math500 --team runs/NAME   a published test set, on the agents of any run
python eval.py jsonl --model DIR --data FILE   word problems of one's own
python eval.py kernels                  the log-prob kernel beside its peers, on this machine
python eval.py sampling training stage  tokens per second, an update's step, both beside transformers, and
                                        where a stage's seconds go; --model DIR for another model
python eval.py gpu                      a GPU's tests and all speed benchmarks, into runs/gpu.json
python eval.py occupancy --short        what fresh rollouts and the radius are worth; in full it takes hours
python eval.py report --team runs/NAME  what a run did: figures, and a page with its transcripts
torchrun --nproc-per-node 8 eval.py gsm8k --team runs/NAME   the same by eight processes, a GPU each
python eval.py export --team runs/NAME --merge   a run's agents, LoRA's adapters merged into checkpoints
"""

import argparse
import functools
import gc
import json
import os
import sys
from pathlib import Path

from teamtr_min.cli import add_flags, open_streams

import train
from teamtr_min.bench import accuracy, export, gpu, kernels, report, sampling, stage, training
from teamtr_min.bench.board import Board
from teamtr_min.engine.distributed import ALONE, Lost, join
from teamtr_min.files import UserError, one_line
from teamtr_min.learner import OutOfMemory
from teamtr_min.studies import occupancy
from teamtr_min.tasks import TASKS

TEAMLESS = ("kernels", "sampling", "training", "stage", "gpu", "occupancy")
BENCHMARKS = [*TASKS, *TEAMLESS, "report", "export"]
SPEED = {
    "sampling": (sampling.run, sampling.table),
    "training": (training.run, training.table),
    "stage": (functools.partial(stage.run, train), stage.table),
}
TEAM_FLAGS = (
    "model agents rounds router temperature max_new_tokens seed device dtype batch_rows shard "
    "question_field answer_field"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="benchmark",
        help=f"what to measure: {', '.join(BENCHMARKS)}, or FILE.py with a task (default: the team's task)",
    )
    parser.add_argument(
        "--team",
        default="",
        help="directory of a run, or A,B,... of several (default: the newest under runs/)",
    )
    parser.add_argument(
        "--mode",
        choices=accuracy.MODES,
        default="team",
        help="team; solo: its first agent takes every turn, compared with the team at equal tokens; "
        "best_of: the likeliest of k rollouts; vote: the answer of most of k (default team)",
    )
    parser.add_argument("--k", type=int, default=1, help="rollouts per problem (default 1)")
    parser.add_argument(
        "--problems", type=int, help="held-out problems (default 2048; of a file named by --data all)"
    )
    parser.add_argument("--data", help="JSONL of problems to take instead of the held-out ones")
    parser.add_argument(
        "--again", action="store_true", help="measure also what was measured before and is kept"
    )
    parser.add_argument("--show", type=int, help="transcripts to print (default 3; of several results 0)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per benchmark, nothing else"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="sampling, training, stage, occupancy: at toy sizes, for the tables' form and not for results",
    )
    study = parser.add_argument_group("occupancy and gpu")
    study.add_argument("--only", help=f"some of {','.join(occupancy.STUDIES)}; or steps of gpu")
    study.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, a thread each")
    study.add_argument(
        "--out", help="where its runs and figures go (default runs/occupancy; gpu: runs/gpu.json)"
    )
    parser.add_argument("--merge", action="store_true", help="export: whole checkpoints instead of adapters")
    add_flags(parser, TEAM_FLAGS.split())
    args = parser.parse_args(argv)
    flags = {name: value for name, value in vars(args).items() if name in TEAM_FLAGS.split()}
    try:
        unknown = sorted(n for n in args.benchmarks if n not in BENCHMARKS and not n.endswith(".py"))
        if unknown:
            raise UserError(f"no benchmark {', '.join(unknown)}; there is: {', '.join(BENCHMARKS)}, FILE.py")
        if args.k < 1 or (args.problems or 1) < 1 or (args.show or 0) < 0:
            raise UserError("--k and --problems must be at least 1, --show at least 0")
        teams = [team for team in args.team.split(",") if team] or [None]
        jobs = [  # team by team, so that each is loaded once
            (name, team)
            for team in teams
            for name in args.benchmarks or [None]
            if team == teams[0] or name not in TEAMLESS
        ]
        places = [job for job in jobs if job[0] not in (*TEAMLESS, "report", "export")]
        ranks = join()
        board = Board(places, args.mode, args.k, args.problems, args.data, args.again, args.show, ranks)
    except UserError as error:
        ALONE.say(f"error: {error}")
        return 2
    failures = []
    for name, team in jobs:
        if not ranks.first and (name, team) not in places:
            continue  # what is no evaluation the first does alone
        try:
            result, text = measure(name, team, args, flags, board)
            print(json.dumps(result) if args.json else text, flush=True)
        except (UserError, OSError, FloatingPointError, OutOfMemory, Lost) as error:
            where = ", ".join(filter(None, (name, team)))
            sentence = one_line(error, 1000)
            failures.append(f"{where}: {sentence}" if len(jobs) > 1 else sentence)
            if ranks.size > 1:
                break  # the others may not have failed
        except KeyboardInterrupt:
            failures.append(None)
            break
    for sentence in failures:
        ranks.say(f"error: {sentence}" if sentence else "interrupted")
    return ranks.leave(130 if None in failures else 2 if failures else 0)


def measure(
    name: str | None, team: str | None, args: argparse.Namespace, flags: dict, board: Board
) -> tuple[dict, str]:
    """One benchmark of one team: what `--json` prints, and the same for people."""
    if name == "kernels":
        result = kernels.run()
        return result, kernels.table(result)
    if name in SPEED:
        if wrong := sorted(flags.keys() - {"model", "device", "dtype"}):
            raise UserError(f"--{wrong[0].replace('_', '-')} says nothing to {name}")
        run, table = SPEED[name]
        result = run(flags, args.short)
        return result, table(result)
    if name == "gpu":
        result = gpu.run(Path(args.out or "runs/gpu.json"), args.only)
        return result, gpu.table(result)
    if name == "occupancy":
        studies = tuple(args.only.split(",")) if args.only else occupancy.STUDIES
        result = occupancy.run(Path(args.out or "runs/occupancy"), args.short, studies, args.jobs)
        return result, occupancy.table(result)
    if name == "report":
        result = report.run(team)
        return result, report.table(result)
    if name == "export":
        result = export.run(team, args.merge, args.out)
        return result, export.table(result)
    return board.measure(name, team, flags)


if __name__ == "__main__":
    open_streams()
    gc.freeze()  # of 300,000 objects that stay, a collection need not look at any
    sys.exit(main())
