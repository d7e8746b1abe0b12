"""The four figures of a report: accuracy, KL against the radius, return, time.

The docstring of each is also its text for those who cannot see it. Stages count from 1, as on the terminal; a
team is as old as the stages behind it, which is 0 in stage 1.
"""

import importlib
import io
import math
import textwrap
from collections.abc import Callable

import numpy as np

from teamtr_min.files import UserError

# Okabe and Ito's colours, told apart by colour-blind eyes, changed where dark or light paper would hide them.
COLOURS = ["#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#8a8f98"]
GREY = COLOURS[-1]
PAPERS = {"light": ("#ffffff", "#1d2329", "#dfe3e7"), "dark": ("#15191d", "#e4e8ec", "#333b43")}
LOWEST = 1e-3  # of the radius, or of the largest KL without one: lower values stand on the axis


def render(draw: Callable, record, paper: str) -> bytes:
    """One figure as PNG, on light or on dark paper."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        Figure = importlib.import_module("matplotlib.figure").Figure
        importlib.import_module("matplotlib.ticker")
    except ImportError:
        raise UserError("the figures of a report need matplotlib: pip install matplotlib") from None
    background, ink, line = PAPERS[paper]
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor",
                           "ytick.labelcolor"), ink)  # fmt: skip
    style |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), line)
    style |= {
        "figure.facecolor": background, "axes.facecolor": background, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "axes.titlelocation": "left", "axes.titlesize": "medium", "savefig.dpi": 160,
        "text.parse_math": False,  # a role may be called $x$
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        draw(figure, record)
        for axes in figure.axes:
            if axes.get_xlabel().startswith("stage"):
                count = max(4, int(16 * axes.get_position().width))
                ticks = matplotlib.ticker.MaxNLocator(count, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1)
                axes.xaxis.set_major_locator(ticks)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def title(figure, text: str) -> None:
    figure.suptitle(text, x=0.015, ha="left", fontsize="large", fontweight="bold")


def accuracy(figure, record) -> None:
    """Accuracy of the team over the stages, on each stage's problems and on held-out ones."""
    axes, done = figure.subplots(), len(record.stages)
    firsts = [u for u in record.updates if u["update"] == 0]
    held_out = {0: record.summary.get("accuracy_start")}
    held_out |= {s["stage"] + 1: s["accuracy_held_out"] for s in record.stages}
    if record.summary.get("accuracy_final") is not None:
        held_out[done] = record.summary["accuracy_final"]
    held_out = {x: y for x, y in held_out.items() if y is not None}
    x, y = record.numbers("stage", firsts), record.numbers("accuracy", firsts)
    axes.plot(x, y, color=COLOURS[0], marker="o", markersize=3, lw=1.5, clip_on=False)
    axes.plot(held_out.keys(), held_out.values(), "D", color=COLOURS[1], markersize=7, markeredgewidth=1.8,
              markerfacecolor="none", clip_on=False, zorder=3)  # fmt: skip
    ends = [(y[-1], f"{y[-1]:.3f} on each\nstage's problems", COLOURS[0])]
    if held_out and max(held_out) >= x[-1]:
        last = held_out[max(held_out)]
        ends = sorted([*ends, (last, f"{last:.3f} held out", COLOURS[1])])
        middle, apart = (last + y[-1]) / 2, max(abs(last - y[-1]), 0.16)  # or the labels would overlap
        middle = min(max(middle, apart / 2), 1 - apart / 2)
        ends = [(middle + side * apart / 2, *end[1:]) for side, end in zip((-1, 1), ends)]
    elif held_out:
        last = max(held_out.items())
        axes.annotate(f"{last[1]:.3f} held out", last, (9, -7), textcoords="offset points", color=COLOURS[1])
    for place, text, colour in ends:
        axes.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), color=colour, va="center")
    axes.set(xlim=(0, max(*x, *held_out, 1)), ylim=(0, 1.02), xlabel="stages done",
             ylabel="share of rollouts with return 1")  # fmt: skip
    if len(held_out) > 1:
        title(figure, f"Held-out accuracy {held_out[min(held_out)]:.3f} → {held_out[max(held_out)]:.3f}")
    else:
        title(figure, f"Accuracy on each stage's problems {y[0]:.3f} → {y[-1]:.3f}")


