"""Training: it learns, leaves a run behind, and ends with the same bits wherever it was stopped."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fastconv
from fastconv import checkpoint, cli, data, models, nn, optim, train
from fastconv.train import TrainConfig, TrainingError, recipe
from fastconv.train.progress import (
    BarProgress,
    PlainProgress,
    Progress,
    choose_progress,
    plot_curves,
)
from fastconv.train.step import training_loss

safetensors = pytest.importorskip("safetensors.numpy")

FILES = {"config.json", "metrics.jsonl", "last.safetensors", "best.safetensors"}


def config_of(digits: str, **options: Any) -> TrainConfig:
    """A run of two epochs of 12 steps, with dropout, augmentation and batch norm in it."""
    settings: dict[str, Any] = {
        "data": "mnist", "data_dir": digits, "epochs": 2, "batch_size": 50, "lr": 2e-3,
        "warmup_steps": 4, "log_every": 5, "checkpoint_every": 4, "crop_padding": 1, "workers": 2,
    }  # fmt: skip
    return TrainConfig(**{**settings, **options})


def everything(digits: str, **options: Any) -> TrainConfig:
    """The same with all that has a state of its own or is random."""
    settings: dict[str, Any] = {
        "batch_size": 25, "accumulate": 2, "clip_norm": 1.0, "ema": 0.97, "patience": 5,
        "rotation": 9.0, "zoom": 0.1, "resized_crop": 0.6, "brightness": 0.3, "contrast": 0.3,
        "cutout": 5, "label_smoothing": 0.1,
    }  # fmt: skip
    return config_of(digits, **{**settings, **options})


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the speed, which alone is not the same each time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all("images_per_second" in line for line in lines)
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_run(found: Path, expected: Path) -> None:
    assert metrics_of(found) == metrics_of(expected)
    for name in ("last.safetensors", "best.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="session")
def whole_run(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `everything`, never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.train(everything(digits), folder)
    return folder


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vgg99"}, "unknown model 'vgg99', expected one of .*smallcnn"),
        ({"data": "svhn"}, "unknown data 'svhn', expected one of mnist5k"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion', expected one of adamw, sgd"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"autocast": "int8"}, "unknown autocast 'int8', expected bfloat16"),
        ({"autocast": "bfloat16"}, "autocast 'bfloat16' needs the device cuda, got 'cpu'"),
        ({"epochs": 0}, "epochs must be at least 1 and below inf, got 0"),
        ({"batch_size": -3}, "batch_size .* got -3"),
        ({"lr": -0.1}, "lr must be at least 0 .* got -0.1"),
        ({"lr": math.nan}, "lr .* got nan"),
        ({"label_smoothing": 1.0}, "label_smoothing .* below 1, got 1.0"),
        ({"seed": -1}, "seed .* got -1"),
        ({"threads": 0}, "threads .* got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every .* got 0"),
        ({"accumulate": 0}, "accumulate .* got 0"),
        ({"ema": 1.0}, "ema .* below 1, got 1.0"),
        ({"clip_norm": -1.0}, "clip_norm .* got -1.0"),
        ({"patience": 0}, "patience .* got 0"),
        ({"milestones": (5, 2), "schedule": "step"}, r"milestones must not fall, got \(5, 2\)"),
        ({"milestones": (5,)}, "milestones belong to the schedule 'step', not 'cosine'"),
        ({"cutout": -1}, "cutout must lie between 0 and inf, got -1"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options).resolved()


def test_config_fills_in_what_is_open() -> None:
    digits = TrainConfig().resolved()
    assert (digits.lr, digits.crop_padding, digits.flip) == (2e-3, 1, False)
    colour = TrainConfig(data="cifar10", optimizer="sgd", crop_padding=0).resolved()
    assert (colour.lr, colour.weight_decay, colour.crop_padding, colour.flip) == (
        0.05, 5e-4, 0, True,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_schedule(schedule: str) -> None:
    """A warm-up of 4 steps to 1/5, 2/5, ... of the rate, then 16 steps; 5 steps an epoch."""
    optimizer = optim.SGD([nn.Parameter(np.zeros(1, np.float32))], lr=2.0)
    config = TrainConfig(schedule=schedule, warmup_steps=4, epochs=4).resolved()
    steps = recipe.create_schedule(config, optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        steps.step()
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0])
    if schedule == "constant":
        assert rates[4:] == [2.0] * 16
    elif schedule == "step":
        np.testing.assert_allclose(rates[4:], [2.0] * 6 + [0.2] * 5 + [0.02] * 5)
    else:
        np.testing.assert_allclose(rates[12], 1.0)  # half way through the cosine
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert 0 < rates[-1] < 0.02


# Learning


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 2e-3), ("sgd", 1e-2)])
def test_learns_real_digits(digits: str, optimizer: str, lr: float) -> None:
    result = train.train(config_of(digits, epochs=6, batch_size=25, lr=lr, optimizer=optimizer))
    assert result.test_accuracy > 0.85
    assert result.best_test_accuracy >= result.test_accuracy
    assert (result.epochs, result.steps, result.out) == (6, 6 * 23, None)
    assert result.parameters == 421_834
    assert result.images_per_second is not None and result.images_per_second > 0


def test_a_step_can_fit_one_batch() -> None:
    fastconv.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2))
    optimizer = optim.AdamW(model.parameters(), 1e-2)
    x = np.random.default_rng(0).standard_normal((8, 1, 6, 6)).astype(np.float32)
    y = np.arange(8) % 2
    losses = [train.train_step(model, optimizer, x, y)[0] for _ in range(40)]
    assert losses[0] > 0.3
    assert losses[-1] < 0.01
    assert train.train_step(model, optimizer, x, y)[1] == 8


def grads_of(model: nn.Module) -> list[Any]:
    return [p.grad.copy() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [3, 8, 9])
def test_accumulated_gradients_are_those_of_the_large_batch(size: int) -> None:
    """To rounding, in float64, with a last part that is not full."""
    fastconv.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    optimizer = optim.SGD(model.parameters(), 0.0)
    x = np.random.default_rng(0).standard_normal((8, 1, 6, 6))
    y = np.arange(8) % 3
    whole = train.train_step(model, optimizer, x, y, 0.1)
    expected = grads_of(model)
    parts = train.train_step(model, optimizer, x, y, 0.1, micro_batch=size)
    assert parts.correct == whole.correct
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-12)
    for grad, right in zip(grads_of(model), expected, strict=True):
        np.testing.assert_allclose(grad, right, rtol=1e-10, atol=1e-15)


def test_a_clipped_step_is_shorter(digits: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    optimizer = optim.SGD(model.parameters(), 1.0)
    x, y = np.ones((3, 1, 2, 2), np.float32), np.zeros(3, int)
    before = model[1].weight.data.copy()
    step = train.train_step(model, optimizer, x, y, clip_norm=0.01)
    norm = np.linalg.norm(model[1].weight.grad)  # as it was before it was clipped
    assert step.gradient_norm == pytest.approx(norm, rel=1e-6)
    assert norm > 0.1
    moved = np.linalg.norm(model[1].weight.data - before)
    assert moved == pytest.approx(0.01, rel=1e-4)
    assert train.train_step(model, optimizer, x, y).gradient_norm is None
    train.train(config_of(digits, epochs=1, clip_norm=0.5), tmp_path / "run")
    norms = [line["gradient_norm"] for line in metrics_of(tmp_path / "run")[:-1]]
    assert len(norms) == 2 and all(norm > 0 for norm in norms)


class GoogLeNetOutputs(NamedTuple):
    logits: Any
    aux_logits2: Any
    aux_logits1: Any


class InceptionOutputs(NamedTuple):
    logits: Any
    aux_logits: Any


@pytest.mark.parametrize("kind", [GoogLeNetOutputs, InceptionOutputs])
def test_auxiliary_heads_count_with_their_weight(kind: Any) -> None:
    rng = np.random.default_rng(0)
    heads = [nn.Parameter(rng.standard_normal((4, 3))) for _ in kind._fields]
    y = np.array([0, 2, 1, 1])
    logits, loss = training_loss(kind(*heads), y, 0.1)
    weight = {3: 0.3, 2: 0.4}[len(heads)]
    parts = [torch.tensor(head.data, requires_grad=True) for head in heads]
    losses = [
        torch.nn.functional.cross_entropy(head, torch.tensor(y), label_smoothing=0.1)
        for head in parts
    ]
    expected = losses[0] + weight * sum(losses[1:])
    assert logits is heads[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    for head, part in zip(heads, parts, strict=True):
        np.testing.assert_allclose(head.grad, part.grad.numpy(), rtol=1e-10)
    without = kind(heads[0], *[None] * (len(heads) - 1))
    assert training_loss(without, y, 0.1)[1].item() == pytest.approx(losses[0].item())
    with pytest.raises(TypeError, match="must return logits, got tuple"):
        training_loss((heads[0],), y, 0.0)


def test_early_stopping(digits: str, tmp_path: Path) -> None:
    """With a learning rate of 0 the first epoch is the best; resumed, the run stays ended."""
    stream = io.StringIO()
    config = config_of(digits, model="lenet5", epochs=9, lr=0.0, patience=2)
    result = train.train(config, tmp_path / "run", progress=PlainProgress(stream))
    assert (result.epochs, result.best_epoch, result.steps) == (3, 1, 36)
    assert "ended early: no better for 2 epochs\n" in stream.getvalue()
    again = train.resume(tmp_path / "run")
    assert (again.epochs, again.steps) == (3, 36)


def test_averaged_weights_are_evaluated_and_kept(digits: str, tmp_path: Path) -> None:
    result = train.train(config_of(digits, epochs=1, ema=0.9), tmp_path / "run")
    plain = train.train(config_of(digits, epochs=1), tmp_path / "plain")
    state, _ = checkpoint.load_state(tmp_path / "run" / "last.safetensors")
    others, _ = checkpoint.load_state(tmp_path / "plain" / "last.safetensors")
    best, _ = checkpoint.load_weights(tmp_path / "run" / "best.safetensors")
    key = "classifier.1.weight"
    np.testing.assert_array_equal(state["ema"]["model"][key], others["model"][key])
    assert not np.array_equal(state["model"][key], others["model"][key])
    np.testing.assert_array_equal(best[key], state["model"][key])
    np.testing.assert_array_equal(result.model.state_dict()[key], best[key])
    assert state["ema"]["updates"] == 12
    assert (result.test_loss, result.test_accuracy) != (plain.test_loss, plain.test_accuracy)


def test_evaluation_against_counting_by_hand() -> None:
    """Confusion, top-1 and top-5 of a model that returns its input as logits."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 1, 7), dtype=np.uint8)
    labels = rng.integers(0, 6, 200)  # none of class 6
    dataset = data.Dataset(images, labels, tuple("abcdefg"))
    result = train.evaluate(nn.Flatten(), data.DataLoader(dataset, 64))
    logits = torch.from_numpy(images[:, 0].astype(np.float32))
    top = logits.topk(5).indices.numpy()
    ranks = np.array([(row > row[y]).sum() for row, y in zip(images[:, 0], labels, strict=True)])
    assert result.top5_accuracy == (ranks < 5).mean()
    assert result.top5_accuracy == pytest.approx((top == labels[:, None]).any(1).mean(), abs=0.02)
    assert result.confusion.shape == (7, 7) and result.confusion.sum() == 200
    for true in range(7):
        chosen = images[labels == true, 0].argmax(1)
        assert result.confusion[true].tolist() == [(chosen == k).sum() for k in range(7)]
    assert result.accuracy == (images[:, 0].argmax(1) == labels).mean()
    per_class = result.class_accuracies()
    assert per_class[6] is None
    assert per_class[2] == (images[labels == 2, 0].argmax(1) == 2).mean()

    rows = result.report("abcdefg").splitlines()
    assert len(rows) == 9 and rows[3].split()[0] == "c"
    assert rows[3].split()[1:-1] == [str(n or ".") for n in result.confusion[2].tolist()]
    many = [*"abcdefg", *(f"more {i}" for i in range(14))]
    worst, *_, last = result.report(many).splitlines()
    errors = result.confusion * (1 - np.eye(7, dtype=int))
    true, answer = np.unravel_index(errors.argmax(), errors.shape)
    assert worst == (
        f"{errors.max()} of {(labels == true).sum()} images of {many[true]} "
        f"taken for {many[answer]}"
    )
    assert last == rows[-1]


