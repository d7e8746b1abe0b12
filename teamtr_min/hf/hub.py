"""A name on the Hugging Face hub -> the model's directory in the hub's cache, fetched when it is not there.

The cache is asked first: a complete snapshot costs no request. Otherwise huggingface_hub finds the commit and
lays out its cache as always, but the weights come in through `_fetch`: huggingface_hub 2 deletes a download
that broke off, here it goes on where it stopped. Only what this code reads is fetched, never a *.bin.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from teamtr_min.files import UserError, one_line, read_json, sha256

ALIASES = {
    **{f"qwen2.5-{size.lower()}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")},
    **{f"llama3.2-{size.lower()}": f"meta-llama/Llama-3.2-{size}-Instruct" for size in ("1B", "3B")},
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
PART = ".incomplete"  # what huggingface_hub, too, adds to the name of a blob that is still arriving
MAKE_ROOM = "make room, or set HF_HOME to a place that has it"


def hub_id(name: str) -> str:
    """The hub's own name of an alias, `@revision` kept; any other name as it is."""
    name, at, revision = name.strip().partition("@")
    return ALIASES.get(name.lower(), name) + at + revision


def weight_files(directory: Path) -> list[str]:
    """Names of the files, there or not, that hold a checkpoint's weights: one, or the shards of its index."""
    index = directory / INDEX
    if (directory / SINGLE).is_file() or not index.is_file():
        return [SINGLE]
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    outside = [file for file in listed.values() if file != os.path.basename(file) or file in ("", ".", "..")]
    if outside:
        raise UserError(f"{index} names a file that is not beside it: {one_line(repr(outside[0]))}")
    return sorted(set(listed.values()))


def snapshot(repo: str, revision: str, accept: Callable[[Path], object]) -> Path:
    """The directory of `repo` at `revision` (a commit, tag or branch); its name is the commit's hash.

    `accept` is given the directory while it holds no weights yet, and may refuse it by raising. A UserError
    says how to go on: offline, no such repository or revision, gated, no safetensors, no space.
    """
    from huggingface_hub import constants, errors, try_to_load_from_cache  # imported late: few runs need it

    cache, endpoint = Path(constants.HF_HUB_CACHE), constants.ENDPOINT  # as the environment wants them
    try:
        config = try_to_load_from_cache(repo, "config.json", cache_dir=cache, revision=revision)
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is neither a directory nor the id of a model: {error}") from None
    absent = "is not"
    if isinstance(config, str):
        directory = Path(config).parent
        wanted = ["tokenizer.json", *weight_files(directory)]
        lacking = [name for name in wanted if not (directory / name).is_file()]
        if not lacking:
            return directory
        absent = f"is not complete ({', '.join(lacking)})"
    absent = f"{repo} at {revision} {absent} in the Hugging Face cache {cache}"
    otherwise = f"or give a directory: `hf download {repo} --local-dir DIR` makes one on a connected machine"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{absent} and HF_HUB_OFFLINE is set: unset it, {otherwise}")
    try:
        return _download(repo, revision, cache, endpoint, accept)
    except (OSError, ValueError, errors.HTTPError) as error:  # the last is the HTTP client's own
        why = " ".join(str(error.__cause__ or error).split())
        unreachable = f"{absent} and {endpoint} cannot be reached ({why}): check the connection, {otherwise}"
        raise UserError(_reason(error, repo, revision, cache, endpoint) or unreachable) from None


def _download(repo: str, revision: str, cache: Path, endpoint: str, accept: Callable) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, hf_hub_url

    info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=10)
    files = {file.rfilename: file for file in info.siblings}

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=info.sha, cache_dir=cache, endpoint=endpoint))

    single = SINGLE in files
    for name in ("config.json", "tokenizer.json", SINGLE if single else INDEX):
        if name not in files:
            what = "weights in safetensors" if name == INDEX else name
            raise UserError(f"{repo} at {revision} has no {what}, which this code needs: take another model")
    small = ["config.json", *TOKENIZER_FILES] + ([] if single else [INDEX])
    directory = [get(name).parent for name in small if name in files][0]
    accept(directory)
    weights = [SINGLE] if single else weight_files(directory)
    if not set(weights) <= set(files):
        raise UserError(f"{repo} at {revision} lacks shards that its {INDEX} lists")

    home = directory.parents[1]  # of this repository in the cache
    large = {home / "blobs" / files[name].lfs.sha256: name for name in weights if files[name].lfs}
    here = [path for blob in large for path in (blob, blob.with_suffix(PART)) if path.exists()]
    missing = sum(files[name].size for name in weights) - sum(path.stat().st_size for path in here)
    free = shutil.disk_usage(home).free
    if missing > free:
        needed = f"{missing / 1e6:,.0f} MB in {cache}, where {free / 1e6:,.0f} MB are free"
        raise UserError(f"{repo} needs {needed}: {MAKE_ROOM}")
    if missing > 0:
        print(f"fetching {repo}@{info.sha} ({missing / 1e6:,.0f} MB) into {cache}", file=sys.stderr)
    for blob, name in large.items():
        _fetch(hf_hub_url(repo, name, revision=info.sha, endpoint=endpoint), blob, files[name].size, name)
    for name in weights:
        get(name)  # already there: only takes its place in the snapshot
    if revision != info.sha:  # last, so that a branch never points to what did not arrive
        (home / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(info.sha)
    return directory


def _fetch(url: str, blob: Path, size: int, name: str) -> None:
    """Download `url` to `blob`, whose name is its sha256; what an interrupted call left is continued."""
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    part = blob.with_suffix(PART)
    part.parent.mkdir(exist_ok=True)
    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"  # huggingface_hub's own
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            done = file.seek(0, os.SEEK_END)
            try:
                http_get(
                    url, file, resume_size=done, headers=build_hf_headers(), expected_size=size,
                    displayed_filename=name,
                )  # fmt: skip
            except (errors.HTTPError, OSError) as error:
                if isinstance(error, errors.HfHubHTTPError) or getattr(error, "errno", None):
                    raise  # the hub's answer, or the disk's
                broke = f"the connection broke off {file.tell():,} bytes into {name}"
                raise UserError(f"{broke}: run the same command again to go on from there") from None
        if sha256(part) != blob.name:
            part.unlink()
            raise UserError(f"{name} arrived damaged from {url}: run the same command again")
        part.rename(blob)


def _reason(error: Exception, repo: str, revision: str, cache: Path, endpoint: str) -> str | None:
    """Why a download failed, in one sentence; None when there is no connection."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "`hf auth login` or HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}: give a branch, a tag or a commit of {endpoint}/{repo}"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{repo} is gated: accept its licence on {endpoint}/{repo}, then log in with {login}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        token = f"your token ({login}) if the model is private or the token old"
        return f"{endpoint} shows you no model {repo}: check the name, and {token}"
    if status:
        return f"{endpoint} answered {status} when asked for {repo}: try again later"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space is left in {cache}: {MAKE_ROOM}"
    if isinstance(error, OSError) and error.errno:
        return f"cannot write to {cache} ({error.strerror}): set HF_HOME to a place of your own"
    if isinstance(error, ValueError):
        return f"{endpoint} does not answer as the hub does ({error}): check HF_ENDPOINT and the connection"
    return None
