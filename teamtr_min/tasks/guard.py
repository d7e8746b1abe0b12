"""The door between the program and a task of the user's own.

What its methods raise or return is checked here, once, so that a mistake is a sentence with file, method and
what was wrong, never a traceback and never a run that trains on nonsense. They get copies: whatever they do
to a problem or a message, what is trained on stays as it was.
"""

import copy
import json
import reprlib
from collections.abc import Callable

from teamtr_min.files import UserError, guarded, one_line
from teamtr_min.tasks.task import Demonstration, Message, Problem, Role


class Guarded:
    """A task with the same methods and attributes; what it lacks is lacking here, too.

    A method without an entry in CHECKS is only kept from raising anything but UserError.
    """

    def __init__(self, task, path: str):
        self._task, self._path = task, path

    def __getattr__(self, name: str):
        value = getattr(self._task, name)
        if name in ATTRIBUTES:
            return self._checked(name, ATTRIBUTES[name], value)
        if not callable(value):
            return value
        call = guarded(self._path, name, value)

        def through_the_door(*given, **named):
            returned = call(*map(_copied, given), **named)
            return (
                self._checked(name, CHECKS[name], returned, *given, **named) if name in CHECKS else returned
            )

        return through_the_door

    def _checked(self, name: str, rule: tuple[str, Callable], returned, *given, **named):
        wanted, check = rule
        try:
            return check(returned, *given, **named)
        except KeyboardInterrupt:
            raise
        except BaseException:  # it may be an object of the user's own, with methods that raise anything
            size = f"a list of {len(returned)}: " if isinstance(returned, list) else ""
            shown = one_line(size + reprlib.repr(returned))
            must = f"`{name}` must {'return' if name in CHECKS else 'be'} {wanted.format(*given)}"
            raise UserError(f"{self._path}: {must}, not {shown}") from None


def _copied(argument):
    if isinstance(argument, Message):
        return argument.copy()
    if isinstance(argument, Problem):
        return copy.copy(argument)
    return [_copied(item) for item in argument] if isinstance(argument, list) else argument


def _sure(*conditions) -> None:
    if not all(conditions):
        raise ValueError


def _text(value) -> str:
    _sure(isinstance(value, str))
    value.encode()  # half of a surrogate pair is not text
    return value


def _records(kind: type, fields: tuple[str, ...], least: int, most: int, returned) -> list:
    _sure(isinstance(returned, list | tuple), least <= len(returned) <= most)
    for record in returned:
        _sure(isinstance(record, kind))
        for field in fields:
            _text(getattr(record, field))
    return [copy.copy(record) for record in returned]


def _roles(returned, agents: int) -> list[Role]:
    return _records(Role, ("name", "system"), agents, agents, returned)


def _problems(returned, count: int, generator, held_out: bool = False) -> list[Problem]:
    return _records(Problem, ("id", "text", "answer"), 1 if held_out else count, count, returned)


def _demonstrations(returned, count: int, generator) -> list[Demonstration]:
    shown = _records(Demonstration, (), count, count, returned)
    for one in shown:
        _records(Problem, ("id", "text", "answer"), 1, 1, [one.problem])
        _sure(isinstance(one.messages, list), all(_text(text) is text for text in one.messages))
        agents = [] if one.agents is None else one.agents
        _sure(isinstance(agents, list), all(type(j) is int and j >= 0 for j in agents))
        _sure(len(agents) in (0, len(one.messages)))
    return shown


def _grade(returned, *given) -> float:
    _sure(not isinstance(returned, str | bytes))
    value = float(returned)
    _sure(0 <= value <= 1)  # neither is NaN
    return value


def _answer(returned, *given) -> str | None:
    return None if returned is None else _text(returned)


def _measure(returned, *given) -> dict:
    _sure(isinstance(returned, dict), all(isinstance(key, str) for key in returned))
    # Numbers of NumPy and torch become plain ones.
    return json.loads(json.dumps(returned, allow_nan=False, default=float))


CHECKS = {  # method -> what it must return, in words with its arguments, and as a function
    "roles": ("a list of {0} Roles of texts", _roles),
    "sample_problems": (
        "a list of {0} Problems of texts (held-out ones may be fewer, but not none)", _problems
    ),
    "demonstrations": ("a list of {0} Demonstrations", _demonstrations),
    "grade": ("a number from 0 to 1", _grade),
    "answer": ("a text or None", _answer),
    "measure": ("a dict of finite numbers, texts, lists or None by name", _measure),
}  # fmt: skip
ATTRIBUTES = {
    "fields": ("two names, of the question's field and the answer's", lambda v: tuple(map(_text, [*v][:2]))),
    "grader": ("a text", _text),
}
