"""What a run did, to look at: four figures, and one page with them, the configuration and the transcripts.

Everything is read from the run's directory, so a run that was stopped, or is still under way, has a report
too. report.html stands alone: images, style and script are inside, and its policy forbids any request.
"""

import base64
import dataclasses
import html
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teamtr_min.bench.plots import COLOURS, FIGURES, duration, render
from teamtr_min.config import Config
from teamtr_min.files import UserError, read_json
from teamtr_min.run.log import read_log, region, violation_rate
from teamtr_min.run.run import newest_run
from teamtr_min.tasks import load_task

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"


@dataclass(frozen=True)
class Record:
    """A run as its files tell it."""

    directory: Path
    config: Config
    updates: list[dict]
    stages: list[dict]
    summary: dict  # what only summary.json knows; empty while it does not match the metrics
    transcripts: list[dict]
    names: list[str]
    damaged: list[str]  # files whose last line was cut off

    def numbers(self, key: str, records: list[dict] | None = None) -> np.ndarray:
        """One value of each update, or of each of `records`; NaN where it was not measured."""
        return np.array([r.get(key) for r in (self.updates if records is None else records)], dtype=float)

    @property
    def seconds(self) -> float:
        """Of the whole run, as far as is known."""
        last = self.stages[-1]["seconds"] if self.stages else 0.0
        spent = (self.numbers("seconds_sampling") + self.numbers("seconds_training")).sum()
        return self.summary.get("seconds", max(last, float(spent)))


def run(team: str | None) -> dict:
    """Write runs/NAME/report/*.png and runs/NAME/report.html; returns what `--json` prints."""
    record = read(find_run(team))
    directory, counts = record.directory, ("rollouts", "tokens_sampled", "tokens_trained")
    headline = {
        "benchmark": "report",
        "team": str(directory),
        "report": str(directory / "report.html"),
        "figures": [str(directory / "report" / f"{draw.__name__}.png") for draw in FIGURES],
        "accuracy_start": record.summary.get("accuracy_start"),
        "accuracy_final": record.summary.get("accuracy_final"),
        "accuracy_last_stage": [u["accuracy"] for u in record.updates if u["update"] == 0][-1],
        "seconds": record.seconds,
        "stages": len(record.stages),
        **{name: int(record.numbers(name).sum()) for name in counts},
        "enforced": record.config.kl == "hard",
        "delta": None if math.isinf(record.config.delta) else record.config.delta,
        "violation_rate_before": violation_rate(record.updates, "kl_before"),
        "violation_rate_after": violation_rate(record.updates, "kl_after"),
        "stopped": record.summary.get("stopped", "still under way, or killed"),
        "transcripts": len(record.transcripts),
        "damaged": record.damaged,
    }
    images = [[render(draw, record, paper) for paper in ("light", "dark")] for draw in FIGURES]
    (directory / "report").mkdir(exist_ok=True)
    for path, (light, _) in zip(headline["figures"], images):
        Path(path).write_bytes(light)
    Path(headline["report"]).write_text(page(record, headline, images), encoding="utf-8")
    return headline


def find_run(team: str | None) -> Path:
    """The run `team`; without one the newest under runs/, finished or not."""
    team = team or newest_run("metrics.jsonl")
    if not team:
        raise UserError("no run under runs/; python train.py makes one, --team names one elsewhere")
    return Path(team)


def read(directory: Path) -> Record:
    config, damaged = Config.load(directory / "config.json"), []
    metrics = read_log(directory / "metrics.jsonl")
    updates = [r for r in metrics if r["kind"] == "update"]
    if any(r.get("stage", 0) >= config.stages for r in metrics):
        raise UserError(f"{directory / 'metrics.jsonl'} has stages beyond the {config.stages} of its run")
    if not updates:
        raise UserError(f"{directory} has no update in its metrics.jsonl yet; there is nothing to report")
    ending = directory / "summary.json"
    summary = read_json(ending) if ending.exists() else {}
    if summary and summary["tokens_trained"] != sum(u["tokens_trained"] for u in updates):
        summary = {"accuracy_start": summary["accuracy_start"]}  # it is of before a resume
    transcripts = read_log(directory / "transcripts.jsonl")
    try:
        names = [role.name for role in load_task(config).roles(config.agents)]
    except Exception:  # the task's file or data, which may be anything, is gone: its run can still be shown
        names = [f"Agent {j + 1}" for j in range(config.agents)]
    stages = [r for r in metrics if r["kind"] == "stage"]
    return Record(directory, config, updates, stages, summary, transcripts, names, damaged)


