"""Files: strict JSON, written whole or not at all, functions of a user's file; and UserError."""

import contextlib
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


class UserError(Exception):
    """A mistake that the person at the terminal can mend: shown as one line, exit code 2."""

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else " " for c in super().__str__())[:1000]


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON: an infinity becomes the text "inf" or "-inf". Raises ValueError for NaN."""

    def strict(value):
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    return json.dumps(strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError if it cannot be read or holds something else."""
    try:
        return {} | json.loads(Path(path).read_text(encoding="utf-8"))  # TypeError: no object
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


def read_jsonl(path: str | Path, whole: bool = False) -> Iterator[tuple[int, dict]]:
    """Line number and object of each line that is not blank; with `whole` only of lines that end with a
    newline, as all do that a kill did not cut off. Raises UserError, which names file and line."""
    try:
        lines = Path(path).read_bytes().split(b"\n")  # not splitlines(): a text may hold other separators
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines[:-1] if whole else lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)  # with or without a byte order mark
                json.dumps(record, ensure_ascii=False).encode()  # no half of a character
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: must be a JSON object, but is {str(record)[:100]}")
            yield number, record


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as aside:
        aside.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or a directory whole or not at all: the caller fills the path that it is given, which is
    then forced to disk and renamed to `path`. After an error nothing of it is left."""
    path = path.resolve()  # a link stays one
    aside = path.with_name(f".{path.name}.part")
    remove(aside)
    umask = os.umask(0o077)  # there is no other way to read it
    os.umask(umask)
    try:
        yield aside
        for written in [*aside.rglob("*"), aside]:
            if written.is_file():
                written.chmod(0o666 & ~umask)  # safetensors writes 0600
            descriptor = os.open(written, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)  # a full directory cannot be renamed over
        os.replace(aside, path)
    finally:
        remove(aside)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def function_from_file(path: str, name: str) -> Callable:
    """The function `name` of a user's Python file. Raises UserError if there is none, or what it raises."""
    # The module is named by its path as the user typed it: by this users_line() knows it.
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise UserError(f"{path} defines no function `{name}`")
    return function


def users_line(error: BaseException) -> str | None:
    """ "FILE, line N: `function` failed: why" if an error came out of a file of the user's, else None."""
    frames = [call for call in traceback.walk_tb(error.__traceback__)
              if call[0].f_globals.get("__name__", "").endswith(".py")]  # fmt: skip
    if not frames:
        return None
    first, line = frames[0][0], frames[-1][1]
    place = f"{first.f_globals['__name__']}, line {line}: `{first.f_code.co_name}`"
    return f"{place} failed: {type(error).__name__}: {' '.join(str(error).split())}"
