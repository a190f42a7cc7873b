"""Convolution layers on a CUDA device against PyTorch with cuDNN, in the same run.

PyTorch counts with channels_last memory and cudnn.benchmark; results are compared before they are
timed. NCHW operands are a case of their own.

    python -m bench.cuda_layers --set resnet50,vgg16,smallcnn --dtype bfloat16 --json F
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import fastconv
from bench import cuda_device
from fastconv import cuda
from tests.cases import NETWORKS, ConvCase

OPS = ("fwd", "dgrad", "wgrad")
BATCH = {"resnet50": 64, "vgg16": 32, "smallcnn": 128, "mobilenet": 64}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Rounding of the operands is shared; that of the result and the order of sums are not.
LIMIT = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}


def operands(case: ConvCase, dtype: torch.dtype, layout: str, seed: int) -> list[torch.Tensor]:
    """x, w, dy."""
    torch.manual_seed(seed)
    memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    return [
        torch.randn(shape, device=cuda_device.torch_device()).to(dtype, memory_format=memory)
        for shape in (case.x_shape, case.w_shape, case.y_shape)
    ]


def our_call(case: ConvCase, op: str, tensors: list[torch.Tensor]) -> cuda_device.Call:
    x, w, dy = (cuda.from_foreign(t, "operand") for t in tensors)
    if op == "fwd":
        return lambda: fastconv.conv2d(x, w, **case.arguments)  # type: ignore[arg-type]
    needs = (op == "dgrad", op == "wgrad", False)

    def gradient() -> object:
        found = fastconv.conv2d_backward(dy, x, w, **case.arguments, needs=needs)  # type: ignore[arg-type]
        return found[0 if op == "dgrad" else 1]

    return gradient


def torch_call(case: ConvCase, op: str, tensors: list[torch.Tensor]) -> cuda_device.Call:
    x, w, dy = tensors
    (top, bottom), (left, right) = case.sides
    assert top == bottom and left == right, "PyTorch pads symmetrically"
    stride, padding, dilation = _pair(case.stride), (top, left), _pair(case.dilation)
    if op == "fwd":
        return lambda: torch.nn.functional.conv2d(
            x, w, None, stride, padding, dilation, case.groups
        )
    mask = (op == "dgrad", op == "wgrad", False)

    def gradient() -> object:
        found = torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, padding, dilation, False, [0, 0], case.groups, mask
        )
        return found[0 if op == "dgrad" else 1]

    return gradient


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def difference(ours: Any, theirs: Any) -> float:
    """Relative L2 difference."""
    a, b = torch.from_dlpack(ours).double(), theirs.double()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def measure(case: ConvCase, op: str, dtype: str, layout: str) -> dict[str, Any]:
    first = operands(case, DTYPES[dtype], layout, 0)
    size = sum(t.numel() * t.element_size() for t in first)
    sets = [first] + [
        operands(case, DTYPES[dtype], layout, seed)
        for seed in range(1, cuda_device.sets_beyond_l2(size))
    ]
    ours = [our_call(case, op, tensors) for tensors in sets]
    theirs = [torch_call(case, op, tensors) for tensors in sets]
    error = difference(ours[0](), theirs[0]())
    times = cuda_device.compare_times(ours, {"cudnn": theirs})
    direction = {"fwd": "forward", "dgrad": "backward_input", "wgrad": "backward_weight"}[op]
    chosen = fastconv.explain(
        "conv2d", case.x_shape, case.w_shape, **case.arguments, dtype=dtype, direction=direction,  # type: ignore[arg-type]
        device="cuda",
    )[-1][0]  # fmt: skip
    ratio = times["cudnn"] / times["ours"] if times.get("cudnn") and times["ours"] else None
    return {
        "layer": case.name,
        "count": case.count,
        "op": op,
        "dtype": dtype,
        "layout": layout,
        "c": case.c,
        "implementation": chosen,
        "microseconds": times,
        "ratio": ratio,
        "tflops": 2e-6 * case.macs / times["ours"] if times["ours"] else None,
        "difference": error,
        "right": error <= LIMIT[dtype],
    }


def cases(names: list[str], batch: int | None) -> Iterator[ConvCase]:
    for name in names:
        for case in NETWORKS[name]:
            yield replace(case, n=batch or BATCH.get(name, 32))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means of the ratios, for each direction and for few channels."""
    means = {}
    for op in OPS:
        of_op = [r for r in rows if r["op"] == op and r["ratio"]]
        means[op] = cuda_device.geometric_mean([r["ratio"] for r in of_op])
        means[f"{op}, C <= 64"] = cuda_device.geometric_mean(
            [r["ratio"] for r in of_op if r["c"] <= 64]
        )
    return {"geometric_mean_ratio": means, "wrong": [r for r in rows if not r["right"]]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.cuda_layers")
    parser.add_argument("--set", default="resnet50,vgg16,smallcnn", help="networks")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--layout", default="NHWC", choices=("NHWC", "NCHW"))
    parser.add_argument("--batch", type=int, help="images (as the network's set has it)")
    parser.add_argument("--filter", default="", help="only layers whose name has this in it")
    parser.add_argument("--json", required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    cuda_device.prepare_torch()
    cuda.allow_tf32(options.dtype == "float32")
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for case in cases(options.set.split(","), options.batch):
        if options.filter not in case.name:
            continue
        for op in options.ops.split(","):
            try:
                row = measure(case, op, options.dtype, options.layout)
            except RuntimeError as error:
                failed.append(f"{case.name} {op}: {error}")
                print(failed[-1], flush=True)
                cuda.synchronize()  # a kernel's fault stays, and ends the run here
                continue
            rows.append(row)
            note = "" if row["right"] else f"WRONG by {row['difference']:.1e}"
            shown = [row[key] for key in ("layer", "op", "implementation", "microseconds", "ratio")]
            print(*shown, note, flush=True)
            cuda_device.write(options.json, {"rows": rows, "failed": failed, **summary(rows)})
    print(summary(rows)["geometric_mean_ratio"])
    wrong = summary(rows)["wrong"]
    if failed or wrong:
        raise SystemExit(f"{len(failed)} failed, {len(wrong)} wrong")


if __name__ == "__main__":
    main()
