"""fastconv's convolution in a PyTorch model: forward and backward in an autograd.Function.

The operations take torch tensors and return torch tensors that share memory with fastconv's output,
so the function below only says which backward belongs to which forward.

    python examples/torch_autograd.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fastconv


class Conv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, stride: int, padding: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = stride, padding
        return fastconv.conv2d(x.detach(), w.detach(), b.detach(), stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = (saved.detach() for saved in ctx.saved_tensors)
        needs = ctx.needs_input_grad[:3]
        return *fastconv.conv2d_backward(dy, x, w, *ctx.geometry, needs=needs), None, None


class FastConv2d(nn.Conv2d):
    """torch.nn.Conv2d, computed by fastconv: same parameters, same state_dict."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Conv2dFunction.apply(x, self.weight, self.bias, self.stride, self.padding)


def main(steps: int = 20) -> list[float]:
    """Fits a small network to random labels; returns the losses."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16).to(memory_format=torch.channels_last)
    target = torch.randint(10, (16,))
    model = nn.Sequential(
        FastConv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in main()))
