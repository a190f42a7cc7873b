"""The numbers of docs/textbook.md, worked out by hand and checked against the library."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv
from fastconv import models, nn
from fastconv.summary import summarize
from fastconv.tensor import Tensor


def image(rows: list[list[float]]) -> np.ndarray:
    """One image of one channel."""
    return np.array(rows, np.float32)[None, None]


def parameters(module: nn.Module) -> int:
    return sum(parameter.data.size for parameter in module.parameters())


# Output size: floor((size + padding on both sides - kernel) / stride) + 1.


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "expected"),
    [
        (32, 5, 1, 0, 28),  # 32 - 5 + 1: without padding each layer loses kernel - 1
        (32, 5, 1, 2, 32),  # padding (kernel - 1) / 2 keeps the size
        (227, 11, 4, 0, 55),  # AlexNet: (227 - 11) / 4 + 1, nothing left over
        (224, 7, 2, 3, 112),  # ResNet: (224 + 6 - 7) / 2 = 111.5, floor 111, + 1
        (7, 3, 3, 0, 2),  # (7 - 3) / 3 = 1.33, floor 1, + 1: one column is never read
        (32, 5, 1, "valid", 28),
        (32, 5, 1, "same", 32),
        (32, 5, 2, "same", 16),  # same with a stride: ceil(32 / 2)
        (33, 5, 2, "same", 17),  # ceil(33 / 2)
    ],
)
def test_output_size(
    size: int, kernel: int, stride: int, padding: int | str, expected: int
) -> None:
    x = np.zeros((1, 1, size, size), np.float32)
    w = np.zeros((1, 1, kernel, kernel), np.float32)
    y = fastconv.conv2d(x, w, stride=stride, padding=padding)
    assert y.shape == (1, 1, expected, expected)


def test_floor_leaves_columns_unread() -> None:
    """7 wide, kernel 3, stride 3: the windows read columns 0-2 and 3-5, so column 6 has no say."""
    x = np.ones((1, 1, 7, 7), np.float32)
    w = np.ones((1, 1, 3, 3), np.float32)
    dy = np.ones((1, 1, 2, 2), np.float32)
    dx, _, _ = fastconv.conv2d_backward(dy, x, w, stride=3)
    expected = np.zeros((1, 1, 7, 7), np.float32)
    expected[..., :6, :6] = 1
    np.testing.assert_array_equal(dx, expected)


def test_same_padding_puts_the_odd_column_at_the_end() -> None:
    """6 wide, kernel 3, stride 2: 3 outputs read 2 * 2 + 3 = 7 columns, so one is padded: the last.

    Row sums of 1..6 over columns (0 1 2), (2 3 4), (4 5 pad): 6, 12, 11.
    """
    x = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 1, 6)
    w = np.ones((1, 1, 1, 3), np.float32)
    y = fastconv.conv2d(x, w, stride=2, padding="same")
    assert y.ravel().tolist() == [6, 12, 11]


# Parameters.


def test_convolution_has_1792_parameters_at_any_image_size() -> None:
    """3 * 3 * 3 weights for each of 64 outputs, and 64 biases: 27 * 64 + 64."""
    layer = nn.Conv2d(3, 64, 3, padding=1)
    assert parameters(layer) == 1792
    for height, width in [(8, 8), (12, 20)]:
        assert layer(np.zeros((1, 3, height, width), np.float32)).shape == (1, 64, height, width)


def test_dense_layer_has_150_million() -> None:
    """One weight for each pair of an input and an output: 224 * 224 * 3 * 1000."""

    def dense(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    assert parameters(nn.Linear(6 * 6 * 3, 10)) == dense(6 * 6 * 3, 10) == 1090
    assert dense(224 * 224 * 3, 1000) == 150_528_000 + 1000


def test_a_filter_sums_over_its_channels() -> None:
    """x has the channels 1, 2, 3 (constant), w is 1, 10, 100: y = 1 + 20 + 300."""
    x = np.array([1, 2, 3], np.float32).reshape(1, 3, 1, 1)
    w = np.array([1, 10, 100], np.float32).reshape(1, 3, 1, 1)
    assert fastconv.conv2d(x, w).item() == 321


# The 2x2 kernel on the 3x3 input, with all its gradients.
#
#     X = 1 2 0     W = 1  0     b = 1
#         3 1 4         0 -1
#         2 0 5
#
# A window is  x00 x01  and gives x00 - x11 + b:
#              x10 x11
#
#     Y = 1 - 1 + 1   2 - 4 + 1   =   1 -1
#         3 - 0 + 1   1 - 5 + 1       4 -3

X = image([[1, 2, 0], [3, 1, 4], [2, 0, 5]])
W = image([[1, 0], [0, -1]])
B = np.array([1], np.float32)
Y = image([[1, -1], [4, -3]])
DY = image([[1, 2], [3, 4]])


def test_forward_is_cross_correlation() -> None:
    """The kernel is not flipped: a convolution would have given x11 - x00 + b, so 1 3 / -2 5."""
    np.testing.assert_array_equal(fastconv.conv2d(X, W, B), Y)
    flipped = np.ascontiguousarray(W[..., ::-1, ::-1])
    np.testing.assert_array_equal(fastconv.conv2d(X, flipped, B), image([[1, 3], [-2, 5]]))


def test_kernel_gradient_correlates_the_input_with_dy() -> None:
    """dW[r][s] = sum over p, q of dY[p][q] X[p + r][q + s].

    dW[0][0] = 1*1 + 2*2 + 3*3 + 4*1 = 18    dW[0][1] = 1*2 + 2*0 + 3*1 + 4*4 = 21
    dW[1][0] = 1*3 + 2*1 + 3*2 + 4*0 = 11    dW[1][1] = 1*1 + 2*4 + 3*0 + 4*5 = 29
    """
    _, dw, _ = fastconv.conv2d_backward(DY, X, W)
    np.testing.assert_array_equal(dw, image([[18, 21], [11, 29]]))
    np.testing.assert_array_equal(dw, fastconv.conv2d(X, DY))


def test_input_gradient_is_the_full_convolution_with_the_flipped_kernel() -> None:
    """dX[i][j] = sum over r, s of dY[i - r][j - s] W[r][s] = dY[i][j] - dY[i - 1][j - 1].

    1       2       0          1  2  0
    3   4 - 1   0 - 2     =    3  3 -2
    0   0 - 3   0 - 4          0 -3 -4
    """
    dx, _, _ = fastconv.conv2d_backward(DY, X, W)
    np.testing.assert_array_equal(dx, image([[1, 2, 0], [3, 3, -2], [0, -3, -4]]))
    flipped = np.ascontiguousarray(W[..., ::-1, ::-1])
    np.testing.assert_array_equal(dx, fastconv.conv2d(DY, flipped, padding=1))  # full: kernel - 1


def test_bias_gradient_is_the_sum() -> None:
    """1 + 2 + 3 + 4."""
    _, _, db = fastconv.conv2d_backward(DY, X, W)
    np.testing.assert_array_equal(db, [10])


def test_the_tape_gives_the_same_gradients() -> None:
    x, w, b = (Tensor(a.copy(), requires_grad=True) for a in (X, W, B))
    fastconv.functional.conv2d(x, w, b).backward(DY)
    expected = fastconv.conv2d_backward(DY, X, W)
    for tensor, gradient in zip((x, w, b), expected, strict=True):
        np.testing.assert_array_equal(tensor.grad, gradient)


# Pooling, 2x2 windows of a 4x4 image.

POOLED = image([[1, 3, 2, 1], [4, 2, 0, 5], [6, 1, 1, 2], [0, 3, 4, 1]])
DPOOL = image([[10, 20], [30, 40]])


def test_max_pool_routes_its_gradient_to_the_maximum() -> None:
    """The maxima are 4, 5, 6 and the 4 of the last window."""
    np.testing.assert_array_equal(fastconv.max_pool2d(POOLED, 2), image([[4, 5], [6, 4]]))
    dx = fastconv.max_pool2d_backward(DPOOL, POOLED, 2)
    routed = image([[0, 0, 0, 0], [10, 0, 0, 20], [30, 0, 0, 0], [0, 0, 40, 0]])
    np.testing.assert_array_equal(dx, routed)


def test_max_pool_gives_a_tie_to_the_first() -> None:
    dx = fastconv.max_pool2d_backward(image([[7]]), image([[5, 5], [5, 5]]), 2)
    np.testing.assert_array_equal(dx, image([[7, 0], [0, 0]]))


def test_average_pool_spreads_its_gradient() -> None:
    """Sums 10, 8, 10, 8 of four values each; each value gets a quarter of dY."""
    np.testing.assert_array_equal(fastconv.avg_pool2d(POOLED, 2), image([[2.5, 2], [2.5, 2]]))
    dx = fastconv.avg_pool2d_backward(DPOOL, POOLED, 2)
    spread = image([[2.5, 2.5, 5, 5], [2.5, 2.5, 5, 5], [7.5, 7.5, 10, 10], [7.5, 7.5, 10, 10]])
    np.testing.assert_array_equal(dx, spread)


# Receptive field: r grows by (kernel - 1) * jump, then the jump is multiplied by the stride.


def receptive_field(layers: list[tuple[int, int]]) -> tuple[int, int]:
    """Size and jump after layers of (kernel, stride), in pixels of the input."""
    size, jump = 1, 1
    for kernel, stride in layers:
        size += (kernel - 1) * jump
        jump *= stride
    return size, jump


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([(3, 1)], (3, 1)),
        ([(3, 1), (3, 1)], (5, 1)),
        ([(3, 1), (3, 1), (3, 1)], (7, 1)),  # three 3x3 see as much as one 7x7
        ([(7, 1)], (7, 1)),
        ([(3, 1), (2, 2), (3, 1)], (8, 2)),  # 3, then 3 + 1 = 4, then 4 + 2 * 2 = 8
        ([(7, 2), (3, 2)], (11, 4)),  # ResNet's first two layers: 7, then 7 + 2 * 2
    ],
)
def test_receptive_field(layers: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    """The recurrence, the summary of the same network, and the pixels that a gradient reaches."""
    assert receptive_field(layers) == expected
    network = nn.Sequential(*(nn.Conv2d(1, 1, kernel, stride) for kernel, stride in layers))
    last = summarize(network, (1, 32, 32)).rows[-1]
    size, jump = expected
    assert (last.receptive_field, last.jump) == ((size, size), (jump, jump))

    for parameter in network.parameters():
        parameter.data[...] = 1
    x = Tensor(np.ones((1, 1, 32, 32), np.float32), requires_grad=True)
    y = network(x)
    one = np.zeros(y.shape, np.float32)
    one[0, 0, 1, 1] = 1
    y.backward(one)
    assert x.grad is not None
    rows, columns = np.nonzero(x.grad[0, 0])
    assert (rows.min(), rows.max()) == (jump, jump + size - 1)
    assert (columns.min(), columns.max()) == (jump, jump + size - 1)


def test_three_3x3_need_27_weights_where_one_7x7_needs_49() -> None:
    def network(channels: int, *kernels: int) -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(channels, channels, k, bias=False) for k in kernels))

    assert parameters(network(1, 3, 3, 3)) == 3 * 9 == 27
    assert parameters(network(1, 7)) == 49
    assert parameters(network(4, 3, 3, 3)) == 27 * 4 * 4  # and so for C channels: 27 C C, 49 C C
    assert parameters(network(4, 7)) == 49 * 4 * 4


# Models.


def output_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [row.output_shape for row in summarize(model, (3, 32, 32)).rows]


def test_textbook_stack() -> None:
    """Padding keeps 32x32, each pool halves: 32 -> 16 -> 8, and 64 * 8 * 8 = 4096 features."""
    model = models.TextbookStack()
    shapes = output_shapes(model)
    for shape in [(32, 32, 32), (32, 16, 16), (64, 16, 16), (64, 8, 8), (4096,), (128,), (10,)]:
        assert shape in shapes
    convolutions = (3 * 9 * 32 + 32) + (32 * 9 * 32 + 32) + (32 * 9 * 64 + 64)
    dense = (4096 * 128 + 128) + (128 * 10 + 10)
    assert parameters(model) == convolutions + dense == 28_640 + 525_706
    probabilities = model.predict(np.zeros((2, 3, 32, 32), np.float32)).numpy()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)


def test_smallcnn() -> None:
    """As the stack, but one convolution before each pool, and batch norm: two numbers a channel."""
    model = models.SmallCNN()
    shapes = output_shapes(model)
    for shape in [(32, 32, 32), (32, 16, 16), (64, 16, 16), (64, 8, 8), (4096,), (128,), (10,)]:
        assert shape in shapes
    first, second = 3 * 9 * 32 + 32 + 2 * 32, 32 * 9 * 64 + 64 + 2 * 64
    dense = (4096 * 128 + 128) + (128 * 10 + 10)
    assert parameters(model) == first + second + dense == 960 + 18_624 + 525_706


def test_residual_block_starts_as_the_identity() -> None:
    """relu(F(x) + x) with the last batch norm's scale at 0: F(x) = 0, so x > 0 and dy both pass."""
    block = models.BasicBlock(4, 4)
    assert block.bn2.weight is not None
    block.bn2.weight.data[...] = 0
    x = Tensor(np.full((2, 4, 5, 5), 3, np.float32), requires_grad=True)
    y = block(x)
    np.testing.assert_array_equal(y.detach().numpy(), x.data)
    dy = np.random.default_rng(0).standard_normal(y.shape, np.float32)
    y.backward(dy)
    np.testing.assert_array_equal(x.grad, dy)


def test_residual_block_halves_the_image_and_doubles_the_channels() -> None:
    """Then the shortcut has a 1x1 convolution, 4 * 8 weights, and a batch norm, 2 * 8 numbers."""
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
    block = models.BasicBlock(4, 8, stride=2, downsample=shortcut)
    assert block(np.zeros((2, 4, 6, 6), np.float32)).shape == (2, 8, 3, 3)
    branch = 4 * 9 * 8 + 2 * 8 + 8 * 9 * 8 + 2 * 8
    assert parameters(block) == branch + 4 * 8 + 2 * 8 == 944
