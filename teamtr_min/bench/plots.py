"""All figures: of a run's report, of the occupancy study, of the hidden convention; drawn in one style.

The docstring of each is also its text for those who cannot see it. Stages count from 1, as on the terminal; a
team is as old as the stages behind it, which is 0 in stage 1.
"""

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


def require_matplotlib():
    """matplotlib, which figures alone need. A study asks for it before the hours that its figures show."""
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    return matplotlib


def render(draw: Callable, what, paper: str = "light") -> bytes:
    """The figure that `draw(figure, what)` fills, as PNG, on light or on dark paper."""
    matplotlib = require_matplotlib()
    background, ink, line = PAPERS[paper]
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor",
                           "ytick.labelcolor"), ink)  # fmt: skip
    style |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), line)
    style |= {
        "figure.facecolor": background, "axes.facecolor": background, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "axes.titlelocation": "left", "axes.titlesize": "medium", "legend.frameon": False,
        "legend.fontsize": "small", "legend.labelcolor": "linecolor", "savefig.dpi": 160,
        "text.parse_math": False,  # a role may be called $x$
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout="constrained")
        draw(figure, what)
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


# A run's report. `record` is report.Record, the run as its files tell it.


def accuracy(figure, record) -> None:
    """Accuracy of the team over the stages, on each stage's problems and on held-out ones."""
    axes, summary = figure.subplots(), record.summary
    firsts = [u for u in record.updates if u["update"] == 0]
    x, y = record.numbers("stage", firsts), record.numbers("accuracy", firsts)
    measured = [(s["stage"] + 1, s.get("accuracy_held_out")) for s in record.stages]
    measured.append((len(record.stages), summary.get("accuracy_final")))
    measured.insert(0, (0, summary.get("accuracy_start")))
    held_out = {stage: value for stage, value in measured if value is not None}
    axes.plot(x, y, color=COLOURS[0], marker="o", markersize=3, lw=1.5, clip_on=False)
    axes.plot(held_out.keys(), held_out.values(), "D", color=COLOURS[1], markersize=7, markeredgewidth=1.8,
              markerfacecolor="none", clip_on=False, zorder=3)  # fmt: skip
    ends = [(y[-1], f"{y[-1]:.3f} on each\nstage's problems", COLOURS[0])]
    if held_out:
        last, value = max(held_out.items())
        text = f"{value:.3f} held out"
        if last >= x[-1]:
            ends.append((value, text, COLOURS[1]))
        else:
            axes.annotate(text, (last, value), (9, -7), textcoords="offset points", color=COLOURS[1])
    name_ends(axes, ends, apart=0.16)
    axes.set(xlim=(0, max(*x, *held_out, 1)), ylim=(0, 1.02), xlabel="stages done",
             ylabel="share of rollouts with return 1")  # fmt: skip
    if len(held_out) > 1:
        title(figure, f"Held-out accuracy {held_out[min(held_out)]:.3f} → {value:.3f}")
    else:
        title(figure, f"Accuracy on each stage's problems {y[0]:.3f} → {y[-1]:.3f}")


def kl(figure, record) -> None:
    """KL of each agent's updates, as attempted and as kept, against the radius, one panel per agent."""
    joint, delta = record.config.occupancy == "joint", record.config.delta
    n = len(record.config.update_groups)
    columns = n if n <= 4 else min(4, math.ceil(n / 2))
    rows = math.ceil(n / columns)
    figure.set_size_inches(8, 1.4 + 2 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    kept, attempted = record.numbers("kl_after"), record.numbers("kl_before")
    finite = [delta] if math.isfinite(delta) else []
    top = max([*attempted[attempted > 0], *finite], default=1.0)
    bottom = min([*kept[kept > 0], top / 5]) / 2
    bottom = max(bottom, LOWEST * min([*finite, top]))
    backtracked = 0
    for axes in panels[n:]:
        axes.set_visible(False)
    for agent, axes in enumerate(panels[:n]):
        own = [u for u in record.updates if joint or u["agent"] == agent]
        own = [u for u in own if u.get("kl_after") is not None]
        x = record.numbers("stage", own) + 1
        before, after = (record.numbers(f"kl_{when}", own).clip(bottom) for when in ("before", "after"))
        back = record.numbers("halvings", own) > 0
        colour, backtracked = COLOURS[agent % len(COLOURS)], backtracked + back.sum()
        if len(own):  # the layout cannot measure unclipped dots of which there are none
            axes.vlines(x[back], after[back], before[back], color=colour, lw=0.8, alpha=0.6)
            axes.plot(x[back], before[back], "o", markersize=4, markerfacecolor="none", color=colour)
            axes.plot(x, after, "o", markersize=3, color=colour, clip_on=False)
        if finite:
            axes.axhline(delta, color=GREY, lw=1.2, ls="--")
        name = "team" if joint else textwrap.shorten(record.names[agent], 24, placeholder="…")
        share = f"{back.sum()} of {len(own)} backtracked" if math.isfinite(record.config.radius) else ""
        axes.set_title(f"{name}\n{share if len(own) else 'took no turn'}".strip(), fontsize="small")
        axes.set(yscale="log", ylim=(bottom, 2 * top), xlim=(0.5, record.updates[-1]["stage"] + 1.5))
        between = "25" if top / bottom < 50 else ""  # few powers of ten in sight: also name 2 and 5 times one
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda v, _, named=between: f"{v:g}" if f"{v:e}"[0] in named else "")
        axes.tick_params(which="minor", length=0)
        if (after <= bottom).any():
            low = f"on the axis: below {bottom:.0e}"
            axes.text(0.03, 0.03, low, transform=axes.transAxes, fontsize="x-small")
        if agent + columns >= n:
            axes.set_xlabel("stage")
            axes.tick_params(labelbottom=True)
    figure.supylabel(f"nats per {record.config.kl_unit}", fontsize="medium")
    kind = "radius {:g} (dashed)" if record.config.kl == "hard" else "{:g} (dashed) not enforced"
    region = kind.format(delta) if finite else "no radius"
    title(figure, f"KL of each update, {region}{'; circles: attempted, dots: kept' if backtracked else ''}")


