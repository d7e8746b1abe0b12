"""Tools that go by name, `--tools calculator`: fixed agents that may answer after each model's turn. [ours]

A tool is a Role with a function, (problem, messages) -> text; with an empty text it writes no message."""

import dataclasses
import re
import reprlib

from teamtr_min.config import split_names
from teamtr_min.files import UserError
from teamtr_min.tasks.answers import closed_form
from teamtr_min.tasks.task import Message, Problem, Role

LONGEST = 64  # characters of a message of these tools, and so at most as many tokens


def calculator(problem: Problem, messages: list[Message]) -> str:
    """The values of what the latest message asks as `<<12*3>>` or `<<12*3=36>>`, of at most three. Worked out
    exactly, written with ten digits; `?` stands for no value and for larger ones."""
    latest = "".join(message.text for message in messages[-1:])
    asked = re.findall(r"<<([^<>=\n]{1,100})(?:=[^<>\n]{0,100})?>>", latest)[-3:]
    values = [None if "%" in text else closed_form(text.replace("$", "")) for text in asked]
    return ", ".join("?" if v is None or abs(v) >= 10**10 else f"{float(v):.10g}" for v in values)


# name -> Role, whose system prompt is for the others
TOOLS = {"calculator": Role("Calculator", "Write <<12*3>> and the calculator works it out.", calculator)}


def with_tools(roles: list[Role], names: str) -> list[Role]:
    """`roles`, told what the tools with these names do, and behind them the tools. Raises UserError."""
    wanted = [name for name in split_names(names) if name]
    if unknown := [name for name in wanted if name not in TOOLS]:
        raise UserError(f"no tool {unknown[0]!r}: give {', '.join(TOOLS)}, or see docs/tasks.md for your own")
    tools = [TOOLS[name] for name in wanted]
    told = [tool.system for tool in tools]
    return [dataclasses.replace(role, system=" ".join([role.system, *told])) for role in roles] + tools


def spoken(j: int, role: Role, problem: Problem, messages: list[Message]) -> list[Message]:
    """The message of agent j, a tool, or none. Raises UserError if its function returns no text."""
    text = role.tool(problem, messages)
    if not isinstance(text, str):
        raise UserError(f"the tool {role.name!r} must return a text, but returned {reprlib.repr(text)}")
    return [Message(j, [], text, [], stopped=True)] if text else []