@pytest.mark.parametrize(("model", "size"), [("resnet8_cifar", 20), ("lenet5", 40)])
def test_digits_at_another_size(digits: str, model: str, size: int) -> None:
    pytest.importorskip("PIL.Image")
    stream = io.StringIO()
    config = config_of(digits, model=model, image_size=size, epochs=1)
    assert train.train(config, progress=PlainProgress(stream)).steps == 12
    assert f"images 1x{size}x{size}, 10 classes" in stream.getvalue()


def test_the_recipe_of_the_readme(digits: str) -> None:
    """It is understood and runs: one epoch of it, on a seventh of the digits."""
    readme = Path(__file__).parents[1] / "README.md"
    found = re.search(
        r"^fastconv (train --model resnet20_cifar(?:.*\\\n)*.*)$", readme.read_text(), re.M
    )
    assert found is not None
    arguments = cli._parser().parse_args(found[1].replace("\\\n", " ").split())
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    assert given["epochs"] == 20
    shorter = {"data": "mnist", "data_dir": digits, "epochs": 1}
    assert train.train(TrainConfig(**{**given, **shorter})).steps == 9


def test_evaluate_counts_every_image_and_puts_the_modes_back() -> None:
    model = models.create("smallcnn", in_channels=1, image_size=28)
    model.train()
    model.features[1].eval()
    modes = [module.training for module in model.modules()]
    test = data.mnist5k("test")[::9]
    results = [train.evaluate(model, data.DataLoader(test, size)) for size in (7, 50)]
    assert results[0].images == len(test) == 112
    assert results[0].accuracy == results[1].accuracy
    assert math.isclose(results[0].loss, results[1].loss, rel_tol=1e-5)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="no images"):
        train.evaluate(model, data.DataLoader(test[:0]))


