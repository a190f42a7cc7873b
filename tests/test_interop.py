"""Whose arrays come in and go out: numpy, PyTorch, DLPack; shared memory; layouts."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv as fc
from tests.memory import channels_last, guarded, is_channels_last
from tests.reference import assert_same_bits, normal

X = normal("x", shape=(2, 19, 7, 8))
W = normal("w", shape=(21, 19, 3, 3))
B = normal("b", shape=(21,))


class Exporter:
    """An array library that speaks nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


# Every public function on arrays, with numpy arguments.
CALLS = {
    "conv2d": (X, W, B),
    "conv2d_moments": (X, W, B),
    "conv2d_backward": (normal("dy", shape=(2, 21, 5, 6)), X, W),
    "conv_transpose2d": (X, normal("wt", shape=(19, 4, 3, 3))),
    "conv_transpose2d_backward": (
        normal("dyt", shape=(2, 4, 9, 10)),
        X,
        normal("wt", shape=(19, 4, 3, 3)),
    ),
    "max_pool2d": (X, 2),
    "max_pool2d_backward": (normal("dp", shape=(2, 19, 3, 4)), X, 2),
    "avg_pool2d": (X, 2),
    "avg_pool2d_backward": (normal("dp", shape=(2, 19, 3, 4)), X, 2),
    "adaptive_avg_pool2d": (X, 3),
    "adaptive_avg_pool2d_backward": (normal("da", shape=(2, 19, 3, 3)), X),
    "global_avg_pool2d": (X,),
    "global_avg_pool2d_backward": (normal("dg", shape=(2, 19, 1, 1)), X),
    "batch_norm": (X, np.zeros(19, "f"), np.ones(19, "f")),
    "batch_norm_train": (X, np.ones(19, "f"), None, None, None, 0.1, 1e-5),
    "batch_norm_max_pool_train": (X, np.ones(19, "f"), None, None, None, 0.1, 1e-5, 2),
    "batch_norm_max_pool_backward": (
        normal("dp", shape=(2, 19, 3, 4)),
        X,
        np.zeros((2, 19, 3, 4), np.uint8),
        np.ones(19, "f"),
        np.zeros(19, "f"),
        np.ones(19, "f"),
        2,
    ),
    "batch_norm_backward": (X, X, np.ones(19, "f"), np.zeros(19, "f"), np.ones(19, "f")),
    "local_response_norm": (X, 5),
    "local_response_norm_backward": (X, X, 5),
    "batch_norm_moments": (X,),
    "batch_norm_backward_sums": (X, X, np.ones(19, "f"), np.zeros(19, "f"), np.ones(19, "f")),
    "batch_norm_backward_input": (
        X,
        X,
        np.ones(19, "f"),
        np.zeros(19, "f"),
        np.ones(19, "f"),
        np.ones((2, 19)),
        1000,
    ),
    "relu": (X,),
    "gelu_backward": (X, X),
    "softmax": (X, 1),
    "log_softmax_backward": (X, X, 1),
    "linear": (X, normal("wl", shape=(5, 8))),
    "linear_backward": (
        normal("dl", shape=(2, 19, 7, 5)),
        X,
        normal("wl", shape=(5, 8)),
    ),
    "cross_entropy": (X[:, :, 0, 0].copy(), np.array([3, 18])),
    "cross_entropy_backward": (np.ones((), "f"), X[:, :, 0, 0].copy(), np.array([3, 18])),
    "add": (X, X),
    "cat": ([X, X[:, :3]],),
    "cat_backward": (X, (16, 3)),
    "channel_gate": (X, normal("gate", shape=(2, 19, 1, 1))),
    "channel_gate_backward": (X, X, normal("gate", shape=(2, 19, 1, 1))),
}


def converted(arguments: tuple | list, kind) -> tuple | list:
    return type(arguments)(
        kind(a) if isinstance(a, np.ndarray) else converted(a, kind) if isinstance(a, list) else a
        for a in arguments
    )


def parts(result: object) -> list:
    return [r for r in result if r is not None] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", CALLS)
