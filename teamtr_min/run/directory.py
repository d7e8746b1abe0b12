"""Where runs lie."""

import time
from collections.abc import Callable
from pathlib import Path

from teamtr_min.config import Config
from teamtr_min.files import UserError


def new_directory(config: Config) -> Path:
    """The run's own directory, made now; one that holds anything is never written into."""
    task = Path(config.task).stem
    name = f"{task}-{config.agents}x-{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
    directory = Path(config.out or Path("runs") / name)
    try:
        while not config.out and directory.exists():  # another run began in the same second
            directory = directory.with_name(directory.name + "b")
        directory.mkdir(parents=True, exist_ok=bool(config.out))
        if any(directory.iterdir()):
            raise UserError(f"{directory} exists and is not empty; give another --out, or remove it first")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    return directory


def newest_run(marker: str, accept: Callable[[Path], bool] = lambda run: True) -> Path | None:
    """The run under runs/ whose file `marker` is the newest, among those that `accept` takes."""
    runs = [path.parent for path in Path("runs").glob(f"*/{marker}")]
    return max(filter(accept, runs), key=lambda run: (run / marker).stat().st_mtime, default=None)
