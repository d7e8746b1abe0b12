"""The figures of a run's report, and the style of all figures.

The docstring of a figure is also its text for people who cannot see it. Legends stand beside the axes.
"""

import io
import math
from collections.abc import Callable

from teamtr_min.files import UserError

# Okabe and Ito's colours, which colour-blind people can tell apart; the last is a grey.
COLOURS = ["#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#8a8f98"]


def require_matplotlib():
    """matplotlib, which only figures need. Raises UserError where it is not installed."""
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    return matplotlib


def render(draw: Callable, what) -> bytes:
    """The figure that `draw(figure, what)` fills, as PNG."""
    matplotlib = require_matplotlib()
    style = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
        "axes.axisbelow": True, "grid.color": "#dfe3e7", "axes.edgecolor": COLOURS[-1], "savefig.dpi": 160,
        "axes.titlelocation": "left", "axes.titlesize": "medium", "axes.titleweight": "bold",
        "legend.frameon": False, "text.parse_math": False,  # a role may be called $x$
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout="constrained")
        draw(figure, what)
        for axes in figure.axes:
            if axes.get_xlabel().startswith("stage"):
                axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def beside(axes) -> None:
    """Put the legend right of the axes, where it hides no curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


# Of a run's report: `record` is report.Record, the run as its files tell it.


def score(figure, record) -> None:
    """The team on each stage's problems, and on held-out ones with 95% intervals; what teaches nothing."""
    figure.set_size_inches(8, 5)
    top, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    name, y, held_out = record.score, record.of_stages("return_mean"), record.held_out
    stages = range(len(y))
    top.plot(stages, y, ".-", color=COLOURS[0], label=f"on each stage's problems,\n{y[-1]:.3f} on the last")
    if name == "return":
        top.plot(stages, record.of_stages("accuracy"), "--", color=COLOURS[-1], label="accuracy there")
    for at, (value, (low, high)) in held_out.items():
        off = [[max(0, value - low)], [max(0, high - value)]]
        label = f"held out,\n{value:.3f} after {at} stages" if at == max(held_out) else None
        top.errorbar(at, value, off, fmt="D", mfc="none", capsize=3, color=COLOURS[1], label=label)
    first, last = y[0], y[-1]
    if len(held_out) > 1:
        first, last = held_out[0][0], held_out[max(held_out)][0]
    top.set_title(f"{'Held-out' if len(held_out) > 1 else 'Training'} {name} {first:.3f} → {last:.3f}")
    top.set(ylim=(-0.02, 1.02), ylabel=f"mean {name}" if name == "return" else name)
    beside(top)
    below.plot(stages, record.of_stages("zero_variance_groups"), color=COLOURS[-1])
    below.set_title("Share of problems whose rollouts all have the same return, and teach nothing")
    below.set(ylim=(-0.02, 1.02), xlabel="stages done")


def kl(figure, record) -> None:
    """KL of each update, as attempted (circles) and as kept (dots), and the radius (dashed)."""
    axes, config, delta = figure.subplots(), record.config, record.config.delta
    updates = [u for u in record.updates if "kl_after" in u]  # without those of an agent that took no turn
    per_stage = 1 + max(u["update"] for u in record.updates)
    values = [u[key] for u in updates for key in ("kl_before", "kl_after") if u[key] > 0]
    top = max([*values, delta] if math.isfinite(delta) else values, default=1.0)
    bottom = max(min(values, default=0.1) / 2, top / 1e4)  # lower values stand on the axis
    for agent in sorted({u.get("agent", -1) for u in updates}):  # -1: all together
        own = [u for u in updates if u.get("agent", -1) == agent]
        back, colour = [u for u in own if u["halvings"]], COLOURS[agent % len(COLOURS)]
        taken = f", {len(back)} of {len(own)} taken back" if config.kl == "hard" else ""
        label = ("team" if agent < 0 else record.names[agent][:24]) + taken
        for key, some, how in (("before", back, {"mfc": "none", "ms": 4}), ("after", own, {"ms": 3})):
            x = [u["stage"] + 0.5 + (u["update"] + 0.5) / per_stage for u in some]
            y = [max(u[f"kl_{key}"], bottom) for u in some]
            axes.plot(x, y, "o", color=colour, label=label if key == "after" else None, **how)
    if math.isfinite(delta):
        enforced = "" if config.kl == "hard" else ", not enforced"
        axes.axhline(delta, color=COLOURS[-1], ls="--", label=f"radius {delta:g}{enforced}")
    axes.set(yscale="log", ylim=(bottom * 0.8, 2 * top), xlabel="stage", ylabel=f"nats per {config.kl_unit}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("KL of each update; circles: attempted, dots: kept")
    beside(axes)


FIGURES = [score, kl]


def duration(seconds: float) -> str:
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 10 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
