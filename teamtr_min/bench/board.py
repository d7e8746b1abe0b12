"""What `eval.py` shows of one result, and of several in one table that grows as they come."""

from teamtr_min.bench import accuracy, kept
from teamtr_min.engine.distributed import ALONE, Ranks


class Board:
    """Measures the given (benchmark, team) pairs one by one; a benchmark of None is the team's own task."""

    def __init__(
        self,
        pairs: list[tuple[str | None, str | None]],
        mode: str,
        k: int,
        count: int | None,
        data: str | None,
        again: bool,
        transcripts: int | None,
        ranks: Ranks = ALONE,
    ):
        self.mode = mode
        self.options = {"k": k, "count": count, "data": data, "again": again}
        self.several, self.begun = len(pairs) > 1, False
        self.transcripts = (0 if self.several else 3) if transcripts is None else transcripts
        names = [("benchmark", "untrained team"), *((name or "", team or "") for name, team in pairs)]
        self.widths = [max(map(len, column)) + 2 for column in zip(*names)]
        self.loader = accuracy.Loader(ranks)

    def measure(self, name: str | None, team: str | None, flags: dict) -> tuple[dict, str]:
        """The result of one pair, and the text for it; `flags` are Config fields from the command line."""
        name = name or accuracy.find_subject(team, flags).config.task
        subject = accuracy.find_subject(team, flags, name)
        result, rollouts = accuracy.run(subject, name, self.mode, self.loader, **self.options)
        shown = accuracy.show(rollouts, self.transcripts) if rollouts else ""
        if not self.several:
            where = f"{shown}\n\nresult appended to {subject.kept_in}" if rollouts else ""
            return result, f"{accuracy.table(result)}\n{where}".rstrip()
        above = [] if self.begun else [self.heading()]
        self.begun = True
        return result, "\n".join([*above, self.row(result), *([shown] if shown else [])])

    def heading(self) -> str:
        names = "".join(f"{name:{width}s}" for name, width in zip(("benchmark", "team"), self.widths))
        k = self.options["k"]
        return (
            f"{names}{'mode':9s}{f'avg@{k}':22s}{f'pass@{k}':22s}"
            f"{'problems':>8s}{'tokens':>13s}{'seconds':>9s}  grader"
        )

    def row(self, result: dict) -> str:
        def interval(name: str) -> str:
            low, high = result[f"{name}_ci"]
            return f"{result[name]:.3f} [{low:.3f}, {high:.3f}]  "

        names = "".join(f"{result[name]:{width}s}" for name, width in zip(("benchmark", "team"), self.widths))
        line = (
            f"{names}{result['mode']:9s}{interval('avg_at_k')}{interval('pass_at_k')}"
            f"{result['problems']:8,d}{result['tokens_sampled']:13,d}{result['seconds']:9.1f}  "
            f"{result['grader']}"
        )
        if equal := result.get("equal_tokens"):
            line += f"; at equal tokens team {equal['team']:.3f}, solo {equal['solo']:.3f}"
        return f"{line}; {kept.when(result)}" if result.get("kept") else line
