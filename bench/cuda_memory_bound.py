"""Batch norm and pooling on a CUDA device against PyTorch, and the bandwidth that they reach.

The bandwidth is measured in the same run by copying an array, read and written bytes counted.

    python -m bench.cuda_memory_bound --json F
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fastconv
from bench import cuda_device
from fastconv import cuda

# N, C, H, W of ResNet-50's activations at batch 64 and of a CIFAR network's.
SHAPES = [
    (64, 64, 112, 112),
    (64, 256, 56, 56),
    (64, 512, 28, 28),
    (64, 2048, 7, 7),
    (512, 64, 32, 32),
]
SMALL = [(2, 8, 6, 6)]


def images(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    device = cuda_device.torch_device()
    return [
        torch.randn(shape, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
        for _ in range(count)
    ]


def bandwidth() -> float | None:
    """Bytes a second of a copy."""
    if cuda_device.emulated():
        return None
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    stream = cuda_device.side_stream()
    graph = cuda_device.TorchGraph([lambda: b.copy_(a)], stream)
    return 2 * a.numel() / (1e-6 * cuda_device.microseconds({"copy": graph}, stream, 1)["copy"])


def batch_norm(shape: tuple[int, ...]) -> dict[str, Any]:
    """Forward in training and backward of batch norm + add + ReLU."""
    channels, size = shape[1], 2 * torch.Size(shape).numel()
    sets = cuda_device.sets_beyond_l2(3 * size)
    device = cuda_device.torch_device()
    weight, bias = torch.rand(channels, device=device), torch.rand(channels, device=device)
    w, b = (cuda.from_foreign(t, "vector") for t in (weight, bias))
    ours: dict[str, list[Any]] = {"forward": [], "backward": []}
    theirs: dict[str, list[Any]] = {"forward": [], "backward": []}
    for _ in range(sets):
        x, residual, dy = images(shape, 3)
        a, r, g = (cuda.from_foreign(t, "image") for t in (x, residual, dy))
        fused: Any = {"residual": r, "activation": "relu"}
        ours["forward"].append(
            lambda a=a, fused=fused: fastconv.batch_norm_train(
                a, w, b, None, None, 0.1, 1e-5, **fused
            )
        )
        _, mean, rstd = ours["forward"][-1]()
        ours["backward"].append(
            lambda a=a, g=g, mean=mean, rstd=rstd, fused=fused: fastconv.batch_norm_backward(
                g, a, w, mean, rstd, bias=b, **fused
            )
        )
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]

        def forward(leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            y = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True)
            return torch.relu(y + leaves[3])

        def plain(leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            with torch.no_grad():
                return forward(leaves)

        with cuda_device.on_side_stream():
            y = forward()
        theirs["forward"].append(plain)
        theirs["backward"].append(
            lambda y=y, leaves=leaves, dy=dy: torch.autograd.grad(y, leaves, dy, retain_graph=True)
        )
    rows = {}
    # Forward: x twice, residual, y. Backward: dy, x, residual, dz; then x, dz and dx.
    for name, arrays in (("forward", 4), ("backward", 7)):
        times = cuda_device.compare_times(ours[name], {"torch": theirs[name]})
        rows[name] = _row(times, arrays * size)
    return rows


def max_pool_backward(shape: tuple[int, ...]) -> dict[str, Any]:
    sets = cuda_device.sets_beyond_l2(4 * torch.Size(shape).numel())
    ours, theirs = [], []
    for _ in range(sets):
        (x,) = images(shape, 1)
        leaf = x.clone().requires_grad_()
        with cuda_device.on_side_stream():
            y = torch.nn.functional.max_pool2d(leaf, 3, 2, 1)
        dy = torch.randn_like(y)
        a, g = cuda.from_foreign(x, "image"), cuda.from_foreign(dy, "dy")
        ours.append(lambda a=a, g=g: fastconv.max_pool2d_backward(g, a, 3, 2, 1))
        theirs.append(
            lambda y=y, leaf=leaf, dy=dy: torch.autograd.grad(y, leaf, dy, retain_graph=True)
        )
    times = cuda_device.compare_times(ours, {"torch": theirs})
    return _row(times, int(2 * torch.Size(shape).numel() * 2.25))


def _row(times: dict[str, Any], least_bytes: int) -> dict[str, Any]:
    ours = times["ours"]
    return {
        "microseconds": times,
        "ratio": times["torch"] / ours if ours and times.get("torch") else None,
        "bytes_a_second": least_bytes / (1e-6 * ours) if ours else None,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.cuda_memory_bound")
    parser.add_argument("--json", required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"copy_bytes_a_second": bandwidth(), "rows": []}
    for shape in SMALL if cuda_device.emulated() else SHAPES:
        row = {"shape": shape, "batch_norm_add_relu": batch_norm(shape)}
        row["max_pool_3x3_s2_backward"] = max_pool_backward(shape)
        result["rows"].append(row)
        print(row, flush=True)
        cuda_device.write(options.json, result)


if __name__ == "__main__":
    main()