# What a run leaves behind


def test_run_folder(whole_run: Path, digits: str) -> None:
    assert FILES <= {file.name for file in whole_run.iterdir()} <= FILES | {"curves.png"}
    config = train.load_config(whole_run)
    assert config == everything(digits).resolved()

    lines = metrics_of(whole_run)
    steps = [line for line in lines if line["event"] == "step"]
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert [line["step"] for line in steps] == [5, 10, 15, 20]
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 12), (2, 24)]
    assert set(epochs[0]) == {
        "event", "epoch", "step", "loss", "accuracy", "test_loss", "test_accuracy",
    }  # fmt: skip
    assert epochs[1]["loss"] < epochs[0]["loss"]

    best = max(epochs, key=lambda line: line["test_accuracy"])
    model, info = train.load_model(whole_run / "best.safetensors")
    assert (info["epoch"], info["test_accuracy"]) == (best["epoch"], best["test_accuracy"])
    loader = data.DataLoader(data.mnist_idx(digits, "test"), 64, mean=info["mean"], std=info["std"])
    assert train.evaluate(model, loader).accuracy == best["test_accuracy"]
    last, _ = train.load_model(whole_run / "last.safetensors")
    assert train.evaluate(last, loader).accuracy == epochs[-1]["test_accuracy"]


