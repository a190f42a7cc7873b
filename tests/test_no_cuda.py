"""What is said where there is no CUDA device."""

from __future__ import annotations

import pytest

import fastconv as fc
from fastconv import cuda
from fastconv.tensor import Tensor


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_module", None)
    monkeypatch.setattr(cuda, "_reason", "fastconv was built without CUDA")


def test_asking_for_cuda_says_why_there_is_none(without):
    assert not cuda.is_available() and not cuda.is_emulated()
    for call in (
        lambda: Tensor([1.0]).to("cuda"),
        lambda: fc.nn.Linear(2, 2).to("cuda"),
        cuda.device_info,
        lambda: fc.explain("conv2d", (1, 1, 3, 3), (1, 1, 3, 3), device="cuda"),
    ):
        with pytest.raises(RuntimeError, match="no CUDA device: fastconv was built without CUDA"):
            call()
    assert "built without CUDA" in fc.info.report()