def page(record: Record, headline: dict, images: list[list[bytes]]) -> str:
    """report.html, all in one file. Text gets into markup through html.escape, or as JSON without a `<`."""
    knobs, figures, config = [], [], record.config
    fitting = Config(
        task=config.task, model=config.model, agents=config.agents
    )  # other models, other defaults
    defaults = dataclasses.asdict(fitting) | {"task": Config.task, "model": "relay", "agents": Config.agents}
    for name, value in dataclasses.asdict(config).items():
        tag = "span" if value == defaults[name] else "b"
        text = html.escape(str(value)) if value != "" else "none"
        knobs.append(f'<li><span class="soft">{name}</span> <{tag}>{text}</{tag}>')
    for draw, both in zip(FIGURES, images):
        light, dark = ("data:image/png;base64," + base64.b64encode(image).decode() for image in both)
        figures.append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{html.escape(draw.__doc__)}"></picture></figure>'
        )
    tile = "<div><dt>{}</dt><dd>{}</dd></div>"
    data = {"transcripts": record.transcripts, "names": record.names, "colours": COLOURS}
    parts = {
        "title": html.escape(record.directory.resolve().name),
        "subtitle": html.escape(subtitle(record, headline)),
        "tiles": "".join(tile.format(*map(html.escape, pair)) for pair in tiles(headline).items()),
        "figures": "\n".join(figures),
        "knobs": "\n".join(knobs),
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def subtitle(record: Record, headline: dict) -> str:
    """What ran, and how it ended."""
    config = record.config
    return "; ".join([
        f"{config.task}: {config.agents} agents of {config.model}, {config.occupancy} occupancy"
        f"{f' before every {config.every} updates' * (config.every > 1)}, "
        f"{region(config)}",
        f"{headline['stages']} of {config.stages} stages",
        f"not finished: {headline['stopped']}" if headline["stopped"] else "finished",
        *cut_off(headline),
    ])  # fmt: skip


def cut_off(headline: dict) -> list[str]:
    return [f"the last line of {name} was cut off, and is left out" for name in headline["damaged"]]


def tiles(headline: dict) -> dict[str, str]:
    """The headline numbers by what they are, as far as they are known."""
    start, final = headline["accuracy_start"], headline["accuracy_final"]
    before, after = headline["violation_rate_before"], headline["violation_rate_after"]
    texts = {
        "held-out accuracy": final is not None and f"{start:.3f} → {final:.3f}",
        "held-out accuracy at the start": final is None and start is not None and f"{start:.3f}",
        "accuracy on the last stage's problems": final is None and f"{headline['accuracy_last_stage']:.3f}",
        "time": duration(headline["seconds"]),
        "rollouts": f"{headline['rollouts']:,}",
        "updates that exceeded the radius": before is not None and f"{before:.0%}",
        "outside it after enforcement": before is not None and headline["enforced"] and f"{after:.0%}",
    }
    return {name: text for name, text in texts.items() if text}


def table(headline: dict) -> str:
    """For the terminal: the headline and where everything is."""
    lines = [f"{headline['team']}: " + ", ".join(f"{name} {text}" for name, text in tiles(headline).items())]
    if headline["stopped"]:
        lines.append(f"not finished, {headline['stages']} stages done: {headline['stopped']}")
    lines += cut_off(headline)
    lines += [f"figures  {path}" for path in headline["figures"]]
    lines.append(f"report   {headline['report']}   ({headline['transcripts']} transcripts to leaf through)")
    return "\n".join(lines)
