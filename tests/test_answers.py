"""Answers: where one is stated, which are equal, and that none takes long."""

import json
import re
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import eval as evaluation
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.tasks import extract_answer, is_correct, load_task, number
from teamtr_min.tasks.answers import canonical
from teamtr_min.tasks.equivalence import _worker, equivalent, grader

SHARED = Path(__file__).parents[2] / "shared" / "data"
PAIRS = Path(__file__).parent / "data" / "equivalence.jsonl"


def boxed(answer: str) -> str:
    return f"so \\boxed{{{answer}}}"


@pytest.fixture
def fresh(monkeypatch):
    """No verdict and no worker of another test."""

    def forget():
        equivalent.cache_clear()
        if _worker.cache_info().currsize:
            _worker().kill()
        _worker.cache_clear()

    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def exact(fresh):
    """As where math-verify is not installed."""
    fresh.setattr("teamtr_min.tasks.equivalence.grader", lambda: "exact")


@pytest.fixture
def math_verify(fresh):
    if grader() == "exact":
        pytest.skip("math-verify is not installed")


@pytest.fixture
def stand_in(fresh, tmp_path):
    """In math-verify's place one that takes texts with the same letters for equal, and `loop` for ever."""
    (tmp_path / "latex2sympy2_extended.py").write_text("NormalizationConfig = dict")
    (tmp_path / "math_verify.py").write_text(
        textwrap.dedent("""
        import os
        LatexExtractionConfig = dict
        def parse(text, *_, **__):
            print("a library that talks")
            return text
        def verify(gold, answer, **_):
            while "loop" in answer: pass
            if "end" in answer: os._exit(1)
            if "memory" in answer: bytearray(1 << 40)
            return sorted(gold) == sorted(answer)
        """)
    )
    fresh.setenv("PYTHONPATH", str(tmp_path))
    fresh.setattr("teamtr_min.tasks.equivalence.grader", lambda: "math-verify 0")
    return tmp_path


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"first \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} but then #### 8", "8"),
        ("#### 8\nThe answer is 9.", "9"),
        ("The answer is: $1,234.50. Good.", "$1,234.50"),
        ("the final ANSWER is 3.5 metres", "3.5 metres"),
        ("The answer is\n\n5", "5"),
        (r"The answer is \boxed{12}.", "12"),
        (r"\boxed {\boxed{12}}", "12"),
        (r"{ \boxed{\{1, 2\}} }", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{unbalanced", None),
        ("####   \n", None),
        ("it is 5", None),
        ("", None),
    ],
)
def test_the_last_stated_answer_counts(text, answer):
    assert extract_answer(text) == answer


def read_pairs() -> list[dict]:
    source, *pairs = map(json.loads, PAIRS.read_text(encoding="utf-8").splitlines())
    assert source.keys() == {"source", "licence"} and len(pairs) >= 400
    return pairs


def verdicts() -> tuple[float, int]:
    """The share of right verdicts on the list of pairs, and how many unequal ones were accepted."""
    pairs = read_pairs()
    given = [is_correct(boxed(pair["given"]), pair["gold"]) for pair in pairs]
    right = sum(verdict == pair["equal"] for verdict, pair in zip(given, pairs))
    return right / len(pairs), sum(verdict and not pair["equal"] for verdict, pair in zip(given, pairs))


def test_the_exact_comparison_accepts_nothing_wrong(exact):
    share, accepted = verdicts()
    assert share > 0.75 and accepted == 0


def test_math_verify_agrees_with_the_list_of_pairs(math_verify):
    share, accepted = verdicts()
    assert share > 0.98 and accepted == 0


