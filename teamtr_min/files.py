"""Files as everyone here reads and writes them, and the one kind of error that is meant for a person."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a Unix: two runs in one directory go unnoticed
    fcntl = None


SUMS = "SHA256.json"


class UserError(Exception):
    """Something that the person at the terminal can put right; shown as one sentence, exit code 2."""

    def __str__(self) -> str:
        return one_line(super().__str__(), 1000)


def one_line(text: object, most: int = 200) -> str:
    """Any text as a printable line of at most `most` characters: what an error quotes may be hostile."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most - most // 3 - 5]} ... {text[-(most // 3) :]}"
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else repr(c)[1:-1] for c in text)[:most]


def plain_file(path: str | os.PathLike) -> Path:
    """`path`, unless it is a pipe or a device, which might be read for ever; then a UserError."""
    path = Path(path)
    with contextlib.suppress(OSError, ValueError):  # whoever opens it will hear of these
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{path} is a pipe or a device; it must be a plain file")
    return path


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; UserError when there is none to be had."""
    try:
        value = json.loads(plain_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def sealed(value: dict) -> dict:
    """`value` with a checksum over itself, for `unsealed`."""
    return {**value, "seal": _seal(value)}


def unsealed(value: dict, path: Path) -> dict:
    """What was sealed; UserError when anything of it has changed since."""
    value = dict(value)
    if value.pop("seal", None) != _seal(value):
        raise UserError(f"{path} is not as it was written: put the original back")
    return value


def _seal(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
        aside.touch()
        mode = stat.S_IMODE(aside.stat().st_mode)  # as the umask has it; safetensors writes 0600
        aside.unlink()
        yield aside
        for written in [*aside.rglob("*"), aside]:  # a rename must not outrun what it names
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


def lock(file: IO) -> None:
    """Keep an open file for this process alone, until it closes it or dies; UserError if another has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file.name} is being written by another process; wait for its end") from None


def sha256(path: Path) -> str:
    with plain_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(directory: Path) -> None:
    """Keep the sha256 of every file below `directory` in it, for `check_sums`."""
    write_json(directory / SUMS, _sums(directory))


def check_sums(directory: Path) -> None:
    """UserError unless the files below `directory` are those that `write_sums` saw, each in its place."""
    kept, here = read_json(directory / SUMS), _sums(directory)
    changed = sorted(name for name in kept.keys() | here.keys() if kept.get(name) != here.get(name))
    if changed:
        raise UserError(f"{directory} is not as it was written ({', '.join(changed)}): put the original back")


def _sums(directory: Path) -> dict[str, str]:
    files = [file for file in sorted(directory.rglob("*")) if not file.is_dir() and file.name != SUMS]
    return {file.relative_to(directory).as_posix(): sha256(file) for file in files}


def function_from_file(path: str, name: str) -> Callable:
    """The function `name` of a Python file of the user's own, which is run to get it; `guarded`."""
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, plain_file(path))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: no usable function `{name}`: {why}") from None
    if not callable(function):
        raise UserError(f"{path}: `{name}` is not a function")
    return guarded(path, name, function)


def guarded(path: str, name: str, function: Callable) -> Callable:
    """`function` of the user's file `path`: all that it raises is a UserError with file, line and name.

    Also what is meant to end the program, such as `sys.exit(0)`; but not Ctrl-C.
    """

    def call(*arguments, **named):
        try:
            return function(*arguments, **named)
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename == os.fspath(path)]  # fmt: skip
            where = f"{path}, line {lines[-1]}" if lines else path
            why = traceback.format_exception_only(error)[-1].strip()  # whatever its __str__ does
            raise UserError(f"{where}: `{name}` failed: {one_line(why)}") from None

    return call


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
