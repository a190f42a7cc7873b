"""Several processes train as one: communicators, averaging of gradients, synchronised batch norm,
shares of a batch, and whole runs under torchrun."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastconv as fc
from fastconv import checkpoint, cli, data, distributed, init, models, nn, optim, train
from fastconv import functional as F
from fastconv.augment import Augmentation
from fastconv.distributed import Environment, GradientReducer, SingleProcess
from fastconv.init import Share
from fastconv.tensor import Tensor
from fastconv.train import TrainConfig
from fastconv.train.progress import Progress
from tests import distributed_worker
from tests.processes import TIME_LIMIT, Threads, in_threads, start_ranks, torchrun
from tests.reference import assert_same_bits, normal
from tests.test_train import assert_same_run, metrics_of

WORKER = Path(distributed_worker.__file__)

# Environment and the process that is alone

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_environment() -> None:
    assert Environment.read({}) == Environment(0, 1, 0)
    assert Environment.read({"WORLD_SIZE": "1", "RANK": "0"}) == Environment(0, 1, 0)
    assert Environment.read(TORCHRUN) == Environment(1, 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "2"}, "RANK < WORLD_SIZE, got .*'RANK': '2'"),
        ({"LOCAL_RANK": "x"}, "integers in .*'x'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR not set beside"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set beside"),
    ],
)
def test_environment_refuses(change: dict[str, Any], message: str) -> None:
    variables = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        Environment.read(variables)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    communicator = distributed.init()
    assert isinstance(communicator, SingleProcess)
    values = np.arange(3.0)
    communicator.all_reduce(values, "mean").wait()
    communicator.broadcast(values)
    communicator.duplicate().barrier()
    communicator.close()
    np.testing.assert_array_equal(values, [0, 1, 2])
    assert distributed.any_process(communicator, True)
    assert not distributed.any_process(communicator, False)


@pytest.mark.parametrize(
    ("array", "op", "error", "message"),
    [
        (np.zeros(2), "max", ValueError, "op must be 'sum' or 'mean', got 'max'"),
        (np.zeros(2, np.float16), "sum", TypeError, "got float16"),
        (np.zeros((3, 2)).T, "sum", ValueError, "strides"),
        (np.broadcast_to(np.zeros(2), (2,)), "sum", ValueError, "writable: False"),
    ],
)
def test_communicators_refuse(array: Any, op: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SingleProcess().all_reduce(array, op)


# The tape's hook


def test_hook_runs_when_the_gradient_is_final() -> None:
    """Of two layers that share a weight, and one in front of them."""
    first, shared = Tensor(np.array([2.0]), True), Tensor(np.array([3.0]), True)
    events: list[tuple[str, Any]] = []

    def spy(x: Tensor) -> Tensor:
        """Identity that notes when the backward pass comes by."""

        def backward(dy: Any, _: Any) -> Any:
            events.append(("backward", None))
            return (dy,)

        return fc.tensor.apply(x.data.copy(), (x,), backward)

    remove = shared.register_post_accumulate_grad_hook(lambda p: events.append(("hook", p.grad[0])))
    (spy(first * 1.0) * shared * shared).sum().backward()
    assert events == [("hook", 12.0), ("backward", None)]
    remove()
    (spy(first * 1.0) * shared).sum().backward()
    assert events[2:] == [("backward", None)]


def test_hook_of_a_leaf_that_another_branch_uses() -> None:
    """A branch without gradient counts for nothing; what is not in the history is not called."""
    used, unused = (Tensor(np.ones(2), True) for _ in range(2))
    calls: list[str] = []
    used.register_post_accumulate_grad_hook(lambda p: calls.append("used"))
    unused.register_post_accumulate_grad_hook(lambda p: calls.append("unused"))
    cut = fc.tensor.apply(used.data.copy(), (used * unused,), lambda dy, _: (None,))
    (used * unused)  # of no consequence for the loss
    (used * 2.0 + cut).sum().backward()
    assert sorted(calls) == ["unused", "used"]
    np.testing.assert_array_equal(used.grad, [2, 2])
    assert unused.grad is None
    used.backward(np.ones(2))
    assert calls.count("used") == 2
    with pytest.raises(RuntimeError, match="no leaf"):
        (used * 2.0).register_post_accumulate_grad_hook(calls.append)  # type: ignore[arg-type]


# Averaging of gradients


class Layers(nn.Module):
    """A product of six weights in a row, from the last to the first; the fifth is used on demand.

    The weights have different sizes, dtypes and orders in memory.
    """

    def __init__(self) -> None:
        shapes = [(3, 2), (5, 2), (4, 3, 2, 2), (1,), (2, 2), (7, 2)]
        for i, shape in enumerate(shapes):
            values = normal("layers", i, shape=shape, dtype=np.float32 if i == 1 else np.float64)
            if len(shape) == 4:
                values = values.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
            setattr(self, f"w{i}", nn.Parameter(values))

    def forward(self, scale: float, use_fifth: bool = False) -> Tensor:
        total = Tensor(np.zeros(()))
        for i, weight in enumerate(self.parameters()):
            if i != 4 or use_fifth:
                total = total * 1.0 + (weight * weight).sum() * (scale * (i + 1))
        return total


def gradients(model: nn.Module) -> list[Any]:
    return [None if p.grad is None else p.grad.copy() for p in model.parameters()]


@pytest.mark.parametrize("bucket_mb", [1e-5, 1e-4, 25.0])
@pytest.mark.parametrize("op", ["mean", "sum"])
def test_gradients_are_those_of_all_processes(op: str, bucket_mb: float) -> None:
    """In three steps; the fifth weight is used by nobody, by one process, by nobody."""
    scales = [0.5, -2.0, 0.25]

    def work(communicator: Threads) -> list[list[Any]]:
        model = Layers()
        reducer = GradientReducer(
            model.parameters(), communicator, op=op, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb
        )
        found = []
        for step in range(3):
            model.zero_grad()
            model(scales[communicator.rank], step == 1 and communicator.rank == 2).backward()
            reducer.finish()
            found.append(gradients(model))
            for p in model.parameters():  # in the parameter's order, as the optimiser wants it
                assert p.grad is None or p.grad.strides == p.data.strides
        return found

    results = in_threads(3, work)
    share = 1 / 3 if op == "mean" else 1.0
    model = Layers()
    for step in range(3):
        for rank in range(3):
            for i, (p, grad) in enumerate(
                zip(model.parameters(), results[rank][step], strict=True)
            ):
                if i == 4 and step != 1:
                    assert grad is None, "a parameter without a gradient anywhere stays without"
                    continue
                factor = scales[2] if i == 4 else sum(scales)
                expected = 2 * p.data * (i + 1) * factor * share
                rtol = 1e-6 if i == 1 else 1e-14
                np.testing.assert_allclose(grad, expected, rtol=rtol)
                assert_same_bits(grad, results[0][step][i])


def test_reduction_starts_before_the_backward_pass_ends() -> None:
    """From the second step on: the last layer's bucket is on its way when the first is computed."""

    def work(communicator: Threads) -> None:
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        reducer = GradientReducer(
            model.parameters(), communicator, bucket_mb=1e-5, first_bucket_mb=1e-5
        )
        log = communicator.log
        first = next(model.parameters())
        first.register_post_accumulate_grad_hook(lambda p: log.append("gradient of the first"))
        for step in range(2):
            model.zero_grad()
            log.clear()
            model(normal("x", shape=(2, 4))).sum().backward()
            log.append("end of backward")
            reducer.finish()
            sizes = [entry[1] for entry in log if isinstance(entry, tuple)]
            # Six buckets of a weight or a bias, each with a number of its holders.
            assert sorted(sizes) == [5, 5, 5, 17, 17, 17]
            if step == 0:
                assert not isinstance(log[log.index("end of backward") - 1], tuple)
            else:
                started = [isinstance(entry, tuple) for entry in log]
                assert sum(started[: log.index("gradient of the first")]) >= 4
                assert sum(started[: log.index("end of backward")]) == 6

    in_threads(2, work)


