"""What each of several ranks checks of spread weights."""

from types import SimpleNamespace

import torch
from teamtr_min.engine.shards import Shards
from tiny import FAMILIES, random_model, random_tokens

from teamtr_min.engine.distributed import ALONE, join
from teamtr_min.learner import Learner


def loss_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Uses the head outside of `hidden`, as the log-prob kernel does."""
    return (model.hidden(tokens).float() @ model.head.float().t()).log_softmax(-1)[..., 0].sum()


def check(ranks, family: str, tied: bool, checkpointing: bool, dtype: torch.dtype) -> None:
    """Rank r goes back through `hidden` r times: the gradient is the sum over all, here as if by one."""
    model, alone = random_model(family, tied), random_model(family, tied).to(dtype)
    masters = [p.detach().clone() for p in model.parameters()]
    shards = Shards(model, torch.device("cpu"), dtype, ranks)
    model.checkpointing = checkpointing
    calls = [
        random_tokens(alone, 1 + i % 2, 5 + i, seed=i) for i in range(ranks.size * (ranks.size - 1) // 2)
    ]
    mine = calls[ranks.rank * (ranks.rank - 1) // 2 :][: ranks.rank]
    with model.in_step(grad=True):
        for tokens in mine:
            loss_of(model, tokens).backward()
    for tokens in calls:
        loss_of(alone, tokens).backward()
    with model.in_step(), torch.no_grad():  # only the last rank looks
        if ranks.rank == ranks.size - 1:
            assert model.hidden(calls[0]).dtype == model.dtype == dtype
            torch.testing.assert_close(model.hidden(calls[0]), alone.hidden(calls[0]))
    held = 0
    for (name, p), whole, other in zip(model.named_parameters(), masters, alone.parameters()):
        part = p.detach().to_local()
        held += part.numel()
        assert p.dtype == p.grad.dtype == torch.float32
        bound = (1e-4 if dtype == torch.float32 else 0.02) * max(1.0, other.grad.abs().max().item())
        torch.testing.assert_close(p.grad.full_tensor(), other.grad.float(), atol=bound, rtol=0, msg=name)
        assert torch.equal(shards.whole(part, p), whole) and torch.equal(shards.part(whole, p), part)
    for (name, saved), other in zip(shards.weights(), alone.parameters()):
        assert torch.equal(saved, other), name
    total = sum(p.numel() for p in alone.parameters())
    assert sum(ranks.gather(held)) == total and held < 1.1 * total / ranks.size


def check_rounding(ranks) -> None:
    """bf16 parts are rounded as the whole is, at thresholds that belong to a weight wherever it lies."""
    model, alone = random_model("qwen2"), random_model("qwen2").to(torch.bfloat16)
    shards = Shards(model, torch.device("cpu"), torch.bfloat16, ranks)
    spread, whole = (
        Learner(SimpleNamespace(agents=[SimpleNamespace(model=m, adapter=None)], ranks=r), [0], 0.0)
        for m, r in ((model, ranks), (alone, ALONE))
    )
    for saved, p in zip(shards.weights(), alone.parameters()):
        assert torch.equal(saved[1], p)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, master in enumerate(whole.masters):
            master += 1e-4 * torch.randn(master.shape, generator=generator)
            spread.masters[i].copy_(shards.part(master, spread.parameters[i]))
    whole._round()
    spread._round()
    jumped = 0
    for (name, saved), p, before in zip(
        shards.weights(), alone.parameters(), random_model("qwen2").parameters()
    ):
        assert torch.equal(saved, p), name
        jumped += (p != before.to(torch.bfloat16)).sum().item()
    assert jumped > 100


def check_all() -> None:
    ranks = join()
    for family in FAMILIES:
        for tied in (True, False):
            check(ranks, family, tied, family == "qwen3", torch.float32)
    check(ranks, "qwen2", True, False, torch.bfloat16)
    check_rounding(ranks)
    ranks.leave(0)
