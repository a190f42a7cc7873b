"""The command `fastconv`: train, eval, show, summary, tune, info.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed on the way, 2
asked for something that is not there or not possible, 130 interrupted. An error is one line;
FASTCONV_DEBUG=1 shows where it came from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import fastconv

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (sys.argv without its arguments) and returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        print(
            f"fastconv: {interrupt}" if interrupt.args else "fastconv: interrupted", file=sys.stderr
        )
        return 130
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTCONV_DEBUG") == "1":
            raise
        print(f"fastconv: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, _WRONG_REQUEST) else 1


_WRONG_REQUEST = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = (*_WRONG_REQUEST, OSError, ImportError, RuntimeError)
    return text if text and isinstance(error, expected) else f"{type(error).__name__}: {text}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error, instead of the whole usage."""
        print(f"fastconv: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastconv", description="Convolutional networks with handwritten kernels."
    )
    parser.add_argument("--version", action="version", version=f"fastconv {fastconv.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_eval(commands)
    _add_show(commands)
    _add_summary(commands)
    _add_tune(commands)
    _add_info(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[..., None], text: str) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.set_defaults(command=run)
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    return parser


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as 10,15, got {text!r}") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as 0.5,0.4, got {text!r}") from None


_METAVAR: dict[Any, str] = {
    str: "NAME",
    int: "N",
    float: "X",
    _whole_numbers: "N,N",
    _numbers: "X,X",
}

# (name, type, meaning with the default in brackets); each is a field of TrainConfig.
_TRAIN_OPTIONS: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "model and data": (
        ("model", str, "name of the model (smallcnn)"),
        ("data", str, "mnist5k, mnist, cifar10, cifar100 or folder (mnist5k)"),
        ("data-dir", str, "folder with the data set's files; for `folder` it has train/ and test/"),
        ("image-size", int, "scale images to N x N (their own size; 32 for `folder`)"),
    ),
    "transfer": (
        ("weights", str, "start from the weights in this file (.pth, .safetensors)"),
        ("freeze-backbone", bool, "train the head alone (no)"),
        ("backbone-lr-scale", float, "factor on the learning rate of all but the head (1)"),
        ("mean", _numbers, "of the channels, 1 is white (as weights expect, or as in the images)"),
        ("std", _numbers, "of the channels"),
    ),
    "optimisation": (
        ("epochs", int, "times through the training images (12)"),
        ("batch-size", int, "images a batch, in each process (64)"),
        ("accumulate", int, "batches whose gradients make one step (1)"),
        ("sync-batch-norm", bool, "batch norm over all processes of torchrun (no)"),
        ("optimizer", str, "adamw or sgd (adamw)"),
        ("lr", float, "learning rate (0.002 for adamw, 0.05 for sgd)"),
        ("momentum", float, "of sgd (0.9)"),
        ("weight-decay", float, "(0.01 for adamw, 0.0005 for sgd)"),
        ("decay-all", bool, "weight decay for biases and norms, too (no)"),
        ("clip-norm", float, "scale gradients to a norm of at most X (no)"),
        ("schedule", str, "of the learning rate: cosine, step or constant (cosine)"),
        ("warmup-steps", int, "steps of linear warm-up (50)"),
        ("milestones", _whole_numbers, "epochs at which `step` acts (1/2 and 3/4 of all)"),
        ("gamma", float, "the factor of `step` (0.1)"),
        ("label-smoothing", float, "(0)"),
        ("ema", float, "evaluate weights averaged with this decay, such as 0.999 (0: no)"),
        ("patience", int, "end after N epochs without a better test accuracy (no)"),
    ),
    "augmentation": (
        ("crop-padding", int, "pixels of the random crop (1 for digits, 4 otherwise)"),
        ("flip", bool, "mirror images at random (not for digits)"),
        ("resized-crop", float, "scale a random box of this share of the area or more (0: no)"),
        ("rotation", float, "rotate by up to X degrees (0)"),
        ("zoom", float, "scale by a factor of up to 1 - X and 1 + X (0)"),
        ("brightness", float, "change the brightness by a factor of up to 1 - X and 1 + X (0)"),
        ("contrast", float, "the contrast (0)"),
        ("saturation", float, "the saturation (0)"),
        ("hue", float, "shift the hue by up to this share of the circle (0)"),
        ("cutout", int, "blank out a random square of N x N pixels (0)"),
    ),
    "run": (
        ("seed", int, "of weights, order, augmentation and dropout (0)"),
        ("device", str, "cpu or cuda (cpu)"),
        ("graph", bool, "on cuda, start a step as one graph; no influence on the result (yes)"),
        ("autocast", str, "on cuda, compute convolutions and dense layers in bfloat16 (no)"),
        ("threads", int, "no influence on the result (all cores)"),
        ("workers", int, "threads that prepare batches (2)"),
        ("prefetch", int, "batches prepared ahead (2)"),
        ("log-every", int, "steps between two lines of metrics.jsonl (10)"),
        ("checkpoint-every", int, "steps between two checkpoints (50)"),
    ),
}


