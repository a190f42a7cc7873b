"""The peers of inference: ONNX Runtime and OpenVINO, on what PyTorch exports, in float32.

Imported only where it is wanted; either may be missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch

from bench.peer import State, build

Forward = Callable[[], np.ndarray]


def exported(name: str, state: State, images: np.ndarray) -> bytes:
    """The model in eval mode with fastconv's weights as an ONNX file for images of this shape."""
    model = build(name, state, torch.contiguous_format).eval()
    file = io.BytesIO()
    # The exporter by tracing: it is deprecated, but needs nothing beside PyTorch and onnx, and both
    # runtimes fold and fuse the graph themselves.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.from_numpy(images),), file, dynamo=False)  # type: ignore[arg-type]
    return file.getvalue()


def onnx_runtime(model: bytes, images: np.ndarray, threads: int) -> Forward:
    """All graph optimisations, one session with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)[0]


def openvino(model: bytes, images: np.ndarray, threads: int) -> Forward:
    """One stream, for latency; sharing input and output memory."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 is the default where the CPU has it
    }
    core = ov.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([images], share_inputs=True, share_outputs=True)[0]


RUNTIMES = {"onnxruntime": ("ONNX Runtime", onnx_runtime), "openvino": ("OpenVINO", openvino)}


def missing() -> list[str]:
    """Packages without which `forwards` has fewer, or no, peers."""
    return [name for name in ("onnx", *RUNTIMES) if importlib.util.find_spec(name) is None]


def forwards(name: str, state: State, images: np.ndarray, threads: int) -> Mapping[str, Forward]:
    """A forward pass for each runtime that is installed."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dense = np.ascontiguousarray(images)
    model = exported(name, state, dense)
    absent = missing()
    return {
        title: make(model, dense, threads)
        for package, (title, make) in RUNTIMES.items()
        if package not in absent
    }
