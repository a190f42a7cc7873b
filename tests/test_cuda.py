"""Arrays of a CUDA device: where there is a GPU, or with the extension built EMULATED.

Convolutions are in test_cuda_conv2d.py; the other operations are tested by their own files with
FASTCONV_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fastconv as fc
from fastconv import cuda, models, nn, optim
from fastconv import functional as F
from fastconv.tensor import Tensor
from tests import reference

pytestmark = pytest.mark.skipif(not cuda.is_available(), reason="no CUDA device here")

# The functions as they are, where the suite runs them on the device.
conv2d = getattr(fc.conv2d, "__wrapped__", fc.conv2d)
PackedConv2d = getattr(fc.PackedConv2d, "__wrapped__", fc.PackedConv2d)
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_a_training_step_follows_the_cpu():
    """Two steps of a small network in float32 on the device and on the CPU."""
    fc.manual_seed(0)
    cpu = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )
    gpu = copy.deepcopy(cpu).to("cuda")
    assert gpu.device == "cuda" and next(gpu.parameters()).device == "cuda"
    x, y = normal(4, 3, 8, 8), np.arange(4)
    losses = []
    for model, images, labels in ((cpu, x, y), (gpu, cuda.array(x), cuda.array(y))):
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(Tensor(images)), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for (name, a), (_, b) in zip(cpu.named_buffers(), gpu.cpu().named_buffers(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=name)


def test_batch_norm_has_its_statistics_from_the_convolution(monkeypatch):
    """In training, of a pair that nothing looks into; with the values of the two layers."""
    calls = []
    fused = F.conv2d_batch_norm
    monkeypatch.setattr(
        F, "conv2d_batch_norm", lambda *a, **k: calls.append(True) or fused(*a, **k)
    )
    layers = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
    apart = copy.deepcopy(layers).to("cuda")
    together = copy.deepcopy(layers).to("cuda")
    images = normal(3, 16, 7, 9)
    results = []
    for model in (together, apart):
        calls.clear()
        x = Tensor(cuda.array(images), requires_grad=True)
        with cuda.autocast("bfloat16"):
            y = model(x) if model is together else model[2](model[1](model[0](x)))
        assert bool(calls) == (model is together)
        (y * y).sum().backward()
        numbers = [y.data, x.grad, model[0].weight.grad, model[1].running_var]
        results.append([cuda.to_numpy(a).astype(np.float32) for a in numbers])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max())
    calls.clear()
    together.eval()(cuda.array(images))
    assert not calls


def test_autocast_computes_in_16_bits_and_keeps_float32_parameters():
    conv = nn.Conv2d(16, 16, 3, padding=1).to("cuda")
    with cuda.autocast("bfloat16"):
        y = conv(Tensor(cuda.array(normal(2, 16, 6, 6))))
        assert y.dtype == cuda.bfloat16
        y.sum().backward()
    assert conv.weight.dtype == np.float32 and conv.weight.grad.dtype == np.float32


def test_a_graph_repeats_a_step_with_fixed_addresses():
    kernels = cuda.kernels()
    x, w = cuda.array(normal(2, 8, 6, 6)), cuda.array(normal(8, 8, 3, 3))
    with cuda.stream(kernels.make_stream()):
        conv2d(x, w, padding=1)
        graph = kernels.Graph()
        graph.begin()
        y = conv2d(x, w, padding=1) + 1.0
        graph.end()
        x[...] = cuda.array(normal(2, 8, 6, 6))
        graph.replay()
        cuda.synchronize()
        reference.assert_same_bits(y.numpy(), (conv2d(x, w, padding=1) + 1.0).numpy())
        other = conv2d(x, w, padding=1)  # does not take the graph's memory
        assert not np.may_share_memory(other, y)


def test_views_are_those_of_numpy():
    host = normal(2, 3, 4, 5)
    array = cuda.array(host)
    for view in (
        lambda a: a[1],
        lambda a: a[:, ::2, None, 1:3, -1],
        lambda a: a.transpose(0, 2, 3, 1),
        lambda a: a.transpose(0, 2, 3, 1).reshape(2, -1, 3),
        lambda a: a.reshape(6, 20),
        lambda a: a.transpose(3, 2, 1, 0).reshape(-1),
        lambda a: a.swapaxes(1, 3),
        lambda a: np.broadcast_to(a[:1], (7, 3, 4, 5)),
    ):
        assert view(array).shape == view(host).shape
        np.testing.assert_array_equal(view(array).numpy(), view(host))
    array[0, 1] = 2.0
    array[1] = array[0]
    host[0, 1] = 2.0
    host[1] = host[0]
    np.testing.assert_array_equal(array.numpy(), host)


def test_arithmetic():
    a, b = normal(3, 4, 5), normal(4, 1)
    x, y = cuda.array(a), cuda.array(b)
    for call in (
        lambda p, q: p + q,
        lambda p, q: q - p,
        lambda p, q: p * q * 2.0,
        lambda p, q: -p / 4.0,
        lambda p, q: 1.0 - p,
    ):
        np.testing.assert_allclose(call(x, y).numpy(), call(a, b), rtol=1e-6)
    np.testing.assert_allclose(x.sum((0, 2)).numpy(), a.sum((0, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        x.sum(1, True).numpy(), a.sum(1, keepdims=True), rtol=1e-5, atol=1e-5
    )
    x += y
    np.testing.assert_allclose(x.numpy(), a + b, rtol=1e-6)
    with pytest.raises(TypeError, match="numpy array"):
        x + a


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "uint8"])
def test_dlpack_shares_memory(dtype):
    """An emulated device's memory is the host's, so torch's CPU tensors take part there."""
    torch_dtype = getattr(torch, dtype)
    source = torch.arange(24).reshape(2, 3, 4).to(torch_dtype)
    tensor = source if cuda.is_emulated() else source.cuda()
    array = cuda.from_foreign(tensor.transpose(0, 2), "tensor")
    assert array.shape == (4, 3, 2) and array.data_ptr == tensor.data_ptr()
    np.testing.assert_array_equal(array.numpy(), source.transpose(0, 2).double().numpy())
    back = torch.from_dlpack(array)
    assert back.data_ptr() == tensor.data_ptr() and back.dtype == torch_dtype


