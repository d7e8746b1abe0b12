"""train.py and eval.py called in this process."""

import itertools
import json


def refusal(capsys, main, *flags: str) -> str:
    """The one sentence with which a command refuses these flags."""
    capsys.readouterr()
    assert main([*flags]) == 2
    plan = "memory  ", " " * 8  # how its lines begin
    said = capsys.readouterr().err.splitlines(keepends=True)
    sentence = "".join(line for line in said if not line.startswith(plan))
    assert sentence.startswith("error: ") and sentence.count("\n") == 1, said
    return sentence


def printed(capsys, *flags: str) -> str:
    import eval as evaluation

    capsys.readouterr()
    assert evaluation.main([*flags]) == 0
    return capsys.readouterr().out


def evaluate(capsys, *flags: str) -> dict:
    return json.loads(printed(capsys, *flags, "--json"))


def interrupt_at(call: int, monkeypatch, owner, name: str) -> None:
    """Ctrl-C instead of the `call`-th call, from 1, of a function of this module."""
    original, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments, **named):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, interrupted)
