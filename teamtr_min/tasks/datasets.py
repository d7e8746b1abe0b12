"""Data sets that go by name: fetched from where they are published, kept in a cache, then used offline.

A URL names a commit and a file has one right sha256, so whoever evaluates on a name has the same problems.
"""

import hashlib
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from teamtr_min.files import UserError, replacing, sha256

DATASETS = {  # name -> the file to train on, or None; the held-out file; the field of the question
    "gsm8k": ("gsm8k-train", "gsm8k-test", "question"),
    "math": ("math-train", "math500", "problem"),  # 12,000 and 500 problems of MATH
    "math500": (None, "math500", "problem"),
    "aime24": (None, "aime24", "problem"),
    "aime25": (None, "aime25", "problem"),
    "amc23": (None, "amc23", "problem"),
}

GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
MATH = "media/openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/math_splits"  # in Git LFS
QWEN = "QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data"
AIME25 = "datasets/math-ai/aime25/resolve/563bb8404243c5f09de6ec262f2db674fe5bce9b"
URLS = {
    "gsm8k-train": f"https://raw.githubusercontent.com/{GSM8K}/train.jsonl",
    "gsm8k-test": f"https://raw.githubusercontent.com/{GSM8K}/test.jsonl",
    "math-train": f"https://media.githubusercontent.com/{MATH}/train.jsonl",
    "math500": f"https://media.githubusercontent.com/{MATH}/test.jsonl",
    "aime24": f"https://raw.githubusercontent.com/{QWEN}/aime24/test.jsonl",
    "aime25": f"https://huggingface.co/{AIME25}/test.jsonl",
    "amc23": f"https://raw.githubusercontent.com/{QWEN}/amc23/test.jsonl",
}
SHA256 = {
    "gsm8k-train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "gsm8k-test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "math-train": "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",
    "math500": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
    "aime24": "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
    "aime25": "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331",
    "amc23": "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4",
}
LIMIT = 64 << 20  # bytes; the largest of these files has 11 MB


def local_copy(name: str) -> Path:
    """Where the file `name` lies on this machine. The first call fetches it; later ones ask nobody."""
    cache = Path(os.environ.get("TEAMTR_CACHE") or Path.home() / ".cache" / "teamtr-min" / "datasets")
    path = cache / f"{name}.jsonl"
    try:
        if is_whole(path):
            return path
        from huggingface_hub.utils import WeakFileLock  # imported late: few runs need it

        cache.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(cache / f".{name}.lock"):  # of runs that start together one fetches
            if not is_whole(path):
                content = download(name)
                with replacing(path) as aside:
                    aside.write_bytes(content)
    except OSError as error:
        why = f"{cache} cannot keep {name}, which comes from {URLS[name]} ({error.strerror or error})"
        raise UserError(f"{why}: make room, set TEAMTR_CACHE to another place, or give --data") from None
    return path


def is_whole(path: Path) -> bool:
    return path.is_file() and sha256(path) == SHA256[path.stem]


def download(name: str) -> bytes:
    """The file's content, which is the published one; proxies are those of the environment."""
    request = urllib.request.Request(URLS[name], headers={"User-Agent": "teamtr-min"})
    content = bytearray()
    try:
        with (
            urllib.request.urlopen(request, timeout=30) as response,
            tqdm(desc=name, total=response.length, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while len(content) <= LIMIT and (piece := response.read(1 << 16)):
                content += piece
                bar.update(len(piece))
            missing = response.length  # read() itself says nothing when the connection breaks off
    except (OSError, HTTPException) as error:
        why = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise refusal(name, " ".join(str(why).split())) from None
    if len(content) > LIMIT:
        raise refusal(name, f"what arrived is larger than {LIMIT >> 20} MB")
    if missing:
        raise refusal(name, f"the connection broke off after {len(content):,} bytes")
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise refusal(name, "what arrived is not the published file; its sha256 is another")
    return bytes(content)


def refusal(name: str, why: str) -> UserError:
    return UserError(f"no {name} from {URLS[name]} ({why}): try again, or give a copy with --data")
