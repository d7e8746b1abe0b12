"""What a run says on the terminal."""

import math
from pathlib import Path

from tqdm import tqdm

from teamtr_min.config import Config
from teamtr_min.run.system import size
from teamtr_min.team import Team


class Console:
    """Lines above a bar of updates, which is quiet when the output is no terminal."""

    def __init__(self, updates: int):
        self.bar = tqdm(total=updates, unit="update", disable=None, leave=False)

    def say(self, text: str) -> None:
        self.bar.clear()
        print(text, flush=True)
        self.bar.refresh()

    def advance(self, updates: int, note: str = "") -> None:
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(updates)

    def close(self) -> None:
        self.bar.close()


def header(config: Config, team: Team, directory: Path) -> str:
    """Team, model, task, method and place, one line each."""
    models = [agent.model for agent in team.agents]
    own = [list(model.parameters()) for model in models]
    sizes = [sum(p.numel() for p in parameters) for parameters in own]
    counts = [sum(p.numel() for p in parameters if p.requires_grad) for parameters in own]  # trained
    collections = "before each update"
    each = [f"{agent.role.name} {model.config.family}" for agent, model in zip(team.agents, models)]
    if len(set(sizes)) > 1:
        each = [f"{text} of {count:,} parameters" for text, count in zip(each, sizes)]
    same = f", {sizes[0]:,} parameters each" * (len(set(sizes)) == 1)
    scaled = f" times {config.lr_scale}" * bool(config.lr_scale)
    precision = "fp32" if models[0].dtype.itemsize == 4 else "bf16 over fp32 masters"
    lines = [
        f"team    {len(models)} agents ({', '.join(each)}){same}, "
        f"{f'{max(counts):,} of them trained, ' * bool(config.lora_rank)}"
        f"{precision} on {models[0].device}",
        f"model   {config.model}",
        f"task    {config.task}: {team.turns} turns, temperature {config.temperature:g}, "
        f"{config.problems} problems x {config.group} rollouts "
        + (collections if config.occupancy == "fresh" else "once a stage"),
        f"method  {config.occupancy} occupancy, {config.order} order, {region(config)}, "
        f"at most {config.inner_steps} steps at lr {config.lr:g}{scaled}, {config.stages} stages",
        f"output  {directory}",
    ]
    return "\n".join(lines)


def region(config: Config) -> str:
    """What bounds an update."""
    if config.kl == "fixed" and config.beta == 0:
        return "no trust region"
    return {
        "hard": f"radius {config.delta:g} ({config.kl_estimator} per {config.kl_unit})",
        "adaptive": f"KL penalty adapted to {config.delta:g}, no radius",
        "fixed": f"KL penalty {config.beta:g}, no radius",
    }[config.kl]


def nothing_to_learn(config: Config, updates: list[dict]) -> str:
    """What to say, and what helps, when the first collections hold no group with unequal returns."""
    mean = sum(u["return_mean"] for u in updates) / len(updates)
    helps = f"a --group larger than {config.group}, or a task that gives partial credit"
    if mean < 1 and not config.warm_start:
        helps = f"--warm-start STEPS, which shows the form of a right answer; {helps}"
    return (
        f"nothing to learn from yet: the {config.group} rollouts of each problem all have the same return "
        f"(on average {mean:.2f}), and an update compares those of one problem. What helps: "
        + ("harder problems" if mean == 1 else helps)
    )


def hardly_moving(config: Config, updates: list[dict], names: list[str]) -> str:
    """What to say after the first stage if some agents' learning rates are far too small for the radius.

    To second order the KL grows as the square of the rate, which says what rate would use a quarter of it.
    """
    scales, slow = list(config.lr_scales), []
    for u in updates:
        whole_step = u["steps"] and not u["halvings"] and u["lr"] and "agent" in u
        if whole_step and abs(u["kl_after"]) < config.delta / 1000 < math.inf:
            factor = math.sqrt(config.delta / 4 / max(abs(u["kl_after"]), 1e-6 * config.delta))
            scales[u["agent"]] *= float(f"{factor:.1g}")
            slow.append(names[u["agent"]])
    if not slow:
        return ""
    return (
        f"{' and '.join(slow)} hardly moved: less than a thousandth of the radius of {config.delta:g} nats. "
        f"A higher rate would use it: about --lr-scale {','.join(f'{scale:g}' for scale in scales)}"
    )