def _add_train(commands: Any) -> None:
    text = "train a model: without options SmallCNN on 5,000 MNIST digits"
    parser = _add_command(commands, "train", _train, text)
    # Options that were not given stay absent, so that the defaults have one place, TrainConfig.
    for title, rows in _TRAIN_OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, meaning in rows:
            settings: dict[str, Any] = {"help": meaning, "default": argparse.SUPPRESS}
            if kind is bool:
                settings["action"] = argparse.BooleanOptionalAction
            else:
                settings |= {"type": kind, "metavar": _METAVAR[kind]}
            group.add_argument(f"--{name}", **settings)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="DIR", help="folder of the run (a new one in runs/)")
    where.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    where.add_argument("--no-save", action="store_true", help="keep nothing on the disk")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")


def _train(options: argparse.Namespace) -> None:
    from fastconv import distributed, train
    from fastconv.train.progress import choose_progress

    names = {field.name for field in fields(train.TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    communicator = distributed.init()
    common: dict[str, Any] = {"progress": choose_progress(), "communicator": communicator}
    out = options.resume
    try:
        if options.resume is not None:
            config = train.load_config(options.resume)
            result = train.resume(options.resume, **common, **given)
        else:
            config = train.TrainConfig(**given).resolved()
            if not options.no_save:
                out = options.out or _new_folder(Path("runs"), f"{config.model}-{config.data}")
            result = train.train(config, out, overwrite=options.overwrite, **common)
    except KeyboardInterrupt:
        saved = (
            communicator.rank == 0 and out is not None and (Path(out) / "last.safetensors").exists()
        )
        how = f"; go on with: fastconv train --resume {out}" if saved else ""
        raise KeyboardInterrupt(f"interrupted{how}") from None
    communicator.close()
    if communicator.rank != 0:
        return
    figures = {"model": config.model, "data": config.data, "seed": config.seed, **result.as_dict()}
    if options.json:
        print(json.dumps(figures))
        return
    speed = result.images_per_second
    print(
        f"test accuracy {result.test_accuracy:.2%} after {result.epochs} epochs "
        f"(best {result.best_test_accuracy:.2%} after {result.best_epoch}), "
        + (f"{speed:,.0f} images/s, " if speed is not None else "")
        + f"{result.seconds:.1f} s"
    )
    if out is not None:
        print(f"run in {out}")


def _new_folder(parent: Path, name: str) -> Path:
    """parent/name, or the first of name-2, name-3, ... that is not there yet."""
    number, path = 1, parent / name
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _add_eval(commands: Any) -> None:
    text = "measure the accuracy of a checkpoint on the test images"
    parser = _add_command(commands, "eval", _eval, text)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder: its best one"
    )
    parser.add_argument("--data", metavar="NAME", help="data set (the one it was trained on)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the files of the data set")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="(test)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(250, less of large images)")
    parser.add_argument("--threads", type=int, metavar="N", help="(all cores)")


