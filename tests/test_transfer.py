"""Training that starts from weights: what is frozen stays, rates differ, and a resume is exact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastconv
from fastconv import checkpoint, cli, models, train
from fastconv.distributed import SingleProcess
from fastconv.train import TrainConfig, recipe
from fastconv.weights import expected_statistics, read_weights

from . import torch_models
from .test_train import StopAt, assert_same_run, config_of

pytest.importorskip("safetensors")


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """SmallCNN of PyTorch for colour images and seven classes, as torch.save writes it."""
    torch.manual_seed(0)
    model = torch_models.SmallCNN(image_size=28)
    model.classifier[4] = torch.nn.Linear(128, 7)
    model.train()(torch.randn(16, 3, 28, 28))  # statistics of batch norms
    path = tmp_path / "pretrained.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return path


def in_backbone(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name.startswith("features.")}


def test_frozen_backbone(digits: str, pretrained: Path, tmp_path: Path) -> None:
    """The head learns; the backbone, statistics included, keeps the bits of the file."""
    config = config_of(digits, weights=str(pretrained), freeze_backbone=True)
    result = train.train(config, tmp_path / "run")
    assert result.test_accuracy > 0.6
    expected = in_backbone(read_weights(pretrained))
    expected["features.0.weight"] = expected["features.0.weight"].sum(axis=1, keepdims=True)
    for name in ("last", "best"):
        state, info = checkpoint.load_weights(tmp_path / "run" / f"{name}.safetensors")
        for key, value in expected.items():
            np.testing.assert_array_equal(state[key], value, err_msg=key)
        assert (info["mean"], info["std"]) == ([0.449], [0.226])
    assert [p.requires_grad for p in result.model.parameters()] == [False] * 8 + [True] * 4


def test_without_freezing_everything_learns(digits: str, pretrained: Path) -> None:
    config = config_of(digits, weights=str(pretrained), epochs=1)
    state = train.train(config).model.state_dict()
    for key, value in in_backbone(read_weights(pretrained)).items():
        if key in ("features.0.bias", "features.4.bias"):
            # In front of a batch norm, whose mean takes away what a bias adds: no gradient.
            np.testing.assert_array_equal(state[key], value)
        elif key != "features.0.weight":
            assert (state[key] != value).any(), key


def test_rates_of_backbone_and_head(digits: str, pretrained: Path) -> None:
    config = config_of(digits, backbone_lr_scale=0.1).resolved()
    model = models.create("smallcnn", in_channels=1, image_size=28)
    optimizer = recipe.create_optimizer(config, model)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        scale = 1.0 if name.startswith("classifier.") else 0.1
        assert rate[id(parameter)] == pytest.approx(2e-3 * scale), name
        assert decay[id(parameter)] == (1e-2 if parameter.ndim > 1 else 0), name

    # A factor of 0: the weights of the backbone stay, but not its statistics, unlike when frozen.
    config = config_of(digits, weights=str(pretrained), epochs=1, backbone_lr_scale=0.0)
    state = train.train(config).model.state_dict()
    expected = read_weights(pretrained)
    np.testing.assert_array_equal(state["features.4.weight"], expected["features.4.weight"])
    assert (state["features.1.running_mean"] != expected["features.1.running_mean"]).all()


@pytest.mark.parametrize(
    "options", [{"freeze_backbone": True}, {"backbone_lr_scale": 0.1, "ema": 0.9}], ids=str
)
@pytest.mark.parametrize("step", [2, 17])
def test_a_resumed_run_needs_no_weight_file_and_has_the_same_bits(
    digits: str, pretrained: Path, tmp_path: Path, options: dict[str, Any], step: int
) -> None:
    config = config_of(digits, weights=str(pretrained), **options)
    train.train(config, tmp_path / "whole")
    with pytest.raises(ConnectionAbortedError):
        train.train(config, tmp_path / "run", progress=StopAt(step=step))
    pretrained.unlink()
    fastconv.manual_seed(12345)
    train.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_reads_the_file_again(
    digits: str, pretrained: Path, tmp_path: Path
) -> None:
    config = config_of(digits, weights=str(pretrained), freeze_backbone=True)
    train.train(config, tmp_path / "whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    train.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_averages_start_at_the_weights(digits: str, pretrained: Path) -> None:
    config = config_of(digits, weights=str(pretrained), ema=0.9, epochs=1, lr=0.0)
    state = train.train(config).model.state_dict()
    expected = read_weights(pretrained)["features.4.weight"]
    np.testing.assert_allclose(state["features.4.weight"], expected, rtol=1e-6)


def test_statistics_that_weights_expect(digits: str, pretrained: Path, tmp_path: Path) -> None:
    """ImageNet's for a foreign file, their averages for grey images, one's own for one's own."""
    assert expected_statistics(pretrained, 3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert expected_statistics(pretrained, 1) == ((0.449,), (0.226,))
    assert expected_statistics(pretrained, 2) is None
    own = tmp_path / "own.safetensors"
    state = models.create("smallcnn", in_channels=1, image_size=28).state_dict()
    checkpoint.save_weights(own, state, {"mean": [0.1], "std": [0.3]})
    assert expected_statistics(own, 1) == ((0.1,), (0.3,))

    config = config_of(digits, weights=str(own)).resolved()
    assert recipe.prepare_data(config, SingleProcess())[2]["mean"] == [0.1]
    config = config_of(digits, weights=str(own), mean=(0.5,), std=(0.25,)).resolved()
    assert recipe.prepare_data(config, SingleProcess())[2]["mean"] == [0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_lr_scale": -1.0}, "backbone_lr_scale must be at least 0 .* got -1"),
        ({"mean": (0.5,)}, r"mean and std go together, got \(0\.5,\) and None"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options).resolved()


def test_command(
    digits: str, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    common = ["train", "--data=mnist", f"--data-dir={digits}", "--epochs=1", f"--out={out}"]
    arguments = [*common, f"--weights={pretrained}", "--freeze-backbone", "--backbone-lr-scale=0.5"]
    assert cli.main([*arguments, "--mean=0.1", "--std=0.3"]) == 0
    notes = capsys.readouterr().err
    assert f"classifier.4: new, since {pretrained} has not 10 classes" in notes
    assert "features.0: summed over the channels, since the images are grey" in notes
    config = json.loads((out / "config.json").read_text())
    assert (config["freeze_backbone"], config["backbone_lr_scale"]) == (True, 0.5)
    assert (config["mean"], config["std"]) == ([0.1], [0.3])

    # Weights of another model: one line that names every key, and the run that is there stays.
    before = (out / "last.safetensors").read_bytes()
    assert cli.main([*arguments, "--model=lenet5", "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"error: state_dict does not fit LeNet5: .*"
        r"'features\.0\.weight': shape \(32, 3, 3, 3\) does not fit \(6, 1, 5, 5\) .*"
        r"missing key 'classifier\.3\.bias' .* unexpected key 'features\.1\.running_mean'",
        error,
    )
    assert (out / "last.safetensors").read_bytes() == before
    for wrong, message in (("nowhere.pth", "nowhere.pth"), (__file__, "neither a file of torch")):
        assert cli.main([*common, f"--weights={wrong}", "--overwrite"]) == 2
        assert message in capsys.readouterr().err
