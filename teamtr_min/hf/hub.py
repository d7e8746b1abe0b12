"""A name on the Hugging Face hub -> a directory in the hub's cache, fetched where it is missing."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

from teamtr_min.files import UserError, read_json

ALIASES = {
    **{f"qwen2.5-{size.lower()}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")},
    **{f"llama3.2-{size.lower()}": f"meta-llama/Llama-3.2-{size}-Instruct" for size in ("1B", "3B")},
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DATA_FILES = (".jsonl", ".parquet")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer.json", *TOKENIZER_CONFIGS, "chat_template.jinja", "generation_config.json")


def weight_files(directory: Path) -> list[str]:
    """Names of the files, there or not, that hold a checkpoint's weights: one, or the shards of its index."""
    if (directory / SINGLE).is_file() or not (directory / INDEX).is_file():
        return [SINGLE]
    files = read_json(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{directory / INDEX} names no files in `weight_map`")
    return sorted(set(files.values()))


@functools.cache
def snapshot(repo: str, revision: str, accept: Callable[[Path], object]) -> Path:
    """The directory of `repo` at `revision` (commit, tag or branch), named as the commit's hash. `accept` may
    refuse the directory by raising, before any weights are fetched."""
    directory = _fetched(repo, revision, ["config.json", INDEX, *TOKENIZER_FILES])
    accept(directory)
    return _fetched(repo, directory.name, weight_files(directory))


@functools.cache
def hub_data(data: str) -> tuple[Path, str] | None:
    """Of a data set org/name[@revision][:folder] of the hub: the directory of its JSONL and parquet files,
    and its name with the commit. None where `data` is a path. Raises UserError."""
    named = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([\w.-]+))?", data)
    if not named or os.path.exists(data) or data.endswith((*DATA_FILES, ".json")):
        return None
    repo, revision, folder = named.groups("")
    wanted = [os.path.join(folder, f"*{kind}") for kind in DATA_FILES]
    root = _fetched(repo, revision or "main", wanted, repo_type="dataset")
    return root / folder, f"{repo}@{root.name}" + (folder and f":{folder}")


def _fetched(repo: str, revision: str, wanted: list[str], **kind) -> Path:
    from huggingface_hub import errors, snapshot_download  # late: few runs need it

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, **kind))
    except (errors.HTTPError, OSError, ValueError) as error:  # which says what is wrong, also offline
        raise UserError(
            f"{repo}@{revision} cannot be had from the Hugging Face hub: {error}; a licence to accept needs "
            f"`hf auth login`; `hf download {repo} --local-dir DIR` makes a directory to give"
        ) from None
