"""Algebra on answers, by the package math-verify where it is installed. It may compute for ever on one. So
this file, run as a program, is a worker that forks for each question; the system ends a fork that is slow."""

import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys

LIMIT = 0.5  # seconds of processor time for one answer; a usual one takes 0.03 to 0.2


@functools.cache
def grader() -> str:
    """What decides whether two answers are equal, as results name it."""
    found = [package.version for package in importlib.metadata.distributions(name="math-verify")]
    return f"math-verify {found[0]}" if found else "exact"


@functools.lru_cache(1 << 14)
def equivalent(given: str, wanted: str) -> bool:
    """math-verify's verdict on two LaTeX expressions; False without it, or where it exceeds its limit."""
    if grader() == "exact":
        return False
    print(json.dumps([wanted, given]), file=_worker().stdin, flush=True)
    if not (verdict := _worker().stdout.readline()):
        raise RuntimeError(f"{grader()} does not run; `python -c 'import math_verify'` says why")
    return verdict == "True\n"


@functools.cache
def _worker() -> subprocess.Popen:
    """A process that waits for questions; in a group of its own, where Ctrl-C does not reach it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-P", __file__], **pipes, text=True, process_group=0)


def serve() -> None:  # the worker: a line [wanted, given] in, a line with the verdict out
    import math_verify.grader
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: plain expressions would go through Python's eval. Units are gone already.
    rules = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(normalization_config=rules)]
    math_verify.grader.sympy_numeric_eq = exactly_equal  # the package's own rounds to 15 digits
    sys.stdout = sys.stderr  # the package may print

    def equal(*texts: str) -> bool:
        wanted, given = (parse(f"${text}$", latex, "no_fallback", parsing_timeout=None) for text in texts)
        return verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True)

    equal("x^2-1", "(x-1)(x+1)")  # loads what the first question would wait for
    for question in sys.stdin:
        if os.fork() == 0:
            signal.setitimer(signal.ITIMER_PROF, LIMIT)  # its signal ends the process
            os._exit(0 if equal(*json.loads(question)) else 1)
        os.write(1, b"True\n" if os.wait()[1] == 0 else b"False\n")


def exactly_equal(a, b, *_) -> bool:
    """Whether the difference of two sympy expressions is exactly 0; of two matrices, of each element."""
    from sympy import nsimplify

    if hasattr(a, "shape") and hasattr(b, "shape"):
        return a.shape == b.shape and all(map(exactly_equal, a.doit().flat(), b.doit().flat()))
    try:
        difference = nsimplify(a, rational=True).doit() - nsimplify(b, rational=True).doit()
        return difference.is_number and difference.equals(0) is True
    except (TypeError, AttributeError):
        return False


if __name__ == "__main__":
    serve()