def test_curves_are_a_picture(whole_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (whole_run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot_curves(whole_run / "metrics.jsonl", tmp_path / "again.png")


def test_a_run_is_not_overwritten_by_accident(whole_run: Path, digits: str, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in whole_run.iterdir()}
    with pytest.raises(FileExistsError, match="whole: holds a run already"):
        train.train(config_of(digits), whole_run)
    assert {file.name: file.read_bytes() for file in whole_run.iterdir()} == before

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    first = train.train(config_of(digits, epochs=1, model="lenet5"), folder)  # no run is in it yet
    with pytest.raises(ValueError, match="unknown model"):
        train.train(config_of(digits, model="none"), folder, overwrite=True)
    assert (folder / "last.safetensors").exists()  # nothing is removed for a run that cannot be
    second = train.train(config_of(digits, epochs=1), folder, overwrite=True)
    assert second.parameters != first.parameters
    assert metrics_of(folder)[-1]["step"] == 12
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"notes\.txt: is a file"):
        train.train(config_of(digits), folder / "notes.txt")


def test_repeated_runs_have_the_same_bits_for_any_number_of_threads(
    whole_run: Path, digits: str, tmp_path: Path
) -> None:
    for threads in (1, 3):
        folder = tmp_path / str(threads)
        train.train(
            everything(digits, threads=threads, prefetch=threads - 1, workers=threads), folder
        )
        assert_same_run(folder, whole_run)


def test_another_seed_is_another_run(whole_run: Path, digits: str, tmp_path: Path) -> None:
    train.train(everything(digits, seed=1), tmp_path / "run")
    assert metrics_of(tmp_path / "run") != metrics_of(whole_run)


# Stopping and resuming


class StopAt(Progress):
    """Ends the run abruptly, by an exception out of the loop, where nothing expects one."""

    def __init__(self, step: int | None = None, epoch: int | None = None) -> None:
        self.step_to_stop, self.epoch_to_stop = step, epoch
        self.steps = 0

    def step(self, loss: float, accuracy: float, speed: float | None) -> None:
        self.steps += 1
        if self.steps == self.step_to_stop:
            raise ConnectionAbortedError

    def epoch_ended(self, epoch: int, figures: dict[str, float], speed: float | None) -> None:
        if epoch == self.epoch_to_stop:
            raise ConnectionAbortedError


@pytest.mark.parametrize(
    "stop",
    [*({"step": n} for n in (2, 4, 5, 11, 12, 13, 17, 24)), {"epoch": 0}, {"epoch": 1}],
    ids=str,
)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    whole_run: Path, digits: str, tmp_path: Path, stop: dict[str, int]
) -> None:
    with pytest.raises(ConnectionAbortedError):
        train.train(everything(digits), tmp_path / "run", progress=StopAt(**stop))
    fastconv.manual_seed(12345)  # another process starts with other random numbers
    result = train.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run)
    assert result.steps == 24
    assert result.test_accuracy == metrics_of(whole_run)[-1]["test_accuracy"]