def test_numpy_in_numpy_out(name):
    for result in parts(getattr(fc, name)(*CALLS[name])):
        assert isinstance(result, np.ndarray | np.floating)


@pytest.mark.parametrize("name", CALLS)
def test_torch_in_torch_out(name):
    expected = parts(getattr(fc, name)(*CALLS[name]))
    results = parts(getattr(fc, name)(*converted(CALLS[name], torch.tensor)))
    for result, right in zip(results, expected, strict=True):
        assert isinstance(result, torch.Tensor)
        assert_same_bits(result.numpy(), right, name)


@pytest.mark.parametrize("name", CALLS)
def test_dlpack_in(name):
    expected = parts(getattr(fc, name)(*CALLS[name]))
    results = parts(getattr(fc, name)(*converted(CALLS[name], Exporter)))
    for result, right in zip(results, expected, strict=True):
        got = result if isinstance(result, np.ndarray) else np.from_dlpack(result)
        assert_same_bits(got, right, name)


def test_kind_of_the_first_argument_wins():
    assert isinstance(fc.conv2d(X, torch.tensor(W), Exporter(B)), np.ndarray)
    assert isinstance(fc.conv2d(torch.tensor(X), W, B), torch.Tensor)


def test_numpy_array_likes():
    class Sub(np.ndarray):
        pass

    y = fc.conv2d(X, W)
    assert_same_bits(fc.conv2d(X.view(Sub), W.view(Sub)), y)
    readonly = X.copy()
    readonly.flags.writeable = False
    assert_same_bits(fc.conv2d(readonly, W), y)
    mapped = np.frombuffer(X.tobytes(), np.float32).reshape(X.shape)
    assert_same_bits(fc.conv2d(mapped, W), y)


def test_torch_results_own_ordinary_memory():
    """Results can be written, resized in a graph, sent to numpy, and outlive their inputs."""
    x = torch.tensor(X)
    y = fc.conv2d(x, torch.tensor(W), torch.tensor(B))
    expected = y.clone()
    del x
    gc.collect()
    assert torch.equal(y, expected)
    y += 1
    assert torch.equal(y, expected + 1)
    assert y.numpy().ctypes.data == y.data_ptr()
    assert y.data_ptr() % 64 == 0


def test_results_are_writable_and_independent():
    y = fc.conv2d(X, W)
    again = fc.conv2d(X, W)
    assert y.flags.writeable and not np.shares_memory(y, again)
    y[...] = 0
    assert again.any()
    z = fc.conv2d(X, W)
    assert_same_bits(z, again)


def test_memory_is_shared_both_ways():
    """In-place state: running statistics in torch tensors are updated where they are."""
    mean, var = torch.zeros(19), torch.ones(19)
    fc.batch_norm(torch.tensor(X), mean, var, training=True)
    expected_mean, expected_var = torch.zeros(19), torch.ones(19)
    F.batch_norm(torch.tensor(X), expected_mean, expected_var, training=True)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)
    mean, var = np.zeros(19, "f"), np.ones(19, "f")
    fc.batch_norm(torch.tensor(X), mean, var, training=True)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-6)


def test_torch_channels_last():
    x = torch.tensor(X).contiguous(memory_format=torch.channels_last)
    y = fc.conv2d(x, torch.tensor(W))
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert_same_bits(y.contiguous().numpy(), np.ascontiguousarray(fc.conv2d(channels_last(X), W)))
    y = fc.conv2d(torch.tensor(X), torch.tensor(W))
    assert y.is_contiguous()
    w = torch.tensor(W).contiguous(memory_format=torch.channels_last)
    assert_same_bits(fc.conv2d(torch.tensor(X), w).numpy(), fc.conv2d(X, W))


def test_nhwc_array_is_used_without_a_copy():
    """A channels-last image must not be copied: no memory beyond the output is taken for it."""
    nhwc = np.ones((1, 512, 512, 16), np.float32)
    w = np.ones((1, 16, 1, 1), np.float32)
    fc.conv2d(nhwc.transpose(0, 3, 1, 2), w)
    fc.reset_peak_memory_stats()
    before = fc.memory_stats()["bytes_in_use"]
    y = fc.conv2d(nhwc.transpose(0, 3, 1, 2), w)
    assert is_channels_last(y)
    peak = fc.memory_stats()["peak_bytes_in_use"] - before
    assert peak < nhwc.nbytes // 2, f"{peak} bytes for an input of {nhwc.nbytes}"


