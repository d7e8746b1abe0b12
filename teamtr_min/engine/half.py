"""Frozen fp32 weights that a CPU reads as fp16 while it samples: half the bytes, and the same numbers.

Published checkpoints hold 16 bits a weight. fp16 holds these exactly, but for bf16 numbers below 2^-17, which
it rounds by at most 2^-25. FBGEMM, a part of torch on x86, multiplies fp32 inputs by fp16 weights, and adds
in fp32. SmolLM2-135M takes half of the time for a token of one row, and 0.7 of it for one of 16 rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

LARGEST_ERROR = 2.0**-25  # of a weight that may be read as fp16


class Product(nn.Linear):
    """nn.Linear, by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in) -> x weight^T + bias (..., out)."""
    packed = in_fp16(weight)
    if packed is None:
        return F.linear(x, weight, bias)
    y = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return y if bias is None else y.add_(bias)


def in_fp16(weight: Tensor):
    """The weight as FBGEMM reads it, while a team samples; None if it is trained, or has changed since."""
    packed, state = getattr(weight, "packed", (None, None))
    current = packed is not None and torch.is_inference_mode_enabled() and state == state_of(weight)
    return packed if current else None


def state_of(weight: Tensor) -> tuple[int, int]:
    """Differs after each change of the weight, in its place or by another tensor in `weight.data`."""
    return weight._version, weight.data_ptr()


def prepare(model: nn.Module) -> None:
    """Pack each frozen weight of a Transformer's products that fp16 holds, where FBGEMM can read it."""
    can = model.device.type == "cpu" and model.dtype == torch.float32 and not model.sharded
    if not can or "fbgemm" not in torch.backends.quantized.supported_engines:
        return
    layers = [module.weight for module in model.model.layers.modules() if hasattr(module, "weight")]
    frozen = [
        w for w in (model.head, *layers) if w.dim() == 2 and not w.requires_grad and not w.is_inference()
    ]
    new = [w for w in frozen if getattr(w, "packed", (None, None))[1] != state_of(w)]
    for weight in tqdm(new, "packing weights", delay=1, leave=False, disable=None):
        exact = all(torch.allclose(w, w.half().float(), 0, LARGEST_ERROR) for w in weight.split(1024))
        made = torch.ops.quantized.linear_prepack_fp16(weight, None) if exact else None
        weight.packed = made, state_of(weight)