def test_accumulation_reduces_once() -> None:
    def work(communicator: Threads) -> list[Any]:
        model = Layers()
        reducer = GradientReducer(model.parameters(), communicator)
        for _ in range(2):
            model.zero_grad()
            communicator.log.clear()
            with reducer.no_sync():
                model(1.0 + communicator.rank, use_fifth=True).backward()
            assert communicator.log == []
            model(10.0).backward()
            reducer.finish()
        return gradients(model)

    for result in in_threads(2, work):
        for i, (p, grad) in enumerate(zip(Layers().parameters(), result, strict=True)):
            expected = 2 * p.data * (i + 1) * (1.5 if i == 4 else 11.5)
            np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_reducer_refuses() -> None:
    parameter = nn.Parameter(np.ones(3))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        GradientReducer([nn.Parameter(np.ones(3), False)], SingleProcess())
    with pytest.raises(ValueError, match="got 'max'"):
        GradientReducer([parameter], SingleProcess(), op="max")
    with pytest.raises(ValueError, match=r"must be positive, got 0 and 1\.0"):
        GradientReducer([parameter], SingleProcess(), bucket_mb=0)

    def twice(communicator: Threads) -> None:
        weight = nn.Parameter(np.ones(3))
        reducer = GradientReducer([weight], communicator)
        for _ in range(2):
            weight.grad = None
            (weight * 2.0).sum().backward()
            if _ == 0:
                reducer.finish()
        (weight * 2.0).sum().backward()

    with pytest.raises(RuntimeError, match="second backward pass before finish"):
        in_threads(2, twice)


