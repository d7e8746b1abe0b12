"""Several processes without torchrun, whose start would cost more than a toy run, and their work in tests."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import FAMILIES, adapted, random_model, random_tokens

import eval as evaluation
import train
from teamtr_min.config import Config, parse
from teamtr_min.engine.distributed import Ranks, join, like, local, shard, unsharded, whole
from teamtr_min.engine.model import Transformer
from teamtr_min.learner import Learner
from teamtr_min.run import log
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import Relay

CPU = torch.device("cpu")


def together(processes: int, directory: Path, target: Callable, *given) -> list[str]:
    """Calls target(*given) in so many ranks, whose outputs go to `directory`; the lines of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["by_rank", "torch.distributed.fsdp", "torch._dynamo"])
    directory.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    children = []
    for rank in range(processes):
        environment = shared | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        outputs = [directory / f"{name}-{rank}" for name in ("out", "err")]
        children.append(context.Process(target=_as_rank, args=(environment, outputs, target, given)))
        children[-1].start()
    for child in children:  # where one fails, its connections break, and so do the others
        child.join(timeout=300)
        child.kill()
    complaints = "".join((directory / f"err-{rank}").read_text() for rank in range(processes))
    assert [child.exitcode for child in children] == [0] * processes, complaints
    return (directory / "out-0").read_text().splitlines()


def _as_rank(environment: dict, outputs: list[Path], target: Callable, given: tuple) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    ranks = join()
    target(ranks, *given)
    sys.stdout.flush()
    ranks.leave(0)


def commands(ranks: Ranks, *lines: list[str]) -> None:
    """`["train", flags...]`, one after the other; `["eval", flags...]` comes last."""
    for program, *flags in lines:
        if program == "train":
            train.train(parse(flags, ""), ranks)
        else:
            log.join = lambda: ranks
            Ranks.leave = lambda self, code: code
            assert evaluation.main(flags) == 0


def loss_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Uses the head outside of `hidden`, as the log-prob kernel does."""
    return (model.hidden(tokens).float() @ model.head.float().t()).log_softmax(-1)[..., 0].sum()


def check_model(ranks: Ranks, family: str, tied: bool, dtype: torch.dtype, lora: bool) -> None:
    """Rank r goes back through the model r times: the gradient is the sum over all, here as if by one."""
    model, alone = random_model(family, tied), random_model(family, tied)
    if lora:
        model, alone = adapted(model.to(dtype), rank=3), adapted(alone.to(dtype), rank=3)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    alone.to(dtype)
    shard(model, ranks, CPU, dtype)
    model.checkpointing = family == "qwen3"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    calls = [random_tokens(alone, 1 + i % 2, 5 + i, seed=i) for i in range(3)]
    mine = (calls[:0], calls[:1], calls[1:])[ranks.rank]
    with unsharded(model):
        for name, p in model.named_parameters():
            assert p.dtype == dtype and torch.equal(p, masters[name].to(dtype)), name
        if ranks.rank == ranks.size - 1:  # only one rank looks, so it exchanges nothing
            with torch.inference_mode():
                torch.testing.assert_close(model.hidden(calls[0]), alone.hidden(calls[0]))
        for tokens in mine:
            loss_of(model, tokens).backward()
        for _ in range(2 - len(mine)):
            (0.0 * loss_of(model, calls[0])).backward()
    for tokens in calls:
        loss_of(alone, tokens).backward()
    held, total, others = 0, 0, dict(alone.named_parameters())
    for name, p in model.named_parameters():
        if name in frozen:
            assert p is frozen[name]  # as all agents of this base have it
            continue
        assert p is trained[name] and p.dtype == p.grad.dtype == torch.float32
        part, master = local(p.detach()), masters[name].float()
        assert torch.equal(whole(p.detach()), master) and torch.equal(local(like(master, p)), part)
        other = others[name].grad.float()
        bound = (1e-4 if dtype == torch.float32 else 0.02) * max(1.0, other.abs().max().item())
        torch.testing.assert_close(whole(p.grad), other, atol=bound, rtol=0, msg=name)
        held, total = held + part.numel(), total + p.numel()
    assert ranks.total(held) == total and held < 1.2 * total / ranks.size


def check_rounding(ranks: Ranks) -> None:
    """bf16 weights are the masters, rounded at thresholds of their own; by as many processes, at others."""
    config = Config(agents=1, dtype="bf16", device="cpu")
    sharded, alone = (build_team(config, Relay(config), r) for r in (ranks, Ranks()))
    learners = [Learner(team, [0], 0.0) for team in (sharded, alone)]
    generator = torch.Generator().manual_seed(0)
    changes = [1e-4 * torch.randn(p.shape, generator=generator) for p in learners[1].masters]
    for learner in learners:
        for p, change in zip(learner.masters, changes):
            p.data.add_(like(change, p))
        learner.restore(learner.snapshot())  # which rounds masters into the model
    with unsharded(sharded.agents[0].model):
        weights, others = (list(team.agents[0].model.parameters()) for team in (sharded, alone))
        for a, b in zip(weights, others):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
        nearest = [p.bfloat16() for p in learners[1].masters]
        assert sum(int((a != b).sum()) for a, b in zip(weights, nearest)) > 100


def check_all(ranks: Ranks) -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    plain = [(family, tied, fp32, False) for family in FAMILIES for tied in (True, False)]
    lora = ("qwen2", True, fp32, True), ("llama", False, bf16, True)
    for kind in (*plain, ("qwen2", True, bf16, False), *lora):
        check_model(ranks, *kind)
    check_rounding(ranks)
    values = [{"rank": r, "third": r / 3, "text": "é" * r} for r in range(ranks.size)]
    assert ranks.gather(values[ranks.rank]) == values and ranks.total(ranks.rank) == 3
