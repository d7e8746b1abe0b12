"""A run as its files tell it, and its figures, for summary.png and `eval.py report`. A figure's docstring is
also its text for people who cannot see it. matplotlib, which is optional, is loaded when one is drawn."""

import collections
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from teamtr_min.config import Config
from teamtr_min.files import UserError, read_json, replacing
from teamtr_min.run import log

# Okabe and Ito's colours, which colour-blind people can tell apart; the last is a grey.
COLOURS = ["#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#8a8f98"]
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#dfe3e7", "axes.titlelocation": "left", "legend.frameon": False, "savefig.dpi": 180,
    "text.parse_math": False,  # a role may be called $x$
}  # fmt: skip


class Record(NamedTuple):
    """A run as its files tell it."""

    directory: Path
    config: Config
    fingerprint: dict[str, str]  # what the run rests on besides its knobs
    roles: list[dict]  # name and system prompt of each agent
    updates: list[dict]
    stages: list[dict]
    summary: dict  # evaluations so far, and summary.json once the run has ended

    @property
    def state(self) -> str:
        done = f"{len(self.stages)} of {self.config.stages} stages"
        if "return_final" not in self.summary:
            return f"{done}; not finished: {self.summary.get('stopped', 'the run goes on, or was killed')}"
        return f"{done}; held-out {log.held_out_score(self.summary, 'start', 'final')}"


def read(directory: Path) -> Record:
    """Raises UserError for a directory that is no run."""
    saved, config = read_json(directory / "config.json"), Config.load(directory / "config.json")
    lines: dict[str, list[dict]] = collections.defaultdict(list)
    for line in log.read_log(directory / "metrics.jsonl"):
        lines[line["kind"]].append(line)
    path = directory / "summary.json"
    known = dict(collections.ChainMap(*lines["evaluation"])) | (read_json(path) if path.exists() else {})
    unknown = [{"name": f"Agent {j + 1}", "system": "not known"} for j in range(config.agents)]
    about = directory, config, saved.get("fingerprint", {}), saved.get("roles_in_use", unknown)
    return Record(*about, lines["update"], lines["stage"], log.measured(known))


def require_matplotlib():
    """matplotlib, which only figures need. Raises UserError where it is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    return matplotlib


def render(what, *draws: Callable) -> bytes:
    """The figures that each `draw(figure, what)` fills, one below the other, as PNG."""
    matplotlib, buffer = require_matplotlib(), io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore"):  # a font may lack a sign
        figure = matplotlib.figure.Figure(figsize=(5.6, 3.5 * len(draws)), layout="constrained")
        for draw, part in zip(draws, figure.subfigures(len(draws)) if len(draws) > 1 else [figure]):
            draw(part, what)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def finish(figure, axes, **settings) -> None:
    """Settings; whole stages, at least one, on the x axis; the legend below, where it hides no curve."""
    axes.set(**settings, xlim=(None, max(1, axes.get_xlim()[1])))
    axes.locator_params(axis="x", integer=True)
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    figure.legend(loc="outside lower center", ncols=max(1, 80 // (longest + 8)), handletextpad=0.4)


def learning(figure, record: Record) -> None:
    """Mean return and accuracy on each stage's problems; the return on held-out ones with its interval."""
    axes, first = figure.subplots(), [u for u in record.updates if u["update"] == 0]
    axes.plot([u["return_mean"] for u in first], ".-", color=COLOURS[0], label="training problems")
    axes.plot([u["accuracy"] for u in first], "--", color=COLOURS[-1], label="accuracy there")
    measured = [(0, record.summary, "return_start"), (len(record.stages), record.summary, "return_final")]
    measured += [(s["stage"] + 1, s, "return_held_out") for s in record.stages]
    for at, line, key in measured:
        if (value := line.get(key)) is not None:
            low, high = line[f"{key}_ci"]
            off = [[max(0, value - low)], [max(0, high - value)]]
            axes.errorbar(at, value, off, fmt="D", mfc="none", capsize=3, color=COLOURS[1])
    axes.plot([], "D", mfc="none", color=COLOURS[1], label="held-out problems")
    finish(figure, axes, title="Mean return", ylim=(-0.02, 1.02), xlabel="stages done")


def trust_region(figure, record: Record) -> None:
    """KL of each update, as attempted (circles) and as kept (dots), and the radius (dashed)."""
    axes, config, delta = figure.subplots(), record.config, record.config.delta
    updates = [u for u in record.updates if "kl_after" in u]  # without those of an agent that took no turn
    per_stage = 1 + max(u["update"] for u in record.updates)
    top = max([u["kl_before"] for u in updates] + [delta] * math.isfinite(delta), default=0) or 1.0
    bottom = top / 1e3  # lower values stand on the axis
    for agent in sorted({u.get("agent", -1) for u in updates}):  # -1: all together
        own = [u for u in updates if u.get("agent", -1) == agent]
        x = [u["stage"] + u["update"] / per_stage for u in own]
        attempted, kept = ([max(u[key], bottom) for u in own] for key in ("kl_before", "kl_after"))
        colour = COLOURS[agent % len(COLOURS)]
        axes.plot(x, attempted, "o", color=colour, mfc="none", ms=4)
        name = "team" if agent < 0 else record.roles[agent]["name"][:24]
        axes.plot(x, kept, "o", color=colour, ms=3, label=name)
    if math.isfinite(delta):
        label = f"radius {delta:g}" + ", not enforced" * (config.kl != "hard")
        axes.axhline(delta, color=COLOURS[-1], ls="--", label=label)
    axes.set(yscale="log", ylim=(bottom * 0.8, 2 * top), ylabel=f"nats per {config.kl_unit}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finish(figure, axes, title="KL of each update; circles: attempted, dots: kept", xlabel="stage")


def save_summary(directory: Path) -> None:
    """Write summary.png of a run that has ended. No run fails for want of a picture: one line says why."""
    try:
        with replacing(directory / "summary.png") as aside:
            aside.write_bytes(render(read(directory), learning, trust_region))
    except Exception as error:
        log.say(f"no summary.png: {error}")
