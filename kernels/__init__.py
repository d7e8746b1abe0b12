"""The heavy operations in Triton.

linear_logprob holds its plain torch reference too, and takes it where Triton cannot run. trust_region_loss is
the kernel alone: its definition, and the choice between the two, are in teamtr_min.objective.
TEAMTR_KERNELS=auto|triton|torch chooses; TRITON_INTERPRET=1 runs the kernels themselves on a CPU, slowly.
"""

import warnings

# `python -m kernels.linear_logprob` imports this package first, and is warned that it did.
warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning, module="runpy")

from kernels.launch import use_triton  # noqa: E402
from kernels.linear_logprob import TokenStats, linear_logprob, linear_logprob_stats  # noqa: E402
from kernels.trust_region import trust_region_loss  # noqa: E402

__all__ = ["TokenStats", "linear_logprob", "linear_logprob_stats", "trust_region_loss", "use_triton"]
