"""Files of problems: those of `--data`, and data sets that go by name, downloaded once. A URL names a commit,
and a file is checked by its sha256 when it is fetched, not when it is read again."""

import collections
import os
import re
from pathlib import Path

from teamtr_min.files import UserError
from teamtr_min.hf.hub import DATA_FILES, hub_data

DATASETS = {  # name -> the file to train on, or None; the held-out file; the field of the question
    "gsm8k": ("gsm8k-train", "gsm8k-test", "question"),
    "math": ("math-train", "math500", "problem"),  # 12,000 and 500 problems of MATH
    **{name: (None, name, "problem") for name in ("math500", "aime24", "aime25", "amc23")},  # to evaluate on
}
SIDES = ("train", "test", "validation", "dev")  # names in the paths of a data set of the hub

GITHUB = "https://raw.githubusercontent.com"
GSM8K = f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
MATH = "https://media.githubusercontent.com/media/openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163"
QWEN = f"{GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data"
AIME25 = "https://huggingface.co/datasets/math-ai/aime25/resolve/563bb8404243c5f09de6ec262f2db674fe5bce9b"
FILES = {  # name -> URL, beginning of the sha256
    "gsm8k-train": (f"{GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c5"),
    "gsm8k-test": (f"{GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066"),
    "math-train": (f"{MATH}/prm800k/math_splits/train.jsonl", "90d96daeac3fe343ebb1e22ce93dd996"),
    "math500": (f"{MATH}/prm800k/math_splits/test.jsonl", "35dc41080a3680858b27fa7e0533d2d5"),
    "aime24": (f"{QWEN}/aime24/test.jsonl", "af2b8bd2aa911b6333ad0df32f3ca05c"),
    "aime25": (f"{AIME25}/test.jsonl", "b4e273c02d3e7fe1b74b59eae768fc82"),
    "amc23": (f"{QWEN}/amc23/test.jsonl", "43707e1ca784602d8479de24ee8ce366"),
}


def problem_files(task: str, data: str) -> tuple[Path, list[Path], list[Path]]:
    """Of `--data`, else of the data set `task`: the directory; files to train on; files held out, none where
    a part of the others is to be. Raises UserError."""
    path, found = Path(data), collections.defaultdict(list)
    if not data and task not in DATASETS:
        raise UserError(f"--task {task} needs --data: a file, or a directory of train.jsonl and test.jsonl")
    if not data:
        train, test = ([local_copy(name)] if name else [] for name in DATASETS[task][:2])
        return test[0].parent, train, test
    if not (on_hub := hub_data(data)):
        sides = [path / "train.jsonl"], [path / "test.jsonl"]
        return (path, *sides) if path.is_dir() else (path.parent, [path], [])
    root, name = on_hub
    for file in sorted(file for file in root.rglob("*") if file.suffix in DATA_FILES):
        words = re.findall("[a-z]+", str(file.relative_to(root)).lower())
        found[next((side for side in SIDES if side in words), "")].append(file)
    train = found["train"] or found[""]
    folders = sorted({file.relative_to(root).parts[0] for file in train if file.parent != root} - {"train"})
    if not train or len(folders) > 1:
        fault = f"needs its folder, such as {data}:{folders[0]}" if train else "has no JSONL or parquet files"
        raise UserError(f"--data {data} {fault} ({', '.join(folders) or name})")
    return root, train, next((found[side] for side in SIDES[1:] if side in found), [])


def local_copy(name: str) -> Path:
    """The file `name` in the cache; the first call downloads it. Raises UserError if that fails."""
    cache = Path(os.environ.get("TEAMTR_CACHE") or Path.home() / ".cache" / "teamtr-min" / "datasets")
    path, (url, sha256) = cache / f"{name}.jsonl", FILES[name]
    if not path.is_file():
        from torch.hub import download_url_to_file  # it renames the file once the hash is right

        try:
            cache.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"no {name} from {url} ({error}): give a copy with --data") from None
    return path
