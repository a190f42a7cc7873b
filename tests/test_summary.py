"""Summaries against numbers worked out by hand, and receptive fields against gradients."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastconv import functional as F
from fastconv import models, nn
from fastconv.summary import Row, summarize
from fastconv.tensor import Tensor


def rows_of(*layers: nn.Module, size: tuple[int, int, int]) -> tuple[Row, ...]:
    return summarize(nn.Sequential(*layers), size).rows


def fields_of(rows: tuple[Row, ...]) -> list[int]:
    """The receptive fields, which must be square."""
    assert all(row.receptive_field and len(set(row.receptive_field)) == 1 for row in rows)
    return [row.receptive_field[0] for row in rows if row.receptive_field]


@pytest.mark.parametrize("size", [8, 32])
def test_a_convolution(size: int) -> None:
    (row,) = rows_of(nn.Conv2d(3, 64, 3, padding=1), size=(3, size, size))
    assert row.parameters == 3 * 3 * 3 * 64 + 64 == 1792
    assert row.output_shape == (64, size, size)
    assert row.multiply_adds == size * size * 64 * 27
    assert row.activation_bytes == 4 * 64 * size * size
    assert (row.receptive_field, row.jump, row.offset) == ((3, 3), (1, 1), (0.5, 0.5))


def test_three_3x3_see_what_one_7x7_sees() -> None:
    three = rows_of(*(nn.Conv2d(8, 8, 3) for _ in range(3)), size=(8, 16, 16))
    (one,) = rows_of(nn.Conv2d(8, 8, 7), size=(8, 16, 16))
    assert fields_of(three) == [3, 5, 7]
    assert one.receptive_field == (7, 7)
    assert [row.offset for row in three] == [(1.5, 1.5), (2.5, 2.5), (3.5, 3.5)]
    assert one.offset == (3.5, 3.5)


def test_strides_multiply_and_every_row_is_there() -> None:
    """Conv 3x3, pool 2x2, conv 3x3, pool 2x2: fields 3, 4, 4 + 2 * 2, 8 + 2."""
    rows = rows_of(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 49, 10),
        size=(1, 28, 28),
    )
    assert [row.name for row in rows] == list("01234567")
    assert [row.type for row in rows[:3]] == ["Conv2d", "ReLU", "MaxPool2d"]
    assert fields_of(rows) == [3, 3, 4, 8, 8, 10, 10, 10 + 6 * 4]  # the dense layer sees all 7x7
    assert [row.jump for row in rows] == [(j, j) for j in (1, 1, 2, 2, 2, 4)] + [None, None]
    assert [row.offset and row.offset[0] for row in rows] == [0.5, 0.5, 1, 1, 1, 2, 2, 14]
    assert [row.multiply_adds for row in rows] == [
        *(28 * 28 * 4 * 9, 0, 0, 14 * 14 * 6 * 4 * 9, 0, 0, 0, 294 * 10),
    ]


def test_grouped_depthwise_and_transposed_multiply_adds() -> None:
    rows = rows_of(
        nn.Conv2d(8, 12, 3, groups=4, bias=False),  # 6x6 outputs of 12 channels, each 2 * 9
        nn.Conv2d(12, 12, 3, groups=12, padding=1, bias=False),
        nn.ConvTranspose2d(12, 5, 4, stride=2, bias=False),  # 6x6x12 inputs, each 5 * 16
        size=(8, 8, 8),
    )
    assert [row.parameters for row in rows] == [12 * 2 * 9, 12 * 9, 12 * 5 * 16]
    expected = [36 * 12 * 18, 36 * 12 * 9, 36 * 12 * 5 * 16]
    assert [row.multiply_adds for row in rows] == expected


def test_a_transposed_convolution_halves_the_jump() -> None:
    """Kernel 4, stride 2, padding 1: an output sees two inputs, the first one -1 and 0."""
    rows = rows_of(nn.Conv2d(1, 1, 2, stride=2), nn.ConvTranspose2d(1, 1, 4, 2, 1), size=(1, 8, 8))
    assert [row.receptive_field for row in rows] == [(2, 2), (4, 4)]
    assert [row.jump for row in rows] == [(2, 2), (1, 1)]
    # Inputs of the second layer are centred at 1, 3, ...: those at -1 and 1 at their mean plus
    # half an output step, (1 - 3 / 2) / 2 of 2 pixels away from the first: 0.5, the first pixel.
    assert rows[1].offset == (0.5, 0.5)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, stride=2), nn.Conv2d(1, 1, 3)],
        [nn.Conv2d(1, 1, 3, padding=1, dilation=2), nn.AvgPool2d(3, 2, padding=1)],
        [nn.Conv2d(1, 1, 4, padding="same"), nn.Conv2d(1, 1, 3, stride=2, padding="same")],
        [nn.Conv2d(1, 1, (3, 5), (2, 1), padding=((2, 0), (1, 3))), nn.Conv2d(1, 1, (2, 3))],
        [nn.AvgPool2d(2), nn.Conv2d(1, 1, 5, padding="valid"), nn.AvgPool2d(3, 1)],
        [nn.Conv2d(1, 1, 3, padding=1), nn.AdaptiveAvgPool2d(8), nn.Conv2d(1, 1, 3)],
    ],
    ids=["strides", "dilation", "same", "four sides", "pools", "adaptive"],
)
def test_gradients_reach_exactly_the_receptive_field(layers: list[nn.Module]) -> None:
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.data[...] = 1
    row = summarize(model, (1, 40, 40)).rows[-1]
    x = Tensor(np.ones((1, 1, 40, 40), np.float32), requires_grad=True)
    y = model(x)
    place = (y.shape[2] // 2, y.shape[3] // 2)  # away from the borders
    dy = np.zeros(y.shape, np.float32)
    dy[0, 0][place] = 1
    y.backward(dy)
    assert x.grad is not None
    assert row.receptive_field and row.jump and row.offset
    for axis, touched in enumerate(np.nonzero(x.grad[0, 0])):
        assert touched.max() - touched.min() + 1 == row.receptive_field[axis]
        centre = (touched.min() + touched.max() + 1) / 2
        assert centre == row.offset[axis] + place[axis] * row.jump[axis]


class Sum(nn.Module):
    """The sum of what branches make of the same input."""

    def __init__(self, *branches: nn.Module) -> None:
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Any) -> Tensor:
        first, *others = (branch(x) for branch in self.branches)
        for other in others:
            first = first + other
        return first


def last_row(*layers: nn.Module, channels: int = 1) -> Row:
    """The row of a 1x1 convolution behind the layers: it sees what their result sees."""
    end = nn.Conv2d(channels, 1, 1)
    return rows_of(*layers, end, size=(1, 16, 16))[-1]


def test_where_branches_meet_the_larger_field_counts() -> None:
    block = Sum(
        nn.Identity(),
        nn.Conv2d(1, 1, 3, padding=1),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1)),
    )
    row = last_row(block, block)
    assert (row.receptive_field, row.jump, row.offset) == ((9, 9), (1, 1), (0.5, 0.5))


def test_branches_that_look_to_different_sides_see_their_union() -> None:
    """From pixel 0 one branch sees the pixels 0 to 2, the other -2 to 0."""
    right = nn.Conv2d(1, 1, 3, padding=((0, 2), (0, 2)))
    left = nn.Conv2d(1, 1, 3, padding=((2, 0), (2, 0)))
    row = last_row(Sum(right, left))
    assert (row.receptive_field, row.offset) == ((5, 5), (0.5, 0.5))


def test_concatenation() -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            self.one, self.five = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 5, padding=2)

        def forward(self, x: Any) -> Tensor:
            return F.cat([self.one(x), self.five(x)])

    assert last_row(Inception(), channels=4).receptive_field == (5, 5)


def test_a_residual_inside_a_fused_layer() -> None:
    """The stem sees 3, each of the two blocks adds 2 * 2; with stride 2 and doubled jump 2 + 4."""
    blocks = models.resnet8_cifar()
    rows = {row.name: row for row in summarize(blocks, (3, 32, 32)).rows}
    fields = {name: row.receptive_field for name, row in rows.items()}
    assert fields["conv1"] == (3, 3)
    assert fields["layer1.0.bn2"] == (7, 7)
    assert fields["layer2.0.conv1"] == (9, 9)
    assert fields["layer2.0.downsample.0"] == (7, 7)  # 1x1, stride 2
    assert fields["layer2.0.bn2"] == (13, 13)
    assert rows["layer2.0.bn2"].jump == (2, 2)
    assert fields["layer3.0.bn2"] == (25, 25)
    assert fields["fc"] == (25 + 7 * 4, 25 + 7 * 4)


def test_resnet50_of_the_paper() -> None:
    """He et al. 2015, table 1: 3.8 billion multiply-adds (3.86 with their 224 pixels and all 1x1
    shortcuts); Araujo, Norris and Sim 2019, table: receptive field 483. Both for the stride in the
    first 1x1 convolution of a block; with torchvision's, in the 3x3, they are 4.09 and 427.
    """
    model = models.resnet50()
    own = {row.name: row.receptive_field for row in summarize(model, (3, 224, 224)).rows}
    assert own["layer4.2.bn3"] == (427, 427)
    for stage in (model.layer2, model.layer3, model.layer4):
        first = stage[0]
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
    summary = summarize(model, (3, 224, 224))
    assert {row.name: row.receptive_field for row in summary.rows}["layer4.2.bn3"] == (483, 483)
    assert round(summary.multiply_adds / 1e9, 2) == 3.86


def test_a_shortcut_counts_even_where_the_layer_itself_sees_less() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            self.wide, self.narrow = nn.Conv2d(1, 1, 7, padding=3), nn.Conv2d(1, 1, 1)

        def forward(self, x: Any) -> Any:
            return self.narrow(x, residual=self.wide(x))

    assert last_row(Late()).receptive_field == (7, 7)


def test_functions_that_are_no_layers() -> None:
    class Gate(nn.Module):
        """Squeeze and excitation: the gate, which sees the whole plane, is left out."""

        def __init__(self) -> None:
            self.wide, self.dense = nn.Conv2d(1, 1, 5, padding=2), nn.Conv2d(1, 1, 1)

        def forward(self, x: Any) -> Tensor:
            return self.wide(x) * self.dense(F.global_avg_pool2d(x))

    class Pool(nn.Module):
        def __init__(self) -> None:
            self.inner = nn.Conv2d(1, 1, 3)

        def forward(self, x: Any) -> Any:
            return self.inner(F.max_pool2d(F.relu(x) * 2.0, 2))

    gated = last_row(Gate())
    assert (gated.receptive_field, gated.jump, gated.offset) == ((5, 5), (1, 1), (0.5, 0.5))
    hidden = last_row(Pool())
    assert (hidden.receptive_field, hidden.jump, hidden.offset) == (None, None, None)


def test_squeeze_and_excitation_leaves_the_window_alone() -> None:
    layers = nn.Conv2d(1, 4, 3), nn.SqueezeExcitation(4, 2), nn.Conv2d(4, 1, 5)
    rows = {row.name: row for row in rows_of(*layers, size=(1, 16, 16))}
    first, last = rows["0"], rows["2"]
    assert (first.receptive_field, last.receptive_field) == ((3, 3), (7, 7))
    assert last.jump == (1, 1)
    assert {"1.avgpool", "1.fc1", "1.fc2"} < set(rows)


def test_parameters_are_counted_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.unused = nn.Linear(5, 2)
            self.scale = nn.Parameter(np.ones(4, np.float32))

        def forward(self, x: Any) -> Any:
            return self.conv(self.conv(x)) * F.as_tensor(self.scale.reshape(1, 4, 1, 1))

    summary = summarize(Model(), (4, 6, 6))
    assert [(row.name, row.parameters) for row in summary.rows] == [
        ("conv", 148), ("conv", 0), ("Model", 4),
    ]  # fmt: skip
    assert summary.parameters == 148 + 12 + 4
    assert summary.multiply_adds == 2 * 36 * 4 * 36
    assert fields_of(summary.rows) == [3, 5, 5]


def test_the_model_is_left_as_it_was() -> None:
    model = models.create("smallcnn")
    model.features[1].eval()
    before = {name: value.copy() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    summarize(model, (3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(ValueError):
        summarize(model, (5, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_vectors_and_other_dtypes() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    summary = summarize(model, (6,))
    assert [row.output_shape for row in summary.rows] == [(4,), (4,), (2,)]
    assert summary.activation_bytes == 8 * (4 + 4 + 2)
    assert summary.multiply_adds == 24 + 8


@pytest.mark.parametrize("size", [(), (3, 0, 4), (-1, 4, 4)])
def test_sizes_must_be_positive(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positive sizes, got"):
        summarize(nn.ReLU(), size)


def test_text_and_json() -> None:
    summary = summarize(models.create("smallcnn"), (3, 32, 32))
    lines = str(summary).splitlines()
    assert lines[0] == "SmallCNN, input 3x32x32, one image"
    head = "layer type output parameters multiply-adds memory field jump offset"
    assert " ".join(lines[1].split()) == head
    assert lines[3].split() == [
        "features.0", "Conv2d", "32x32x32", "896", "884,736", "128", "KiB", "3", "1", "0.5",
    ]  # fmt: skip
    assert lines[-1].split()[:3] == ["total", "545,290", "6,128,896"]
    assert len({len(line) for line in lines[1:-1]}) == 1  # aligned
    found = json.loads(json.dumps(summary.as_dict()))
    assert found["parameters"] == 545_290
    assert found["rows"][0]["receptive_field"] == [3, 3]
    assert found["rows"][0]["output_shape"] == [32, 32, 32]
