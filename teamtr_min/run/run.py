"""A run around the loop of train.py: its directory and logs, evaluation, checkpoints, resume, summary."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.extras.certificate import stage_certificate
from teamtr_min.files import UserError, lock, plain_file, sealed, sha256, write_json
from teamtr_min.learner import Learner, Update
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run import checkpoint, metrics
from teamtr_min.run.console import Console, closing, hardly_moving, header, nothing_to_learn, stage_text
from teamtr_min.run.directory import new_directory
from teamtr_min.run.memory import Plan
from teamtr_min.run.system import peak
from teamtr_min.team import Team

LOGS = ("metrics.jsonl", "transcripts.jsonl")
SECONDS_BETWEEN_CHECKPOINTS = 60  # of a warm start; a stage has one of its own


class Run:
    """A context: whatever ends the block, the team as it is then is saved, with a summary.

    A new run that ends before its first measurement leaves nothing behind, a resumed one what it found.
    """

    def __init__(self, config: Config, task, team: Team, learners: list[Learner], plan: Plan):
        self.config, self.task, self.team, self.learners, self.plan = config, task, team, learners, plan
        self.held_out = task.sample_problems(
            config.eval_problems, rng.generator(0, "held-out"), held_out=True
        )
        self.begin = time.perf_counter()
        self.updates: list[dict] = []  # their lines in metrics.jsonl
        self.accuracies: list[float] = []  # of the team at the start of each stage, on that stage's problems
        self.evaluation = {
            "rollouts_evaluation": 0, "tokens_sampled_evaluation": 0, "seconds_evaluation": 0.0
        }  # fmt: skip
        self.warm_start = {"tokens_warm_start": 0, "seconds_warm_start": 0.0}
        self.accuracy_untrained = self.accuracy_start = self.accuracy_final = None
        self.summary: dict = {}

    def __enter__(self) -> "Run":
        resume = self.config.resume
        self.directory = Path(resume) if resume else new_directory(self.config)
        self._logs = {}
        try:
            if not resume:
                self.config.save(self.directory / "config.json")
            for name in LOGS:
                self._logs[name] = plain_file(self.directory / name).open("a", encoding="utf-8")
            lock(self._logs["metrics.jsonl"])
            print(header(self.config, self.team, self.directory), flush=True)
            self.console = Console((self.config.warm_start + self.config.stages) * len(self.learners))
            self.done = self._resume() if resume else 0  # steps of the warm start, and stages
        except BaseException as error:
            self._close(keep=bool(resume) or isinstance(error, UserError))  # it may be another process's
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise UserError(f"cannot write to {self.directory}: {error.strerror}") from None
            raise
        return self

    @property
    def warm_steps_done(self) -> int:
        return self.done

    @property
    def stages_done(self) -> int:
        return max(self.done - self.config.warm_start, 0)

    def evaluate(self, name: str) -> None:
        attribute = f"accuracy_{name}"
        if getattr(self, attribute) is None:
            at = self.config.stages if name == "final" else 0
            setattr(self, attribute, self._evaluate(at, *(["untrained"] if name == "untrained" else [])))
            if name != "final":
                self.console.say(f"{name:14s}held-out accuracy {getattr(self, attribute):.3f}")

    def log_warm_start(self, line: dict, seconds: float) -> None:
        """Log one step of one learner."""
        self._append("metrics.jsonl", [{"kind": "warm_start", **line, "seconds": seconds}])
        self.warm_start["tokens_warm_start"] += line["tokens"]
        self.warm_start["seconds_warm_start"] += seconds
        self.console.advance(
            1, f"warm start, loss {line.get('loss', 0):.3f}, {line['tokens'] / seconds:,.0f} tokens/s"
        )

    def log_update(
        self, stage: int, i: int, learner: Learner, rollouts: Rollouts, update: Update, seconds: float, **more
    ) -> None:
        """Log update number i of a stage, which took `seconds`; `more` goes into its line as it is."""
        if callable(measure := getattr(self.task, "measure", None)):
            more |= measure(rollouts.problems, rollouts.messages)
        more["seconds_training"] = seconds
        line = metrics.update_line(stage, i, learner.agents, rollouts, update, self.config.delta, more)
        self._append("metrics.jsonl", [line])
        if i == 0:
            self._append("transcripts.jsonl", metrics.transcripts(rollouts, stage, "train"))
            self.accuracies.append(rollouts.accuracy)
        self.updates.append(line)
        if len(self.updates) == len(self.learners) and all(
            u["zero_variance_groups"] == 1 for u in self.updates
        ):
            self.console.say(nothing_to_learn(self.config, self.updates))
        rate = (rollouts.tokens_sampled + update.tokens) / (rollouts.seconds + seconds)
        self.console.advance(1, f"return {line['return_mean']:.3f}, {rate:,.0f} tokens/s")

    def end_stage(self, stage: int) -> None:
        """Log the stage; evaluate and write a checkpoint if it is time to."""
        every, done = self.config.eval_every, stage + 1
        due = every and done % every == 0 and done < self.config.stages
        updates = sorted(self.updates[-len(self.learners) :], key=lambda u: u.get("agent", 0))
        line = metrics.stage_line(
            stage,
            updates,
            accuracy_held_out=self._evaluate(done) if due else None,
            rollouts_so_far=metrics.totals(self.updates)["rollouts"],
            seconds=time.perf_counter() - self.begin,
            seconds_evaluation=self.evaluation["seconds_evaluation"],
            **(stage_certificate(updates) if self.config.diagnostics else {}),
        )
        self._append("metrics.jsonl", [line])
        names = [agent.role.name for agent in self.team.agents]
        self.console.say(stage_text(line, updates, self.config, names))
        if stage == 0 and (advice := hardly_moving(self.config, updates, names)):
            self.console.say(advice)
        if done % self.config.checkpoint_every == 0 or done == self.config.stages:
            self._checkpoint(self.config.warm_start + done)

    def __exit__(self, kind, reason: BaseException | None, trace) -> None:
        self.console.close()
        if self.accuracy_start is None and self.accuracy_untrained is None:
            self._close(keep=bool(self.config.resume))
            return
        stopped = "interrupted" if isinstance(reason, KeyboardInterrupt) else reason and str(reason)
        try:
            if not (self.team.ranks.size > 1 and reason):  # else ranks that are no more would be waited for
                self.team.save(self.directory / "agents")
            self.summary = {
                "accuracy_untrained": self.accuracy_untrained,
                "accuracy_start": self.accuracy_start,
                "accuracy_final": self.accuracy_final,
                "seconds": time.perf_counter() - self.begin,
                "stages": len(self.updates) // len(self.learners),
                **metrics.totals(self.updates),
                **self.evaluation,
                **self.warm_start,
                "violation_rate_before": metrics.violation_rate(self.updates, "kl_before"),
                "violation_rate_after": metrics.violation_rate(self.updates, "kl_after"),
                "memory_peak": peak(self.plan.device),
                "memory_planned": self.plan.total,
                "stopped": stopped,
            }
            write_json(self.directory / "summary.json", sealed(self.summary))
            print(closing(self.config, self.directory, self.summary, self.accuracies), flush=True)
        except OSError as error:
            reason = reason or error  # else the first reason is the one to hear
        finally:
            self._close()
        if isinstance(reason, OSError) and not isinstance(reason, BrokenPipeError):
            put_right = f"put this right and continue with --resume {self.directory}"
            raise UserError(
                f"cannot write to {self.directory}: {reason.strerror or reason}; {put_right}"
            ) from None

    def _checkpoint(self, done: int) -> None:
        """Everything on disk, so that the run can go on from here."""
        for file in self._logs.values():
            os.fsync(file.fileno())
        log = {
            "bytes": {name: file.tell() for name, file in self._logs.items()},
            "sha256": {name: sha256(self.directory / name) for name in LOGS},
            "accuracy_untrained": self.accuracy_untrained,
            "accuracy_start": self.accuracy_start,
            "evaluation": self.evaluation,
            "warm_start": self.warm_start,
            "seconds": time.perf_counter() - self.begin,
        }
        checkpoint.save(self.directory, done, self.learners, log, 2)

    def _evaluate(self, stages_done: int, split: str = "held-out") -> float:
        """Accuracy on the held-out problems, one rollout each."""
        path = rng.RngPath(self.config.seed, "held-out", stages_done)
        rollouts = collect(self.team, self.held_out, 1, path, label="evaluating")
        self.evaluation["rollouts_evaluation"] += rollouts.count_sampled
        self.evaluation["tokens_sampled_evaluation"] += rollouts.tokens_sampled
        self.evaluation["seconds_evaluation"] += rollouts.seconds
        self._append("transcripts.jsonl", metrics.transcripts(rollouts, stages_done, split))
        return rollouts.accuracy

    def _resume(self) -> int:
        """Go back to the newest checkpoint: what was logged after it will happen, and be logged, again."""
        done, log = checkpoint.load(self.directory, self.learners)
        path = self.directory / "metrics.jsonl"
        if log is None:
            # A kill before the first checkpoint leaves these at most; a new start would write over more.
            logged, most = path.read_bytes().splitlines(), self.config.checkpoint_every
            if sum(b'"kind": "warm_start"' not in line for line in logged) > most * (len(self.learners) + 1):
                raise UserError(
                    f"{self.directory} has finished stages but no checkpoints; nothing to resume from"
                )
            log = {"bytes": dict.fromkeys(LOGS, 0)}
        for name, count in log["bytes"].items():
            content = (self.directory / name).read_bytes()
            if len(content) < count:
                raise UserError(f"{self.directory / name} was cut short; nothing to resume from")
            if done and hashlib.sha256(content[:count]).hexdigest() != log["sha256"][name]:
                raise UserError(f"{self.directory / name} is not as it was written: put the original back")
        for name, count in log["bytes"].items():
            os.truncate(self.directory / name, count)
        if done:
            self.begin -= log["seconds"]
            self.accuracy_untrained, self.accuracy_start = log["accuracy_untrained"], log["accuracy_start"]
            self.evaluation, self.warm_start = log["evaluation"], log["warm_start"]
            lines = metrics.read_lines(path, metrics.LINES)
            self.updates = [line for line in lines if line["kind"] == "update"]
            self.accuracies = [line["accuracy"] for line in lines if line["kind"] == "stage"]
        warm = min(done, self.config.warm_start)
        self.console.advance(len(self.updates) + warm * len(self.learners))
        steps = f"{warm} of {self.config.warm_start} steps of the warm start and " * bool(
            self.config.warm_start
        )
        self.console.say(f"resumed after {steps}{done - warm} of {self.config.stages} stages")
        return done

    def _append(self, name: str, lines: list[dict]) -> None:
        """At once, so that a run which is killed keeps all that it had measured."""
        for line in lines:
            self._logs[name].write(json.dumps(line, ensure_ascii=name == "metrics.jsonl") + "\n")
        self._logs[name].flush()

    def _close(self, keep: bool = True) -> None:
        """Close the logs; without `keep` the directory goes, as nothing in it is worth a name."""
        for file in self._logs.values():
            with contextlib.suppress(OSError):  # a full disk refuses what is left in the buffer once more
                file.close()
        if not keep:
            shutil.rmtree(self.directory, ignore_errors=True)


class Follower(Run):
    """The run on a rank that is not the first: it takes part in all that is computed, and writes nothing."""

    def __enter__(self) -> "Follower":
        self.directory, self.done, self._logs = Path(self.config.resume), 0, {}
        self.console = Console(0)
        if self.config.resume:
            self.done, log = checkpoint.load(self.directory, self.learners)
            if log:
                self.accuracy_untrained, self.accuracy_start = (
                    log["accuracy_untrained"],
                    log["accuracy_start"],
                )
        return self

    def __exit__(self, kind, reason: BaseException | None, trace) -> None:
        self.console.close()
        if self.team.ranks.size > 1 and not reason:
            self.team.save(self.directory / "agents")

    def _checkpoint(self, done: int) -> None:
        checkpoint.save(self.directory, done, self.learners, {}, 2)

    def _append(self, name: str, lines: list[dict]) -> None:
        pass
