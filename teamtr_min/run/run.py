"""A run around the loop of train.py: its directory, logs, evaluations, checkpoints, resume and summary."""

import collections
import fcntl
import hashlib
import os
import shutil
import time
from pathlib import Path

from tqdm.auto import tqdm

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError, read_json, sha256, to_json, users_line, write_json
from teamtr_min.hf.weights import weight_files
from teamtr_min.learner import Diverged, Learner, Update
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run import checkpoint, figures, log
from teamtr_min.run.memory import Plan, in_use
from teamtr_min.tasks.task import Message, Problem
from teamtr_min.team import Team

METRICS, TRANSCRIPTS = LOGS = ("metrics.jsonl", "transcripts.jsonl")
WARM_STEPS_BETWEEN_CHECKPOINTS = 10


class Run:
    """A context. However the block ends, the agents as they are then are saved, with a summary; by several
    processes only without an error. A new run that ends before its first evaluation removes its directory.
    Each process calls its Run alike, as evaluations and checkpoints are shared; only the first has files."""

    def __init__(self, config: Config, task, team: Team, learners: list[Learner], plan: Plan):
        self.config, self.task, self.team, self.learners, self.plan = config, task, team, learners, plan
        self.directory = Path(config.resume or config.out or unused_name(config))
        generator = rng.generator(0, "held-out")
        self.held_out = task.sample_problems(config.eval_problems, generator, held_out=True)
        self.begin = time.perf_counter()  # later by the time in which the run was stopped
        self.warm_steps_done = self.stages_done = 0
        self.updates, self.stages = [], []  # their lines in metrics.jsonl
        self.results: dict = {}  # accuracy_NAME, return_NAME and their intervals, as far as measured
        self.costs = collections.Counter()  # of evaluations and warm start
        self.summary: dict = {}
        self.files: dict = {}  # the open logs; the first is also the lock of the directory
        self.board = None  # with --tensorboard its writer
        self.names = [agent.role.name for agent in team.agents]
        self.removable = False  # a new directory that holds nothing worth keeping yet
        self.bar = tqdm(total=config.stages * len(learners), unit="update", disable=None, leave=False)

    def __enter__(self) -> "Run":
        if self.team.ranks.first:
            self._lock()
        header = log.header(self.config, self.team, self.directory)
        log.say("\n".join([header, str(self.plan), *self.task.notes]))
        if self.config.show_prompts:
            log.say(log.prompts_in_use(self.team, self.held_out[0]))
        if self.config.resume:
            self._resume()
        if self.config.tensorboard and self.files:  # all lines again: what a kill kept back is lost
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.directory / "tensorboard", purge_step=0, flush_secs=10)
            log.write_scalars(self.board, log.read_log(self.directory / METRICS), self.names)
        return self

    def evaluate(self, name: str) -> None:
        """Measure "untrained", "start" or "final"; a resumed run keeps what it has measured before."""
        if f"accuracy_{name}" not in self.results:
            self.results |= (found := self._measure(name))
            self._append(METRICS, [{"kind": "evaluation", "stage": self.stages_done, **found}])
            if name != "final":  # which the closing lines tell
                shown = log.held_out_score(self.results, name)
                log.say(f"{name:13s} held-out {shown}, {len(self.held_out):,} problems")

    def log_warm_start(self, line: dict, seconds: float) -> None:
        self._append(METRICS, [{"kind": "warm_start", **line, "seconds": seconds}])
        self.costs.update(tokens_warm_start=line["tokens"], seconds_warm_start=seconds)
        self.bar.set_postfix_str(f"warm start, step {line['step'] + 1}, loss {line.get('loss', 0):.3f}")

    def end_warm_step(self, step: int) -> None:
        """Write a checkpoint after the last step, and after some before."""
        self.warm_steps_done, last = step + 1, step + 1 == self.config.warm_start
        if last or self.warm_steps_done % WARM_STEPS_BETWEEN_CHECKPOINTS == 0:
            self.checkpoint()

    def log_update(
        self, stage: int, i: int, learner: Learner, rollouts: Rollouts, update: Update, seconds: float, **more
    ) -> None:
        """Update number i of a stage, which took `seconds`; `more` goes into its line as it is."""
        line = log.update_line(stage, i, learner, rollouts, update)
        line |= {"delta": self.config.delta, "seconds_training": seconds}
        if measure := getattr(self.task, "measure", None):
            more |= measure(rollouts.problems, rollouts.messages) or {}
        try:
            to_json(more)
        except (TypeError, ValueError) as error:  # a tensor, or NaN in a list
            raise UserError(f"`measure` of the task returns what JSON cannot hold: {error}") from None
        if taken := line.keys() & more.keys():
            raise UserError(f"`measure` of the task returns {', '.join(taken)}, which are logged already")
        self.updates += self._append(METRICS, [line | more])
        if i == 0:
            self._append(TRANSCRIPTS, log.transcripts(rollouts, stage, "train"))
        self.bar.set_postfix_str(f"return {line['return_mean']:.3f}", refresh=False)
        self.bar.update()

    def end_stage(self, stage: int, **more) -> None:
        """Log the stage, with `more`; evaluate and write a checkpoint where due."""
        self.stages_done, every, last = stage + 1, self.config.eval_every, stage + 1 == self.config.stages
        updates = self.updates[-len(self.learners) :]
        if every and self.stages_done % every == 0 and not last:
            more |= self._measure("held_out")
        line = {
            "kind": "stage", "stage": stage, **more,
            "accuracy": updates[0]["accuracy"], "return_mean": updates[0]["return_mean"],
            "rollouts_so_far": sum(u["rollouts"] for u in self.updates),
            "seconds": self._seconds(), "seconds_evaluation": self.costs["seconds_evaluation"],
        }  # fmt: skip
        self.stages += self._append(METRICS, [line])
        log.say(log.stage_text(self.stages[-1], updates, self.config, self.names))
        if stage == 0:
            log.say(log.advice(self.config, updates))
        if last or self.stages_done % self.config.checkpoint_every == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write all that the run needs to go on from here."""
        for file in self.files.values():
            os.fsync(file.fileno())
        names = ("warm_steps_done", "stages_done", "results", "costs")
        state = {name: getattr(self, name) for name in names} | {"seconds": self._seconds()}
        state["bytes"] = {name: (self.directory / name).stat().st_size for name in self.files}
        checkpoint.save(self.directory, self.warm_steps_done + self.stages_done, self.learners, state)

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        self.bar.close()
        try:
            if self.results:
                self._finish(error)
            elif self.removable:
                shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            for file in [*self.files.values(), *filter(None, [self.board])]:
                file.close()

    def _lock(self) -> None:
        """Lock the directory before anything is written; then write, or on resume compare, config.json."""
        self.directory.mkdir(parents=True, exist_ok=bool(self.config.resume or self.config.out))
        self.files[METRICS] = (self.directory / METRICS).open("a", encoding="utf-8")
        try:
            fcntl.flock(self.files[METRICS], fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except BlockingIOError:
            busy = f"{self.directory} is being written by another process; wait until it ends"
            raise UserError(busy) from None
        check_out(self.config)  # another run may have begun, and ended, meanwhile
        self.files[TRANSCRIPTS] = (self.directory / TRANSCRIPTS).open("a", encoding="utf-8")
        path, found = self.directory / "config.json", provenance(self.config, self.team, self.held_out[0])
        if not self.config.resume:
            self.config.save(path, **found, accept_changes=False, show_prompts=False)
            self.removable = True
            return
        write_json(path, unchanged(self.directory, found, self.config.accept_changes) | found)

    def _resume(self) -> None:
        """Go back to the newest checkpoint: what was logged after it happens, and is logged, again."""
        state = checkpoint.load(self.directory, self.learners)
        if state:
            self.warm_steps_done, self.stages_done = state["warm_steps_done"], state["stages_done"]
            self.results, self.costs = state["results"], collections.Counter(state["costs"])
            self.begin -= state["seconds"]
        elif self.files:
            stages = sum(line["kind"] == "stage" for line in log.read_log(self.directory / METRICS))
            if stages > self.config.checkpoint_every:  # a checkpoint has been there
                raise UserError(f"{self.directory} has finished {stages} stages but has no checkpoints")
        lengths = state["bytes"] if state else dict.fromkeys(LOGS, 0)
        paths = {name: self.directory / name for name in self.files}
        if short := [path for name, path in paths.items() if path.stat().st_size < lengths[name]]:
            raise UserError(f"{short[0]} was cut short since its newest checkpoint")
        for name, file in self.files.items():
            file.truncate(lengths[name])
            (self.directory / "summary.json").unlink(missing_ok=True)  # of how it ended before
        lines = log.read_log(self.directory / METRICS) if self.files else []
        self.updates, self.stages = ([x for x in lines if x["kind"] == kind] for kind in ("update", "stage"))
        self.bar.update(len(self.updates))
        warm = f"{self.warm_steps_done} steps of warm start and " if self.config.warm_start else ""
        log.say(f"resumed after {warm}{self.stages_done} of {self.config.stages} stages")

    def _append(self, name: str, lines: list[dict]) -> list[dict]:
        """Write lines at once, so that a kill loses none; returns them without what was not measured."""
        lines = [log.measured(line) for line in lines]
        if file := self.files.get(name):
            file.writelines(to_json(line) + "\n" for line in lines)
            file.flush()
            if self.board and name == METRICS:
                log.write_scalars(self.board, lines, self.names)
        return lines

    def _seconds(self) -> float:
        return time.perf_counter() - self.begin

    def _measure(self, name: str) -> dict:
        """`accuracy_NAME` and `return_NAME` on the held-out problems, one rollout each, with intervals."""
        path = rng.RngPath(self.config.seed, "held-out", self.stages_done)
        rollouts = collect(self.team, self.held_out, 1, path, label="evaluating")
        self.costs.update(rollouts_evaluation=len(rollouts.messages), seconds_evaluation=rollouts.seconds)
        self.costs.update(tokens_sampled_evaluation=rollouts.tokens_sampled)
        split = "untrained" if name == "untrained" else "held-out"
        count = 32 if name in ("start", "final") else 4  # the report compares them
        self._append(TRANSCRIPTS, log.transcripts(rollouts, self.stages_done, split, count))
        found, returns = {}, rollouts.returns
        for key, values in (("accuracy", (returns == 1).double()), ("return", returns)):
            found[f"{key}_{name}"], found[f"{key}_{name}_ci"] = log.mean_interval(values)
        return found

    def _finish(self, error: BaseException | None) -> None:
        """Save the agents and summary.json, whose `reason` and `stopped` say why the run ended early."""
        reasons = {KeyboardInterrupt: "interrupted", Diverged: "diverged", FloatingPointError: "diverged"}
        reason = reasons.get(type(error), "error") if error else None
        self.summary = {
            "accuracy_start": None, "accuracy_final": None, "return_start": None, "return_final": None,
            **self.results, **log.totals(self.updates), **self.costs,
            "problems_held_out": len(self.held_out), "seconds": self._seconds(), "stages": self.stages_done,
            "memory_peak": in_use(self.plan.device, most=True), "memory_planned": self.plan.total,
            "reason": reason, "stopped": error and (users_line(error) or str(error) or reason),
        }  # fmt: skip
        if error is None or self.team.ranks.size == 1:  # else other processes may be gone, with their parts
            self.team.save(self.directory / "agents")
        if self.files:
            write_json(self.directory / "summary.json", self.summary)
            log.say(log.closing(self.config, self.directory, self.summary, self.stages))
            if self.updates:
                figures.save_summary(self.directory)


def unused_name(config: Config) -> Path:
    name = f"{Path(config.task).stem}-{config.agents}x-{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
    taken = len(list(Path("runs").glob(f"{name}*")))  # runs that began in the same second
    return Path("runs", f"{name}-{taken + 1}" if taken else name)


def check_out(config: Config) -> None:
    """Raises UserError if --out holds anything but what a run leaves that is killed as it begins."""
    if config.out and not config.resume and Path(config.out).exists():
        found = [path for path in Path(config.out).iterdir() if path.name != ".config.json.part"]
        if any(path.name not in LOGS or path.stat().st_size for path in found):
            raise UserError(f"--out {config.out} exists and is not empty; give another, or remove it first")


def fingerprint(config: Config, team: Team, problem: Problem) -> dict[str, str]:
    """Hashes of what results rest on besides flags and weights: problems, grader, files, prompts."""
    found = dict(team.task.fingerprint())
    for name in ("task", "router", "roles", "demonstrations"):
        if Path(path := getattr(config, name)).is_file():
            found[f"{name} file"] = sha256(path)
    ends = [[agent.chat.end_of_message] if agent.chat else [] for agent in team.agents]
    messages = [Message(j, end, "", [0.0], True) for j, end in enumerate(ends)]
    for j, agent in enumerate(team.agents):
        if agent.chat:
            ids = team.render(j, problem, messages, add_generation_prompt=True).ids
            seen = f"{ids} {agent.tokenizer.hash} {sorted(agent.chat.end_tokens)}".encode()
            name = f"prompts of agent {j} (tokenizer, template, roles, date)"
            found[name] = hashlib.sha256(seen).hexdigest()
    return found


def provenance(config: Config, team: Team, problem: Problem) -> dict:
    """What config.json holds besides the knobs: hashes, of LoRA's base too, and the roles."""
    found = fingerprint(config, team, problem)
    for base in {agent.adapter.base for agent in team.agents if agent.adapter}:
        if os.path.isdir(base):  # another name holds a commit, or ships with the code
            sums = [sha256(Path(base, file)) for file in ("config.json", *weight_files(Path(base)))]
            found[f"LoRA base {base}"] = hashlib.sha256("".join(sums).encode()).hexdigest()
    roles = [{"name": agent.role.name, "system": agent.role.system} for agent in team.agents]
    return {"fingerprint": found, "roles_in_use": roles}


def unchanged(run: Path, found: dict, accept_changes: bool = False) -> dict:
    """config.json of `run`. Raises UserError if its fingerprint is not the one that was `found` now."""
    saved, now = read_json(run / "config.json"), found["fingerprint"]
    then = saved.get("fingerprint", now)
    changed = sorted(name for name in then | now if then.get(name) != now.get(name))
    if changed and not accept_changes:
        what = f"{run} rests on other things now than when it began: {', '.join(changed)}"
        raise UserError(f"{what}; put them back, or go on with --accept-changes")
    return saved


def newest_run(marker: str, accept=lambda run: True) -> Path | None:
    """The run under runs/ whose file `marker` is the newest, among those that `accept` takes."""
    runs = [path.parent for path in Path("runs").glob(f"*/{marker}")]
    return max(filter(accept, runs), key=lambda run: (run / marker).stat().st_mtime, default=None)