def returns(figure, record) -> None:
    """Mean return of the rollouts, and the share of zero-variance groups: all rollouts with one return."""
    figure.set_size_inches(8, 4.6)
    sampled = [u for u in record.updates if u["rollouts"]]
    stage = record.numbers("stage", sampled) + 1
    x = stage - 0.5 + (record.numbers("update", sampled) + 0.5) / len(record.config.update_groups)
    stages = np.unique(stage)
    for axes, key, text in zip(figure.subplots(2, sharex=True), ("return_mean", "zero_variance_groups"), (
        "Mean return", "Share of zero-variance groups: all rollouts have the same return, and teach nothing",
    )):  # fmt: skip
        y = record.numbers(key, sampled)
        axes.plot(x, y, "o", color=COLOURS[0], markersize=3, alpha=0.45, markeredgewidth=0)
        means = [y[stage == s].mean() for s in stages]
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
    was = evaluated = 0.0
    for s in record.stages:
        i, so_far = s["stage"], s.get("seconds_evaluation", 0.0)
        parts["evaluation"][i] = so_far - evaluated
        parts["the rest"][i] = max(0.0, s["seconds"] - was - sum(part[i] for part in parts.values()))
        was, evaluated = s["seconds"], so_far
    totals = {name: part.sum() for name, part in parts.items()}
    totals["evaluation"] = record.summary.get("seconds_evaluation", totals["evaluation"])
    known = sum(totals.values()) - totals["the rest"]
    whole = max(record.seconds, known)
    totals["the rest"] = whole - known

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
    for part, colour in zip(parts.values(), colours):
        right.bar(np.arange(count) + 1, part, 0.9, below, color=colour)
        below += part
    right.set(xlabel="stage", ylabel="seconds", title="each stage", xlim=(0.4, count + 0.6))
    title(figure, f"Where {duration(whole)} went")


FIGURES = [accuracy, kl, returns, seconds]  # of a report


def duration(seconds: float) -> str:
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 10 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def held_out_curves(figure, curves: dict[str, list[list[tuple[int, float]]]]) -> None:
    """Held-out accuracy over training rollouts: each method's mean over seeds, and every seed's points."""
    axes, ends, furthest = figure.subplots(), [], 0
    for (name, runs), colour in zip(curves.items(), COLOURS):
        for run in runs:
            axes.plot(*zip(*run), "o", color=colour, markersize=3, alpha=0.5, clip_on=False)
        x = [rollouts for rollouts, _ in runs[0]]
        mean = np.mean([[value for _, value in run] for run in runs], axis=0)
        axes.plot(x, mean, color=colour, lw=2, clip_on=False)
        ends.append((mean[-1], f"{name}\n{mean[-1]:.3f}, {len(runs)} seed{'s' * (len(runs) > 1)}", colour))
        furthest = max(furthest, x[-1])
    name_ends(axes, ends, apart=0.14, size="small")
    axes.set(xlim=(0, furthest), ylim=(0, 1), xlabel="training rollouts", ylabel="held-out accuracy")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    title(figure, "A team of two SmolLM2-135M on word problems, after its warm start")


# The occupancy study. Bands reach from the lowest to the highest seed.

STYLE = {  # occupancy is the colour, the radius the line
    "fresh, radius": (COLOURS[0], "-"),
    "fresh, no radius": (COLOURS[0], ":"),
    "stale, radius": (COLOURS[1], "-"),
    "stale, no radius": (COLOURS[1], ":"),
    "joint, radius": (GREY, "--"),
}


def band(axes, name: str, x, values, **how) -> None:
    """An arm's mean over seeds and the band around it; values (len(x), seeds), None for what diverged."""
    colour, line = STYLE[name]
    values = np.array(values, dtype=float)
    axes.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.13, lw=0)
    axes.plot(x, values.mean(1), color=colour, ls=line, label=name, **how)