def test_copies_and_closed_reducers_are_left_alone() -> None:
    def work(communicator: Threads) -> None:
        model = Layers()
        reducer = GradientReducer(model.parameters(), communicator)
        copied = copy.deepcopy(model)
        copied(1.0).backward()
        reducer.close()
        model(1.0).backward()
        assert communicator.log == []

    in_threads(2, work)


def test_broadcast_state() -> None:
    def work(communicator: Threads) -> dict[str, Any]:
        model = models.SmallCNN(in_channels=1)
        for value in model.state_dict().values():
            value[...] = value + communicator.rank
        distributed.broadcast_state(model, communicator)
        return model.state_dict()

    fc.manual_seed(3)
    first, second = in_threads(2, work)
    for name, value in first.items():
        assert_same_bits(value, second[name], name)


# Synchronised batch norm


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(7, 5, 3, 4), (9, 5)], ids=str)
def test_sync_batch_norm(shape: tuple[int, ...], residual: bool, activation: str | None) -> None:
    """Three processes, one of them without rows, against PyTorch's on the whole batch."""
    x, dy = (normal(k, shape=shape, dtype=np.float64) * 2 + 1 for k in ("x", "dy"))
    r = normal("r", shape=shape, dtype=np.float64) if residual else None
    ends = [0, 2]
    parts = list(zip(*[np.split(a, ends) for a in (x, dy)], strict=True))
    r_parts = [None] * 3 if r is None else np.split(r, ends)

    def build() -> nn.SyncBatchNorm:
        layer = nn.SyncBatchNorm(5, momentum=0.2, activation=activation).double()
        layer.weight.data[...] = normal("w", shape=(5,))
        layer.bias.data[...] = normal("b", shape=(5,))
        return layer

    def work(communicator: Threads) -> tuple[Any, ...]:
        layer = distributed.convert_sync_batchnorm(build(), communicator)
        xp, dyp = parts[communicator.rank]
        rp = r_parts[communicator.rank]
        xt, rt = Tensor(xp, True), None if rp is None else Tensor(rp, True)
        y = layer(xt, rt)
        y.backward(dyp)
        buffers = [b.copy() for b in layer.buffers()]
        assert layer.eval()(xt).shape == xp.shape
        return y.data, xt.grad, None if rt is None else rt.grad, gradients(layer), buffers

    results = in_threads(3, work)
    oracle = (
        torch.nn.BatchNorm2d(5, momentum=0.2)
        if len(shape) == 4
        else torch.nn.BatchNorm1d(5, momentum=0.2)
    )
    oracle.double().load_state_dict({k: torch.tensor(v) for k, v in build().state_dict().items()})
    xt = torch.tensor(x, requires_grad=True)
    rt = None if r is None else torch.tensor(r, requires_grad=True)
    y = oracle(xt) if rt is None else oracle(xt) + rt
    act = {None: torch.nn.Identity(), "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}[activation]
    y = act(y)
    y.backward(torch.tensor(dy))
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(np.concatenate([p[0] for p in results]), y.detach(), **close)
    np.testing.assert_allclose(np.concatenate([p[1] for p in results]), xt.grad, **close)
    if rt is not None:
        np.testing.assert_allclose(np.concatenate([p[2] for p in results]), rt.grad, **close)
    for i, p in enumerate((oracle.weight, oracle.bias)):
        np.testing.assert_allclose(sum(part[3][i] for part in results), p.grad, **close)
    for part in results:
        for i, buffer in enumerate(oracle.buffers()):
            np.testing.assert_allclose(part[4][i], buffer, rtol=1e-14)


def test_sync_batch_norm_alone_has_the_bits_of_batch_norm() -> None:
    x, dy = (normal(k, shape=(6, 19, 5, 4)) for k in ("x", "dy"))
    results = []
    for layer in (nn.BatchNorm2d(19), nn.SyncBatchNorm(19, communicator=SingleProcess())):
        xt = Tensor(x, True)
        y = layer(xt, activation="relu")
        y.backward(dy)
        results.append([y.data, xt.grad, *gradients(layer), *layer.buffers()])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_convert_sync_batchnorm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, eps=1e-3), nn.ReLU())
    model.eval()
    before = dict(model.state_dict())
    image = normal("image", shape=(2, 1, 5, 5))
    expected = model(image).data
    assert distributed.convert_sync_batchnorm(model, SingleProcess()) is model
    assert "BatchNorm2d(3, eps=0.001" in repr(model)
    assert "processes=1" in repr(model)
    for name, value in model.state_dict().items():
        assert value is before[name]
    assert_same_bits(model(image).data, expected)  # and still one pass with the ReLU
    alone = nn.SyncBatchNorm(4)
    with pytest.raises(ValueError, match="SyncBatchNorm needs 2 or 4 dimensions, got shape"):
        alone(np.zeros((4,), np.float32))


