"""Training on a CUDA device: a step as one graph, and batches made there from resident bytes.

The yardstick is the bits of single operations, and of the CPU's loader.
"""

from __future__ import annotations

import dataclasses
import json
import struct
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
from fastconv.train import EMA, GraphedStep, TrainConfig, TrainingError
from fastconv.train.progress import Progress
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
    graphed.optimizer.zero_grad()
    found += graphed.graphed(given[5:], graph)
    assert found == expected
    assert_same(graphed.state(), state)


def test_autocast_holds_for_a_graph():
    shares, given = [Share(0, BATCH, BATCH)], batches(3)
    eager, graphed = Run(), Run()
    with cuda.autocast("bfloat16"):
        fc.manual_seed(3)
        expected = eager.eager(given, shares)
        fc.manual_seed(3)
        found = graphed.graphed(given, graphed.graph(shares))
    assert found == expected
    assert_same(graphed.state(), eager.state())


def test_a_graph_has_a_fixed_place_and_goes_on_after_loading_a_checkpoint():
    """What is allocated afterwards does not touch it; a copied state ends with the same bits."""
    shares, given = [Share(0, BATCH, BATCH)], batches(6)
    whole, stopped, resumed = Run(), Run(), Run()
    fc.manual_seed(3)
    steps = whole.graphed(given, whole.graph(shares))
    fc.manual_seed(3)
    first = stopped.graphed(given[:3], stopped.graph(shares))
    random = nn.get_rng_state()
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.ema.model.load_state_dict(stopped.ema.model.state_dict())
    resumed.ema.updates = stopped.ema.updates
    resumed.optimizer.load_state_dict(stopped.optimizer.state_dict())
    resumed.schedule.load_state_dict(stopped.schedule.state_dict())
    graph = resumed.graph(shares)
    nn.set_rng_state(random)
    rest = []
    for batch in given[3:]:
        rest += resumed.graphed([batch], graph)
        for size in (64, 384, 1024, 4096, 9000):  # whatever the graph uses, these are not its own
            cuda.array(np.full(size, np.nan, np.float32))
    assert first + rest == steps
    assert_same(resumed.state(), whole.state())


def test_a_step_that_is_not_finite_leaves_the_weights_alone():
    run, shares = Run(), [Share(0, BATCH, BATCH)]
    graph, given = run.graph(shares), batches(4)
    run.graphed(given[:3], graph)
    before = run.state()
    x, y = given[3]
    x[2, 0, 1, 1] = np.nan
    (step,) = run.graphed([(x, y)], graph)
    with pytest.raises(TrainingError, match="loss is nan"):
        step.check_finite()
    after = run.state()
    for name, value in before.items():
        if name.endswith(("weight", "bias", "exp_avg", "exp_avg_sq")) and "ema" not in name:
            np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_what_cannot_be_recorded_says_so():
    shares, given = [Share(0, BATCH, BATCH)], batches(3)
    run = Run()
    run.model.norm.momentum = None
    with pytest.raises(ValueError, match="norm takes the plain average"):
        run.graph(shares)

    class Looks(Net):
        def forward(self, x: Any) -> Tensor:
            y = super().forward(x)
            assert y.data.sum().item() < 1e9  # waits for the device
            return y

    eager, graphed = Run(), Run()
    for one in (eager, graphed):
        one.model.__class__ = Looks
    fc.manual_seed(3)
    expected = eager.eager(given, shares)
    fc.manual_seed(3)
    graph = graphed.graph(shares)
    for x, y in given:
        graph(x, y)
        graphed.schedule.step()
    assert graph.obstacle is not None and "recorded" in graph.obstacle
    assert graph.read() == expected
    assert_same(graphed.state(), eager.state())


