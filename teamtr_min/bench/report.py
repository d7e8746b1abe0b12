"""What a run did, to look at: two figures, and one page with them, the transcripts and the configuration.

Everything is read from the run's directory, so a run that was stopped, or still goes on, has a report too.
report.html stands alone: images, style and script are inside, and its policy forbids any request.
"""

import base64
import dataclasses
import html
import json
import re
from pathlib import Path
from typing import NamedTuple

from teamtr_min.bench.plots import COLOURS, FIGURES, render
from teamtr_min.config import Config
from teamtr_min.files import UserError, read_json
from teamtr_min.run.loading import roles_of
from teamtr_min.run.log import held_out_score, read_log, region, totals, violation_rate
from teamtr_min.run.run import newest_run
from teamtr_min.tasks import load_task

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
FILLED_IN = ("batch_rows", "batch_tokens", "date")  # knobs that a run sets by itself


class Record(NamedTuple):
    """A run as its files tell it."""

    directory: Path
    config: Config
    updates: list[dict]
    stages: list[dict]
    summary: dict  # without what it says of the end, while the run goes on
    transcripts: list[dict]
    names: list[str]  # of the agents

    @property
    def score(self) -> str:
        """The measure that is shown: the return where any rollout got another one than 0 or 1."""
        partial = any(u["return_mean"] > u["accuracy"] for u in self.updates)
        return "return" if partial else "accuracy"

    def of_stages(self, key: str) -> list[float]:
        """Of the rollouts that each stage began with."""
        return [u[key] for u in self.updates if u["update"] == 0]

    @property
    def held_out(self) -> dict[int, tuple[float, list[float]]]:
        """Score on held-out problems and its 95% interval, by the stages done before."""
        lines = [(0, self.summary, "start"), *((s["stage"] + 1, s, "held_out") for s in self.stages)]
        lines.append((len(self.stages), self.summary, "final"))
        named = [(at, line, f"{self.score}_{name}") for at, line, name in lines]
        return {at: (line[key], line[f"{key}_ci"]) for at, line, key in named if line.get(key) is not None}

    @property
    def seconds(self) -> float:
        return self.summary.get("seconds") or (self.stages[-1]["seconds"] if self.stages else 0.0)

    @property
    def state(self) -> str:
        done = f"{len(self.stages)} of {self.config.stages} stages"
        stopped = self.summary.get("stopped", "the run goes on, or was killed")
        return f"{done}; not finished: {stopped}" if stopped else f"{done}; finished"

    @property
    def headline(self) -> dict[str, str]:
        """The numbers on top, as far as they are known."""
        texts = {}
        for name, label in (("start", "held out, at the start"), ("final", "held out, at the end")):
            if self.summary.get(f"accuracy_{name}") is not None:
                texts[label] = held_out_score(self.summary, name)
        if len(texts) < 2:
            texts["on the last stage's problems"] = f"{self.score} {self.of_stages('return_mean')[-1]:.3f}"
        texts |= {"time": f"{self.seconds:,.0f} s", "rollouts": f"{totals(self.updates)['rollouts']:,}"}
        if (before := violation_rate(self.updates, "kl_before")) is not None:
            texts["updates that exceeded the radius"] = f"{before:.0%}"
        return texts


def read(directory: Path) -> Record:
    """Raises UserError for a directory that is no run, or a run without an update."""
    config, metrics = Config.load(directory / "config.json"), read_log(directory / "metrics.jsonl")
    updates, stages = ([line for line in metrics if line["kind"] == kind] for kind in ("update", "stage"))
    if not updates:
        raise UserError(f"{directory} has no update in its metrics.jsonl yet; there is nothing to report")
    path = directory / "summary.json"
    summary = read_json(path) if path.exists() else {}
    if summary and summary["tokens_trained"] != totals(updates)["tokens_trained"]:  # it is of before a resume
        summary = {key: value for key, value in summary.items() if "_start" in key}
    try:
        names = [role.name for role in roles_of(config, load_task(config))]
    except Exception:  # the file or data of the task is gone, which may raise anything
        names = [f"Agent {j + 1}" for j in range(config.agents)]
    transcripts = read_log(directory / "transcripts.jsonl")
    return Record(directory, config, updates, stages, summary, transcripts, names)


def run(team: str | None) -> dict:
    """Write report/*.png and report.html of a run, None for the newest; returns what `--json` prints."""
    directory = Path(team) if team else newest_run("metrics.jsonl")
    if not directory:
        raise UserError("no run under runs/; python train.py makes one, --team names one elsewhere")
    record, path = read(directory), directory / "report.html"
    images = {draw: render(draw, record) for draw in FIGURES}
    (directory / "report").mkdir(exist_ok=True)
    figures = {directory / "report" / f"{draw.__name__}.png": image for draw, image in images.items()}
    for figure, image in figures.items():
        figure.write_bytes(image)
    path.write_text(page(record, images), encoding="utf-8")
    return {
        "benchmark": "report", "team": str(directory), "report": str(path), "figures": [*map(str, figures)],
        "headline": record.headline, "state": record.state, "stages": len(record.stages),
        "seconds": record.seconds, "transcripts": len(record.transcripts), **totals(record.updates),
    }  # fmt: skip


def page(record: Record, images: dict) -> str:
    """report.html, all in one file. Text gets into markup through html.escape, or as JSON without a `<`."""
    config, knobs, figures = record.config, [], []
    usual = Config(model=config.model, task=config.task, agents=config.agents, lora_rank=config.lora_rank)
    for name, value in dataclasses.asdict(config).items():
        tag = "span" if name in FILLED_IN or value == getattr(usual, name) else "b"
        text = html.escape(str(value)) if value != "" else "none"
        knobs.append(f'<li><span class="soft">{name}</span> <{tag}>{text}</{tag}>')
    for draw, image in images.items():
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        figures.append(f'<img src="{source}" alt="{html.escape(draw.__doc__)}">')
    tiles = (map(html.escape, pair) for pair in record.headline.items())
    what = f"{config.task}: {config.agents} agents of {config.model}, {config.occupancy} occupancy"
    data = {"transcripts": record.transcripts, "names": record.names, "colours": COLOURS}
    parts = {
        "title": html.escape(record.directory.resolve().name),
        "subtitle": html.escape(f"{what}, {region(config)}; {record.state}"),
        "tiles": "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in tiles),
        "figures": "\n".join(figures),
        "knobs": "\n".join(knobs),
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def table(result: dict) -> str:
    """For the terminal: the headline, and where everything is."""
    width = max(map(len, result["headline"].values()))
    lines = [f"{result['team']}: {result['state']}"]
    lines += [f"  {text:{width}s}  {name}" for name, text in result["headline"].items()]
    lines += [f"  figure   {path}" for path in result["figures"]]
    return "\n".join([*lines, f"  report   {result['report']}   ({result['transcripts']} transcripts)"])