def test_a_run_may_be_stopped_again_and_again(whole_run: Path, digits: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConnectionAbortedError):
        train.train(everything(digits), folder, progress=StopAt(step=6))
    for threads in (2, 1, 3):
        with pytest.raises(ConnectionAbortedError):
            train.resume(folder, progress=StopAt(step=6), threads=threads)
    train.resume(folder, checkpoint_every=1)
    assert_same_run(folder, whole_run)


def test_resuming_a_finished_run_changes_nothing(whole_run: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in whole_run.iterdir()}
    result = train.resume(whole_run)
    assert result.images_per_second is None
    assert result.test_accuracy == metrics_of(whole_run)[-1]["test_accuracy"]
    after = {file.name: file.read_bytes() for file in whole_run.iterdir()}
    assert all(after[name] == before[name] for name in FILES)


def test_resume_refuses(whole_run: Path, digits: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no run to resume"):
        train.resume(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"keeps its lr: .* has 0\.002, asked for 0\.1"):
        train.resume(whole_run, lr=0.1)
    train.resume(whole_run, lr=2e-3, threads=2)

    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "last.safetensors"):
        (folder / name).write_bytes((whole_run / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "data": "mnist5k"}))
    with pytest.raises(ValueError, match=r"started with 572 training images.*has 4000 now"):
        train.resume(folder)
    (folder / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    with pytest.raises(ValueError, match=r"config\.json: not a configuration .*colour"):
        train.resume(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a configuration"):
        train.resume(folder)


def test_metrics_hold_no_step_twice(whole_run: Path, digits: str, tmp_path: Path) -> None:
    """Lines after the last checkpoint are cut off, half a line at the end too."""
    folder = tmp_path / "run"
    with pytest.raises(ConnectionAbortedError):
        train.train(everything(digits, checkpoint_every=9), folder, progress=StopAt(step=11))
    assert [line["step"] for line in metrics_of(folder)] == [5, 10]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')
    train.resume(folder)
    assert metrics_of(folder) == metrics_of(whole_run)


# Things that go wrong


def test_a_loss_that_is_no_number_stops_the_run(digits: str, tmp_path: Path) -> None:
    config = config_of(
        digits, optimizer="sgd", lr=1e20, schedule="constant", warmup_steps=0, checkpoint_every=1
    )
    where = r"epoch 1, step \d+, learning rate 1e\+20: the loss is (nan|inf): try a smaller"
    with pytest.raises(TrainingError, match=where):
        train.train(config, tmp_path / "run")


def test_a_step_with_a_bad_loss_leaves_the_weights_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    optimizer = optim.SGD(model.parameters(), 0.1)
    before = [p.data.copy() for p in model.parameters()]
    with pytest.raises(TrainingError, match="the loss is nan"):
        train.train_step(
            model, optimizer, np.full((2, 1, 2, 2), np.nan, np.float32), np.zeros(2, int)
        )
    for parameter, value in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(parameter.data, value)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_training_needs_numpy_alone(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "rich", "safetensors", "PIL", "matplotlib")
    result = train.train(config_of(digits, epochs=1, model="lenet5"), progress=choose_progress())
    assert result.steps == 12
    with pytest.raises(ImportError, match=r"pip install 'fastconv\[train\]'"):
        train.train(config_of(digits), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_there_is_a_notice(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "matplotlib")
    stream = io.StringIO()
    config = config_of(digits, epochs=1, model="lenet5")
    train.train(config, tmp_path / "run", progress=PlainProgress(stream))
    assert (
        stream.getvalue().splitlines()[-1] == "no curves.png: pip install 'fastconv[plot]' for it"
    )
    assert not (tmp_path / "run" / "curves.png").exists()


def test_data_must_fit(digits: str, tmp_path: Path) -> None:
    for name in os.listdir(digits):
        (tmp_path / name).write_bytes((Path(digits) / name).read_bytes())
    images = np.zeros((3, 28, 20), np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
    )
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 3) + bytes(3))
    with pytest.raises(ValueError, match=r"test images \(28, 20, 1\)"):
        train.train(config_of(str(tmp_path)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 0, 28, 28))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 0))
    with pytest.raises(ValueError, match="'mnist' has no images to test"):
        train.train(config_of(str(tmp_path)))


