"""Tasks and routers of the user's own: each mistake is a sentence, and no argument can be spoilt."""

import pytest
from commands import refusal
from toy_runs import TOY, run, same, weights

import eval as evaluation
import train

TASK = """
import sys
import teamtr_min.tasks as t
from teamtr_min.team import Role

class Mine(t.Relay):
    {}

task = Mine
"""
WRONG = [
    "def grade(self, problem, messages): return 1 / 0",
    "def grade(self, problem, messages): sys.exit(0)",
    *(f"def grade(self, problem, messages): return {value}"
      for value in ("None", "[1.0]", "2.0", "-0.1", "float('inf')", "float('nan')", "'1'", "1j", "{}")),
    *(f"def sample_problems(self, count, generator, held_out=False): return {value}"
      for value in ("None", "[]", "super().sample_problems(count + 1, generator, held_out)", "[1] * count",
                    "['7+8'] * count", "[t.Problem(1, '7+8', '5')] * count", "iter([])",
                    "[t.Problem('1', '\\ud800', '5')] * count", "sys.exit(0)")),
    *(f"def roles(self, agents): return {value}"
      for value in ("None", "[]", "['A'] * agents", "[Role('A', None)] * agents", "[Role('A', '')] * 9",
                    "1 / 0")),
    *(f"def measure(self, problems, messages): return {value}"
      for value in ("None", "[1]", "{1: 2}", "{'x': float('nan')}", "{'x': self}", "{'stage': 7}",
                    "sys.exit(0)")),
]  # fmt: skip


@pytest.mark.parametrize("method", WRONG)
def test_what_a_task_does_wrong_is_named_with_file_and_method(tmp_path, capsys, method):
    (tmp_path / "mine.py").write_text(TASK.format(method))
    flags = [*TOY, "--task", str(tmp_path / "mine.py"), "--max-new-tokens", "8"]
    sentence = refusal(capsys, train.main, *flags, "--model", "relay", "--out", str(tmp_path / "run"))
    assert f"`{method[4 : method.index('(')]}`" in sentence and len(sentence) < 1000
    assert "mine.py" in sentence or "logged already" in sentence
    if "/ 0" in method or "exit" in method:
        assert "mine.py, line 7" in sentence


@pytest.mark.parametrize("answer", ["7", "[1]", "sys.exit(0)", "1 / 0"])
def test_a_wrong_answer_method_is_named(tmp_path, capsys, answer):
    (tmp_path / "mine.py").write_text(
        TASK.format(
            f"def grade(self, problem, messages): return 0.0\n    def answer(self, messages): return {answer}"
        )
    )
    flags = ["--agents", "2", "--problems", "4", "--k", "2", "--mode", "vote", "--device", "cpu"]
    assert "`answer`" in refusal(capsys, evaluation.main, str(tmp_path / "mine.py"), *flags)


@pytest.mark.parametrize(
    "returned",
    ["None", "[]", "[1] * count", "[t.Demonstration(t.Problem('1', '7+8', '5'), [5])] * count", "1 / 0",
     "[t.Demonstration(t.Problem('1', '7+8', '5'), ['5'], [0, 1])] * count",
     "[t.Demonstration(t.Problem('1', '7+8', '5'), ['5'], [9])] * count"],
)  # fmt: skip
def test_wrong_demonstrations_are_named(tmp_path, capsys, returned):
    method = f"def demonstrations(self, count, generator): return {returned}"
    (tmp_path / "mine.py").write_text(TASK.format(method))
    flags = ["--task", str(tmp_path / "mine.py"), "--model", "relay", "--warm-start", "2"]
    sentence = refusal(capsys, train.main, *TOY, *flags, "--out", str(tmp_path / "run"))
    assert "`demonstrations`" in sentence or "agent 9, whom the team lacks" in sentence


@pytest.mark.parametrize("returned", ["True", "1", "0.5", "__import__('numpy').float32(0.5)"])
def test_every_kind_of_number_is_a_return(tmp_path, returned):
    (tmp_path / "mine.py").write_text(TASK.format(f"def grade(self, problem, messages): return {returned}"))
    run(
        tmp_path / "run",
        "--task",
        str(tmp_path / "mine.py"),
        "--model",
        "relay",
        "--stages",
        "1",
        "--agents",
        "1",
    )


VANDAL = """
import teamtr_min.tasks as t

class Mine(t.Relay):
    def grade(self, problem, messages):
        value = super().grade(problem, messages)
        {vandalism}
        return value

    def measure(self, problems, messages):
        {vandalise_all}
        return {{}}

def router(turn, messages, agents, uniform):
    {vandalism_of_messages}
    return turn % agents

task = Mine
"""


def test_what_user_code_does_to_its_arguments_changes_nothing_of_what_is_trained_on(tmp_path):
    harm = "[m.tokens.clear() or m.logprobs.clear() for m in messages]; messages.clear()"
    rewrite = "object.__setattr__(problem, 'text', '1+1+1'); "
    everything = "[ms.clear() for ms in messages]; messages.clear(); problems.clear()"
    for name, words in [("harmless", ("pass",) * 3), ("vandal", (rewrite + harm, everything, harm))]:
        parts = dict(zip(("vandalism", "vandalise_all", "vandalism_of_messages"), words))
        file = tmp_path / f"{name}.py"
        file.write_text(VANDAL.format(**parts))
        run(tmp_path / name, "--task", str(file), "--router", str(file), "--model", "relay")
    assert same(weights(tmp_path / "harmless"), weights(tmp_path / "vandal"))
    logs = [(tmp_path / name / "transcripts.jsonl").read_text() for name in ("harmless", "vandal")]
    assert logs[0] == logs[1]


def test_ctrl_c_in_user_code_is_an_interrupt(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(TASK.format("def grade(self, problem, messages): raise KeyboardInterrupt"))
    flags = ["--task", str(file), "--model", "relay", "--out", str(tmp_path / "run")]
    assert train.main([*TOY, *flags]) == 130