def test_what_does_not_fit_is_refused():
    array = cuda.array(normal(2, 3, 4, 4))
    with pytest.raises(TypeError, match="on the CPU and some on a CUDA device"):
        conv2d(array, normal(4, 3, 3, 3))
    with pytest.raises(TypeError, match=r"\.cpu\(\)"):
        np.asarray(array)
    with pytest.raises(TypeError, match="complex64"):
        cuda.array(np.zeros(3, np.complex64))
    with pytest.raises(TypeError, match="integers and slices"):
        array[[0, 1]]
    with pytest.raises(ValueError, match="reshape"):
        array.reshape(5, 5)
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        Tensor(array).to("tpu")


def test_memory_is_used_again():
    before = cuda.memory_stats()
    for _ in range(3):
        cuda.array(normal(64, 64))
    after = cuda.memory_stats()
    assert after["cache_hits"] > before["cache_hits"]
    assert after["bytes_in_use"] == before["bytes_in_use"]


def test_an_emulated_device_says_so():
    assert cuda.is_emulated() == ("emulated" in cuda.device_info()["name"])


def test_every_model_can_be_moved():
    model = models.create("smallcnn", num_classes=4)
    assert model.to("cuda").to("cpu").device == "cpu"


def test_evaluation_computes_without_folding():
    """What the CPU folds into its weights, the device computes one operation after the other."""
    fc.manual_seed(0)
    cpu = models.create("resnet8_cifar", in_channels=3, image_size=8, num_classes=4).eval()
    gpu = copy.deepcopy(cpu).to("cuda").eval()
    x = normal(2, 3, 8, 8)
    with fc.no_grad():
        expected, result = cpu(x).data, gpu(cuda.array(x)).data
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_packed_weights_are_of_the_cpu_alone():
    w, x = normal(4, 3, 3, 3), normal(2, 3, 6, 6)
    with pytest.raises(TypeError, match="weight is on a CUDA device"):
        PackedConv2d(cuda.array(w))
    with pytest.raises(TypeError, match="input is on a CUDA device"):
        PackedConv2d(w)(cuda.array(x))
