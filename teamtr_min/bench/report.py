"""What a run did on one page, or several runs side by side (compare.py), and their numbers as CSV. A run that
was stopped, or still goes on, has a report too. A page stands alone: images, style and script are inside.
Text gets into markup through html.escape, or as JSON without a `<`."""

import base64
import csv
import html
import os
import re
from collections.abc import Callable
from pathlib import Path

from teamtr_min.bench import compare
from teamtr_min.config import Config
from teamtr_min.files import UserError, to_json
from teamtr_min.run.figures import COLOURS, Record, learning, read, render, trust_region
from teamtr_min.run.log import read_log, region
from teamtr_min.run.run import newest_run

ASSETS = Path(__file__).parents[1] / "assets"
FILLED_IN = ("batch_rows", "batch_tokens", "date")  # knobs that a run sets by itself


def run(teams: list[str], out: str | None = None, tables: bool = False) -> dict:
    """Write report.html of a run, without any name of the newest, or compare.html of several; returns what
    `--json` prints. The place is `out`, else the run's directory, or the one that holds the first of them."""
    directories = [*dict.fromkeys(map(Path, filter(None, teams)))] or [newest_run("metrics.jsonl")]
    if not directories[0]:
        raise UserError("no run under runs/; python train.py makes one, --team names one elsewhere")
    records, several = [read(path) for path in directories], len(directories) > 1
    place = Path(out or (os.path.relpath(directories[0].absolute().parent) if several else directories[0]))
    path = place / ("compare.html" if several else "report.html")
    result = {"benchmark": "report", "team": ",".join(map(str, directories)), "report": str(path)}
    result["state"] = f"{len(records)} runs" if several else records[0].state
    if several:
        result["groups"] = compare.grouped(records)
    text = comparison(result["groups"], place) if several else page(records[0])
    place.mkdir(parents=True, exist_ok=True)
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
    knobs = [(name, str(value), str(getattr(usual, name))) for name, value in vars(config).items()]
    what = f"{config.task}: {config.agents} agents of {config.model}, {config.occupancy} occupancy"
    parts = {"title": directory.resolve().name, "subtitle": f"{what}, {region(config)}; {record.state}"}
    parts = {name: html.escape(text) for name, text in parts.items()}
    parts |= {draw.__name__: image(record, draw) for draw in (learning, trust_region)}
    data = {"transcripts": read_log(directory / "transcripts.jsonl"), "roles": record.roles}
    data["knobs"] = [knob for knob in knobs if knob[0] not in FILLED_IN and knob[1] != knob[2]]
    return filled("report.html", data, **parts)


def comparison(groups: list[dict], place: Path) -> str:
    """compare.html of groups of runs, for the directory `place`; a run is linked to its own report."""
    reports = {run["run"]: Path(run["run"], "report.html") for group in groups for run in group["runs"]}
    links = {run: os.path.relpath(path, place) for run, path in reports.items() if path.exists()}
    figures = "".join(image((groups, axis), compare.curves) for axis in (0, 1))
    return filled("compare.html", {"groups": groups, "links": links}, figures=figures)


def image(what, draw: Callable) -> str:
    source = base64.b64encode(render(what, draw)).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(draw.__doc__)}">'


def filled(name: str, data: dict, **parts: str) -> str:
    """A page with its style, `parts` and `data`."""
    parts["style"] = (ASSETS / "page.css").read_text(encoding="utf-8")
    parts["data"] = to_json(data | {"colours": COLOURS}).replace("<", "\\u003c")
    text = (ASSETS / name).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def table(result: dict) -> str:
    return f"{result['team']}: {result['state']}\n  {result['report']}"