def test_what_a_graph_cannot_take_is_noticed():
    run, shares = Run(), [Share(0, BATCH, BATCH)]
    graph = run.graph(shares)
    run.graphed(batches(2), graph)
    with pytest.raises(ValueError, match=r"shape .* alone"):
        graph(*(array[:3] for array in batches(1)[0]))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), got 0 to 4"):
        graph(batches(1)[0][0], np.array([0, 1, 2, 3, 4, 0]))
    run.optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match="settings"):
        graph(*batches(1)[0])
    run.optimizer.param_groups[0]["weight_decay"] = 0.01
    run.graphed(batches(1), graph)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="make a new GraphedStep"):
        graph(*batches(1)[0])


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(2, True), Augmentation(1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resident_images_make_the_batches_of_the_loader(augmentation, channels):
    images = RNG.integers(0, 256, (23, 9, 7, channels), np.uint8)
    dataset = data.Dataset(images, RNG.integers(0, 5, 23), tuple("abcde"))
    loader = data.DataLoader(
        dataset,
        8,
        shuffle=True,
        seed=5,
        augmentation=augmentation,
        mean=[0.4, 0.5, 0.3][:channels],
        std=[0.2, 0.3, 0.7][:channels],
    )
    resident = data.ResidentLoader(loader)
    for epoch, start in ((0, 0), (3, 1)):
        expected = list(loader.batches(epoch, start))
        found = list(resident.batches(epoch, start))
        assert len(found) == len(expected) == 3 - start
        for (picks,), (x, y) in zip(found, expected, strict=True):
            pixels, labels = resident.arrays(cuda.array(picks))
            assert pixels.strides == x.strides
            np.testing.assert_array_equal(pixels.numpy().view(np.uint32), x.view(np.uint32))
            np.testing.assert_array_equal(labels.numpy(), y)
    half = data.ResidentLoader(loader, "bfloat16").arrays(cuda.array(picks))[0]
    np.testing.assert_array_equal(half.numpy(), cuda.cast(pixels, "bfloat16").numpy())


def test_what_cannot_stay_on_the_device_says_so():
    dataset = data.Dataset(np.zeros((4, 5, 5, 1), np.uint8), np.zeros(4, np.int64), ("a",))
    loader = data.DataLoader(dataset, 2, augmentation=Augmentation(rotation=3.0))
    with pytest.raises(ValueError, match="no other augmentation"):
        data.ResidentLoader(loader)


class Quiet(Progress):
    """Keeps what it is told, and is killed at a step."""

    def __init__(self, last: int = 10**9) -> None:
        self.last, self.steps = last, 0
        self.messages: list[str] = []

    def step(self, loss: float, accuracy: float, speed: float | None) -> None:
        self.steps += 1
        if self.steps == self.last:
            raise InterruptedError

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with 14 and 5 small images in MNIST's format."""
    folder = tmp_path_factory.mktemp("shapes")
    for prefix, count in (("train", 14), ("t10k", 5)):
        pixels = RNG.integers(0, 256, (count, 16, 16), np.uint8).tobytes()
        labels = RNG.integers(0, 10, count).astype(np.uint8).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, count, 16, 16) + pixels
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, count) + labels
        )
    return str(folder)


def config(folder: str, **options: Any) -> TrainConfig:
    """Two epochs of three full batches and a smaller one."""
    settings: dict[str, Any] = {
        "model": "smallcnn", "data": "mnist", "data_dir": folder, "batch_size": 4, "epochs": 2,
        "device": "cuda", "clip_norm": 1.0, "ema": 0.9, "warmup_steps": 2, "log_every": 3,
        "checkpoint_every": 3,
    }  # fmt: skip
    return TrainConfig(**{**settings, **options})


def outcome(folder: Path) -> list[Any]:
    """What a run left behind, without its speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return [figures, (folder / "last.safetensors").read_bytes()]


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_run_of_graphs_ends_with_the_bits_of_single_operations(shapes, tmp_path, autocast):
    pytest.importorskip("safetensors")
    progress = Quiet()
    settings = {"autocast": autocast}
    train.train(config(shapes, **settings), tmp_path / "graph", progress=progress)
    assert progress.steps == 8 and not any("operations" in m for m in progress.messages)
    train.train(config(shapes, graph=False, **settings), tmp_path / "single", progress=Quiet())
    assert outcome(tmp_path / "graph") == outcome(tmp_path / "single")
    with pytest.raises(InterruptedError):
        train.train(config(shapes, **settings), tmp_path / "killed", progress=Quiet(last=5))
    train.resume(tmp_path / "killed", progress=Quiet())
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "graph")
    losses = [line["loss"] for line in outcome(tmp_path / "graph")[0] if "loss" in line]
    train.train(config(shapes), tmp_path / "float32", progress=Quiet())
    others = [line["loss"] for line in outcome(tmp_path / "float32")[0] if "loss" in line]
    assert losses == pytest.approx(others, rel=0.05)
    assert (losses == others) == (autocast is None)


def test_a_run_says_why_batches_are_made_by_the_cpu_and_where_it_failed(shapes, tmp_path):
    progress = Quiet()
    settings = {"model": "lenet5", "ema": 0.0, "clip_norm": None, "warmup_steps": 0}
    train.train(config(shapes, rotation=5.0, epochs=1, **settings), progress=progress)
    assert any("made by the CPU" in m for m in progress.messages)
    run = config(shapes, optimizer="sgd", lr=1e30, log_every=50, **settings)
    with pytest.raises(TrainingError) as single:
        train.train(dataclasses.replace(run, graph=False))
    with pytest.raises(TrainingError) as graph:
        train.train(run)
    assert str(graph.value) == str(single.value) and "step 3" in str(graph.value)
