"""What a run tells: the terminal, metrics.jsonl, transcripts.jsonl, summary.json, and the trained agents.

metrics.jsonl holds one object per update ("kind": "update") and one per stage ("kind": "stage"); README.md
explains each key. Every line is written at once, so a run that is killed keeps all that it had measured.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.hf.hub import TOKENIZER_FILES
from teamtr_min.hf.weights import save_model
from teamtr_min.rollout import Rollouts
from teamtr_min.team import Team
from teamtr_min.theory.certificate import DIAGNOSIS, stage_certificate

TRANSCRIPTS_PER_COLLECTION = 4


class Run:
    """One training run: its directory, its lines on the terminal, and the count of what it cost."""

    def __init__(self, config: Config, team: Team, task):
        self.config, self.team = config, team
        self.measure = getattr(task, "measure", lambda problems, messages: {})
        self.start = time.perf_counter()
        self.updates: list[dict] = []
        self.accuracies: list[float] = []  # of the team at the start of each stage, on that stage's problems
        self.accuracy_start: float | None = None
        self.rollouts = dict.fromkeys(("training", "evaluation", "diagnostics"), 0)
        self.tokens = dict.fromkeys(("training", "evaluation", "diagnostics"), 0)
        self.seconds = dict.fromkeys(("sampling", "training", "evaluation", "diagnostics"), 0.0)
        self.directory = Path(config.resume) if config.resume else new_directory(config)
        try:
            if not config.resume:
                config.save(self.directory / "config.json")
            self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
            self._transcripts = (self.directory / "transcripts.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {self.directory}: {error.strerror}") from None
        print(header(config, team, self.directory), flush=True)
        self.bar = tqdm(total=config.stages * len(config.updates), unit="update", disable=None, leave=False)

    def state(self) -> dict:
        """What a checkpoint keeps of this log, for `restore`."""
        return {
            "accuracy_start": self.accuracy_start,
            "metrics_bytes": (self.directory / "metrics.jsonl").stat().st_size,
            "transcripts_bytes": (self.directory / "transcripts.jsonl").stat().st_size,
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "seconds_elapsed": time.perf_counter() - self.start,
        }

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint's `state()`: what was logged after it will happen, and be logged, again."""
        os.truncate(self.directory / "metrics.jsonl", state.get("metrics_bytes", 0))
        os.truncate(self.directory / "transcripts.jsonl", state.get("transcripts_bytes", 0))
        if not state:
            return
        self.rollouts, self.tokens, self.seconds = state["rollouts"], state["tokens"], state["seconds"]
        self.start -= state["seconds_elapsed"]
        self.accuracy_start = state["accuracy_start"]
        for line in (self.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "update":
                self.updates.append(record)
                if record["update"] == 0:
                    self.accuracies.append(record["accuracy"])
        self.bar.update(len(self.updates))
        self.say(f"resumed after {len(self.updates)} of {self.bar.total} updates")

    def evaluated(self, rollouts: Rollouts, stages_done: int) -> float:
        """Book an evaluation on held-out problems; returns its accuracy."""
        self._book(rollouts, "evaluation")
        self.seconds["evaluation"] += rollouts.seconds
        self._keep_some(rollouts, stages_done, "held-out")
        return rollouts.accuracy

    def started(self, accuracy: float) -> None:
        self.accuracy_start = accuracy
        self.say(f"start         held-out accuracy {accuracy:.3f}")

    def diagnosed(self, rollouts: Rollouts) -> None:
        """Book rollouts that only a diagnosis reads."""
        self._book(rollouts, "diagnostics")
        self.seconds["diagnostics"] += rollouts.seconds

    def updated(
        self, stage: int, update: int, agents: list[int], rollouts: Rollouts, sampled: bool, report: dict
    ) -> None:
        """Log the update of one agent, or of all together. `sampled`: the rollouts are new, not left over."""
        own = rollouts.by(agents)
        if sampled:
            self._book(rollouts, "training")
        record = {
            "kind": "update",
            "stage": stage,
            "update": update,
            "agent": agents[0] if len(agents) == 1 else None,
            "accuracy": rollouts.accuracy,
            "return_mean": rollouts.returns.mean().item(),
            "constant_groups": rollouts.constant_groups,
            "messages": len(own),
            "message_tokens": sum(len(m.tokens) for m in own) / max(len(own), 1),
            "truncated": sum(not m.stopped for m in own) / max(len(own), 1),
            **self.measure(rollouts.problems, rollouts.messages),
            **dict.fromkeys(DIAGNOSIS),
            **report,
            "rollouts": rollouts.sampled if sampled else 0,
            "tokens_sampled": rollouts.tokens_sampled if sampled else 0,
            "seconds_sampling": rollouts.seconds if sampled else 0.0,
        }
        if update == 0:
            self.accuracies.append(rollouts.accuracy)
            self._keep_some(rollouts, stage, "train")
        self.seconds["sampling"] += record["seconds_sampling"]
        self.seconds["training"] += record["seconds_training"]
        self.updates.append(record)
        self._write(record)
        rate = (record["tokens_sampled"] + record["tokens_trained"]) / (
            record["seconds_sampling"] + record["seconds_training"]
        )
        self.bar.update()
        self.bar.set_postfix_str(f"return {record['return_mean']:.3f}, {rate:,.0f} tokens/s")

    def finished_stage(self, stage: int, accuracy_held_out: float | None) -> None:
        """Log a stage and print its line: accuracy before its first update, KL of each agent's update."""
        updates = sorted(self.updates[-len(self.config.updates) :], key=lambda u: u["agent"] or 0)
        record = {
            "kind": "stage",
            "stage": stage,
            "accuracy": self.accuracies[-1],
            "accuracy_held_out": accuracy_held_out,
            "return_mean": updates[0]["return_mean"],
            "kl": [u["kl_after"] for u in updates],
            "delta": self.config.delta if math.isfinite(self.config.delta) else None,
            "rollouts_so_far": self.rollouts["training"],
            "seconds": time.perf_counter() - self.start,
            "seconds_evaluation": self.seconds["evaluation"],
            **dict.fromkeys(("certificate", "vacuous", "bound", "delta_stale")),
        }
        if self.config.diagnostics:
            record |= stage_certificate(updates)
        self._write(record)
        kls = " ".join(self._kl_text(u) for u in updates)
        held_out = "" if accuracy_held_out is None else f"  held-out {accuracy_held_out:.3f}"
        self.say(
            f"stage {stage + 1:3d}/{self.config.stages}  accuracy {self.accuracies[-1]:.3f}{held_out}"
            f"  KL {kls} of {self.config.delta:g}  {record['seconds']:4.0f} s"
        )
        if self.config.diagnostics:
            self.say(diagnosis(record, updates))

    def _kl_text(self, update: dict) -> str:
        """`B .0153*`: agent B's KL after its update; the star says that it had to be brought back inside."""
        name = "team" if update["agent"] is None else self.team.agents[update["agent"]].role.name
        if update["kl_after"] is None:
            return f"{name} silent"
        return f"{name} {update['kl_after']:.4f}{'*' if update['halvings'] else ' '}"

    def say(self, text: str) -> None:
        self.bar.clear()
        print(text, flush=True)
        self.bar.refresh()

    def save_agents(self) -> None:
        """agents/0..n-1 in HF layout, weights in the compute dtype; replaced as a whole."""
        aside, final = self.directory / ".agents.part", self.directory / "agents"
        shutil.rmtree(aside, ignore_errors=True)
        for j, agent in enumerate(self.team.agents):
            save_model(agent.model, aside / str(j))
            for file in TOKENIZER_FILES:
                if (agent.tokenizer.directory / file).is_file():
                    shutil.copyfile(agent.tokenizer.directory / file, aside / str(j) / file)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)

    def finish(self, accuracy_final: float | None = None, stopped: str | None = None) -> dict:
        """Save agents and summary.json, and say what came of it; `stopped` is the reason of an early end.

        A new run that ends before its first measurement leaves nothing behind.
        """
        self.bar.close()
        if self.accuracy_start is None and not self.config.resume:
            self._metrics.close()
            self._transcripts.close()
            shutil.rmtree(self.directory)
            return {}
        self.save_agents()
        summary = {
            "accuracy_start": self.accuracy_start,
            "accuracy_final": accuracy_final,
            "seconds": time.perf_counter() - self.start,
            **{f"seconds_{purpose}": value for purpose, value in self.seconds.items()},
            "stages": len(self.updates) // len(self.config.updates),
            "rollouts": self.rollouts["training"],
            "tokens_sampled": self.tokens["training"],
            "tokens_trained": sum(u["tokens_trained"] for u in self.updates),
            "rollouts_evaluation": self.rollouts["evaluation"],
            "tokens_sampled_evaluation": self.tokens["evaluation"],
            "rollouts_diagnostics": self.rollouts["diagnostics"],
            "tokens_sampled_diagnostics": self.tokens["diagnostics"],
            "violation_rate_before": violation_rate(self.updates, "kl_before"),
            "violation_rate_after": violation_rate(self.updates, "kl_after"),
            "stopped": stopped,
        }
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._metrics.close()
        self._transcripts.close()
        print(closing(self.config, self.directory, summary, self.accuracies), flush=True)
        return summary

    def _book(self, rollouts: Rollouts, purpose: str) -> None:
        self.rollouts[purpose] += rollouts.sampled
        self.tokens[purpose] += rollouts.tokens_sampled

    def _keep_some(self, rollouts: Rollouts, stage: int, split: str) -> None:
        """A few transcripts, spread over the problems."""
        stride = max(1, len(rollouts.messages) // TRANSCRIPTS_PER_COLLECTION)
        for r in range(0, stride * TRANSCRIPTS_PER_COLLECTION, stride)[: len(rollouts.messages)]:
            problem = rollouts.problems[r]
            record = {
                "id": problem.id,
                "text": problem.text,
                "answer": problem.answer,
                "messages": [{"agent": m.agent, "text": m.text} for m in rollouts.messages[r]],
                "return": rollouts.returns[r].item(),
                "stage": stage,
                "split": split,
            }
            self._transcripts.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._transcripts.flush()

    def _write(self, record: dict) -> None:
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()


def new_directory(config: Config) -> Path:
    """The run's own directory, made now; one that holds anything is never written into."""
    task = Path(config.task).stem
    name = f"{task}-{config.agents}x-{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
    directory = Path(config.out or Path("runs") / name)
    try:
        while not config.out and directory.exists():  # another run began in the same second
            directory = directory.with_name(directory.name + "b")
        directory.mkdir(parents=True, exist_ok=bool(config.out))
        if any(directory.iterdir()):
            raise UserError(f"{directory} exists and is not empty; give another --out, or remove it first")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    return directory


def violation_rate(updates: list[dict], kl: str) -> float | None:
    """Share of updates whose KL is past delta; silent agents do not count. None without any, or a delta."""
    outside = [u[kl] > u["delta"] for u in updates if u[kl] is not None and u["delta"] is not None]
    return sum(outside) / len(outside) if outside else None


def header(config: Config, team: Team, directory: Path) -> str:
    """Team, model, memory, task, method and place, one line each."""
    models = [agent.model for agent in team.agents]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    width = models[0].dtype.itemsize
    weights = sum(counts) * width
    collections = {"every_k": f"before every {config.every} updates", "fresh": "before each update"}
    # Who is in an update: gradients, Adam, the last accepted point with its Adam, the attempted point;
    # and where the masters are a second copy, they and their own gradients.
    moved = max(sum(counts[j] for j in agents) for agents in config.updates)
    update = moved * (width + 8 + 12 + 4 + (8 if width == 2 else 0))
    rows = min(config.problems * config.group, config.batch_rows)
    caches = [m.config.kv_per_token * width * rows for m in models]
    cache = max(caches) if team.speaks_last(0, 0) else sum(caches)  # all stay where agents speak again
    roles = ", ".join(f"{agent.role.name} {agent.model.config.family}" for agent in team.agents)
    precision = "bf16 over fp32 masters" if width == 2 else "fp32"
    weights += config.diagnostics * (weights + moved * width)  # the team as it was
    lines = [
        f"team    {len(models)} agents ({roles}), {max(counts):,} parameters each, "
        f"{precision} on {models[0].device}",
        f"model   {config.model}",
        f"memory  weights {size(weights)}, an update {size(update)} besides activations, "
        f"KV cache {size(cache)} per token of a transcript",
        f"task    {config.task}: {team.turns} turns, T = {config.temperature:g}, "
        f"{config.problems} problems x {config.group} rollouts "
        + collections.get(config.occupancy, "once a stage"),
        f"method  {config.occupancy} occupancy, {config.order} order, {config.region}, "
        f"at most {config.inner_steps} steps at lr {config.lr:g}, {config.stages} stages",
        f"output  {directory}",
    ]
    return "\n".join(lines)


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
        if (passed := summary["violation_rate_before"]) is not None:
            brought_back = " and were brought back" * (config.kl == "hard")
            lines[-1] += f"; {passed:.0%} of updates passed the radius{brought_back}"
    lines.append(
        f"{directory}/ holds agents/, metrics.jsonl, transcripts.jsonl, config.json and summary.json"
    )
    lines.append(f"next: python eval.py {config.task} --team {directory} --k 4")
    return "\n".join(lines)


def diagnosis(stage: dict, updates: list[dict]) -> str:
    """A stage's certificate and its terms, below its line."""
    gap = "none" if stage["delta_stale"] is None else f"{stage['delta_stale']:.4f}"
    updates = [u for u in updates if u["surrogate"] is not None]
    if not updates:
        return "      nobody who was updated spoke: nothing to diagnose"
    return (
        f"      certificate {stage['certificate']:,.0f}{' (vacuous)' * stage['vacuous']}, "
        f"finite-horizon bound {stage['bound']:+.3f}; "
        f"stale gap {gap}, occupancy shift {max(u['occupancy_shift'] for u in updates):.3f}, "
        f"ESS/B {min(u['ess'] for u in updates):.2f}, "
        f"held-out KL {max(u['kl_held_out'] for u in updates):.4f}"
    )


def size(count: float) -> str:
    """Bytes in words: 1.4 MiB."""
    power = min(3, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


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
