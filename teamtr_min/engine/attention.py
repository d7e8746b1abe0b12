"""Scaled dot-product attention with grouped heads, by whatever is fastest where it runs, and as defined.

Letters as in model.py. `span` counts the positions that a row may attend to.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PRODUCTS_FROM_ROWS = 32  # measured on a CPU: from here on plain batched products beat torch's kernel
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, Q/K query heads to a key head. q (B, Q, T, D), k and v (B, K, span, D).

    `mask` (B or 1, 1, T, span) is added to the scores. Without it attention is causal, and the
    last query sees everything; T is then 1 or span.
    """
    (B, Q, T, D), K = q.shape, k.shape[1]
    if T == 1:
        return attend_one(q.reshape(B, K, Q // K, D), k, v, mask).view(B, Q, 1, D)
    options = {"attn_mask": mask, "is_causal": mask is None}
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    with sdpa_kernel(NOT_CUDNN):  # cuDNN makes a plan for every new shape
        if mask is not None:  # the only kernel that takes masks takes no groups
            k, v = (x.repeat_interleave(Q // K, dim=1) for x in (k, v))  # (B, Q, span, D)
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for one new token a row, q (B, K, Q/K, D) -> (B, Q * D).

    The query heads of a group stand where queries do, so that K and V need no repetition.
    """
    if not q.is_cuda and len(q) >= PRODUCTS_FROM_ROWS:
        return attend_by_products(q, k, v, mask).view(len(q), -1)
    with contextlib.nullcontext() if not q.is_cuda else sdpa_kernel(NOT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(len(q), -1)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for one new token a row, as two batched products; q (B, K, Q/K, D), as is the result."""
    B, K, heads, D = q.shape
    scores = (q.flatten(0, 1) / math.sqrt(D)) @ k.flatten(0, 1).transpose(1, 2)  # (B * K, Q/K, span)
    if mask is not None:
        scores = scores.view(B, K * heads, -1).add_(mask[:, 0]).view(scores.shape)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, K, heads, D)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `attend` computes, written out."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, Q, span, D)
    T, span = q.shape[2], k.shape[2]
    if mask is None:
        later = torch.ones(T, span, dtype=torch.bool, device=q.device).triu(span - T + 1)
        mask = torch.zeros(T, span, device=q.device).masked_fill(later, -math.inf)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, Q, T, span)
    return (scores + mask).softmax(-1) @ v
