"""Files as everyone here reads and writes them, and the one kind of error that is meant for a person."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a Unix: two runs in one directory go unnoticed
    fcntl = None


class UserError(Exception):
    """Something that the person at the terminal can put right; shown as one sentence, exit code 2."""


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; UserError when there is none to be had."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or a directory whole or not at all.

    The caller fills the path that it is given, which is then forced to disk and takes the place of `path`.
    Whatever goes wrong before leaves the old one as it was, and nothing beside it.
    """
    aside = path.with_name(f".{path.name}.part")
    _remove(aside)
    try:
        yield aside
        for written in [*aside.rglob("*"), aside]:  # a rename must not outrun what it names
            _flush(written)
        if path.is_dir():
            shutil.rmtree(path)  # a full directory cannot be renamed over
        os.replace(aside, path)
        _flush(path.parent)
    except BaseException:
        _remove(aside)
        raise


def lock(file: IO) -> None:
    """Keep an open file for this process alone, until it closes it or dies; UserError if another has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file.name} is being written by another process; wait for its end") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def function_from_file(path: str, name: str) -> Callable:
    """The function `name` of a Python file of the user's own, which is run to get it."""
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: no usable function `{name}`: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(f"{path}: `{name}` is not a function")
    return function


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
