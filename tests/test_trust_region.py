"""The fused trust-region loss against its definition, teamtr_min.objective.teamtr_loss, in float64."""

import json
import math

import pytest
import torch

pytest.importorskip("triton")

import kernels
from kernels import trust_region
from teamtr_min.objective import teamtr_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(lengths, scale=0.05, ignored=0.0, agents=3, seed=0):
    """Messages of these lengths, and ignored slots anywhere among them that hold NaN and -inf."""
    g = torch.Generator().manual_seed(seed)
    message = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    message[torch.rand(len(message), generator=g) < ignored] = -1
    logp = -3 * torch.rand(len(message), generator=g)
    old_logp = logp + scale * torch.randn(len(message), generator=g)
    logp[message < 0], old_logp[message < 0] = math.nan, -math.inf
    advantage = torch.randn(len(lengths), generator=g)
    agent = torch.randint(0, agents, (len(lengths),), generator=g)
    return [x.to(DEVICE) for x in (logp, old_logp, message, advantage)], {"agent": agent.to(DEVICE)}


def run(loss_function, arguments, options, dtype=torch.float32):
    """-> loss, dL/dlogp, stats; with an upstream gradient that is not 1."""
    logp, old_logp, message, advantage = arguments
    logp = logp.detach().to(dtype).requires_grad_()
    loss, stats = loss_function(logp, old_logp.to(dtype), message, advantage.to(dtype), **options)
    (1.7 * loss).backward()
    return {"loss": loss.detach(), "gradient": logp.grad, **stats}


def check(arguments, options, tolerance=2e-6):
    got = run(kernels.trust_region_loss, arguments, options)
    want = run(teamtr_loss, arguments, options, torch.float64)
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].shape == exact.shape and not got[name].isnan().any(), name
        size = exact.abs().max().clamp(min=1e-6) if exact.numel() else 1.0
        worst = ((got[name].double() - exact).abs() / size).max().item() if exact.numel() else 0.0
        assert worst < tolerance, f"{name} is off by {worst:.1e}"
    return got


@pytest.mark.parametrize("ratio", trust_region.RATIOS)
@pytest.mark.parametrize("kl_unit", trust_region.KL_UNITS)
@pytest.mark.parametrize("scale", [0.02, 200.0])
def test_equals_the_definition(ratio, kl_unit, scale, launches):
    """Lengths of 1, of none, past the block; ignored slots; an agent without messages; beta per agent."""
    arguments, options = batch([1, 40, 0, 300, 7, 3], scale, ignored=0.2)
    options |= {"n_agents": 4, "beta": torch.tensor([0.5, 0.0, 0.1, 2.0]).to(DEVICE), "clip": 0.1}
    got = check(arguments, options | {"ratio": ratio, "kl_unit": kl_unit}, tolerance=1e-5)
    assert got["messages"].sum() == 6 and got["messages"][3] == got["ratio_max"][3] == 0
    assert (got["gradient"][arguments[2] < 0] == 0).all()
    assert set(launches) == {"trust_messages", "trust_agents", "trust_gradient"}


def test_every_side_of_the_clip(launches):
    """Four messages: past either end of the range, with either sign of the advantage."""
    for ratio in trust_region.RATIOS:
        log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.05], device=DEVICE)
        advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], device=DEVICE)
        message = torch.arange(5, device=DEVICE)
        got = check([log_ratio, torch.zeros_like(log_ratio), message, advantage], {"ratio": ratio})
        assert (got["gradient"] != 0).tolist() == [False, True, True, False, False]


def test_layouts_and_small_ids(launches):
    arguments, options = batch([3, 4, 60], ignored=0.1)
    arguments[:2] = [torch.stack((x, x), 1)[:, 0] for x in arguments[:2]]
    arguments[2], options["agent"] = arguments[2].int(), options["agent"].int()
    assert not arguments[0].is_contiguous()
    check(arguments, options | {"n_agents": 3, "beta": 0.3})


def test_a_message_of_ignored_slots_and_stray_ones(launches):
    arguments, options = batch([3, 4, 5])
    arguments[2][3:7] = -1  # the whole of message 1
    arguments[2][0] = arguments[2][-1] = -1
    arguments[0][arguments[2] < 0] = math.nan
    check(arguments, options | {"n_agents": 3, "beta": 0.3})


@pytest.mark.parametrize("lengths", [[], [0, 0], [4]])
def test_no_valid_token(lengths, launches):
    arguments, options = batch(lengths, ignored=1.1)
    for ratio in trust_region.RATIOS:
        check(arguments, options | {"n_agents": 3, "beta": 0.1, "ratio": ratio})


def test_unchanged_policy(launches):
    """Its ratios are exactly 1 and its KL exactly 0, not nearly."""
    (logp, _, message, advantage), options = batch([5, 300, 1])
    for ratio in trust_region.RATIOS:
        _, stats = kernels.trust_region_loss(logp, logp, message, advantage, ratio=ratio)
        assert stats["ratio_mean"] == stats["ratio_max"] == 1
        assert stats["kl_k1"] == stats["kl_k3"] == stats["clip_fraction"] == 0


