"""What this machine has left, of memory and of disk, and how much this process has taken."""

import contextlib
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from teamtr_min.files import UserError

try:
    import resource
except ImportError:  # not a Unix: no limits to ask for
    resource = None

UNITS = "KMGT"


def set_threads(shipped: bool) -> None:
    """One for the models that ship, whose products are so small that a second thread mostly waits: a stage
    takes 1.4 times as long with two, on two idle cores. Else, and with OMP_NUM_THREADS, as torch has it."""
    if shipped and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be had: on CUDA the device's; else the least of what the machine has available,
    what its control groups leave (versions 1 and 2, each level up to the root), and what rlimits leave.

    `root` is where /proc and /sys lie.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # for later tensors
        return torch.cuda.mem_get_info(device)[0] + kept
    found = _fields(root / "proc/meminfo").get("MemAvailable")
    if found is None:  # not Linux: all there is
        with contextlib.suppress(ValueError, OSError, AttributeError):
            found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024
    limits = [math.inf if found is None else 1024 * found, *_left_by_groups(root), *_left_by_rlimits(root)]
    return max(0, math.floor(min(*limits, 2**62)))


def _left_by_groups(root: Path) -> list[int]:
    """What each control group that this process is in leaves: pages of files can be given up, so they do
    not count."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, kinds, path = line.split(":", 2)
        if number == "0":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for level in [group, *group.parents]:
            if level.is_relative_to(top):
                limit, used = (_text(level / name).strip() for name in files[:2])
                if limit.isdigit() and used.isdigit():
                    left.append(int(limit) - int(used) + _fields(level / "memory.stat").get(files[2], 0))
    return left


def _left_by_rlimits(root: Path) -> list[int]:
    pages = _text(root / "proc/self/statm").split()  # size resident shared text library data
    if resource is None or len(pages) < 6:
        return []
    limits = (resource.RLIMIT_AS, int(pages[0])), (resource.RLIMIT_DATA, int(pages[5]))
    soft = [(resource.getrlimit(kind)[0], count * resource.getpagesize()) for kind, count in limits]
    return [limit - used for limit, used in soft if limit != resource.RLIM_INFINITY]


def in_use(device: torch.device) -> int:
    """Bytes that this process holds: tensors on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = _text(Path("/proc/self/statm")).split()
    return int(pages[1]) * resource.getpagesize() if pages else peak(device)


def peak(device: torch.device) -> int:
    """Most bytes that this process held since `reset_peak`; since its start on some systems, 0 on others."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if most := _fields(Path("/proc/self/status")).get("VmHWM"):
        return 1024 * most
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_disk(path: Path) -> int:
    """Bytes free where `path` lies or will lie."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return shutil.disk_usage(path).free


def limit_from_environment() -> int | None:
    """TEAMTR_MEMORY, such as 8GiB: what a process may use in all, instead of what is found free."""
    text = os.environ.get("TEAMTR_MEMORY", "").strip()
    if not text:
        return None
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) *([{UNITS}]?)(?:i?B)?", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"TEAMTR_MEMORY is {text!r}; it is a size such as 8GiB or 500MiB")
    return math.floor(float(found[1]) * 1024 ** (UNITS.find(found[2].upper()) + 1 if found[2] else 0))


def size(count: float) -> str:
    """Bytes in words: 1.4 MiB."""
    power = min(3, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _text(path: Path) -> str:
    """A file of /proc or /sys; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """`name 12` or `name: 12 kB` lines."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}
