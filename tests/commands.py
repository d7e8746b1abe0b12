"""train.py and eval.py called in this process."""

import itertools
import json

import eval as evaluation


def refusal(capsys, main, *flags: str) -> str:
    """The one sentence with which a command refuses these flags."""
    capsys.readouterr()
    assert main([*flags]) == 2
    plan = "memory  ", " " * 8  # how its lines begin
    said = capsys.readouterr().err.splitlines(keepends=True)
    sentence = "".join(line for line in said if not line.startswith(plan))
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence


def evaluate(capsys, *flags: str) -> dict:
    """What `eval.py ... --json` prints."""
    capsys.readouterr()
    assert evaluation.main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def interrupt_at(call: int, monkeypatch, owner, name: str) -> None:
    """Ctrl-C instead of the `call`-th call, from 1, of a function of this module."""
    original, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
