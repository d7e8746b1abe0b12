"""The first half hour on a GPU: its tests, then every speed benchmark, each result written as it comes.

Speed does not depend on what weights say, so the large model is made up, in the shape of Qwen2.5-1.5B:
nothing is downloaded. Its messages hardly ever end by themselves, so nearly all have the full length.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from teamtr_min.bench import kernels, sampling, stage, training
from teamtr_min.files import UserError, one_line, write_json
from teamtr_min.hf.weights import save_model
from teamtr_min.model import ModelConfig, Transformer

QWEN_1B5 = ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, rope_theta=1e6)
TESTS = Path(__file__).parents[2] / "tests"


def run(train, out: Path) -> dict:
    """All of it; a step that fails is a sentence in the result, and the rest goes on."""
    if not torch.cuda.is_available():
        raise UserError("eval.py gpu measures a CUDA device, and torch sees none here")
    with tempfile.TemporaryDirectory() as directory:
        return measure(steps(train, made_up(QWEN_1B5, Path(directory))), out)


def steps(train, model: str) -> dict[str, Callable[[], dict]]:
    """What is measured, in order: what other figures rest on comes first."""
    return {
        "tests": tests,
        "kernels": kernels.run,
        "sampling relay": sampling.run,
        "sampling 1.5b": lambda: sampling.run(model),
        "training relay": training.run,
        "training 1.5b": lambda: training.run(model),
        "stage relay": lambda: stage.run(train),
        "stage 1.5b": lambda: stage.run(train, model),
    }


def measure(steps: dict[str, Callable[[], dict]], out: Path) -> dict:
    """The result of each step, with its seconds; `out` holds by then what there is."""
    result = {"benchmark": "gpu", "machine": machine(), "steps": {}}
    for name, step in steps.items():
        begin = time.perf_counter()
        try:
            found = step()
        except Exception as error:  # no failure costs the figures that can still be had
            found = {"failed": one_line(f"{type(error).__name__}: {error}", 300)}
        result["steps"][name] = found | {"seconds": time.perf_counter() - begin}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
    return result


def machine() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton")}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
        found["cuda"] = torch.version.cuda
    return found


def tests() -> dict:
    """Those that run on a GPU alone, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(TESTS)],
        cwd=TESTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    failed = [one_line(line, 200) for line in lines if re.match("FAILED|ERROR", line)]
    summary = lines[-1] if lines else f"pytest ended with {done.returncode}"
    return {"benchmark": "tests", "exit": done.returncode, "summary": summary, "failed": failed}


def made_up(shape: ModelConfig, directory: Path) -> str:
    """A model directory: random weights, and a tokenizer of the 256 bytes."""
    model = Transformer(shape).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    save_model(model, directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|im_{word}|>", special=True) for word in ("start", "end")])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return str(directory)


def table(result: dict) -> str:
    tables = {
        "tests": lambda found: "\n".join([found["summary"], *found["failed"]]),
        "kernels": kernels.table,
        "sampling": sampling.table,
        "training": training.table,
        "stage": stage.table,
    }
    parts = [", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    for name, found in result["steps"].items():
        text = f"failed: {found['failed']}" if "benchmark" not in found else tables[found["benchmark"]](found)
        parts.append(f"== {name}, {found['seconds']:.0f} s\n{text}")
    return "\n\n".join(parts)