@pytest.mark.parametrize("given, wanted", [
    ("1,234.50", "1234.5"), ("$18", "18"), ("18 dollars", "18"), ("18.00", "18"), ("50%", "50"),
    (r"50\%", "50"), ("-3", "\N{MINUS SIGN}3"), ("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), ("12 apples", "12"),
    (r"12\text{ cm}", "12"), (r"x = \text{even}", r"x=\text{ even}"), (r"(1, 2)", "(1,2)"), ("5e3", "5000"),
    (r"3\frac{1}{2}", "7/2"), (r"\frac34", "3/4"), (r"\tfrac83", "8/3"), ("10%", "10"), (".1", "0.1"),
    ("58 square units", "58"), ("x = 5", "5"), ("(0.5, 1)", r"\left(\frac12, 1\right)"),
    ("(x-2)(x+2)", r"\left(x-2\right)\left(x+2\right)"), ("1" * 5000, "1" * 5000), ("1e999", "10e998"),
])  # fmt: skip
def test_answers_are_equal_as_numbers_or_else_as_text(exact, given, wanted):
    assert is_correct(boxed(given), wanted) and is_correct(f"#### {given}", wanted)
    assert is_correct(boxed(wanted), given)


@pytest.mark.parametrize("given, wanted", [
    ("0.1", "0.10000000000000001"), ("12,34", "1234"), ("18", "81"), ("1/3", "0.333333"),
    ("10000000000000001", "10000000000000000"), ("18", "-18"), ("1/0", "0"), ("blue", "red"), ("5 or 6", "5"),
    ("5 is wrong", "5"), (r"2\pi", "2"), ("5e3", "5"), ("0x10", "0"), (r"3\frac{1}{2}", "31/2"),
    ("5 6", "56"), ("2*3", "23"), ("5x", "5"), ("5 million", "5"), ("x = 5", "y = 5"), ("1_2", "1_3"),
    (r"\{1,2\}", "(1,2)"), ("1" * 5000, "1" * 4999 + "2"), ("1e9999999", "0"),
    ("St. Paul", "St. Mary"),
])  # fmt: skip
def test_other_answers_are_wrong_whatever_grades_them(fresh, given, wanted):
    assert not is_correct(boxed(given), wanted) and not is_correct(f"#### {given}", wanted)
    assert not is_correct(boxed(wanted), given)


def test_a_response_without_an_answer_is_wrong():
    assert not is_correct("18", "18") and not is_correct("", "")


@pytest.mark.parametrize("text", [
    r"\boxed{" * 30_000, r"\boxed{" * 30_000 + "}" * 30_000, boxed("1" + " " * 20_000), "1" + " " * 100_000,
    boxed("1" * 4301), boxed("1" * 999 + "e999"), boxed("1e999/1e-999"), "answer is" + "\n" * 100_000,
    ("answer" + " " * 1000) * 300, "#### " + " " * 100_000 + "\n", "#" * 100_000, boxed("5" + "," * 900),
    boxed(r"\frac" * 190), boxed("5" + " ab" * 300 + "!"), boxed("\ud800"), boxed("٣²½\0"), "{}" * 50_000,
], ids=range(17))  # fmt: skip
def test_no_text_takes_long_or_breaks_the_exact_comparison(exact, text):
    start = time.perf_counter()
    for response, answer in [(text, "5"), (boxed("5"), text)]:
        assert not is_correct(response, answer)
    canonical(text)
    assert number(text) is None or len(text) < 100
    assert time.perf_counter() - start < 2


def test_the_worker_is_asked_about_what_is_not_equal_exactly(stand_in):
    assert is_correct(boxed("x+1"), "1+x") and not is_correct(boxed("x+1"), "x+2")
    asked = equivalent.cache_info().misses
    for given, wanted in [("5", "6"), ("even", "neve"), ("1" * 1001 + "+x", "x+" + "1" * 1001), ("5", "5.0")]:
        is_correct(boxed(given), wanted)
    assert equivalent.cache_info().misses == asked == 2


def test_an_answer_that_breaks_its_limits_is_wrong_and_the_next_is_graded(stand_in):
    with ThreadPoolExecutor(2) as threads:  # nor does it matter which thread asks
        for bad in ("loop", "end", "memory"):
            start = time.perf_counter()
            assert not threads.submit(equivalent, bad, bad[::-1]).result()
            assert time.perf_counter() - start < 60
            assert threads.submit(equivalent, f"x+{len(bad)}", f"{len(bad)}+x").result()


def test_a_math_verify_that_does_not_start_is_an_error(stand_in):
    (stand_in / "math_verify.py").write_text("import absent")
    with pytest.raises(UserError, match="math-verify 0 does not start"):
        equivalent("x", "y")


@pytest.mark.parametrize("answer", [
    "9^{9^{9^{9}}}", r"\frac{1}{" * 90 + "x" + "}" * 90, "9^" * 50_000 + "9", "(x+y+z)^{99999}"
], ids=["power", "nested", "long", "expansion"])  # fmt: skip
def test_a_malicious_answer_ends_and_the_next_is_graded(math_verify, answer):
    start = time.perf_counter()
    assert not is_correct(boxed(answer), "x^2-1")
    assert time.perf_counter() - start < 60
    assert is_correct(boxed("(x-1)(x+1)"), "x^2-1")


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="GSM8K is not at hand (../shared/data/gsm8k)")
def test_every_gold_solution_of_gsm8k_is_right_and_its_neighbours_is_not(exact):
    records = [json.loads(line) for side in ("train", "test")
               for line in (SHARED / "gsm8k" / f"{side}.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(records) == 8792
    for record, other in zip(records, records[1:] + records[:1]):
        gold, wrong = (r["answer"].split("####")[1].strip().replace(",", "") for r in (record, other))
        assert is_correct(record["answer"], gold)
        assert is_correct(other["answer"], gold) == (gold == wrong)
    task = load_task(Config(task="gsm8k", data=str(SHARED / "gsm8k")))
    assert (len(task.train), len(task.held_out)) == (7473, 1319)
    assert all(number(p.answer) is not None for p in task.train + task.held_out)


@pytest.fixture(scope="module")
def math() -> list[dict]:
    if not (SHARED / "math").is_dir():
        pytest.skip("MATH is not at hand (../shared/data/math)")
    return [json.loads(line) for line in (SHARED / "math" / "train.jsonl").read_text().splitlines()]


def test_gold_solutions_of_math_are_right(exact, math):
    assert sum(is_correct(r["solution"], r["answer"]) for r in math) / len(math) > 0.99


@pytest.mark.parametrize("how", ["exact", "math_verify"])
def test_hardly_any_other_answer_of_math_is_accepted(request, how, math):
    request.getfixturevalue(how)
    answers = list(dict.fromkeys(r["answer"] for r in math if number(r["answer"]) is None))
    pairs = list(zip(answers, answers[1:]))[::3]
    accepted = [pair for pair in pairs if is_correct(boxed(pair[0]), pair[1])]
    assert len(pairs) > 200 and len(accepted) <= len(pairs) / 100, accepted


def test_the_task_names_its_grader(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "7+8?", "answer": 15}\n')
    task = load_task(Config(task="jsonl", data=str(tmp_path / "p.jsonl")))
    assert re.fullmatch(r"exact|math-verify \d[\d.]*", task.grader)


def test_eval_names_the_grader(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["relay", "--agents", "2", "--problems", "2", "--k", "1", "--device", "cpu"]
    assert evaluation.main(flags) == 0 and ", graded: exact, " in capsys.readouterr().out.splitlines()[0]
    assert evaluation.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["grader"] == "exact"
