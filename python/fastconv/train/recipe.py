"""From a configuration to what a run is made of: loaders, model, optimiser, schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from os import PathLike
from typing import Any

from fastconv import checkpoint, data, models, nn, optim, weights
from fastconv.data import DataLoader, Dataset
from fastconv.distributed import Communicator
from fastconv.train.config import TrainConfig


def prepare_data(
    config: TrainConfig, communicator: Communicator
) -> tuple[DataLoader, DataLoader, dict[str, Any]]:
    """The loaders of both splits, for this process's part of each batch, and what a checkpoint says
    about model and data."""
    train_set, test_set = (
        data.load(config.data, split, config.data_dir, config.image_size)
        for split in ("train", "test")
    )
    for split, dataset in (("train", train_set), ("test", test_set)):
        if not len(dataset):
            raise ValueError(f"data set {config.data!r} has no images to {split}")
    height, width, channels = train_set.image_shape
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width}")
    if (test_set.image_shape, test_set.classes) != (train_set.image_shape, train_set.classes):
        raise ValueError(
            f"the test images {test_set.image_shape} or classes {test_set.classes} differ from "
            f"those to train, {train_set.image_shape} and {train_set.classes}"
        )
    mean, std = _statistics(config, train_set)
    rank, processes = communicator.rank, communicator.size
    train_loader = DataLoader(
        train_set,
        config.batch_size * config.accumulate * processes,
        shuffle=True,
        seed=config.seed,
        augmentation=config.augmentation(),
        mean=mean,
        std=std,
        prefetch=config.prefetch,
        workers=config.workers,
        rank=rank,
        processes=processes,
        micro_batch=config.batch_size * processes,
    )
    test_loader = DataLoader(
        test_set,
        evaluation_batch(height) * processes,
        mean=mean,
        std=std,
        rank=rank,
        processes=processes,
    )
    info = {
        "model": config.model,
        "data": config.data,
        "in_channels": channels,
        "image_size": height,
        "classes": list(train_set.classes),
        "mean": list(mean),
        "std": list(std),
    }
    return train_loader, test_loader, info


def _statistics(config: TrainConfig, train_set: Dataset) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation that the images are normalised by."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    expected = None
    if config.weights is not None:
        expected = weights.expected_statistics(config.weights, train_set.image_shape[2])
    return expected or data.channel_statistics(train_set)


def evaluation_batch(image_size: int) -> int:
    """A batch that takes little memory: 250 images, fewer where they are large."""
    return max(1, min(250, 2**20 // image_size**2))


def create_model(info: dict[str, Any]) -> nn.Module:
    return models.create(
        info["model"],
        in_channels=info["in_channels"],
        image_size=info["image_size"],
        num_classes=len(info["classes"]),
    )


def create_optimizer(config: TrainConfig, model: nn.Module) -> optim.Optimizer:
    assert config.lr is not None and config.weight_decay is not None  # resolved
    scale, lr_scale = config.backbone_lr_scale, None
    if scale != 1:
        head = f"{weights.head(model)}."

        def lr_scale(name: str) -> float:
            return 1.0 if name.startswith(head) else scale

    groups = optim.parameter_groups(
        model.named_parameters(),
        config.lr,
        config.weight_decay,
        lr_scale=lr_scale,
        decay_all=config.decay_all,
    )
    if config.optimizer == "sgd":
        return optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
    return optim.AdamW(groups, config.lr)


def create_schedule(
    config: TrainConfig, optimizer: optim.Optimizer, steps: int
) -> optim.LRScheduler:
    """A linear warm-up, then what config.schedule says, step by step.

    "cosine" goes down to zero along half a cosine, "step" by a factor gamma at each milestone, and
    "constant" stays.
    """
    milestones = [epoch * steps // config.epochs for epoch in config.milestones or ()]
    warmup = min(config.warmup_steps, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule != "cosine":  # a constant rate is one without milestones
            return config.gamma ** bisect_right(milestones, step)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return optim.LambdaLR(optimizer, factor)


def load_model(path: str | PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint that `train` wrote, last or best, and the information on it."""
    state, info = checkpoint.load_weights(path)
    if "model" not in info:
        raise ValueError(f"{path}: does not say which model its weights belong to")
    model = create_model(info)
    model.load_state_dict(state)
    return model, info
