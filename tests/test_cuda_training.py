"""Training on a CUDA device: a step as one graph, and batches made there from resident bytes.

The yardstick is the bits of single operations, and of the CPU's loader.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastconv as fc
from fastconv import cuda, data, nn, optim, train
from fastconv import functional as F
from fastconv.augment import Augmentation
from fastconv.init import Share
from fastconv.tensor import Tensor
from fastconv.train import EMA, TrainConfig, TrainingError
from fastconv.train.graph import GraphedStep
from fastconv.train.step import Step, train_step

pytestmark = pytest.mark.skipif(not cuda.is_available(), reason="no CUDA device here")
RNG = np.random.default_rng(0)
BATCH, CLASSES = 6, 4


class Net(nn.Module):
    """Batch norm, both kinds of dropout, pooling."""

    def __init__(self) -> None:
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, activation="relu")
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 3 * 3, CLASSES)

    def forward(self, x: Any) -> Tensor:
        x = F.stochastic_depth(self.norm(self.conv(x)), 0.3, "row", self.training)
        return self.head(self.drop(self.pool(x).flatten(1)))


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    shapes = RNG.standard_normal((count, BATCH, 2, 6, 6)).astype(np.float32)
    return [(x, RNG.integers(0, CLASSES, BATCH)) for x in shapes]


class Run:
    """A model in training with an optimiser, a schedule and averages, from the same start."""

    def __init__(self, optimizer: str = "adamw", **options: Any) -> None:
        fc.manual_seed(3)
        self.model = Net().to("cuda").train()
        groups = optim.parameter_groups(self.model.named_parameters(), 0.05, 0.01)
        if optimizer == "sgd":
            self.optimizer: optim.Optimizer = optim.SGD(groups, 0.05, 0.9, nesterov=True)
        else:
            self.optimizer = optim.AdamW(groups, 0.05)
        self.schedule = optim.CosineAnnealingLR(self.optimizer, 9)
        self.ema = EMA(self.model, 0.9)
        self.options = {"clip_norm": 0.5, **options}

    def eager(self, given: list[tuple[np.ndarray, np.ndarray]], shares: list[Share]) -> list[Step]:
        steps = []
        for x, y in given:
            steps.append(
                train_step(self.model, self.optimizer, x, y, 0.1, shares=shares, **self.options)
            )
            self.ema.update(self.model)
            self.schedule.step()
        return steps

    def graph(self, shares: list[Share]) -> GraphedStep:
        return GraphedStep(
            self.model, self.optimizer, 0.1, shares=shares, ema=self.ema, **self.options
        )

    def graphed(self, given: list[tuple[np.ndarray, np.ndarray]], graph: GraphedStep) -> list[Step]:
        for x, y in given:
            graph(x, y)
            self.schedule.step()
        assert graph.obstacle is None and (len(given) == 1 or graph._graph is not None)
        return graph.read()

    def state(self) -> dict[str, np.ndarray]:
        """Everything that a checkpoint holds."""
        arrays = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        arrays |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{number}.{k}": v for k, v in state.items()}
        arrays["random"] = np.array(nn.get_rng_state(), np.uint64)
        arrays["updates"] = np.array(self.ema.updates)
        return {
            k: cuda.to_numpy(v).copy() if cuda.is_device_array(v) else np.array(v)
            for k, v in arrays.items()
        }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("shares", [[Share(0, 6, 6)], [Share(0, 4, 4), Share(0, 2, 2)]])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_graph_has_the_bits_of_single_operations(optimizer, shares):
    """With dropout, batch norm, clipping, averages and a schedule; and after steps in between."""
    given = batches(7)
    eager, graphed = Run(optimizer), Run(optimizer)
    fc.manual_seed(3)
    expected = eager.eager(given, shares)
    state = eager.state()
    fc.manual_seed(3)
    graph = graphed.graph(shares)
    found = graphed.graphed(given[:4], graph)
    found += graphed.eager(given[4:5], shares)  # as the last batch of an epoch
    found += graphed.graphed(given[5:], graph)
    assert found == expected
    assert_same(graphed.state(), state)