def stage_text(stage: dict, updates: list[dict], config: Config, names: list[str]) -> str:
    """A stage's line: accuracy before its first update, and the KL of each agent's update.

    `B 0.0153*`: the star says that the update exceeded its radius and was backtracked.
    """
    kls = []
    for u in updates:
        name = names[u["agent"]] if "agent" in u else "team"
        took_turn = "kl_after" in u
        kls.append(
            f"{name} {u['kl_after']:.4f}{'*' if u['halvings'] else ' '}" if took_turn else f"{name} no turn"
        )
    held_out = f"  held-out {stage['accuracy_held_out']:.3f}" if "accuracy_held_out" in stage else ""
    lines = [
        f"stage {stage['stage'] + 1:3d}/{config.stages}  accuracy {stage['accuracy']:.3f}{held_out}"
        f"  KL {' '.join(kls)} of {config.delta:g}  {stage['seconds']:4.0f} s"
    ]
    if config.diagnostics:
        lines.append(diagnosis(stage, [u for u in updates if "surrogate" in u]))
    return "\n".join(lines)


def replace_text(line: dict, name: str) -> str:
    """What a replacement did to the team: accuracy before, just after, and after the alignment."""

    def cost(when: str) -> str:
        low, high = line[f"shock_{when}_ci"]
        return (
            f"{line[f'accuracy_{when}']:.3f} (shock {line[f'shock_{when}']:+.3f} [{low:+.3f}, {high:+.3f}])"
        )

    text = f"agent {line['agent']} ({name}) is now {line['model']}: held-out accuracy "
    text += f"{line['accuracy_before']:.3f} -> {cost('replaced')}"
    if "accuracy_aligned" not in line:
        return f"{text}, not aligned"
    return f"{text}, after {line['align_steps']} steps of alignment {cost('aligned')}"


def diagnosis(stage: dict, updates: list[dict]) -> str:
    """A stage's certificate and its terms, below its line."""
    if not updates:
        return "      nobody who was updated took a turn: nothing to diagnose"
    gap = f"{stage['delta_stale']:.4f}" if "delta_stale" in stage else "none"
    return (
        f"      certificate {stage['certificate']:,.0f}{' (vacuous)' * stage['vacuous']}, "
        f"finite-horizon bound {stage['bound']:+.3f}; "
        f"stale gap {gap}, occupancy shift {max(u['occupancy_shift'] for u in updates):.3f}, "
        f"ESS/B {min(u['ess'] for u in updates):.2f}, "
        f"held-out KL {max(u['kl_held_out'] for u in updates):.4f}"
    )


def closing(config: Config, directory: Path, summary: dict, accuracies: list[float]) -> str:
    """The last words of a run: the curve, the result, where the files are, what to try next."""
    lines = [""]
    if accuracies:
        lines.append(plot(accuracies, label=f"accuracy on each stage's problems, {len(accuracies)} stages"))
    if summary["stopped"]:
        lines.append(f"stopped early: {summary['stopped']}; to go on: python train.py --resume {directory}")
    else:
        lines.append(
            f"held-out accuracy {summary['accuracy_start']:.3f} -> {summary['accuracy_final']:.3f} "
            f"in {summary['seconds']:.0f} s, {summary['rollouts']:,} rollouts"
        )
        if (exceeded := summary["violation_rate_before"]) is not None:
            backtracked = " and were backtracked" * (config.kl == "hard")
            lines[-1] += f"; {exceeded:.0%} of updates exceeded the radius{backtracked}"
    if summary["memory_peak"]:
        lines.append(
            f"memory peak {size(summary['memory_peak'])} of {size(summary['memory_planned'])} planned"
        )
    saved = (directory / "agents").is_dir()  # not where a run on spread weights was stopped
    holds = "agents/, " * saved + "metrics.jsonl, transcripts.jsonl, config.json and summary.json"
    lines.append(f"{directory}/ holds {holds}")
    if saved:
        lines.append(f"next: python eval.py {config.task} --team {directory} --k 4")
    return "\n".join(lines)


def plot(values: list[float], height: int = 8, width: int = 60, label: str = "") -> str:
    """A curve in [0, 1] for a terminal; a column is the mean of its share of the values."""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    repeat = max(1, width // columns)
    lines = []
    for row in reversed(range(height)):
        bars = (" ▁▂▃▄▅▆▇█"[max(0, min(8, round(8 * (mean * height - row))))] * repeat for mean in means)
        tick = f"{(row + 1) / height:4.1f}" if (row + 1) % (height // 2) == 0 else "    "
        lines.append(f"{tick} │{''.join(bars)}")
    lines.append(" 0.0 └" + "─" * (columns * repeat) + f" {label}")
    return "\n".join(lines)
