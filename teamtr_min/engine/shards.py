"""Weights spread over ranks (`--shard`), by torch's FSDP2: each rank keeps a part of every tensor, in fp32.

A layer is gathered in the compute dtype just before it is used and dropped behind it; its gradient is summed
straight into the parts. What is gathered needs all ranks, so all must use the model equally often, though
their rollouts differ in number and length. Hence `in_step`: whoever is done goes along with a single token,
until all are.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from teamtr_min.engine.distributed import Ranks
from teamtr_min.engine.model import Transformer


class Shards:
    """Those of one model, whose `hidden` from now on is to be called within `in_step` alone."""

    def __init__(self, model: Transformer, device: torch.device, dtype: torch.dtype, ranks: Ranks):
        self.model, self.dtype, self.ranks = model, dtype, ranks
        self.mesh = init_device_mesh(device.type, (ranks.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=self.mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # losses are shares of the whole batch's already
            module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "hidden")
        self._hidden = model.hidden
        model.hidden = self._counted  # so that every use of the model tells the other ranks
        model.shards = self
        with self.in_step(grad=False):  # FSDP2 keeps tensors of its first use: not of inference mode's kind
            model.hidden(self._token)

    @contextlib.contextmanager
    def in_step(self, grad: bool) -> Iterator[None]:
        """Where ranks may call `hidden` unequally often, with `grad` each time to go back through it.

        All ranks enter and leave together. If one fails within, the others find its connection broken.
        """
        with self.ranks.connected():
            yield
            while self.ranks.any_of(False):
                with torch.set_grad_enabled(grad):
                    nothing = 0.0 * (self._hidden(self._token).float().sum() + self.model.head.float().sum())
                    if grad:
                        nothing.backward()
        self.model.reshard()  # the output head stays gathered until here

    @property
    def _token(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.long, device=self.model.device)

    def _counted(self, *args, **kwargs) -> Tensor:
        self.ranks.any_of(True)
        return self._hidden(*args, **kwargs)

    def whole(self, part: Tensor, p: DTensor) -> Tensor:
        """What all ranks together hold, given this rank's part of something in the shape of parameter p."""
        part = part.to(p.device)
        spread = DTensor.from_local(part, self.mesh, p.placements, shape=p.shape, stride=p.stride())
        with self.ranks.connected():
            return spread.full_tensor()

    def part(self, whole: Tensor, p: DTensor) -> Tensor:
        """This rank's part of it."""
        return distribute_tensor(whole.to(p.device), self.mesh, p.placements, src_data_rank=None).to_local()

    def offset(self, p: DTensor) -> int:
        """Number of the first element of this rank's part, in the whole."""
        rows = min(self.ranks.rank * -(-p.shape[0] // self.ranks.size), p.shape[0])
        return rows * p.shape[1:].numel()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of each parameter, in the compute dtype, one at a time."""
        for name, p in self.model.named_parameters():
            yield name, self.whole(p.detach().to_local(), p).to(self.dtype)
