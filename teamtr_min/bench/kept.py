"""Results that are kept, one sealed JSON object a line, so that nothing is measured twice."""

import json
import time
from pathlib import Path

from teamtr_min.files import UserError, plain_file, sealed, unsealed

NAMES = {"team", "model", "data"}  # where things lie; the hashes beside them say what they are


def find(asked: dict, path: Path) -> dict | None:
    """The newest result in `path` that agrees with `asked` in all but names; a changed line is none."""
    asked = {key: value for key, value in asked.items() if key not in NAMES}
    found = None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            result = unsealed(json.loads(line), path)
        except (UserError, ValueError, TypeError, RecursionError):
            continue
        if asked.items() <= result.items():
            found = result
    return found


def append(result: dict, path: Path) -> dict:
    """The result with the time, as it now stands at the end of `path`."""
    result = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    with plain_file(path).open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b"\n":  # a line that was cut short must not take this one with it
                file.write(b"\n")
        file.write(json.dumps(sealed(result)).encode() + b"\n")
    return result


def when(result: dict) -> str:
    return f"already measured on {result['time'][:10]} (anew: --again)"
