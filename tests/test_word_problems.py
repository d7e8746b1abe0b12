"""Word problems from files and data sets, and tasks of a user's own: what is read, left out and refused."""

import hashlib
import importlib.util
import json
import shutil

import pytest
from tiny import refusal, said

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.hf.weights import hub_data, pinned
from teamtr_min.run.memory import plan_training
from teamtr_min.tasks import TASKS, Problem, load_task, read_problems
from teamtr_min.tasks.word_problems import DATASETS, FILES

COMMIT = "c" * 40


def write(path, *questions, answer="7", field="question"):
    path.write_text("".join(json.dumps({field: q, "answer": answer}) + "\n" for q in questions))
    return path


def jsonl(path, **flags):
    return load_task(Config(task="jsonl", data=str(path), **flags))


@pytest.fixture
def task(tmp_path):
    return jsonl(write(tmp_path / "p.jsonl", *(f"What is {i}?" for i in range(200))))


def test_problem_files_are_read_and_each_problem_names_its_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"q": "7+8", "a": 5}\n\n{"q": "1*1", "a": "so #### 1", "id": "x"}\n')
    problems = [Problem("p.jsonl, line 1", "7+8", "5"), Problem("p.jsonl, line 3", "1*1", "1")]
    assert read_problems(tmp_path / "p.jsonl", "q", "a") == problems


@pytest.mark.parametrize("line, fault", [
    *((line, 'p.jsonl, line 2: must have a text in "q" and in "a" .*, but is .*')
      for line in ('{"q": "1", "b": 2}', '{"q": null, "a": 1}', '{"q": 1, "a": " "}', '{"q": [7], "a": 1}')),
    ("{", "p.jsonl, line 2: Expecting"), ("", "no problems"),
])  # fmt: skip
def test_a_fault_in_a_problem_file_is_located(tmp_path, line, fault):
    (tmp_path / "p.jsonl").write_text(('{"q": "7+8", "a": "5"}\n' if line else "\n") + line + "\n")
    with pytest.raises(UserError, match=fault):
        read_problems(tmp_path / "p.jsonl", "q", "a")


def test_problems_are_split_and_sampled_without_repetition(task):
    assert len(task.train) + len(task.held_out) == 200 and 8 <= len(task.held_out) <= 35
    assert {p.id for p in task.all_problems()} == {f"p.jsonl, line {i}" for i in range(1, 201)}
    first, second = ([p.id for p in task.sample_problems(50, rng.generator(0, stage))] for stage in (0, 1))
    assert len(set(first)) == 50 and not set(first) & {p.id for p in task.held_out} and first != second
    assert task.sample_problems(3, rng.generator(0), held_out=True) == task.held_out[:3]
    with pytest.raises(UserError, match="only .* to train on"):  # before anything is loaded
        plan_training(Config(problems=500), task)
    assert [len(task.roles(agents)) for agents in (1, 2, 3)] == [1, 2, 3]


def test_the_last_answer_that_any_message_states_is_the_teams(task):
    problem = Problem("", "", "18")
    for last in ("I agree.", "#### Check\n9 * 2 = 18, fine", "The answer is already right.", "\\boxed{}"):
        assert [task.grade(problem, said(first, last)) for first in ("\\boxed{18}", "hm")] == [1, 0]
    for last in ("no: \\boxed{17}", "The answer is 17.", "#### 17"):
        assert task.grade(problem, said("\\boxed{18}", last)) == 0 and task.answer(said("18", last)) == "17"
    stated = task.answer(said("\\boxed{36/2}", "I agree."))
    assert (stated, task.same(stated)) == ("36/2", "18") and task.answer(said("18")) is None


def test_held_out_problems_among_the_training_ones_are_left_out_with_a_count(tmp_path):
    write(tmp_path / "train.jsonl", *(f"What is {i}?" for i in range(10)), "Zoe\u0308 is?", "Zo\xeb was?")
    write(tmp_path / "test.jsonl", "What is 3?", " what  is 4?\n", "ZO\xcb is?", "zoe\u0308 was?")
    task = jsonl(tmp_path)
    assert [p.id for p in task.train] == [f"train.jsonl, line {i + 1}" for i in range(10) if i not in (3, 4)]
    assert task.notes == [f"4 problems of {tmp_path} are left out: they stand among the held-out ones too"]
    assert len(task.held_out) == 4 and task.is_held_out("What is 3?") and not task.is_held_out("What is 5?")
    task.leave_out({"train.jsonl, line 1", "test.jsonl, line 3", "no such"}, "they are too long")
    assert len(task.train) == 7 and len(task.held_out) == 3 and task.notes[1].startswith("2 problems")
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name, *(f"What is {i}?" for i in range(10)))
    with pytest.raises(UserError, match="only 0 to train on and 10 held out; 10 problems of .* stand among"):
        jsonl(tmp_path).sample_problems(1, rng.generator(0))


