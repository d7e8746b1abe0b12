"""Chat templates, which are programs of strangers: jinja2's sandbox, in a process of its own with limits.

The sandbox keeps a template from Python, but not from `'a' * 10**9` or from loops in loops. So this file, run
as a program, compiles and renders. The system ends it after LIMIT seconds of computing, and gives it no more
than MEMORY bytes. A template is rendered a dozen times a run, always while a team is loaded.
"""

import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import threading

LIMIT = 1.0  # seconds of processor time for one conversation; a usual one takes 0.001
MEMORY = 1 << 30  # bytes
LONGEST = 1 << 20  # characters of a template, and of what it writes
_one_at_a_time = threading.Lock()


class TemplateError(Exception):
    """What is wrong with a template, in its own words or in ours."""


def render(template: str, values: dict | None) -> str:
    """What `template` writes, given `values` that JSON can hold; without any it is only compiled.

    Raises TemplateError when it does not parse, refuses, or exceeds its limits.
    """
    if len(template) > LONGEST:
        raise TemplateError(f"it is longer than {LONGEST:,} characters")
    question = json.dumps([template, values]) + "\n"
    with _one_at_a_time:
        worker = _worker(os.getpid())  # a forked process asks one of its own
        try:
            worker.stdin.write(question)
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except OSError:
            answer = ""
        if not answer.endswith("\n"):  # it has ended; the next question starts another
            worker.kill()
            worker.communicate()
            _worker.cache_clear()
            raise TemplateError(f"it takes more than {LIMIT:g} seconds of computing or {MEMORY >> 20} MiB")
    answer = json.loads(answer)
    if "text" not in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


@functools.cache
def _worker(process_id: int) -> subprocess.Popen:
    """A process that waits for templates; in a group of its own, where Ctrl-C does not reach it."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, process_group=0,
    )  # fmt: skip


def _answer_questions() -> None:
    """The worker: a line [template, values] in, a line {"text"} or {"error"} out."""
    import resource
    import signal

    environment = _environment()
    compiled = functools.cache(environment.from_string)

    def answer(template: str, values: dict | None) -> dict:
        program = compiled(template)
        text = "" if values is None else program.render(values)
        return {"text": text} if len(text) <= LONGEST else {"error": f"it writes {len(text):,} characters"}

    with contextlib.suppress(ValueError, OSError):  # not every system limits memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # its signal ends the process, whatever that is doing
        try:
            reply = answer(*json.loads(line))
        except Exception as error:  # a template may raise anything
            reply = {"error": str(error)[:1000] or type(error).__name__}
        print(json.dumps(reply), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _environment():
    """jinja2 with the filters and functions that chat templates rely on."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks assistant text for others; here it is inert."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if __name__ == "__main__":
    _answer_questions()
