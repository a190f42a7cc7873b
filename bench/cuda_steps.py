"""Training steps on a CUDA device against PyTorch: forward, loss, backward, SGD with momentum.

Both sides are captured into a graph with fixed addresses and a fixed learning rate, and both
compute convolutions in bfloat16 with float32 parameters; PyTorch has channels_last, autocast,
cudnn.benchmark and its fused optimiser. PyTorch's eager step is timed too, without a graph.

    python -m bench.cuda_steps --json F
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import numpy as np
import torch

from bench import cuda_device, peer
from fastconv import cuda, models, nn, optim
from fastconv import functional as F
from fastconv.tensor import Tensor

# model, image size, batch
CASES = [("smallcnn", 32, 128), ("resnet18", 224, 128), ("resnet50", 224, 128)]
SMALL = [("smallcnn", 32, 2)]


def ours(model: nn.Module, size: int, batch: int) -> cuda_device.Call:
    model = copy.deepcopy(model).to("cuda").train()
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3), np.float32).transpose(0, 3, 1, 2)
    x, y = cuda.array(images), cuda.array(rng.integers(0, 10, batch))

    def step() -> object:
        optimizer.zero_grad()
        with cuda.autocast("bfloat16"):
            loss = F.cross_entropy(model(Tensor(x)), y)
            loss.backward()
        optimizer.step()
        return loss.data

    return step


def theirs(name: str, state: peer.State, size: int, batch: int) -> cuda_device.Call:
    device = cuda_device.torch_device()
    model = peer.build(name, state, torch.channels_last).to(device)
    fused = device == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def eager_microseconds(step: cuda_device.Call, repeats: int) -> float | None:
    if cuda_device.emulated():
        return None
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / repeats


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.cuda_steps")
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--only", help="one model")
    parser.add_argument("--repeats", type=int, default=20, help="steps of PyTorch's eager timing")
    options = parser.parse_args(arguments)
    cuda_device.prepare_torch()
    rows: list[dict[str, Any]] = []
    for name, size, batch in SMALL if cuda_device.emulated() else CASES:
        if options.only not in (None, name):
            continue
        model = models.create(name)
        sides = name, model.state_dict(), size, batch
        times = cuda_device.compare_times(
            [ours(model, size, batch)], {"torch graph": [theirs(*sides)]}
        )
        times["torch eager"] = eager_microseconds(theirs(*sides), options.repeats)
        rows.append({"model": name, "image": size, "batch": batch, "microseconds": times})
        print(rows[-1], flush=True)
        cuda_device.write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
