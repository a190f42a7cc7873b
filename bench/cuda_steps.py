"""Training steps on a CUDA device against PyTorch: forward, loss, backward, SGD with momentum.

Ours is `train.GraphedStep`, with all that a user of it has: the learning rate of each step, the
loss and the count of right answers. PyTorch's is captured into a graph too, with a fixed learning
rate and no figures, and timed eager as well; with --compile also under torch.compile(max-autotune).
Both compute convolutions in bfloat16 with float32 parameters; PyTorch has channels_last, autocast,
cudnn.benchmark and its fused optimiser.

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
from fastconv import cuda, models, nn, optim, train
from fastconv.init import Share

# model, image size, batch
CASES = [("smallcnn", 32, 128), ("resnet18_cifar", 32, 512), ("resnet50", 224, 256)]
SMALL = [("smallcnn", 32, 2)]


class Ours:
    """Steps on a batch that lies on the device."""

    def __init__(self, model: nn.Module, size: int, batch: int, stream: int) -> None:
        model = copy.deepcopy(model).to("cuda").train()
        rng = np.random.default_rng(0)
        images = rng.standard_normal((batch, size, size, 3), np.float32).transpose(0, 3, 1, 2)
        self._optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self._step = train.GraphedStep(model, self._optimizer, shares=[Share(0, batch, batch)])
        self._stream = stream
        self._batch = cuda.array(images), cuda.array(rng.integers(0, 10, batch))
        cuda.synchronize()  # they and the weights were copied on another stream than the steps'
        for _ in range(2):  # the second is recorded
            self.replay()
        if self._step.obstacle is not None:
            raise RuntimeError(f"no graph: {self._step.obstacle}")

    def replay(self) -> None:
        with cuda.stream(self._stream), cuda.autocast("bfloat16"):
            self._optimizer.param_groups[0]["lr"] *= 0.999
            self._step(*self._batch)


def theirs(
    name: str, state: peer.State, size: int, batch: int, mode: str | None = None
) -> cuda_device.Call:
    device = cuda_device.torch_device()
    model = peer.build(name, state, torch.channels_last).to(device)
    forward = model if mode is None else torch.compile(model, mode=mode)
    fused = device == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def eager_microseconds(step: cuda_device.Call, repeats: int) -> float:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / repeats


def compare(
    name: str, size: int, batch: int, repeats: int, compiled: bool
) -> dict[str, float | None]:
    """Microseconds of a step of each side; null where the device is emulated."""
    model = models.create(name)
    state = model.state_dict()
    if cuda_device.emulated():
        Ours(model, size, batch, cuda.kernels().make_stream()).replay()
        return {"ours": None, "torch graph": None, "torch eager": None}
    stream = cuda_device.side_stream()
    graphs = {
        "ours": Ours(model, size, batch, stream.cuda_stream),
        "torch graph": cuda_device.TorchGraph([theirs(name, state, size, batch)], stream),
    }
    times: dict[str, float | None] = {**cuda_device.microseconds(graphs, stream, 1)}
    times["torch eager"] = eager_microseconds(theirs(name, state, size, batch), repeats)
    if compiled:
        step = theirs(name, state, size, batch, "max-autotune")
        times["torch compiled"] = eager_microseconds(step, repeats)
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.cuda_steps")
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--only", help="one model")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too: takes minutes")
    parser.add_argument("--repeats", type=int, default=20, help="steps of a timing without a graph")
    options = parser.parse_args(arguments)
    cuda_device.prepare_torch()
    rows: list[dict[str, Any]] = []
    for name, size, batch in SMALL if cuda_device.emulated() else CASES:
        if options.only not in (None, name):
            continue
        times = compare(name, size, batch, options.repeats, options.compile)
        rows.append({"model": name, "image": size, "batch": batch, "microseconds": times})
        print(rows[-1], flush=True)
        cuda_device.write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
