"""The peer: PyTorch doing the same work, in each of the modes that its users know.

Imported only where it is wanted, so that the other benchmarks run without PyTorch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from bench.measure import Call
from tests.cases import ConvCase, pair

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


def smallcnn() -> nn.Module:
    """fastconv.models.SmallCNN in PyTorch's modules, with the same names."""
    features = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)
    )
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))


MODELS = {"smallcnn": smallcnn}
State = Mapping[str, np.ndarray]


def build(name: str, state: State, layout: torch.memory_format) -> nn.Module:
    """The model in training mode with a copy of fastconv's weights."""
    model = MODELS[name]()
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
    model.to(memory_format=layout)  # type: ignore[call-overload]  # not in its type stub
    return model.train()


def step_call(
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    lr: float,
) -> Callable[[], torch.Tensor]:
    """A training step of ``model``, whose forward pass is ``forward`` (itself, or compiled)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def losses(
    name: str, state: State, images: np.ndarray, labels: np.ndarray, lr: float, steps: int
) -> list[float]:
    """The losses of the first steps without dropout."""
    model = build(name, state, torch.contiguous_format)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    step = step_call(model, model, torch.from_numpy(images), torch.from_numpy(labels), lr)
    return [step().item() for _ in range(steps)]


def steps(
    name: str, state: State, images: np.ndarray, labels: np.ndarray, lr: float, compiled: bool
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
        calls[layout_name] = step_call(model, model, x, target, lr)
        if compiled:
            model = build(name, state, layout)
            fast = torch.compile(model, options=threads)
            calls[f"compiled {layout_name}"] = step_call(model, fast, x, target, lr)
    return calls
