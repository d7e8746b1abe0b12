"""Real models on word problems: runs side by side, as a table and a figure.

    python train.py --model DIR --agents 2 --task sums --eval-every 3 --seed 0 --out runs/sums-0     and so on
    python -m teamtr_min.studies.sums runs/sums-*

Runs with the same method are one curve, the mean over seeds, with every seed's points. A run's first point is
the team after its warm start: what rises from there is TeamTR's own.
"""

import argparse
import math
import sys
from pathlib import Path

from teamtr_min.bench.plots import held_out_curves, render, require_matplotlib
from teamtr_min.bench.report import Record, read
from teamtr_min.config import Config
from teamtr_min.files import UserError


def method(config: Config) -> str:
    """How a run differs from the full method."""
    words = [] if config.occupancy == "fresh" else [f"{config.occupancy} rollouts"]
    if config.kl != "hard" or math.isinf(config.delta):
        words.append(
            "no trust region" if config.kl == "fixed" and not config.beta else f"{config.kl} penalty"
        )
    adapters = [f"LoRA of rank {config.lora_rank}"] * bool(config.lora_rank)
    return ", ".join((words or ["TeamTR"]) + adapters)


def curve(record: Record) -> list[tuple[int, float]]:
    """(training rollouts so far, held-out accuracy) wherever it was measured."""
    points = [(0, record.summary["accuracy_start"])]
    points += [
        (s["rollouts_so_far"], s["accuracy_held_out"]) for s in record.stages if "accuracy_held_out" in s
    ]
    if record.summary.get("accuracy_final") is not None:
        points.append((record.summary["rollouts"], record.summary["accuracy_final"]))
    return points


def table(records: list[Record]) -> str:
    """One line a run, in Markdown: accuracies, the radius, and where the time went."""
    lines = [
        "| run | seed | untrained | start | final | gain | outside the radius, before, after | largest KL "
        "| minutes | warm start | sampling | training | evaluation |",
        "|" + "---|" * 13,
    ]
    for record in records:
        config, s = record.config, record.summary
        before, after = (s[f"violation_rate_{when}"] for when in ("before", "after"))
        rates = "no radius" if before is None else f"{before:.0%} / {after:.0%}"
        largest = max((u["kl_after"] for u in record.updates if "kl_after" in u), default=math.nan)
        parts = [
            s[f"seconds_{part}"] / s["seconds"]
            for part in ("warm_start", "sampling", "training", "evaluation")
        ]
        accuracies = [s["accuracy_untrained"], s["accuracy_start"], s["accuracy_final"]]
        gain = s["accuracy_final"] - s["accuracy_start"]
        lines.append(
            f"| {method(config)} | {config.seed} | "
            + " | ".join("" if value is None else f"{value:.3f}" for value in accuracies)
            + f" | {gain:+.3f} | {rates} | {largest:.4f} | {s['seconds'] / 60:.1f} | "
            + " | ".join(f"{part:.0%}" for part in parts)
            + " |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--figure", type=Path, default=Path("runs/sums.png"), help="(default runs/sums.png)")
    args = parser.parse_args(argv)
    try:
        require_matplotlib()
        records = [read(run) for run in args.runs]
        unfinished = [str(r.directory) for r in records if r.summary.get("accuracy_final") is None]
        if unfinished:
            raise UserError(f"not finished: {', '.join(unfinished)}")
        curves: dict[str, list] = {}
        for record in records:
            curves.setdefault(method(record.config), []).append(curve(record))
        args.figure.write_bytes(render(held_out_curves, curves))
        print(f"{table(records)}\n\n{args.figure}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
