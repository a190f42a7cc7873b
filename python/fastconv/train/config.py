"""The configuration of a training run: what can be chosen, the defaults, the ranges."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from fastconv import data, models
from fastconv.augment import Augmentation

__all__ = ["TrainConfig", "load_config"]

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step", "constant")
DEVICES = ("cpu", "cuda")
# What the configuration leaves open, by optimiser and by data set.
_LR = {"adamw": 2e-3, "sgd": 0.05}
_WEIGHT_DECAY = {"adamw": 1e-2, "sgd": 5e-4}
_IMAGE_SIZE = {"folder": 32}  # the others have a size of their own
_CROP_PADDING = {"mnist5k": 1, "mnist": 1}
_FLIP = {"mnist5k": False, "mnist": False}  # a mirrored digit is another digit or none


@dataclass(frozen=True)
class TrainConfig:
    """What determines a run. None is the default of the optimiser or of the data set."""

    model: str = "smallcnn"
    data: str = "mnist5k"
    data_dir: str | None = None
    image_size: int | None = None  # height and width that images are scaled to
    mean: tuple[float, ...] | None = None  # of the channels, in units of 255; None: those that the
    std: tuple[float, ...] | None = None  # weights expect, without weights the training images'
    weights: str | None = None  # file of pretrained weights to start from
    freeze_backbone: bool = False  # train the head alone
    backbone_lr_scale: float = 1.0  # factor on the learning rate of everything but the head
    epochs: int = 12
    batch_size: int = 64  # of each process
    accumulate: int = 1  # batches whose gradients make one step
    sync_batch_norm: bool = False  # statistics over all processes instead of each one's
    optimizer: str = "adamw"
    lr: float | None = None
    momentum: float = 0.9  # of SGD
    weight_decay: float | None = None
    decay_all: bool = False  # biases and norms, too
    clip_norm: float | None = None  # longest gradient; None does not clip
    schedule: str = "cosine"  # with a linear warm-up over the first warmup_steps
    warmup_steps: int = 50
    milestones: tuple[int, ...] | None = None  # epochs after which "step" multiplies by gamma
    gamma: float = 0.1
    ema: float = 0.0  # decay of the averaged weights, which then are what is evaluated; 0: none
    patience: int | None = None  # epochs without a better test accuracy before the run ends
    label_smoothing: float = 0.0
    crop_padding: int | None = None  # from here on as in Augmentation
    flip: bool | None = None
    resized_crop: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    cutout: int = 0
    seed: int = 0
    device: str = "cpu"  # or "cuda"
    graph: bool = True  # on a CUDA device, start a step as one graph; no influence on the bits
    autocast: str | None = (
        None  # or "bfloat16", in which its convolutions and linear layers compute
    )
    threads: int | None = None  # no influence on the bits
    log_every: int = 10  # steps between two lines of metrics.jsonl
    checkpoint_every: int = 50  # steps between two checkpoints
    prefetch: int = 2
    workers: int = 2  # threads that prepare batches; no influence on the bits

    def resolved(self) -> TrainConfig:
        """With every open value filled in. Raises ValueError for a value out of its range."""
        for name, allowed in (
            ("model", tuple(models.available())),
            ("data", data.NAMES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("device", DEVICES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )

        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"unknown autocast {self.autocast!r}, expected bfloat16")
        if self.autocast is not None and self.device != "cuda":
            raise ValueError(
                f"autocast {self.autocast!r} needs the device cuda, got {self.device!r}"
            )

        def default(value: Any, otherwise: Any) -> Any:
            return otherwise if value is None else value

        if self.milestones and self.schedule != "step":
            raise ValueError(f"milestones belong to the schedule 'step', not {self.schedule!r}")
        halves = (self.epochs // 2, self.epochs * 3 // 4) if self.schedule == "step" else ()
        config = dataclasses.replace(
            self,
            image_size=default(self.image_size, _IMAGE_SIZE.get(self.data)),
            milestones=tuple(default(self.milestones, halves)),
            mean=None if self.mean is None else tuple(self.mean),
            std=None if self.std is None else tuple(self.std),
            lr=default(self.lr, _LR[self.optimizer]),
            weight_decay=default(self.weight_decay, _WEIGHT_DECAY[self.optimizer]),
            crop_padding=default(self.crop_padding, _CROP_PADDING.get(self.data, 4)),
            flip=default(self.flip, _FLIP.get(self.data, True)),
        )
        for names, low, high in (
            ("epochs batch_size accumulate image_size patience threads workers", 1, math.inf),
            ("log_every checkpoint_every", 1, math.inf),
            ("lr weight_decay clip_norm gamma warmup_steps prefetch", 0, math.inf),
            ("backbone_lr_scale", 0, math.inf),
            ("momentum label_smoothing ema", 0, 1),
            ("seed", 0, 2**64),
        ):
            for name in names.split():
                value = getattr(config, name)
                if value is not None and not low <= value < high:  # NaN lies nowhere
                    raise ValueError(f"{name} must be at least {low} and below {high}, got {value}")
        if list(config.milestones or ()) != sorted(config.milestones or ()):
            raise ValueError(f"milestones must not fall, got {config.milestones}")
        if (config.mean is None) != (config.std is None):
            raise ValueError(f"mean and std go together, got {config.mean} and {config.std}")
        config.augmentation()  # which checks its own values
        return config

    def augmentation(self) -> Augmentation:
        """What is done to the training images, of a resolved configuration."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation)})


def load_config(out: str | PathLike[str]) -> TrainConfig:
    """The configuration of the run in a folder. Raises FileNotFoundError or ValueError."""
    path = Path(out) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{out}: no run to resume here (no config.json)")
    try:
        return TrainConfig(**json.loads(path.read_text())).resolved()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration of fastconv ({error})") from error