def test_the_fingerprint_changes_with_the_problems_their_answers_and_the_grader(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", *(f"What is {i}?" for i in range(30)))
    before = jsonl(path).fingerprint()
    assert before == jsonl(path).fingerprint() and before.keys() == {"problems", "grader"}
    path.write_text(path.read_text().replace('"7"', '"8"', 1))
    assert jsonl(path).fingerprint()["problems"] != before["problems"]
    monkeypatch.setattr("teamtr_min.tasks.word_problems.grader", lambda: "another")
    assert jsonl(path).fingerprint()["grader"] != before["grader"]
    assert load_task(Config()).fingerprint() == {"task": "relay, version 1"}


def test_a_data_set_is_downloaded_once_and_math_is_trained_on_apart_from_math500(tmp_path, monkeypatch):
    monkeypatch.setenv("TEAMTR_CACHE", str(tmp_path / "cache"))
    files = []
    for name, texts in {"math-train": "abc", "math500": "bd"}.items():  # published here, with the right hash
        files.append(write(tmp_path / name, *texts, field="problem"))
        sha256 = hashlib.sha256(files[-1].read_bytes()).hexdigest()
        monkeypatch.setitem(FILES, name, (files[-1].as_uri(), sha256))
    for _ in range(2):
        task = load_task(Config(task="math"))
        assert [p.text for p in task.train] == ["a", "c"] and [p.text for p in task.held_out] == ["b", "d"]
        for file in files:
            file.write_text("another")
    assert load_task(Config(task="math500")).held_out == task.held_out and set(DATASETS) < set(TASKS)
    assert task.train[1].id == "math-train.jsonl, line 3"
    shutil.rmtree(tmp_path / "cache")
    for why in ("invalid hash", "No such file"):
        with pytest.raises(UserError, match=f"no math500 from file:.*{why}.*give a copy with --data"):
            load_task(Config(task="math500"))
        assert not [*(tmp_path / "cache").iterdir()]
        files[1].unlink(missing_ok=True)


def test_a_data_set_of_the_hub_has_its_sides_by_name_and_is_pinned_to_its_commit(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    hub_data.cache_clear()
    repos = {"two": {"data/train-0": 9, "data/train-1": 9, "data/test-0": 4, "data/dev": 3}}
    repos |= {"one": {"all": 40}, "many": {"main/train": 9, "main/test": 4, "other/train": 5}}
    for repo, files in repos.items():
        directory = tmp_path / f"datasets--org--{repo}"
        for name, count in files.items():
            file = directory / "snapshots" / COMMIT / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, *(f"{name} {i}?" for i in range(count)))
        (directory / "refs").mkdir()
        (directory / "refs" / "main").write_text(COMMIT)
    for name, sides in {"org/two": (18, 4), "org/many:main": (9, 4), f"org/two@{COMMIT}": (18, 4)}.items():
        config = pinned(Config(task="jsonl", data=name))
        task = load_task(config)
        assert (len(task.train), len(task.held_out)) == sides and f"@{COMMIT}" in config.data
        assert config.data.replace(f"@{COMMIT}", "") == name.replace(f"@{COMMIT}", "")
    assert task.train[9].id == "data/train-1.jsonl, line 1" and 0 < len(jsonl("org/one").held_out) < 20
    assert "needs its folder, such as org/many:main (main, other)" in refusal(jsonl, "org/many")
    assert "org/no@main cannot be had from" in refusal(jsonl, "org/no")
    assert "has no JSONL or parquet files" in refusal(jsonl, "org/many:no")


def test_prompts_speak_of_maths_where_the_data_set_is_of_maths_alone(task, tmp_path):
    for name in ("jsonl", "gsm8k"):
        prompt = load_task(Config(task=name, data=str(task.path))).roles(3)[2].system
        assert ("maths" in prompt) == ("boxed" in prompt) == (name == "gsm8k") != ("Answer: ..." in prompt)
    assert task.grade(Problem("", "", "Rome"), said("Answer: rome")) == 1
    fault = "cannot be read" if importlib.util.find_spec("pyarrow") else "needs pyarrow: pip install pyarrow"
    assert fault in refusal(jsonl, write(tmp_path / "p.parquet"))


TASK = """
from teamtr_min.tasks import Problem, Role

class Own:
    def roles(self, agents): return [Role(str(j), "") for j in range(agents)]
    def sample_problems(self, count, generator, held_out=False): return [Problem("1", "1+1", "2")] * count
    def grade(self, problem, messages): return 1

def task(config): return Own()
"""


def own(tmp_path, old: str = "", new: str = ""):
    (tmp_path / "mine.py").write_text(TASK.replace(old, new) if old else TASK)
    return load_task(Config(task=str(tmp_path / "mine.py")))


def test_a_users_task_has_the_defaults_and_whatever_else_it_defines(tmp_path):
    task = own(tmp_path)
    (problem,) = task.sample_problems(1, rng.generator(0))
    assert task.grade(problem, []) == 1.0 and type(task.grade(problem, [])) is float
    assert task.view(problem, 1) == "1+1" and task.fingerprint() == {} and not task.is_held_out("1+1")
    assert not hasattr(task, "demonstrations") and not hasattr(task, "answer")
    assert own(tmp_path, "class Own:", "class Own:\n    notes = ['seen']").notes == ["seen"]


@pytest.mark.parametrize("old, new, fault", [
    ("return 1\n", "return float('nan')\n", "`grade` must return a number from 0 to 1, but returned nan"),
    ("def grade", "def great", "its task has no grade"),
    ("return 1\n", "return 2\n", "`grade` must return .*returned 2"),
    ("return 1\n", "return '1'\n", "`grade` must .*'1'"), ("return 1\n", "pass\n", "`grade` .*None"),
    ("range(agents)]", "range(agents - 1)]", "`roles` must return a list of 3 Roles, but"),
    ("Role(str(j), '')".replace("'", '"'), "str(j)", "`roles` must return a list of 3 Roles"),
    ("* count", "* (count - 1)", "`sample_problems` must return a list of 4 Problems"),
    ('[Problem("1", "1+1", "2")]', '["1+1"]', "`sample_problems` must return a list of 4 Problems"),
])  # fmt: skip
def test_what_a_users_task_returns_is_checked_in_one_sentence(tmp_path, old, new, fault):
    with pytest.raises(UserError, match=rf"mine.py: {fault}"):
        task = own(tmp_path, old, new)
        task.roles(3)
        task.grade(*task.sample_problems(4, rng.generator(0))[:1], [])
