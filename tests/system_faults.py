"""Disks of one's own, and kills at a chosen moment: what the campaign asks of the system."""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

_NEWNS, _NEWUSER = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)
TOUCHES = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}


def own_mounts() -> bool:
    """Give this process a table of mounts that nobody else sees; False where the system does not let it."""
    try:
        unshared = _libc.unshare(_NEWNS if os.getuid() == 0 else _NEWNS | _NEWUSER)
        return unshared == 0 and _mount("none", Path("/"), None, _REC | _PRIVATE)
    except AttributeError:  # not Linux
        return False


def small_disk(place: Path, size: int) -> bool:
    """A disk of `size` bytes at `place`."""
    return _mount("tmpfs", place, "tmpfs", 0, f"size={size}")


def read_only(place: Path) -> bool:
    return _mount(place, place, None, _BIND) and _mount("none", place, None, _REMOUNT | _BIND | _READ_ONLY)


def _mount(source, place: Path, kind: str | None, flags: int, data: str | None = None) -> bool:
    given = [None if text is None else os.fsencode(text) for text in (source, place, kind)]
    return _libc.mount(*given, ctypes.c_ulong(flags), data and data.encode()) == 0


def fill(disk: Path, left: int) -> None:
    """Leave `left` bytes of a disk to others; `filler` in it takes the rest."""
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - left))


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Touches:
    """Counts what this process does to files below a directory, and acts at a chosen one."""

    def __init__(self):
        self.below, self.count = "", 0
        sys.addaudithook(self._seen)

    def watch(self, below: Path, last: int | None = None, act: Callable = kill_this_process) -> None:
        self.below, self.count, self.last, self.act = os.fspath(below), 0, last, act

    def stop(self) -> int:
        self.below = ""
        return self.count

    def _seen(self, event: str, given: tuple) -> None:
        if self.below and event in TOUCHES and str(given[0]).startswith(self.below):
            self.count += 1
            if self.count == self.last:
                self.act()


def kill_after(process: int, seconds: float) -> None:
    """SIGKILL to a child once it has computed for so many seconds, unless it ends before."""
    clock = (~process << 3) | 2  # of the processor time of another process
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with contextlib.suppress(OSError):  # it has ended just now
            if time.clock_gettime(clock) >= seconds:
                os.kill(process, signal.SIGKILL)
                return
        time.sleep(0.001)