# Progress


def test_plain_progress_is_a_line_an_epoch(digits: str) -> None:
    stream = io.StringIO()
    train.train(config_of(digits, model="lenet5"), progress=PlainProgress(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("lenet5 (")
    assert lines[0].endswith("on mnist: images 1x28x28, 10 classes")
    assert lines[2].startswith("epoch 2/2  loss ")
    assert lines[2].endswith("images/s")
    assert "\x1b" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(digits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    progress = choose_progress()
    assert isinstance(progress, BarProgress)
    train.train(config_of(digits, model="lenet5"), progress=progress)
    shown = sys.stderr.getvalue()
    assert "epoch 2/2  loss " in shown
    assert "12/12" in shown
    assert not [t for t in threading.enumerate() if t.name.startswith("fastconv-data")]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(choose_progress()) is PlainProgress


# Signals, in processes of their own


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastconv", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.001)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="session")
def embedded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of 63 steps on the embedded digits, never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "embedded"
    settings = {"batch_size": 32, "accumulate": 2, "clip_norm": 1.0, "ema": 0.99, "cutout": 5}
    config = TrainConfig(epochs=2, log_every=1, checkpoint_every=20, threads=1, **settings)
    train.train(config, folder)
    return folder


# One thread: on a busy machine two that wait for each other take many times as long.
EMBEDDED = (
    "--epochs=2", "--log-every=1", "--checkpoint-every=20", "--threads=1",
    "--batch-size=32", "--accumulate=2", "--clip-norm=1", "--ema=0.99", "--cutout=5",
)  # fmt: skip


@pytest.mark.parametrize("steps", [5, 30, 85])
def test_killed_in_mid_epoch_and_resumed(embedded_run: Path, tmp_path: Path, steps: int) -> None:
    """Before the first checkpoint, in the first epoch, and in the second one."""
    folder = tmp_path / "run"
    process = start(f"--out={folder}", *EMBEDDED)
    wait_for(lambda: lines_in(folder / "metrics.jsonl") >= steps, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert lines_in(folder / "metrics.jsonl") < 126

    process = start(f"--resume={folder}", "--json")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["steps"] == 126
    assert_same_run(folder, embedded_run)


def test_interrupt_saves_and_says_how_to_go_on(embedded_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(f"--out={folder}", *EMBEDDED, "--checkpoint-every=1000")
    wait_for(lambda: lines_in(folder / "metrics.jsonl") >= 30, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == (
        f"fastconv: interrupted; go on with: fastconv train --resume {folder}"
    )
    assert "Traceback" not in err
    state, _ = checkpoint.load_state(folder / "last.safetensors")
    assert state["position"]["step"] >= 30
    train.resume(folder)
    assert_same_run(folder, embedded_run)