# Shares of a batch


def test_loaders_of_all_processes_make_the_batches_of_one() -> None:
    """Also where the last batch has fewer images than there are processes."""
    dataset = data.mnist5k("train")[:26]
    options: dict[str, Any] = {"shuffle": True, "seed": 4}
    options["augmentation"] = Augmentation(crop_padding=2, flip=True, rotation=9.0, cutout=5)
    whole = list(data.DataLoader(dataset, 12, **options).batches(3, start=1))
    loaders = [data.DataLoader(dataset, 12, rank=r, processes=3, **options) for r in range(3)]
    ranks = [list(loader.batches(3, start=1)) for loader in loaders]
    assert [len(y) for _, y in whole] == [12, 2]
    assert [[len(y) for _, y in batches] for batches in ranks] == [[4, 0], [4, 1], [4, 1]]
    for k, (x, y) in enumerate(whole):
        assert_same_bits(np.concatenate([batches[k][0] for batches in ranks]), x)
        assert_same_bits(np.concatenate([batches[k][1] for batches in ranks]), y)
    with pytest.raises(ValueError, match="0 <= rank < processes, got 3 and 3"):
        data.DataLoader(dataset, rank=3, processes=3)


def test_micro_batches_of_all_processes_are_those_of_one() -> None:
    dataset = data.mnist5k("train")[:17]
    whole = [y for _, y in data.DataLoader(dataset, 12)]
    loaders = [data.DataLoader(dataset, 12, rank=r, processes=2, micro_batch=5) for r in range(2)]
    assert loaders[1].shares(0) == [Share(2, 5, 5), Share(2, 5, 5), Share(1, 2, 2)]
    assert loaders[0].shares(1) == [Share(0, 2, 5)]
    first, second = ([y for _, y in loader] for loader in loaders)
    for k, order in ((0, [0, 1, 5, 6, 10, 2, 3, 4, 7, 8, 9, 11]), (1, range(5))):
        np.testing.assert_array_equal(np.concatenate([first[k], second[k]]), whole[k][list(order)])


def test_dropout_of_all_processes_is_that_of_one() -> None:
    x = np.ones((5, 3, 4), np.float32)
    table = np.ones((7, 4), np.float32)  # no batch: the same in every process

    def draw(rows: Any) -> list[Any]:
        fc.manual_seed(9)
        return [F.dropout(rows).data, F.dropout(rows[:, 0]).data, F.dropout(table).data]

    expected = draw(x)
    parts = []
    for start, stop in ((0, 2), (2, 2), (2, 5)):
        with init.default_generator.batch_share(Share(start, stop, 5)):
            parts.append(draw(x[start:stop]))
            assert nn.get_rng_state() == (9, 5 * 12 + 5 * 4 + 28)
    for i in range(2):
        assert_same_bits(np.concatenate([part[i] for part in parts]), expected[i])
    for part in parts:
        assert_same_bits(part[2], expected[2])


