"""Files are whole and strict JSON, a user's own mistake is named with file and line."""

import json
import math

import pytest
from tiny import refusal

from teamtr_min import files
from teamtr_min.files import UserError, function_from_file, replacing, to_json, users_line, write_json


def test_json_is_strict_and_an_error_is_one_printable_line():
    value = {"radius": math.inf, "low": (-math.inf, 0.5), "text": "Ωμ", "none": None, "yes": True}
    assert json.loads(to_json(value)) == value | {"radius": "inf", "low": ["-inf", 0.5]}
    assert "Ωμ" in to_json(value)
    with pytest.raises(ValueError):
        to_json({"x": [math.nan]})
    assert str(UserError("a\nb\033[2J")) == "a b [2J" and len(str(UserError("x" * 10**6))) == 1000


def test_lines_of_json_are_parted_by_newlines_alone_and_a_fault_is_located(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n{"x": 1}\n'.encode() + b'{"x": "\xc3')
    right = [(1, {"text": "a\u2028b"}), (3, {"x": 1})]
    assert [*files.read_jsonl(path, whole=True)] == right  # without what a kill cut off
    for line in (b'{"x": "\xc3', b"nonsense", b"[1]", b"7", rb'{"x": ["\ud83d"]}', rb'{"\uDE00": 1}'):
        path.write_bytes(b'{"x": 1}\n' + line)
        assert "a.jsonl, line 2: " in refusal(list, files.read_jsonl(path))
    assert "none.jsonl cannot be read: No such" in refusal(list, files.read_jsonl(tmp_path / "none.jsonl"))
    path.write_text("{")
    told = refusal(files.read_json, path), refusal(files.read_json, tmp_path / "none")
    assert all(" cannot be read: " in one for one in told) and "column 2" in told[0] and "No such" in told[1]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_or_directory_is_replaced_whole_or_not_at_all(tmp_path, error):
    file, directory = tmp_path / "file", tmp_path / "directory"
    file.write_text("old")
    directory.mkdir()
    (directory / "old").touch()
    for path in (file, directory):
        with pytest.raises(error), replacing(path) as aside:
            aside.write_text("half") if path == file else aside.mkdir()
            raise error
    assert file.read_text() == "old" and [p.name for p in directory.iterdir()] == ["old"]
    assert {p.name for p in tmp_path.iterdir()} == {"file", "directory"}
    write_json(file, {"new": 1})
    with replacing(directory) as aside:
        aside.mkdir()
        (aside / "new").touch()
    assert json.loads(file.read_text()) == {"new": 1} and [p.name for p in directory.iterdir()] == ["new"]
    assert {p.name for p in tmp_path.iterdir()} == {"file", "directory"}


OWN = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Entry:
    number: int

def grade(x):
    return 1 / Entry(x).number
"""


def test_a_users_file_is_named_with_the_line_in_which_it_failed_or_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    for path in ("mine.py", str(tmp_path / "mine.py")):  # relative paths as they were typed
        grade = function_from_file(path, "grade")
        with pytest.raises(ZeroDivisionError) as caught:
            grade(0)
        words = f"{path}, line 10: `grade` failed: ZeroDivisionError: division by zero"
        assert grade(4) == 0.25 and users_line(caught.value) == words
    path = tmp_path / "none.py"
    with pytest.raises(FileNotFoundError, match="none.py"):
        function_from_file(str(path), "grade")
    for text in ("x = 1", "grade = 1"):
        path.write_text(text)
        assert "none.py defines no function `grade`" in refusal(function_from_file, str(path), "grade")
    path.write_text("\n\ngrade = = 1")
    with pytest.raises(SyntaxError, match="invalid syntax .none.py, line 3."):
        function_from_file(str(path), "grade")