def two_by_two(figure, panels: dict[str, dict[str, dict]]) -> None:
    """Accuracy of the four arms over rollouts, at the common learning rate and at each one's own best."""
    figure.set_size_inches(9.5, 4.2)
    for axes, (panel, rows) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        ends = []
        for name, row in rows.items():
            curves = list(zip(*row["curve"]))  # (stages, seeds), as far as all seeds got
            if curves:
                band(axes, name, row["curve_rollouts"][: len(curves)], curves)
                text = f"{name}\nlr {row['flags']['lr']:g}"
                ends.append((np.mean(curves[-1]), text, STYLE[name][0]))
        name_ends(axes, ends, apart=0.115, size="small")
        axes.set(title=panel, ylim=(0, 1), xlabel="training rollouts", xlim=(0, None))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=4)
    figure.axes[0].set_ylabel("accuracy on each stage's problems")
    title(figure, "Fresh or stale rollouts, with and without the radius, at equal rollouts")


def learning_rate(figure, arms: dict[str, list[dict]]) -> None:
    """Final held-out accuracy of each arm against the learning rate."""
    figure.set_size_inches(7.5, 4.2)
    axes = figure.subplots()
    for name, rows in arms.items():
        rates = [row["flags"]["lr"] for row in rows]
        band(axes, name, rates, [row["accuracy_final"] for row in rows], marker="o", markersize=4)
    start = rows[0]["accuracy_start"][0]
    axes.axhline(start, color=GREY, lw=1)
    axes.annotate("before training", (rates[0], start), (0, 3), textcoords="offset points",
                  color=GREY, size="small")  # fmt: skip
    axes.set(xscale="log", ylim=(0, 1), xlabel="peak learning rate", ylabel="final held-out accuracy")
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.minorticks_off()
    axes.legend(loc="upper left", ncols=2)
    title(figure, "What a learning rate costs with and without the radius")


def team_size(figure, arms: dict[str, list[dict]]) -> None:
    """Stale gap and occupancy shift of a stage against the number of agents."""
    figure.set_size_inches(9.5, 3.8)
    texts = {"delta_stale": "stale gap: mean |L_seq - L_stale|", "occupancy_shift": "occupancy shift D_occ"}
    for axes, (key, text) in zip(figure.subplots(1, 2), texts.items()):
        for name, rows in arms.items():
            sizes = [row["flags"]["agents"] for row in rows]
            band(axes, name, sizes, [row[key] for row in rows], marker="o", markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="agents", title=text)
        axes.set_xticks(sizes, map(str, sizes))
        low, high = axes.get_ylim()
        ticks = [m * 10.0**e for e in range(-6, 1) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
    figure.axes[0].legend()
    title(figure, "How far a team drifts from its stage's first rollouts")


# The hidden convention.


def agreement_map(figure, what: tuple[dict[str, np.ndarray], tuple, tuple]) -> None:
    """How much a team loses by stale occupancy, over radius and team size, without noise and with it."""
    losses, teams, deltas = what  # name -> (teams, deltas)
    figure.set_size_inches(10, 3.8)
    panels = figure.subplots(1, len(losses), sharey=True)
    for axes, (name, loss) in zip(panels, losses.items()):
        image = axes.imshow(loss, vmin=-0.7, vmax=0.7, cmap="RdBu_r", origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(loss):
            text, ink = f"{round(value, 2) + 0:.2f}", "white" if abs(value) > 0.4 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize="small", color=ink)
        axes.set_xticks(range(len(deltas)), [f"{delta:g}" for delta in deltas])
        axes.set_yticks(range(len(teams)), map(str, teams))
        axes.set(title=name, xlabel="radius delta, nats")
        axes.grid(False)
        axes.tick_params(length=0)
    panels[0].set_ylabel("agents")
    figure.colorbar(image, ax=panels, label="agreement, fresh minus stale").outline.set_visible(False)
    title(figure, "What stale occupancy costs in agreement")


def habit_curves(figure, runs: list[tuple[str, dict[str, np.ndarray]]]) -> None:
    """Each agent's habit at the start of each stage, one panel per run.

    Where the return lies above what independent habits would give, readers see through the code.
    """
    columns = min(len(runs), 3)
    rows = math.ceil(len(runs) / columns)
    figure.set_size_inches(max(4 * columns, 5.5), 1 + 2.4 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(runs) :]:
        axes.set_visible(False)
    for axes, (name, run) in zip(panels.flat, runs):
        for j, habit in enumerate(run["habits"].T):
            axes.plot(habit, marker=".", color=COLOURS[j], label="ABCD"[j])
        axes.plot(run["return"], color=GREY, ls="--", label="return")
        axes.plot(run["explained"], color=GREY, ls=":", label="by the habits alone")
        axes.axhline(0.5, color=GREY, lw=0.8, alpha=0.5, zorder=0)
        axes.set(title=name, xlabel="stages done", ylim=(-0.03, 1.03))
    for axes in panels[:, 0]:
        axes.set_ylabel("share of code 1")
    fullest = max(panels.flat, key=lambda axes: len(axes.lines))
    figure.legend(*fullest.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    title(figure, "Each agent's habit, and the return")
