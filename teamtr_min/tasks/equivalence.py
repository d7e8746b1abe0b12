"""Algebra on answers, by the package math-verify where it is installed.

It may compute for ever on one answer, and its own time limits can fail. So this file, run as a program, puts
the questions to it in a process of its own, which the system ends after LIMIT seconds. That is processor
time: a machine that is busy with other things gives the same verdicts.
"""

import contextlib
import functools
import importlib.metadata
import json
import subprocess
import sys
import threading

LIMIT = 5.0  # seconds for one answer; a usual one takes 0.01, none of MATH's more than 1
MEMORY = 2 << 30  # bytes
_one_at_a_time = threading.Lock()


@functools.cache
def grader() -> str:
    """What decides whether two answers are equal, as results name it."""
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        return "exact"


@functools.lru_cache(1 << 14)
def equivalent(given: str, wanted: str) -> bool:
    """math-verify's verdict on two LaTeX expressions; False without it, or where it exceeds its limits."""
    if grader() == "exact":
        return False
    with _one_at_a_time:
        worker = _worker()
        try:
            worker.stdin.write(json.dumps([wanted, given]) + "\n")
            worker.stdin.flush()
            verdict = worker.stdout.readline()
        except OSError:
            verdict = ""
        if not verdict:  # it has ended; the next question starts another
            worker.kill()
            worker.communicate()
            _worker.cache_clear()
    return verdict == "True\n"


@functools.cache
def _worker() -> subprocess.Popen:
    """A process that waits for questions; in a group of its own, where Ctrl-C does not reach it."""
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, process_group=0,
    )  # fmt: skip
    if worker.stdout.readline() != "ready\n":
        from teamtr_min.files import UserError  # not above: the worker runs this file without the package

        raise UserError(f"{grader()} does not start; `python -c 'import math_verify'` says why")
    return worker


def _answer_questions() -> None:
    """The worker: a line [wanted, given] in, a line with the verdict out."""
    import resource
    import signal

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: plain expressions would go through Python's eval. Units are gone already.
    rules = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(normalization_config=rules)]

    def verdict(wanted: str, given: str) -> bool:
        gold, answer = (
            parse(f"${text}$", latex, "no_fallback", parsing_timeout=None) for text in (wanted, given)
        )
        return verify(gold, answer, timeout_seconds=None)

    with contextlib.suppress(ValueError, OSError):  # not every system limits memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out, sys.stdout = sys.stdout, sys.stderr
    verdict("x^2-1", "(x-1)(x+1)")  # loads what the first question would wait for
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # its signal ends the process, whatever that is doing
        try:
            equal = bool(verdict(*json.loads(line)))
        except Exception:
            equal = False
        print(equal, file=out, flush=True)


if __name__ == "__main__":
    _answer_questions()