def test_small_kl_is_not_rounding(launches):
    """Log-ratios of 1e-4: e^x - 1 - x in fp32 would be noise, even negative."""
    arguments, _ = batch([50, 20], scale=1e-4)
    arguments[1] = torch.zeros_like(arguments[0])
    arguments[0] = 1e-4 * torch.randn(70, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got, want = run(kernels.trust_region_loss, arguments, {}), run(teamtr_loss, arguments, {}, torch.float64)
    assert got["kl_k3"].item() == pytest.approx(want["kl_k3"].item(), rel=1e-5)


def test_a_log_ratio_at_the_limit_still_moves(launches):
    """+-20 is inside, as it is for torch's clamp; anything beyond is flat."""
    logp = torch.tensor([20.0, -20.0, 20.1, -20.1], device=DEVICE)
    arguments = [logp, 0 * logp, torch.arange(4, device=DEVICE), -torch.ones(4, device=DEVICE)]
    for ratio in trust_region.RATIOS:
        check(arguments, {"ratio": ratio, "beta": 0.5})


def test_a_valid_nan_shows(launches):
    for ratio in trust_region.RATIOS:
        arguments, options = batch([3, 4])
        arguments[0][5] = math.nan
        loss, stats = kernels.trust_region_loss(*arguments, ratio=ratio)
        assert loss.isnan() and stats["kl_k3"].isnan() and stats["ratio_max"].isnan()


def test_the_same_bits_again(launches):
    arguments, options = batch([70, 300, 2], scale=0.3)
    first, again = (run(kernels.trust_region_loss, arguments, options | {"n_agents": 3}) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_wrong_ids(launches, monkeypatch):
    """A sentence on a CPU; below that check, and so on CUDA, a loss of NaN."""
    (logp, old_logp, message, advantage), options = batch([3, 4])
    unordered, past, stranger = message.flip(0), message + 1, options["agent"] + 3
    cases = [(unordered, options["agent"], "must ascend"), (past, options["agent"], "id 2 has no advantage"),
             (message, stranger, "agent ids must be within 0..2")]  # fmt: skip
    for ids, agent, says in cases:
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=says):
                kernels.trust_region_loss(logp, old_logp, ids, advantage, agent=agent, n_agents=3)
    monkeypatch.setattr(trust_region, "_check", lambda *_: None)
    for ids, agent, _ in cases:
        loss, _ = kernels.trust_region_loss(logp, old_logp, ids, advantage, agent=agent, n_agents=3)
        assert loss.isnan()


def test_bad_input_is_a_sentence():
    (logp, old_logp, message, advantage), _ = batch([3, 4])
    for error_type, says, arguments, extra in [
        (ValueError, "ratio is 'tokens'", (logp, old_logp, message, advantage), {"ratio": "tokens"}),
        (ValueError, "kl_unit is 'nat'", (logp, old_logp, message, advantage), {"kl_unit": "nat"}),
        (ValueError, "n_agents is 0", (logp, old_logp, message, advantage), {"n_agents": 0}),
        (ValueError, "old_logp is", (logp, old_logp[1:], message, advantage), {}),
        (ValueError, "advantage is on meta", (logp, old_logp, message, advantage.to("meta")), {}),
        (TypeError, "logp must be float32", (logp.bfloat16(), old_logp, message, advantage), {}),
        (TypeError, "message must be int64", (logp, old_logp, message.float(), advantage), {}),
    ]:
        with pytest.raises(error_type, match=says):
            kernels.trust_region_loss(*arguments, **extra)


def test_the_kernel_runs_where_triton_does_and_nowhere_else(launches, monkeypatch):
    """Whatever TEAMTR_KERNELS says: that is for those who choose, and this is one of the choices."""
    arguments, _ = batch([3, 4])
    on_cpu = [x.cpu() for x in arguments]
    for mode in ("auto", "torch", "triton"):
        monkeypatch.setenv("TEAMTR_KERNELS", mode)
        launches.clear()
        kernels.trust_region_loss(*arguments)
        assert launches
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(kernels.launch, "INTERPRETED", False)
            with pytest.raises(ValueError, match=r"on cpu; teamtr_min\.objective\.trust_region_loss"):
                kernels.trust_region_loss(*on_cpu)


def test_training_is_the_same_by_both_paths(launches, monkeypatch, tmp_path):
    """Two stages of train.py agree to 3e-5 in everything that they log.

    Not closer: Adam's first steps are nearly signs, so a rounding of a small gradient moves a weight far."""
    import train

    def logged(mode: str, **options) -> list[dict]:
        monkeypatch.setenv("TEAMTR_KERNELS", mode)
        launches.clear()
        flags = "--stages 2 --agents 2 --problems 1 --group 4 --inner-steps 1 --eval-problems 2 --beta 0.01"
        flags += f" --lr 2e-4 --kl-estimator exact --device {DEVICE} --out {tmp_path / mode}"
        assert train.main(flags.split()) == 0
        lines = (tmp_path / mode / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line, **options) for line in lines]
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]

    torch_rows = logged("torch", parse_float=lambda text: pytest.approx(float(text), rel=3e-5, abs=3e-5))
    assert not launches
    kernel_rows = logged("triton")
    assert len(launches) == 6 + 5 + 5  # of the loss, of layers, of decode steps alone
    assert len(torch_rows) == len(kernel_rows) >= 6
    for by_torch, by_kernels in zip(torch_rows, kernel_rows):
        assert by_torch == by_kernels
