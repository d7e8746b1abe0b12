"""What a run did on one page, or several runs side by side, and their numbers as CSV. A run that was stopped,
or still goes on, has a report too. A page stands alone: figures, style and script are inside. What a run
holds gets into it as JSON without a `<`, and becomes text there, never markup.

Runs that differ in nothing but the seed are a group, shown by its mean and standard error: standard
deviation / sqrt(runs).
"""

import base64
import collections
import csv
import dataclasses
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from teamtr_min.config import Config
from teamtr_min.files import UserError, to_json
from teamtr_min.run.figures import COLOURS, Record, finish, learning, read, render, trust_region
from teamtr_min.run.log import measured, occupancy, read_log, region, totals
from teamtr_min.run.run import newest_run

ASSETS = Path(__file__).parents[1] / "assets"
FILLED_IN = ("batch_rows", "batch_tokens", "date")  # knobs that a run sets by itself
# Knobs in which the runs of a group may differ: the seed, and those that decide no number.
IGNORED = (*FILLED_IN, "seed", "out", "resume", "accept_changes", "checkpoint_every", "tensorboard")


def run(teams: list[str], out: str | None = None, tables: bool = False) -> dict:
    """Write report.html of a run, without any name of the newest, or compare.html of several; returns what
    `--json` prints. The place is `out`, else the run's directory, or the one that holds the first of them."""
    directories = [*dict.fromkeys(map(Path, filter(None, teams)))] or [newest_run("metrics.jsonl")]
    if not directories[0]:
        raise UserError("no run under runs/; python train.py makes one, --team names one elsewhere")
    records = [read(path) for path in directories]
    result = {"benchmark": "report", "team": ",".join(map(str, directories))}
    if len(records) == 1:
        path, text = Path(out or directories[0], "report.html"), page(records[0])
        result |= {"report": str(path), "state": records[0].state}
    else:
        path = Path(out or os.path.relpath(directories[0].absolute().parent), "compare.html")
        groups = grouped(records)
        result |= {"report": str(path), "state": f"{len(records)} runs", "groups": groups}
        reports = {str(directory): directory / "report.html" for directory in directories}
        links = {run: os.path.relpath(own, path.parent) for run, own in reports.items() if own.exists()}
        images = "".join(image((groups, axis), curves) for axis in (0, 1))
        text = filled("compare.html", {"groups": groups, "links": links}, figures=images)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for name in ("updates", "stages") if tables else ():
        lines = [{"run": record.directory} | line for record in records for line in getattr(record, name)]
        write_table(path.with_name(f"{name}.csv"), lines)
    return result


def write_table(path: Path, lines: list[dict]) -> None:
    """Lines as CSV, one column per key of any of them; a list becomes columns KEY_0, KEY_1, ..."""
    for line in lines:
        for key in [key for key, value in line.items() if isinstance(value, list)]:
            line |= {f"{key}_{i}": value for i, value in enumerate(line.pop(key))}
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, dict.fromkeys(key for line in lines for key in line))
        table.writeheader()
        table.writerows(lines)


def page(record: Record) -> str:
    """report.html of a run."""
    directory, config = record.directory, record.config
    if not record.updates:
        raise UserError(f"{directory} has no update in its metrics.jsonl yet; there is nothing to report")
    usual = Config(model=config.model, task=config.task, agents=config.agents, lora_rank=config.lora_rank)
    knobs = [
        (name, str(value), str(getattr(usual, name))) for name, value in dataclasses.asdict(config).items()
    ]
    what = f"{config.task}: {config.agents} agents of {config.model}, {occupancy(config)}"
    data = {
        "title": directory.resolve().name, "subtitle": f"{what}, {region(config)}; {record.state}",
        "transcripts": read_log(directory / "transcripts.jsonl"), "roles": record.roles,
        "knobs": [knob for knob in knobs if knob[0] not in FILLED_IN and knob[1] != knob[2]],
    }  # fmt: skip
    images = {draw.__name__: image(record, draw) for draw in (learning, trust_region)}
    return filled("report.html", data, **images)


