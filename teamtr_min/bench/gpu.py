"""The first half hour on a GPU: its tests, then every speed benchmark, each result written as it comes.

Speed does not depend on what weights say, so the large model is made up, in the shape of Qwen2.5-1.5B:
nothing is downloaded. Its messages hardly ever end by themselves, so nearly all have the full length. Each
step is a process of its own: none leaves memory behind, or a broken device.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from teamtr_min.bench import kernels, sampling, stage, training
from teamtr_min.engine.model import ModelConfig, Transformer
from teamtr_min.files import UserError, one_line, read_json, write_json
from teamtr_min.hf.weights import save_model

ROOT = Path(__file__).parents[2]
QWEN_1B5 = ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, rope_theta=1e6)
LIMIT = 15 * 60  # seconds of a step
TESTS = ["test_linear_logprob", "test_trust_region", "test_layer", "test_decode", "test_cuda"]
STEPS = {  # what other figures rest on comes first
    "tests": ["-m", "pytest", "-q", *(f"tests/{name}.py" for name in TESTS)],
    "kernels": ["eval.py", "kernels", "--json"],
    "sampling": ["eval.py", "sampling", "--json"],
    "training": ["eval.py", "training", "--json"],
    "stage": ["eval.py", "stage", "--json"],
    "sampling 1.5b": ["eval.py", "sampling", "--json", "--model", "MADE-UP"],
    "training 1.5b": ["eval.py", "training", "--json", "--model", "MADE-UP"],
    "stage 1.5b": ["eval.py", "stage", "--json", "--model", "MADE-UP"],
}


def run(out: Path, only: str | None = None) -> dict:
    """All of it, or the steps that `only` names, whose results take their places in `out`."""
    if not torch.cuda.is_available():
        raise UserError("eval.py gpu measures a CUDA device, and torch sees none here")
    chosen = only.split(",") if only else list(STEPS)
    if unknown := [name for name in chosen if name not in STEPS]:
        raise UserError(f"no step {', '.join(unknown)}; there is: {', '.join(STEPS)}")
    return measure({name: STEPS[name] for name in chosen}, out)


def measure(steps: dict[str, list[str]], out: Path) -> dict:
    """The result of each step, with its seconds; a step that fails is a sentence, and the rest goes on."""
    if out.is_dir():
        raise UserError(f"{out} is a directory; --out names the file that results go to")
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = read_json(out)["steps"] if out.exists() else {}
    result = {"benchmark": "gpu", "machine": machine(), "steps": kept}
    with tempfile.TemporaryDirectory(dir=out.parent) as directory:
        for name, words in steps.items():
            begin = time.perf_counter()
            try:
                if "MADE-UP" in words and not any(Path(directory).iterdir()):
                    made_up(QWEN_1B5, Path(directory))
                found = child([directory if word == "MADE-UP" else word for word in words])
            except (OSError, UserError, subprocess.TimeoutExpired) as error:
                found = {"failed": one_line(str(error), 300)}
            result["steps"][name] = found | {"seconds": time.perf_counter() - begin}
            write_json(out, result)
    return result


def child(words: list[str]) -> dict:
    """What this command prints as JSON; of the tests, their last line."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    said, complaint = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
    if "pytest" in words:
        failed = [one_line(line, 200) for line in said if line.startswith(("FAILED", "ERROR"))]
        summary = said[-1] if said else f"pytest ended with {done.returncode}"
        return {
            "benchmark": "tests",
            "passed": done.returncode == 0,
            "summary": summary,
            "failed_tests": failed,
        }
    if done.returncode:
        return {"failed": one_line(complaint[-1] if complaint else f"it ended with {done.returncode}", 300)}
    return json.loads(said[-1])


def machine() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton")}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
        found["cuda"] = torch.version.cuda
    return found


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
        "tests": lambda found: "\n".join([found["summary"], *found["failed_tests"]]),
        "kernels": kernels.table,
        "sampling": sampling.table,
        "training": training.table,
        "stage": stage.table,
    }
    parts = [", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    for name, found in result["steps"].items():
        text = f"failed: {found['failed']}" if "failed" in found else tables[found["benchmark"]](found)
        parts.append(f"== {name}, {found['seconds']:.0f} s\n{text}")
    return "\n\n".join(parts)
