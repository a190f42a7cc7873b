"""The peer: PyTorch doing the same work, in each of the modes that its users know.

Imported only where it is wanted, so that the other benchmarks run without PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.measure import Call
from bench.steps import Training
from fastconv.train.step import AUXILIARY_WEIGHT
from tests.architectures import ARCHITECTURES, outputs, without_noise
from tests.cases import ConvCase, pair
from tests.torchvision_models import models as torchvision

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
WANTED = {"dgrad": (True, False, False), "wgrad": (False, True, False)}


def set_num_threads(threads: int) -> None:
    torch.set_num_threads(threads)


def in_layout(array: np.ndarray, layout: torch.memory_format) -> torch.Tensor:
    return torch.from_numpy(array).contiguous(memory_format=layout)


def convolution(
    case: ConvCase, op: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> dict[str, Call]:
    """One call for each layout, on operands that already have it, as in a user's model."""
    return {
        name: convolution_call(case, op, *(in_layout(a, layout) for a in (x, w, dy)))
        for name, layout in LAYOUTS.items()
    }


def convolution_call(
    case: ConvCase, op: str, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> Call:
    (top, bottom), (left, right) = case.sides
    if (top, left) != (bottom, right):
        raise ValueError(f"{case.name}: PyTorch takes no padding of {case.sides}")
    stride, padding, dilation = pair(case.stride), (top, left), pair(case.dilation)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return nn.functional.conv2d(x, w, None, stride, padding, dilation, case.groups)

    def backward() -> torch.Tensor:
        gradients = torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, padding, dilation, False, (0, 0), case.groups, WANTED[op]
        )
        return gradients[WANTED[op].index(True)]

    return forward if op == "fwd" else backward


State = Mapping[str, np.ndarray]
# With the auxiliary head that the tests' own line leaves out.
REFERENCES = {"inception_v3": partial(torchvision.inception_v3, weights=None, init_weights=False)}


def build(name: str, state: State, layout: torch.memory_format) -> nn.Module:
    """The model in training mode with a copy of fastconv's weights."""
    with torch.device("meta"):  # no random numbers
        model = REFERENCES.get(name, ARCHITECTURES[name].reference)()
    model.to_empty(device="cpu")
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
    model.to(memory_format=layout)  # type: ignore[call-overload]  # not in its type stub
    return model.train()


def forwards(name: str, state: State, images: np.ndarray) -> dict[str, Call]:
    """A forward pass in eval mode for each layout."""
    return {
        layout_name: forward_call(build(name, state, layout).eval(), in_layout(images, layout))
        for layout_name, layout in LAYOUTS.items()
    }


def forward_call(model: nn.Module, images: torch.Tensor) -> Call:
    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return forward


def training_loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Of the logits, and of auxiliary heads with the weights that fastconv gives them."""
    logits, *auxiliary = outputs(output)
    loss = nn.functional.cross_entropy(logits, labels)
    for head in auxiliary:
        weight = AUXILIARY_WEIGHT[type(output).__name__]
        loss = loss + weight * nn.functional.cross_entropy(head, labels)
    return loss


def step_call(
    model: nn.Module,
    forward: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    labels: torch.Tensor,
    training: Training,
) -> Callable[[], torch.Tensor]:
    """A training step of ``model``, whose forward pass is ``forward`` (itself, or compiled)."""
    optimizer = getattr(torch.optim, training.optimizer)(
        model.parameters(), **training.settings, fused=True
    )

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def losses(
    name: str, state: State, images: np.ndarray, labels: np.ndarray, training: Training
) -> dict[str, list[float]]:
    """The losses of the first steps without dropout, in each layout."""
    target = torch.from_numpy(labels)
    found = {}
    for layout_name, layout in LAYOUTS.items():
        model = without_noise(build(name, state, layout))
        step = step_call(model, model, in_layout(images, layout), target, training)
        found[layout_name] = [step().item() for _ in range(training.checked_steps)]
    return found


def steps(
    name: str,
    state: State,
    images: np.ndarray,
    labels: np.ndarray,
    training: Training,
    compiled: bool = False,
) -> dict[str, Call]:
    """A training step for each mode, each with its own model."""
    target = torch.from_numpy(labels)
    # torch.compile writes the number of threads into its code, so each number is compiled anew.
    threads: dict[str, str | int | bool | Callable[..., object]] = {
        "cpp.threads": torch.get_num_threads()
    }
    calls: dict[str, Call] = {}
    for layout_name, layout in LAYOUTS.items():
        x = in_layout(images, layout)
        model = build(name, state, layout)
        calls[layout_name] = step_call(model, model, x, target, training)
        if compiled:
            model = build(name, state, layout)
            fast = torch.compile(model, options=threads)
            calls[f"compiled {layout_name}"] = step_call(model, fast, x, target, training)
    return calls
