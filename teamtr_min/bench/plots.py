"""The figures of a run's report, and the style of all figures.

The docstring of a figure is also its text for people who cannot see it. Stages count from 1, as on the
terminal. A team is as old as the stages behind it, which are 0 in stage 1.
"""

import io
import math
import textwrap
from collections.abc import Callable

import numpy as np

from teamtr_min.files import UserError

# Okabe and Ito's colours, which colour-blind people can tell apart, changed to show on light and dark paper.
COLOURS = ["#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#8a8f98"]
GREY = COLOURS[-1]


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
        "axes.axisbelow": True, "grid.color": "#dfe3e7", "axes.edgecolor": GREY, "axes.titlelocation": "left",
        "axes.titlesize": "medium", "legend.frameon": False, "savefig.dpi": 160,
        "text.parse_math": False,  # a role may be called $x$
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout="constrained")
        draw(figure, what)
        for axes in figure.axes:
            if axes.get_xlabel().startswith("stage"):
                axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def title(figure, text: str) -> None:
    figure.suptitle(text, x=0.015, ha="left", fontsize="large", fontweight="bold")


def name_ends(axes, ends: list[tuple[float, str, str]], apart: float, **how) -> None:
    """Write (height, text, colour) of each line right of the axes, beside its end; heights are in [0, 1]."""
    ends = sorted(ends)
    how |= {"xycoords": ("axes fraction", "data"), "va": "center"}
    for height, (_, text, colour) in zip(spread([height for height, *_ in ends], apart), ends):
        axes.annotate(text, (1.02, height), color=colour, **how)


def spread(heights: list[float], apart: float) -> list[float]:
    """Ascending heights in [0, 1]; neighbours that are less than `apart` give way, each by half."""
    heights = list(heights)
    for _ in range(100):
        for i in range(len(heights) - 1):
            give = max(0.0, apart - heights[i + 1] + heights[i]) / 2
            heights[i], heights[i + 1] = heights[i] - give, heights[i + 1] + give
        heights = [min(max(height, 0.0), 1.0) for height in heights]
    return heights


def duration(seconds: float) -> str:
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 10 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


# Of a run's report: `record` is report.Record, the run as its files tell it.


def score(figure, record) -> None:
    """The team on each stage's problems, and on held-out ones with 95% intervals; what teaches nothing."""
    figure.set_size_inches(8, 5)
    top, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    name, y, held_out = record.score, record.of_stages("return_mean"), record.held_out
    stages = np.arange(len(y))
    top.plot(stages, y, ".-", color=COLOURS[0], clip_on=False)
    ends = [(y[-1], f"{y[-1]:.3f} on each\nstage's problems", COLOURS[0])]
    if name == "return":
        right = record.of_stages("accuracy")
        top.plot(stages, right, "--", color=GREY, lw=1, clip_on=False)
        ends.append((right[-1], f"{right[-1]:.3f} accuracy", GREY))
    for at, (value, (low, high)) in held_out.items():
        off = [[max(0, value - low)], [max(0, high - value)]]
        top.errorbar(
            at, value, off, fmt="D", mfc="none", capsize=3, color=COLOURS[1], clip_on=False, zorder=3
        )
    if held_out:
        at = max(held_out)
        ends.append((held_out[at][0], f"{held_out[at][0]:.3f} held out,\nafter {at} stages", COLOURS[1]))
    name_ends(top, ends, apart=0.15)
    top.set(ylim=(0, 1.02), ylabel=f"mean {name}" if name == "return" else name)
    below.plot(stages, record.of_stages("zero_variance_groups"), color=GREY, clip_on=False)
    below.set_title("share of problems whose rollouts all have the same return, and teach nothing")
    below.set(ylim=(0, 1.02), xlim=(0, max(*stages, *held_out, 1)), xlabel="stages done")
    values = [value for value, _ in held_out.values()]
    where, values = ("Held-out", values) if len(values) > 1 else ("Training", y)
    title(figure, f"{where} {name} {values[0]:.3f} → {values[-1]:.3f}")


def kl(figure, record) -> None:
    """KL of each agent's updates, as attempted (circles) and as kept (dots), and the radius (dashed)."""
    config, updates = record.config, [u for u in record.updates if "kl_after" in u]
    agents = sorted({u.get("agent", -1) for u in record.updates})  # -1: all together
    columns, finite = min(len(agents), 4), [config.delta] if math.isfinite(config.delta) else []
    rows = math.ceil(len(agents) / columns)
    figure.set_size_inches(8, 1.4 + 2 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    values = [u[key] for u in updates for key in ("kl_before", "kl_after") if u[key] > 0] + finite
    top = max(values, default=1.0)
    bottom = max(min(values, default=0.1) / 2, top / 1e4)  # lower values stand on the axis
    for axes in panels[len(agents) :]:
        axes.set_visible(False)
    for agent, axes in zip(agents, panels):
        own = [u for u in updates if u.get("agent", -1) == agent]
        back, colour = [u for u in own if u["halvings"]], COLOURS[agent % len(COLOURS)]
        for key, some, how in (("before", back, {"mfc": "none", "ms": 4}), ("after", own, {"ms": 3})):
            axes.plot([u["stage"] + 1 for u in some], [max(u[f"kl_{key}"], bottom) for u in some], "o",
                      color=colour, **how)  # fmt: skip
        for radius in finite:
            axes.axhline(radius, color=GREY, lw=1.2, ls="--")
        name = "team" if agent < 0 else textwrap.shorten(record.names[agent], 24, placeholder="…")
        text = f"{len(back)} of {len(own)} taken back" if own else "took no turn"
        axes.set_title(f"{name}\n{text if config.kl == 'hard' or not own else ''}", fontsize="small")
        axes.set(yscale="log", ylim=(bottom * 0.8, 2 * top), xlim=(0.5, record.updates[-1]["stage"] + 1.5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("stage")
        axes.label_outer()
    figure.supylabel(f"nats per {config.kl_unit}", fontsize="medium")
    radius = f"radius {config.delta:g}{'' if config.kl == 'hard' else ', not enforced'} (dashed)"
    title(figure, f"KL of each update; {radius if finite else 'no radius'}; circles: attempted, dots: kept")


def seconds(figure, record) -> None:
    """Seconds of each stage by purpose, stacked; the totals stand beside them."""
    axes, below, spent = figure.subplots(), np.zeros(len(record.spent)), record.spent
    parts = {name: np.array([stage[name] for stage in spent]) for name in (spent or [{}])[0]}
    parts = {name: part for name, part in parts.items() if part.any()}
    for i, ((name, part), colour) in enumerate(zip(parts.items(), COLOURS)):
        axes.bar(np.arange(len(part)) + 1, part, 0.9, below, color=colour)
        below += part
        text = f"{name}\n{duration(part.sum())}"
        axes.annotate(text, (1.02, 0.1 + 0.2 * i), xycoords="axes fraction", color=colour, va="center")
    axes.set(xlabel="stage", ylabel="seconds", xlim=(0.4, len(spent) + 0.6))
    title(figure, f"Where {duration(record.seconds)} went")


FIGURES = [score, kl, seconds]