def image(what, draw: Callable) -> str:
    source = base64.b64encode(render(what, draw)).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{draw.__doc__}">'


def filled(name: str, data: dict, connect: str = "", **images: str) -> str:
    """A page: what all have in common (page.html), its own part, images and data; by itself it loads nothing,
    unless `connect` is what it may connect to."""
    text = to_json(data | {"colours": COLOURS}).replace("<", "\\u003c")
    parts = images | {"connect": connect, "data": text}
    text = "".join((ASSETS / file).read_text(encoding="utf-8") for file in ("page.html", name))
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def grouped(records: list[Record]) -> list[dict]:
    """Groups. `name` tells the `knobs` and hashes in which they differ; if these are many, the first run."""
    found, groups = collections.defaultdict(list), []
    held_out = all(any("return_held_out" in stage for stage in record.stages) for record in records)
    for record in records:
        facts = dataclasses.asdict(record.config) | {
            f"hash: {name}": value for name, value in record.fingerprint.items()
        }
        found[tuple(item for item in facts.items() if item[0] not in IGNORED)].append(row(record, held_out))
    alike = set.intersection(*map(set, found))
    for facts, runs in found.items():
        knobs = {name: value for name, value in facts if (name, value) not in alike}
        name = ", ".join(f"{knob} {value}" for knob, value in knobs.items())
        name = name if 0 < len(name) <= 50 else Path(runs[0]["run"]).resolve().name
        groups.append({"name": name, "knobs": knobs, "runs": runs, "held_out": held_out})
    return groups


def row(record: Record, held_out: bool) -> dict:
    """What a run reached and cost so far. `curve`: stages done -> (training rollouts, seconds without
    evaluation, mean return), on held-out problems or on those of the stage that then began."""
    summary, stages, updates = record.summary, record.stages, record.updates
    ends = [(s["rollouts_so_far"], s["seconds"] - s["seconds_evaluation"]) for s in stages]
    ends = [(0, summary.get("seconds_warm_start", 0)), *ends]
    returns = [u["return_mean"] for u in updates if u["update"] == 0]
    if held_out:
        returns = [summary.get("return_start"), *(s.get("return_held_out") for s in stages)]
        returns[-1] = summary.get("return_final", returns[-1])
    curve = {i: (*end, value) for i, (end, value) in enumerate(zip(ends, returns)) if value is not None}
    line = {"run": str(record.directory), "seed": record.config.seed, "state": record.state, "curve": curve}
    line |= {key: value for key, value in summary.items() if key.startswith(("accuracy_", "return_"))}
    return measured(line | totals(updates) | {"seconds": ends[-1][1]})


def curves(figure, what: tuple[list[dict], int]) -> None:
    """Mean return of each group as far as all its runs have come, in a band of one standard error to either
    side; thin lines are its runs."""
    (groups, axis), axes = what, figure.subplots()
    for group, colour in zip(groups, itertools.cycle(COLOURS)):
        own = [run["curve"] for run in group["runs"]]
        for curve in own:
            axes.plot([p[axis] for p in curve.values()], [p[2] for p in curve.values()], color=colour, lw=0.6)
        shared = sorted(set.intersection(*map(set, own)))
        points = np.array([[curve[done] for done in shared] for curve in own]).reshape(len(own), -1, 3)
        x, y = points[:, :, axis].mean(0), points[:, :, 2].mean(0)
        error = points[:, :, 2].std(0, ddof=1) / len(own) ** 0.5 if len(own) > 1 else 0 * y
        label = group["name"] + f" ({len(own)} runs)" * (len(own) > 1)
        axes.plot(x, y, ".-", color=colour, label=label)
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, lw=0)
    problems = "held-out problems" if groups[0]["held_out"] else "the problems of each stage"
    unit = ("training rollouts", "seconds, without evaluation")[axis]
    finish(figure, axes, title=f"Mean return on {problems}", ylim=(0, None), xlabel=unit)