def kl(figure, record) -> None:
    """KL of each agent's updates, as attempted and as kept, against the radius, one panel per agent."""
    joint, delta = record.config.occupancy == "joint", record.config.delta
    n = len(record.config.updates)
    columns = n if n <= 4 else min(4, math.ceil(n / 2))
    rows = math.ceil(n / columns)
    figure.set_size_inches(8, 1.4 + 2 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    kept, tried = (record.numbers(f"kl_{when}") for when in ("after", "before"))
    finite = [delta] if math.isfinite(delta) else []
    top = max([*tried[tried > 0], *finite], default=1.0)
    bottom = min([*kept[kept > 0], top / 5]) / 2
    bottom = max(bottom, LOWEST * min([*finite, top]))
    brought_back = 0
    for axes in panels[n:]:
        axes.set_visible(False)
    for agent, axes in enumerate(panels[:n]):
        own = [u for u in record.updates if (joint or u["agent"] == agent) and u["kl_after"] is not None]
        x = record.numbers("stage", own) + 1
        before, after = (record.numbers(f"kl_{when}", own).clip(bottom) for when in ("before", "after"))
        back = record.numbers("halvings", own) > 0
        colour, brought_back = COLOURS[agent % len(COLOURS)], brought_back + back.sum()
        if len(own):  # the layout cannot measure unclipped dots of which there are none
            axes.vlines(x[back], after[back], before[back], color=colour, lw=0.8, alpha=0.6)
            axes.plot(x[back], before[back], "o", markersize=4, markerfacecolor="none", color=colour)
            axes.plot(x, after, "o", markersize=3, color=colour, clip_on=False)
        if math.isfinite(delta):
            axes.axhline(delta, color=GREY, lw=1.2, ls="--")
        name = "team" if joint else textwrap.shorten(record.names[agent], 24, placeholder="…")
        share = f"{back.sum()} of {len(own)} brought back" if math.isfinite(record.config.radius) else ""
        axes.set_title(f"{name}\n{share if len(own) else 'silent'}".strip(), fontsize="small")
        axes.set(yscale="log", ylim=(bottom, 2 * top), xlim=(0.5, record.updates[-1]["stage"] + 1.5))
        between = "25" if top / bottom < 50 else ""  # few powers of ten in sight: also name 2 and 5 times one
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda v, _, named=between: f"{v:g}" if f"{v:e}"[0] in named else "")
        axes.tick_params(which="minor", length=0)
        if (after <= bottom).any():
            axes.text(
                0.03, 0.03, f"on the axis: below {bottom:.0e}", transform=axes.transAxes, fontsize="x-small"
            )
        if agent + columns >= n:
            axes.set_xlabel("stage")
            axes.tick_params(labelbottom=True)
    figure.supylabel(f"nats per {record.config.kl_unit}", fontsize="medium")
    attempted = "" if not brought_back else "; circles: attempted, dots: kept"
    region = (
        f"radius {delta:g} (dashed)" if record.config.kl == "hard" else f"{delta:g} (dashed) not enforced"
    )
    title(figure, f"KL of each update, {'no radius' if math.isinf(delta) else region}{attempted}")


def returns(figure, record) -> None:
    """Mean return of the rollouts, and the share of groups in which all rollouts had the same."""
    figure.set_size_inches(8, 4.6)
    sampled = [u for u in record.updates if u["rollouts"]]
    stage = record.numbers("stage", sampled) + 1
    x = stage - 0.5 + (record.numbers("update", sampled) + 0.5) / len(record.config.updates)
    stages = np.unique(stage)
    for axes, key, text in zip(figure.subplots(2, sharex=True), ("return_mean", "constant_groups"), (
        "Mean return", "Share of groups whose rollouts all had the same return, which teach nothing",
    )):  # fmt: skip
        y = record.numbers(key, sampled)
        means = [y[stage == s].mean() for s in stages]
        axes.plot(x, y, "o", color=COLOURS[0], markersize=3, alpha=0.45, markeredgewidth=0)
        axes.plot(stages, means, color=COLOURS[0], marker="o", markersize=3, lw=1.5)
        axes.set(title=text, ylim=(-0.02, 1.02))
    axes.set(xlabel="stage", xlim=(0.5, stages[-1] + 0.5))
    title(figure, "Return of the rollouts before each update (pale), and each stage's mean")


def seconds(figure, record) -> None:
    """Seconds of sampling, training, evaluation and the rest, in total and for each stage."""
    count = 1 + max(u["stage"] for u in record.updates)
    parts = {name: np.zeros(count) for name in ("sampling", "training", "evaluation", "the rest")}
    for u in record.updates:
        parts["sampling"][u["stage"]] += u["seconds_sampling"]
        parts["training"][u["stage"]] += u["seconds_training"]
    was, evaluated = 0.0, 0.0
    for s in record.stages:
        i = s["stage"]
        parts["evaluation"][i] = s.get("seconds_evaluation", 0.0) - evaluated
        spent = sum(part[i] for part in parts.values())
        parts["the rest"][i] = max(0.0, s["seconds"] - was - spent)
        was, evaluated = s["seconds"], s.get("seconds_evaluation", 0.0)
    totals = {name: part.sum() for name, part in parts.items()}
    totals["evaluation"] = record.summary.get("seconds_evaluation", totals["evaluation"])
    whole = max(record.seconds, sum(totals.values()) - totals["the rest"])
    totals["the rest"] = whole - sum(totals.values()) + totals["the rest"]

    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    colours = [COLOURS[0], COLOURS[1], COLOURS[2], GREY]
    bars = left.barh(list(totals), totals.values(), 0.5, color=colours)
    left.bar_label(bars, [f"{value / whole:.0%}  {duration(value)}" for value in totals.values()], padding=4)
    left.invert_yaxis()
    left.set(xticks=[], xlim=(0, 1.9 * max(totals.values())), title="in total")
    left.grid(False)
    left.spines["bottom"].set_visible(False)
    left.tick_params(length=0)
    below = np.zeros(count)
    for (_, part), colour in zip(parts.items(), colours):
        right.bar(np.arange(count) + 1, part, 0.9, below, color=colour)
        below += part
    right.set(xlabel="stage", ylabel="seconds", title="each stage", xlim=(0.4, count + 0.6))
    title(figure, f"Where {duration(whole)} went")


FIGURES = [accuracy, kl, returns, seconds]


def duration(seconds: float) -> str:
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 10 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
