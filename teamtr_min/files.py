"""Files: strict JSON, written whole or not at all, one writer, functions of a user's file; and UserError."""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


class UserError(Exception):
    """A mistake that the person at the terminal can mend: shown as one line, exit code 2."""

    def __str__(self) -> str:
        return one_line(super().__str__(), 1000)


def one_line(text: object, most: int = 200) -> str:
    """Any text as one printable line of at most `most` characters."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON: an infinity becomes the text "inf" or "-inf". Raises ValueError for NaN."""
    return json.dumps(_strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _strict(value):
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as aside:
        aside.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or a directory whole or not at all.

    The caller fills the path that it is given. This is then forced to disk and renamed to `path`. If anything
    is raised before, `path` stays as it was and nothing is left beside it.
    """
    aside = path.with_name(f".{path.name}.part")
    _remove(aside)
    try:
        aside.touch()
        mode = aside.stat().st_mode & 0o777  # as the umask has it; safetensors writes 0600
        aside.unlink()
        yield aside
        for written in [*aside.rglob("*"), aside]:
            if written.is_file():
                written.chmod(mode)
            _flush(written)
        if path.is_dir():
            shutil.rmtree(path)  # a full directory cannot be renamed over
        os.replace(aside, path)
        _flush(path.parent)
    except BaseException:
        _remove(aside)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def lock(file: IO) -> None:
    """Lock an open file until it is closed. Raises UserError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file.name} is being written by another process; wait until it ends") from None


def sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def function_from_file(path: str, name: str) -> Callable:
    """The function `name` of the user's Python file `path`. Raises UserError if there is none; what the file
    itself raises while it is run passes through."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    # The module is named by its path as the user typed it: by this users_line() knows it.
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    if not callable(function := getattr(module, name, None)):
        raise UserError(f"{path} defines no function `{name}`")
    return function


def users_line(error: BaseException) -> str | None:
    """ "FILE, line N: `function` failed: why" if an error came out of a file of the user's, else None."""
    called = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name, line)
              for frame, line in traceback.walk_tb(error.__traceback__)]  # fmt: skip
    own = [call for call in called if call[0].endswith(".py")]
    if not own:
        return None
    path, function, line = own[0][0], own[0][1], own[-1][2]
    return f"{path}, line {line}: `{function}` failed: {type(error).__name__}: {one_line(error)}"


def defined_at(function: Callable) -> str:
    """ "FILE, line N" of a function of the user's, for an error about what it returned."""
    code = getattr(function, "__code__", None)
    return f"{function.__module__}, line {code.co_firstlineno}" if code else repr(function)