# Real processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What distributed_worker.py found in each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    finish(start_ranks(WORKER, 2, "together", str(folder)))
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """(stdout, stderr) of processes that must all succeed."""
    outputs = [process.communicate(timeout=TIME_LIMIT) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return outputs


def test_operations(two_processes: list[dict[str, Any]]) -> None:
    steps = np.arange(1000, dtype=np.float32)
    expected = {
        "sum32": steps * np.float32(0.1) + steps * np.float32(1.1),
        "mean64": (np.linspace(0, 1, 7) + np.linspace(0, 1, 7) ** 2) / 2,
        "mean32": np.full((2, 3), 2.0, np.float32),
        "int": np.array([1, 10]),
        "empty": np.zeros((0, 4)),
        "from1": np.full(3, 11.0),
        "any": np.array([True, False]),
    }
    for found in two_processes:
        for name, value in expected.items():
            assert_same_bits(found[name], value, name)


@pytest.mark.parametrize("kind", ["sync", "plain", "accumulated"])
def test_two_processes_take_the_steps_of_one(
    two_processes: list[dict[str, Any]], kind: str
) -> None:
    """In float64: synchronised batch norm, dropout, clipping, momentum, accumulation, a last batch
    of one image. 8 steps of sums of a few hundred terms, at 1.1e-16 each: 1e-13 of the largest
    number is above any rounding, and far below any mistake."""
    expected = distributed_worker.train_all(SingleProcess())
    keys = [key for key in expected if key.startswith(kind)]
    assert len(keys) > 4
    first, second = two_processes
    for key in keys:
        limit = 1e-13 * abs(expected[key]).max()
        np.testing.assert_allclose(first[key], expected[key], rtol=0, atol=limit, err_msg=key)
        assert_same_bits(first[key], second[key], key)
    assert expected[f"{kind}.steps"][:, 2].max() > 0.5, "nothing was clipped"


def test_the_failure_of_one_process_ends_the_others() -> None:
    waiting, failed = start_ranks(WORKER, 2, "fail")
    try:
        ((stdout, _),) = finish([waiting])
        assert failed.poll() is None, "this one was to live on"
    finally:
        failed.kill()
        failed.communicate()
    assert stdout.startswith("process 0 of 2 lost another one")


# Whole runs


class Failing(Progress):
    """Fails after some steps of process 0."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, loss: float, accuracy: float, speed: float | None) -> None:
        self.steps -= 1
        if self.steps == 0:
            raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("options", [{}, {"sync_batch_norm": True, "ema": 0.9}], ids=str)
def test_runs_with_batch_norm_resume_to_the_same_bits(
    options: dict[str, Any], digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics of process 0 are kept; the other ones must have no influence."""
    fc.manual_seed(1)  # the threads share the library's random numbers, as processes do not
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(648, 10)
    )
    monkeypatch.setattr(train.loop, "create_model", lambda info: copy.deepcopy(model))
    config = TrainConfig(
        data="mnist", data_dir=digits, epochs=2, batch_size=75, accumulate=2,
        checkpoint_every=1, **options,
    )  # fmt: skip

    def whole(communicator: Threads) -> train.Result:
        return train.train(config, tmp_path / "whole", communicator=communicator)

    def failing(communicator: Threads) -> None:
        train.train(config, tmp_path / "run", communicator=communicator, progress=Failing(3))

    def resumed(communicator: Threads) -> train.Result:
        return train.resume(tmp_path / "run", communicator=communicator)

    first, second = in_threads(2, whole)
    assert (first.steps, first.out, second.out) == (4, str(tmp_path / "whole"), None)
    assert first.test_loss == second.test_loss
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        in_threads(2, failing)
    in_threads(2, resumed)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    shared = dict(second.model.named_parameters())
    for name, value in first.model.named_parameters():
        assert_same_bits(value.data, shared[name].data, name)


