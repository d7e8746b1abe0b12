"""Algebra on answers, by the package math-verify where it is installed.

It may compute for ever on one answer. So this file, run as a program, answers questions in a process of its
own, which the system ends after LIMIT seconds of processor time. A second process, with the package loaded,
then forks the next one.
"""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys

LIMIT = 0.5  # seconds for one answer; a usual one takes 0.03


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
    print(json.dumps([wanted, given]), file=_worker().stdin, flush=True)
    if not (verdict := _worker().stdout.readline()):
        raise RuntimeError(f"{grader()} does not run; `python -c 'import math_verify'` says why")
    return verdict == "True\n"


@functools.cache
def _worker() -> subprocess.Popen:
    """A process that waits for questions; in a group of its own, where Ctrl-C does not reach it."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, process_group=0,
    )  # fmt: skip


def serve() -> None:
    """The worker: a line [wanted, given] in, a line with the verdict out."""
    verdict = load_math_verify()
    verdict("x^2-1", "(x-1)(x+1)")  # loads what the first question would wait for
    while process := os.fork():
        if os.waitpid(process, 0)[1] == 0:
            return  # there are no more questions
        os.write(1, b"False\n")  # the limit has ended it
    answer_questions(verdict)


def answer_questions(verdict) -> None:
    import signal

    while question := read_line():
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # its signal ends this process, whatever that is doing
        try:
            equal = verdict(*json.loads(question))
        except Exception:
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(1, f"{equal}\n".encode())


def read_line() -> bytes:
    """One question and not a byte more: the next one may be for another process."""
    question = b""
    while not question.endswith(b"\n") and (piece := os.read(0, 1 << 16)):
        question += piece
    return question


def load_math_verify():
    import math_verify.grader
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: plain expressions would go through Python's eval. Units are gone already.
    rules = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(normalization_config=rules)]
    math_verify.grader.sympy_numeric_eq = exactly_equal  # the package's own rounds to 15 digits
    sys.stdout = sys.stderr  # the package may print

    def verdict(wanted: str, given: str) -> bool:
        gold, answer = (
            parse(f"${text}$", latex, "no_fallback", parsing_timeout=None) for text in (wanted, given)
        )
        return bool(verify(gold, answer, timeout_seconds=None))

    return verdict


def exactly_equal(a, b, *_) -> bool:
    """Whether the difference of two sympy expressions is exactly 0; of two matrices, of each element."""
    from sympy import nsimplify

    if hasattr(a, "shape") and hasattr(b, "shape"):
        a, b = a.doit(), b.doit()
        return a.shape == b.shape and all(map(exactly_equal, a.flat(), b.flat()))
    try:
        a, b = (nsimplify(x, rational=True).doit() for x in (a, b))  # decimals become fractions
        difference = a - b
    except (TypeError, AttributeError):
        return False
    return difference.is_number and difference.equals(0) is True


if __name__ == "__main__":
    serve()