# Around the squares in which planes are transposed, and one so large that it bypasses the caches.
@pytest.mark.parametrize("size", [(1, 1), (1, 16), (3, 5), (4, 4), (7, 7), (16, 16), (31, 3)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33])
def test_planes_keep_their_bits(channels, size, isa):
    """To channels-last and back, for a pool over single pixels."""
    x = normal(channels, size, shape=(2, channels, *size))
    for side in ("start", "end"):
        assert_same_bits(fc.avg_pool2d(guarded(x, side), 1), x)


@pytest.mark.parametrize("size", [(128, 64), (127, 65)])
def test_large_planes_keep_their_bits(size, isa):
    x = normal(size, shape=(2, 48, *size))
    assert x.size >= 1 << 19
    assert_same_bits(fc.avg_pool2d(x, 1), x)
    assert_same_bits(fc.avg_pool2d(x[:, 1:41], 1), x[:, 1:41])


@pytest.mark.parametrize("view", [
    lambda t: t[::2], lambda t: t[:, 1:], lambda t: t[:, :, ::2, 1:], lambda t: t.transpose(2, 3),
    lambda t: t[:1].expand(3, -1, -1, -1), lambda t: t[:, :, :1].expand(-1, -1, 5, -1),
])  # fmt: skip
def test_torch_views(view):
    x = view(torch.tensor(normal("big", shape=(4, 20, 9, 10))))
    w = normal("w", x.shape[1], shape=(5, x.shape[1], 3, 3))
    assert_same_bits(fc.conv2d(x, w).numpy(), fc.conv2d(x.numpy().copy(), w))


def test_float64_torch():
    x, w = torch.tensor(X, dtype=torch.float64), torch.tensor(W, dtype=torch.float64)
    y = fc.conv2d(x, w)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, F.conv2d(x, w), rtol=1e-12, atol=1e-12)


def test_indices_are_int64_of_the_same_kind():
    y, index = fc.max_pool2d(torch.tensor(X), 2, return_indices=True)
    assert index.dtype == torch.int64
    ref, ref_index = F.max_pool2d(torch.tensor(X), 2, return_indices=True)
    assert torch.equal(y, ref) and torch.equal(index, ref_index)
    dy = torch.ones_like(ref)
    dx = fc.max_pool2d_backward(dy, torch.tensor(X), 2, indices=ref_index)
    assert isinstance(dx, torch.Tensor)
    assert torch.equal(dx, F.max_unpool2d(dy, ref_index, 2, output_size=X.shape))


class Convolution(torch.autograd.Function):
    """What somebody with their own autograd writes."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return fc.conv2d(x, w, b, stride=2, padding=1)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad)
        return fc.conv2d_backward(dy, x, w, stride=2, padding=1, needs=needs)


def test_inside_torch_autograd():
    leaves = [
        torch.tensor(normal(i, shape=s, dtype=np.float64), requires_grad=True)
        for i, s in enumerate([(2, 2, 5, 4), (3, 2, 3, 3), (3,)])
    ]
    assert torch.autograd.gradcheck(Convolution.apply, leaves)
    Convolution.apply(*leaves).sum().backward()  # a gradient with stride 0
    assert all(a.grad is not None for a in leaves)


@pytest.mark.parametrize("dtype", ["float16", "int32", "int64", "bool", "complex64"])
def test_other_types_are_refused(dtype):
    x, w = torch.tensor(X).to(getattr(torch, dtype)), torch.tensor(W).to(getattr(torch, dtype))
    with pytest.raises((TypeError, ValueError)):
        fc.conv2d(x, w)


def test_mixed_types_are_refused():
    with pytest.raises((TypeError, ValueError), match="float64"):
        fc.conv2d(X, W.astype(np.float64))
    with pytest.raises((TypeError, ValueError), match="float64"):
        fc.conv2d(X, W, B.astype(np.float64))