def test_a_loss_that_is_no_number_ends_all_processes() -> None:
    """Of one process only: the others raise the same error."""

    def work(communicator: Threads) -> str:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        optimizer = optim.SGD(model.parameters(), 0.1)
        reducer = GradientReducer(model.parameters(), communicator, op="sum")
        x = np.full((1, 1, 2, 2), np.nan if communicator.rank else 1.0, np.float32)
        before = model.state_dict()["1.weight"].copy()
        share = Share(communicator.rank, communicator.rank + 1, 2)
        with pytest.raises(train.TrainingError, match="the loss is nan") as error:
            train.train_step(
                model, optimizer, x, np.array([1]), gradients=reducer, shares=[share]
            )  # fmt: skip
        assert_same_bits(model.state_dict()["1.weight"], before)
        return str(error.value)

    first, second = in_threads(2, work)
    assert first == second


RUN = ("train", "--model=lenet5", "--data=mnist", "--optimizer=sgd", "--lr=0.02", "--epochs=2",
       "--warmup-steps=4", "--log-every=2", "--checkpoint-every=3")  # fmt: skip


@pytest.fixture(scope="module")
def two_process_run(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of torchrun, never stopped: 2 processes with batches of 30, the last ones of 15."""
    out = tmp_path_factory.mktemp("runs") / "two"
    command = torchrun("-m", "fastconv", *RUN, f"--data-dir={digits}", "--batch-size=30")
    done = subprocess.run(
        [*command, f"--out={out}", "--json"],
        capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)  # of one process
    assert (figures["epochs"], figures["steps"]) == (2, 20)
    assert done.stderr.count("epoch 2/2") == 1
    return out


def test_torchrun_trains_as_one_process_with_doubled_batches(
    two_process_run: Path, digits: str, tmp_path: Path
) -> None:
    """In float32, by the change of the weights over 20 steps of SGD without batch norm.

    The gradient of a weight is a sum of at most K = 60 * 28 * 28 products, with a relative error of
    u sqrt(K) = 1.3e-5 in each of the two runs; the steps add up with their errors.
    """
    options = [*RUN, f"--data-dir={digits}", "--batch-size=60", f"--out={tmp_path}", "--threads=1"]
    assert cli.main(options) == 0
    fc.manual_seed(0)
    start = models.create("lenet5", in_channels=1, image_size=28, num_classes=10).state_dict()
    one, two = (
        checkpoint.load_weights(folder / "last.safetensors")[0]
        for folder in (tmp_path, two_process_run)
    )
    for name, weight in one.items():
        change = np.linalg.norm(weight - start[name])
        assert 0 < np.linalg.norm(two[name] - weight) <= 2.6e-5 * change, name
    for a, b in zip(metrics_of(tmp_path), metrics_of(two_process_run), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if "loss" in key:
                assert b[key] == pytest.approx(value, rel=1e-4)
            elif "accuracy" in key:
                assert b[key] == pytest.approx(value, abs=1.01 / 30)  # one image of the last batch
            else:
                assert b[key] == value


def test_killed_and_interrupted_runs_end_with_the_same_bits(
    two_process_run: Path, digits: str, tmp_path: Path
) -> None:
    """First one process is killed, then torchrun gets a Ctrl-C, then the run is resumed again."""
    out = tmp_path / "run"
    fresh = [*RUN, f"--data-dir={digits}", "--batch-size=30", f"--out={out}"]
    for stop, arguments in (("kill:7", fresh), ("interrupt:6", ["train", f"--resume={out}"])):
        stopped = subprocess.run(
            torchrun(str(WORKER), "command", stop, *arguments),
            capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
        )  # fmt: skip
        assert stopped.returncode != 0
        assert "test accuracy" not in stopped.stdout
    assert f"interrupted; go on with: fastconv train --resume {out}" in stopped.stderr
    position = checkpoint.load_state(out / "last.safetensors")[0]["position"]
    assert position["step"] == 12, "6 from the checkpoint of the killed run, and 6"
    with pytest.raises(ValueError, match="started with 2 processes, not with 1"):
        train.resume(out)
    finish(
        [
            subprocess.Popen(
                torchrun("-m", "fastconv", "train", f"--resume={out}"),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        ]
    )  # fmt: skip
    assert_same_run(out, two_process_run)
