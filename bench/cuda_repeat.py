"""The same bits on every run: each operation 20 times on a CUDA device over the same operands.

python -m bench.cuda_repeat --json F
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import numpy as np

import fastconv as fc
from bench import cuda_device
from fastconv import cuda

RUNS = 20


def operations(dtype: str) -> dict[str, Any]:
    """A call by name, over images that several blocks and slices share."""
    rng = np.random.default_rng(0)
    scale = 1 if not cuda_device.emulated() else 4

    def image(*shape: int) -> Any:
        array = rng.standard_normal(shape, np.float32).transpose(0, 3, 1, 2)
        return cuda.array(array, dtype)

    x, dy = (
        image(32 // scale, 28 // scale, 28 // scale, 64),
        image(32 // scale, 28 // scale, 28 // scale, 128),
    )
    w = cuda.array(rng.standard_normal((128, 64, 3, 3), np.float32), dtype)
    vector = cuda.array(rng.random(64, np.float32))
    depth = cuda.array(rng.standard_normal((64, 1, 3, 3), np.float32), dtype)
    small = image(32 // scale, 14 // scale, 14 // scale, 64)
    return {
        "conv2d": lambda: fc.conv2d(x, w, padding=1),
        "conv2d_backward": lambda: fc.conv2d_backward(dy, x, w, padding=1),
        "depthwise_backward": lambda: fc.conv2d_backward(x, x, depth, padding=1, groups=64),
        "batch_norm_train": lambda: fc.batch_norm_train(x, vector, vector, None, None, 0.1, 1e-5),
        "batch_norm_backward": lambda: fc.batch_norm_backward(x, x, vector, vector, vector),
        "max_pool2d_backward": lambda: fc.max_pool2d_backward(small, x, 2),
        "channel_gate_backward": lambda: fc.channel_gate_backward(x, x, fc.global_avg_pool2d(x)),
    }


def digest(result: Any) -> str:
    arrays = result if isinstance(result, tuple) else (result,)
    state = hashlib.sha256()
    for array in arrays:
        if array is not None:
            state.update(np.ascontiguousarray(array.numpy()).tobytes())
    return state.hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.cuda_repeat")
    parser.add_argument("--json", required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    runs = 2 if cuda_device.emulated() else RUNS
    different = []
    for dtype in ("float32", "bfloat16"):
        for name, call in operations(dtype).items():
            found = {digest(call()) for _ in range(runs)}
            print(dtype, name, len(found), "result" if len(found) == 1 else "RESULTS", flush=True)
            if len(found) > 1:
                different.append(f"{dtype} {name}")
    cuda_device.write(options.json, {"runs": runs, "different": different})
    if different:
        raise SystemExit(f"not the same bits on every run: {', '.join(different)}")


if __name__ == "__main__":
    main()
