"""Every model against the same model in PyTorch: parameters, keys, logits and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastconv import models, nn
from fastconv.nn import channels_last
from fastconv.summary import summarize
from fastconv.tensor import Array, Tensor, no_grad

from .architectures import (
    ARCHITECTURES,
    create,
    create_pair,
    outputs,
    randomise_running_statistics,
)

LOGITS_LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4


def draw_images(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def distance(found: Array, expected: Array) -> float:
    """Relative L2 of the difference."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_table_is_complete() -> None:
    assert models.available() == sorted(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_and_keys(name: str) -> None:
    line = ARCHITECTURES[name]
    with torch.device("meta"):
        reference = line.reference()
    model = create(name)
    assert sum(parameter.data.size for parameter in model.parameters()) == line.parameters
    shapes = [(key, value.shape) for key, value in model.state_dict().items()]
    assert shapes == [(key, tuple(value.shape)) for key, value in reference.state_dict().items()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_weights_give_the_same_logits(name: str) -> None:
    model, reference = create_pair(name)
    x = draw_images(ARCHITECTURES[name].image_shape, seed=0)
    randomise_running_statistics(reference, torch.from_numpy(x).double())
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected = reference.eval()(torch.from_numpy(x).double()).numpy()
    found = model.eval()(x).data
    assert found.dtype == np.float32
    assert np.abs(expected).max() < 1e3
    assert distance(found, expected) <= LOGITS_LIMIT
    with no_grad():  # batch norms folded into convolutions
        assert distance(model(x).data, expected) <= LOGITS_LIMIT


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_gradients(name: str) -> None:
    """In float64: in float32 rounding moves some values across the kinks of their ReLUs, in PyTorch
    too, and batch norms of a few values make a difference of 1e-2 of it. test_trajectory.py trains
    in float32."""
    line = ARCHITECTURES[name]
    model, reference = create_pair(name)
    model.double().load_state_dict(reference.state_dict())
    x = draw_images(line.image_shape, seed=0).astype(np.float64)
    target = np.arange(line.batch) % 10

    loss_of = torch.nn.CrossEntropyLoss()
    reference_loss = sum(
        loss_of(logits, torch.from_numpy(target))
        for logits in outputs(reference(torch.from_numpy(x)))
    )
    reference_loss.backward()
    loss: Any = sum(
        nn.CrossEntropyLoss()(logits, target) for logits in outputs(model(channels_last(x)))
    )
    assert isinstance(loss, Tensor)
    loss.backward()

    assert loss.item() == pytest.approx(reference_loss.item(), rel=LOGITS_LIMIT)
    check_gradients(model, reference)
    for key, value in reference.named_buffers():
        np.testing.assert_allclose(
            dict(model.named_buffers())[key], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=key
        )


def check_gradients(model: nn.Module, reference: torch.nn.Module) -> None:
    """Each parameter's gradient, in the order of the backward, so that the first error shows.

    Some gradients are exactly zero (a bias in front of a batch norm), in floating point a sum of
    terms that cancel; so no norm counts for less than a thousandth of that of the whole gradient.
    """
    expected = {key: value.grad.numpy() for key, value in reference.named_parameters()}
    whole = float(np.sqrt(sum(np.vdot(grad, grad) for grad in expected.values())))
    for key, parameter in reversed(list(model.named_parameters())):
        error = float(np.linalg.norm(parameter.grad - expected[key]))
        size = max(float(np.linalg.norm(expected[key])), 1e-3 * whole)
        assert error <= GRADIENT_LIMIT * size, f"{key}: relative L2 {error / size:.2g}"


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.published])
def test_published_figures(name: str) -> None:
    line = ARCHITECTURES[name]
    assert line.published
    figures = line.published
    size = (line.in_channels, figures.image_size, figures.image_size)
    summary = summarize(create(name, image_size=figures.image_size), size)
    if figures.giga_multiply_adds is not None:
        digits = len(figures.giga_multiply_adds.partition(".")[2])
        assert f"{summary.multiply_adds / 1e9:.{digits}f}" == figures.giga_multiply_adds
    if figures.receptive_field is not None:
        fields = {row.name: row.receptive_field for row in summary.rows}
        assert fields[figures.layer] == (figures.receptive_field,) * 2