def _eval(options: argparse.Namespace) -> None:
    from fastconv import data, train
    from fastconv.train import recipe
    from fastconv.train.run_folder import find_checkpoint

    _set_threads(options.threads)
    checkpoint = find_checkpoint(options.checkpoint)
    model, info = train.load_model(checkpoint)
    name = options.data or info["data"]
    dataset = data.load(name, options.split, options.data_dir, info["image_size"])
    expected = (info["image_size"], info["image_size"], info["in_channels"])
    if dataset.image_shape != expected or len(dataset.classes) != len(info["classes"]):
        raise ValueError(
            f"{checkpoint} takes images {expected} of {len(info['classes'])} classes, "
            f"{name} has {dataset.image_shape} and {len(dataset.classes)}"
        )
    batch_size = options.batch_size
    if batch_size is None:
        batch_size = recipe.evaluation_batch(info["image_size"])
    loader = data.DataLoader(dataset, batch_size, mean=info["mean"], std=info["std"])
    result = train.evaluate(model, loader)
    figures = {
        "checkpoint": str(checkpoint),
        "model": info["model"],
        "data": name,
        "split": options.split,
        "images": result.images,
        "accuracy": result.accuracy,
        "top5_accuracy": result.top5_accuracy,
        "loss": result.loss,
        "class_accuracies": dict(zip(info["classes"], result.class_accuracies(), strict=True)),
        "confusion": result.confusion.tolist(),
    }
    if options.json:
        print(json.dumps(figures))
    else:
        print(result.report(info["classes"]))


def _add_show(commands: Any) -> None:
    text = "draw the first filters of a checkpoint and what its layers see in an image"
    parser = _add_command(commands, "show", _show, text)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or a run's folder")
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--image", metavar="FILE", help="image file to look at")
    image.add_argument("--index", type=int, default=0, metavar="N", help="of the data set (0)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="(test)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the files of the data set")
    parser.add_argument(
        "--layers", metavar="NAMES", help="such as conv1,layer2.0 (some of the convolutions)"
    )
    parser.add_argument("--out", metavar="DIR", help="for the pictures (beside the checkpoint)")


def _show(options: argparse.Namespace) -> None:
    from fastconv import show

    paths = show.show(
        options.checkpoint,
        options.out,
        image=options.image,
        index=options.index,
        split=options.split,
        data_dir=options.data_dir,
        layers=options.layers.split(",") if options.layers else (),
    )
    names = [str(path) for path in paths]
    print(json.dumps({"pictures": names}) if options.json else "\n".join(names))


def _add_summary(commands: Any) -> None:
    text = "describe a model, a row a layer, for one image"
    parser = _add_command(commands, "summary", _summary, text)
    _add_model(parser)


def _add_model(parser: _Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name of the model")
    parser.add_argument(
        "--input-size", type=_sizes, default=(3, 32, 32), metavar="C,H,W", help="(3,32,32)"
    )
    parser.add_argument("--num-classes", type=int, default=10, metavar="N", help="(10)")


def _model(options: argparse.Namespace) -> Any:
    from fastconv import models

    channels, height, width = options.input_size
    if height != width:
        raise ValueError(f"the models take square images, got {height} x {width}")
    return models.create(
        options.model, in_channels=channels, image_size=height, num_classes=options.num_classes
    )


def _sizes(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected C,H,W, got {text!r}") from None
    if min(channels, height, width) < 1:
        raise argparse.ArgumentTypeError(f"sizes must be positive, got {text!r}")
    return channels, height, width


def _summary(options: argparse.Namespace) -> None:
    from fastconv.summary import summarize

    summary = summarize(_model(options), options.input_size)
    print(json.dumps(summary.as_dict()) if options.json else summary)


def _add_tune(commands: Any) -> None:
    text = "measure which implementation of each convolution of a model is fastest here"
    parser = _add_command(commands, "tune", _tune, text)
    _add_model(parser)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="(32)")
    parser.add_argument("--threads", type=int, metavar="N", help="(all cores)")
    parser.add_argument(
        "--out", default="tuning.json", metavar="FILE", help="for FASTCONV_TUNING (tuning.json)"
    )


def _tune(options: argparse.Namespace) -> None:
    import numpy as np

    _set_threads(options.threads)
    if options.batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {options.batch_size}")
    channels, height, width = options.input_size
    images = np.zeros((options.batch_size, height, width, channels), np.float32)
    tuning = fastconv.tune(_model(options), images.transpose(0, 3, 1, 2), options.out)
    print(json.dumps(tuning.as_dict()) if options.json else f"{tuning}\nwritten to {options.out}")


def _add_info(commands: Any) -> None:
    _add_command(commands, "info", _info, "describe this installation and machine")


def _info(options: argparse.Namespace) -> None:
    from fastconv import info

    print(json.dumps(info.collect()) if options.json else info.report())


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    fastconv.set_num_threads(threads)
