"""Settings that must stand before torch and Triton are imported.

Toy models gain nothing from a second thread: one each, children too. Without a GPU, kernel tests run in
Triton's interpreter and all other tests take the fast references. No test reaches the real hub.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}  # nobody listens there

import importlib.metadata  # noqa: E402
import shutil  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TEAMTR_KERNELS", "torch")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def launches(monkeypatch):
    """The test runs the kernels; the counter says which started, and none at all is a failure."""
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        triton, numpy = (importlib.metadata.version(name).split(".")[:2] for name in ("triton", "numpy"))
        if triton == ["3", "6"] and [int(part) for part in numpy] >= [2, 4]:
            pytest.skip("Triton 3.6 interprets only with numpy below 2.4")

    from kernels.launch import launches

    monkeypatch.setenv("TEAMTR_KERNELS", "triton")
    launches.clear()
    yield launches
    assert launches, "no kernel was started: this test ran on the torch reference"


@pytest.fixture(params=["triton", "torch"])
def path(request, monkeypatch):
    """The test runs once by the kernels and once by the torch references, and takes no other way."""
    from kernels.launch import launches

    if request.param == "triton":
        request.getfixturevalue("launches")
    else:
        monkeypatch.setenv("TEAMTR_KERNELS", "torch")
        launches.clear()
    yield request.param
    assert request.param == "triton" or not launches, "a kernel was started: this test is for the reference"


@pytest.fixture(scope="session", autouse=True)
def save_summary():
    """Toy runs end without a picture, which takes longer than they do; this is the function that draws it."""
    from teamtr_min.run import figures

    with pytest.MonkeyPatch.context() as patch:
        drawing = figures.save_summary
        patch.setattr(figures, "save_summary", lambda directory: None)
        yield drawing


SHARED = ["--stages", "3", "--eval-every", "1", "--eval-problems", "64"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A toy run of three stages. Tests read it, or copy it."""
    from toy_runs import run

    out = tmp_path_factory.mktemp("finished") / "run"
    run(out, *SHARED)
    return out


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """The same run, ended by Ctrl-C in its third stage: two checkpoints, and logs that are ahead of them."""
    from toy_runs import TOY, interrupt_at

    import train

    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(8, patch, train, "group_advantages")
        assert train.main([*TOY, *SHARED, "--out", str(out)]) == 130
    return out


@pytest.fixture
def half_right(monkeypatch):
    """Half of all rollouts are right: few groups of a toy run would have both outcomes otherwise."""
    from teamtr_min.tasks import Relay, WordProblems

    for task in (Relay, WordProblems):
        monkeypatch.setattr(task, "grade", lambda task, problem, row: float(sum(row[-1].tokens) % 2))


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")
