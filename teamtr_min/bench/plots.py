"""The figures of a run's report, and the style of all figures.

The docstring of a figure is also its text for people who cannot see it. Legends stand beside the axes.
"""

import io
import math
from collections.abc import Callable

from teamtr_min.files import UserError

# Okabe and Ito's colours, which colour-blind people can tell apart; the last is a grey.
COLOURS = ["#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#8a8f98"]
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": "#dfe3e7", "axes.edgecolor": COLOURS[-1], "savefig.dpi": 160,
    "axes.titlelocation": "left", "axes.titlesize": "medium", "axes.titleweight": "bold",
    "legend.frameon": False, "text.parse_math": False,  # a role may be called $x$
}  # fmt: skip


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


# Of a run's report: `record` is report.Record, the run as its files tell it.


def score(figure, record) -> None:
    """The team on each stage's problems, and on held-out ones with 95% intervals; what teaches nothing."""
    axes, y, held_out = figure.subplots(), record.of_stages("return_mean"), record.held_out
    axes.plot(y, ".-", color=COLOURS[0], label=f"on each stage's problems,\n{y[-1]:.3f} on the last")
    if record.score == "return":
        axes.plot(record.of_stages("accuracy"), "--", color=COLOURS[-1], label="accuracy there")
    if held_out:
        values = [value for value, _ in held_out.values()]
        off = [[max(0, value - low), max(0, high - value)] for value, (low, high) in held_out.values()]
        label = f"held out,\n{values[-1]:.3f} after {max(held_out)} stages"
        how = {"fmt": "D", "mfc": "none", "capsize": 3, "color": COLOURS[1]}
        axes.errorbar([*held_out], values, [*zip(*off)], label=label, **how)
    same = "share of problems whose\nrollouts all have the same return"
    axes.plot(record.of_stages("zero_variance_groups"), ":", color=COLOURS[-1], label=same)
    finish(axes, title=f"Mean {record.score}", ylim=(-0.02, 1.02), xlabel="stages done")


def kl(figure, record) -> None:
    """KL of each update, as attempted (circles) and as kept (dots), and the radius (dashed)."""
    axes, config, delta = figure.subplots(), record.config, record.config.delta
    updates = [u for u in record.updates if "kl_after" in u]  # without those of an agent that took no turn
    per_stage = 1 + max(u["update"] for u in record.updates)
    top = max([u["kl_before"] for u in updates] + [delta] * math.isfinite(delta), default=0.0) or 1.0
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


FIGURES = [score, kl]
