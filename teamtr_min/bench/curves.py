"""The figures of the occupancy study. Bands and whiskers reach from the lowest to the highest seed."""

import numpy as np

from teamtr_min.bench.plots import COLOURS, GREY, title

STYLE = {  # freshness is the colour, the radius the line
    "fresh, radius": (COLOURS[0], "-"),
    "fresh, no radius": (COLOURS[0], ":"),
    "stale, radius": (COLOURS[1], "-"),
    "stale, no radius": (COLOURS[1], ":"),
    "joint, radius": (GREY, "--"),
}


def two_by_two(figure, chosen: dict[str, dict[str, dict]]) -> None:
    """Accuracy of the four arms over rollouts, at the common learning rate and at each one's own best."""
    figure.set_size_inches(9.5, 4.2)
    for axes, (panel, rows) in zip(figure.subplots(1, 2, sharey=True), chosen.items()):
        ends = []
        for name, row in rows.items():
            colour, line = STYLE[name]
            stages = min(map(len, row["curve"]))  # all seeds got that far
            if stages == 0:
                continue
            curve = np.array([one[:stages] for one in row["curve"]])  # (seeds, stages)
            x = np.array(row["curve_rollouts"])[:stages]
            axes.fill_between(x, curve.min(0), curve.max(0), color=colour, alpha=0.15, lw=0)
            axes.plot(x, curve.mean(0), color=colour, ls=line, lw=1.6)
            ends.append((curve.mean(0)[-1], f"{name}\nlr {row['flags']['lr']:g}", colour))
        place = -1.0
        for y, text, colour in sorted(ends):  # no two labels closer than their height
            place = max(y, place + 0.115)
            axes.annotate(
                text,
                (1.02, place),
                xycoords=("axes fraction", "data"),
                color=colour,
                va="center",
                size="small",
            )
        axes.set(title=panel, ylim=(0, 1), xlabel="training rollouts", xlim=(0, None))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=4)
    figure.axes[0].set_ylabel("accuracy on each stage's problems")
    title(figure, "Fresh or stale rollouts, with and without the radius, at equal rollouts")


def learning_rate(figure, rows: list[dict]) -> None:
    """Final held-out accuracy of each arm against the learning rate."""
    figure.set_size_inches(7.5, 4.2)
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        colour, line = STYLE[name]
        final = np.array([row["accuracy_final"] for row in own], dtype=float)  # (rates, seeds); NaN: diverged
        x = np.array([row["flags"]["lr"] for row in own])
        axes.fill_between(x, final.min(1), final.max(1), color=colour, alpha=0.12, lw=0)
        axes.plot(x, final.mean(1), color=colour, ls=line, marker="o", markersize=4, label=name)
    axes.axhline(rows[0]["accuracy_start"][0], color=GREY, lw=1)
    axes.annotate("before training", (x[0], rows[0]["accuracy_start"][0]), (0, 3), textcoords="offset points",
                  color=GREY, size="small")  # fmt: skip
    axes.set(xscale="log", ylim=(0, 1), xlabel="peak learning rate", ylabel="final held-out accuracy")
    axes.set_xticks(x, [f"{lr:g}" for lr in x])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small", labelcolor="linecolor", loc="upper left", ncols=2)
    title(figure, "What a learning rate costs with and without the radius")


def team_size(figure, rows: list[dict]) -> None:
    """Stale gap and occupancy shift of a stage against the number of agents."""
    figure.set_size_inches(9.5, 3.8)
    for axes, key, text in zip(
        figure.subplots(1, 2),
        ("delta_stale", "occupancy_shift"),
        ("stale gap: mean |L_seq - L_stale|", "occupancy shift D_occ"),
    ):
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [row for row in rows if row["name"] == name]
            colour, line = STYLE[name]
            n = np.array([row["flags"]["agents"] for row in own])
            values = np.array([row[key] for row in own], dtype=float)  # (sizes, seeds)
            axes.fill_between(n, values.min(1), values.max(1), color=colour, alpha=0.12, lw=0)
            axes.plot(n, values.mean(1), color=colour, ls=line, marker="o", markersize=4, label=name)
        axes.set(xscale="log", yscale="log", xlabel="agents", title=text)
        axes.set_xticks(n, [str(count) for count in n])
        low, high = axes.get_ylim()
        ticks = [m * 10.0**e for e in range(-6, 1) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
    figure.axes[0].legend(frameon=False, fontsize="small", labelcolor="linecolor")
    title(figure, "How far a team drifts from its stage's first rollouts")
