"""What a run did, on one page: two figures, the transcripts, the knobs that are not the preset's.

A run that was stopped, or still goes on, has a report too. report.html stands alone: images, style and script
are inside. A figure's docstring is also its text for people who cannot see it.
"""

import base64
import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from teamtr_min.config import Config
from teamtr_min.files import UserError, read_json
from teamtr_min.run.loading import roles_of
from teamtr_min.run.log import held_out_score, read_log, region
from teamtr_min.run.run import newest_run
from teamtr_min.tasks import load_task

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
FILLED_IN = ("batch_rows", "batch_tokens", "date")  # knobs that a run sets by itself
# Okabe and Ito's colours, which colour-blind people can tell apart; the last is a grey.
COLOURS = ["#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#8a8f98"]
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#dfe3e7", "axes.titlelocation": "left", "legend.frameon": False, "savefig.dpi": 160,
    "text.parse_math": False,  # a role may be called $x$
}  # fmt: skip


class Record(NamedTuple):
    """A run as its files tell it."""

    directory: Path
    config: Config
    updates: list[dict]
    stages: list[dict]
    summary: dict  # {} until the run has ended once
    transcripts: list[dict]
    names: list[str]  # of the agents

    @property
    def state(self) -> str:
        done = f"{len(self.stages)} of {self.config.stages} stages"
        if stopped := self.summary.get("stopped", "the run goes on, or was killed"):
            return f"{done}; not finished: {stopped}"
        return f"{done}; held-out {held_out_score(self.summary, 'start', 'final')}"


def read(directory: Path) -> Record:
    """Raises UserError for a directory that is no run, or a run without an update."""
    config, metrics = Config.load(directory / "config.json"), read_log(directory / "metrics.jsonl")
    updates, stages = ([line for line in metrics if line["kind"] == kind] for kind in ("update", "stage"))
    if not updates:
        raise UserError(f"{directory} has no update in its metrics.jsonl yet; there is nothing to report")
    path = directory / "summary.json"
    summary = read_json(path) if path.exists() else {}
    try:
        names = [role.name for role in roles_of(config, load_task(config))]
    except Exception:  # the file or data of the task is gone, which may raise anything
        names = [f"Agent {j + 1}" for j in range(config.agents)]
    transcripts = read_log(directory / "transcripts.jsonl")
    return Record(directory, config, updates, stages, summary, transcripts, names)


def require_matplotlib():
    """matplotlib, which only figures need. Raises UserError where it is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    return matplotlib


def render(draw: Callable, what) -> bytes:
    """The figure that `draw(figure, what)` fills, as PNG."""
    matplotlib, buffer = require_matplotlib(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout="constrained")
        draw(figure, what)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def finish(axes, **settings) -> None:
    """Settings; whole stages on the x axis; the legend right of the axes, where it hides no curve."""
    axes.set(**settings)
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def learning(figure, record: Record) -> None:
    """Mean return and accuracy on each stage's problems; the return on held-out ones with its interval."""
    axes, first = figure.subplots(), [u for u in record.updates if u["update"] == 0]
    axes.plot([u["return_mean"] for u in first], ".-", color=COLOURS[0], label="on each stage's problems")
    axes.plot([u["accuracy"] for u in first], "--", color=COLOURS[-1], label="accuracy there")
    measured = [(0, record.summary, "return_start"), (len(record.stages), record.summary, "return_final")]
    measured += [(s["stage"] + 1, s, "return_held_out") for s in record.stages]
    for at, line, key in measured:
        if (value := line.get(key)) is not None:
            low, high = line[f"{key}_ci"]
            off = [[max(0, value - low)], [max(0, high - value)]]
            axes.errorbar(at, value, off, fmt="D", mfc="none", capsize=3, color=COLOURS[1])
    axes.plot([], "D", mfc="none", color=COLOURS[1], label="held out")
    finish(axes, title="Mean return", ylim=(-0.02, 1.02), xlabel="stages done")


def trust_region(figure, record: Record) -> None:
    """KL of each update, as attempted (circles) and as kept (dots), and the radius (dashed)."""
    axes, config, delta = figure.subplots(), record.config, record.config.delta
    updates = [u for u in record.updates if "kl_after" in u]  # without those of an agent that took no turn
    per_stage = 1 + max(u["update"] for u in record.updates)
    top = max([u["kl_before"] for u in updates] + [delta] * math.isfinite(delta)) or 1.0
    bottom = top / 1e3  # lower values stand on the axis
    for agent in sorted({u.get("agent", -1) for u in updates}):  # -1: all together
        own = [u for u in updates if u.get("agent", -1) == agent]
        x = [u["stage"] + u["update"] / per_stage for u in own]
        attempted, kept = ([max(u[key], bottom) for u in own] for key in ("kl_before", "kl_after"))
        colour = COLOURS[agent % len(COLOURS)]
        axes.plot(x, attempted, "o", color=colour, mfc="none", ms=4)
        axes.plot(x, kept, "o", color=colour, ms=3, label="team" if agent < 0 else record.names[agent][:24])
    if math.isfinite(delta):
        enforced = "" if config.kl == "hard" else ", not enforced"
        axes.axhline(delta, color=COLOURS[-1], ls="--", label=f"radius {delta:g}{enforced}")
    axes.set(yscale="log", ylim=(bottom * 0.8, 2 * top), ylabel=f"nats per {config.kl_unit}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finish(axes, title="KL of each update; circles: attempted, dots: kept", xlabel="stage")


def run(team: str | None) -> dict:
    """Write report.html of a run, None for the newest; returns what `--json` prints."""
    directory = Path(team) if team else newest_run("metrics.jsonl")
    if not directory:
        raise UserError("no run under runs/; python train.py makes one, --team names one elsewhere")
    record, path = read(directory), directory / "report.html"
    path.write_text(page(record), encoding="utf-8")
    return {"benchmark": "report", "team": str(directory), "state": record.state, "report": str(path)}


def page(record: Record) -> str:
    """report.html, all in one file. Text gets into markup through html.escape, or as JSON without a `<`."""
    config, knobs, figures = record.config, [], []
    usual = Config(model=config.model, task=config.task, agents=config.agents, lora_rank=config.lora_rank)
    for name, value in dataclasses.asdict(config).items():
        if name not in FILLED_IN and value != (preset := getattr(usual, name)):
            cells = (html.escape(str(cell)) for cell in (name, value, preset))
            knobs.append("<tr><td>" + "<td>".join(cells))
    for draw in (learning, trust_region):
        source = f"data:image/png;base64,{base64.b64encode(render(draw, record)).decode()}"
        figures.append(f'<img src="{source}" alt="{html.escape(draw.__doc__)}">')
    what = f"{config.task}: {config.agents} agents of {config.model}, {config.occupancy} occupancy"
    data = {"transcripts": record.transcripts, "names": record.names, "colours": COLOURS}
    parts = {
        "title": html.escape(record.directory.resolve().name),
        "subtitle": html.escape(f"{what}, {region(config)}; {record.state}"),
        "figures": "\n".join(figures),
        "knobs": "\n".join(knobs),
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def table(result: dict) -> str:
    return f"{result['team']}: {result['state']}\n  {result['report']}"
