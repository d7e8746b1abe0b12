"""The heavy operations in Triton.

linear_logprob and the operations of layer.py hold their plain torch references too, and take them where
Triton cannot run. For the loss and for decoding, objective.py and engine/decode.py choose.
TEAMTR_KERNELS=auto|triton|torch chooses; TRITON_INTERPRET=1 runs the kernels themselves on a CPU, slowly.
"""

from kernels.launch import use_triton
from kernels.linear_logprob import TokenStats, linear_logprob, linear_logprob_stats
from kernels.trust_region import trust_region_loss

__all__ = ["TokenStats", "linear_logprob", "linear_logprob_stats", "trust_region_loss", "use_triton"]
