"""Weights that exist already: read them from a file, load them, and build on them.

    model = models.create("efficientnet_lite0", num_classes=1000)
    model.load_state_dict(read_weights("efficientnet-lite0.pth"))

Transfer learning takes the weights of a network that was trained for other classes. `head` names
the part that turns features into classes, everything before it is the backbone:

    model = models.create("efficientnet_lite0", num_classes=10)
    load_pretrained(model, read_weights("efficientnet-lite0.pth"))  # all but the output layer
    freeze_backbone(model)                                          # train the head alone
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastconv import checkpoint, nn, torch_file

__all__ = [
    "Adapted",
    "backbone_modules",
    "expected_statistics",
    "freeze_backbone",
    "head",
    "load_pretrained",
    "output_layers",
    "read_weights",
]

Arrays = dict[str, NDArray[Any]]

# By the number of channels, in units of 255: those of torchvision, and their averages.
_IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}

# What a wrapper around the trained model puts before every key: DataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")


def read_weights(path: str | PathLike[str], key: str | None = None) -> Arrays:
    """The weights in a file, by name, whatever the file is called.

    Reads `.pth` and `.pt` files of torch.save, new and old format, without PyTorch and without
    running anything that is in them (see `fastconv.torch_file`), and safetensors files (needs the
    package safetensors). bfloat16 becomes float32, other types stay; the arrays may share memory
    and may be read-only.

    A checkpoint that holds a state_dict among other things ({"epoch": 3, "state_dict": {...}})
    gives the state_dict, where it has only one; `key` says which ("ema"), where it has several. A
    prefix "module." of all names, left by DataParallel, goes.

    Raises FileNotFoundError, or ValueError for a file that is damaged or of another kind, and where
    it is not clear which of its tensors are meant.
    """
    return _without_wrapper(_state_dict(path, _read(path)[0], key))


def _read(path: str | PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """What is in the file, and the information that `checkpoint` keeps beside weights."""
    with open(path, "rb") as file:
        start = file.read(16)
    # The header of safetensors: its length in 8 bytes, which may look like a pickle, then JSON.
    if start[8:9] == b"{":
        return checkpoint.load_weights(path)
    if torch_file.is_torch_file(start):
        return torch_file.read(path), {}
    raise ValueError(
        f"{path}: neither a file of torch.save nor a safetensors file, begins with {start!r}"
    )


def _state_dict(path: str | PathLike[str], found: Any, key: str | None) -> Arrays:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a state_dict")
    if key is not None:
        if not _is_state_dict(found.get(key)):
            raise ValueError(f"{path}: has no weights under {key!r}, its keys are {list(found)}")
        weights: Arrays = found[key]
        return weights
    if _is_state_dict(found):
        return found
    inner = [name for name, value in found.items() if _is_state_dict(value)]
    if len(inner) != 1:
        what = f"weights under each of {inner}: say which" if inner else "no state_dict"
        raise ValueError(f"{path}: {what}, its keys are {list(found)}")
    return _state_dict(path, found, inner[0])


def _is_state_dict(value: Any) -> bool:
    """Names and arrays, nothing else."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(array, np.ndarray) for array in value.values())
    )


def _without_wrapper(weights: Arrays) -> Arrays:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): array for name, array in weights.items()}
    return weights


# Transfer learning


def head(model: nn.Module) -> str:
    """The path of the model's head, the dense layers that turn features into classes.

    It is the child of the model that holds its last Linear layer, if that child is dense layers
    alone ("classifier" of VGG, "fc" of ResNet), else that Linear layer itself.
    Raises ValueError for a model without a Linear layer.
    """
    last = list(_linear_layers(model))[-1]
    child = last.partition(".")[0]
    parts = [m for m in dict(model.named_modules())[child].modules() if not any(m.children())]
    dense = all(isinstance(m, nn.Linear) or not any(m.parameters()) for m in parts)
    return child if dense else last


def output_layers(model: nn.Module) -> list[str]:
    """The paths of the Linear layers whose outputs are classes, the main one last.

    That is the model's last Linear layer, and with auxiliary heads (GoogLeNet, Inception) every
    child of the model that ends in a Linear layer of as many outputs.
    Raises ValueError for a model without a Linear layer.
    """
    layers = _linear_layers(model)
    last_of_child = {path.partition(".")[0]: path for path in layers}
    *others, main = last_of_child.values()
    classes = layers[main].out_features
    return [path for path in others if layers[path].out_features == classes] + [main]


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers by path, in order."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear layer, so no head to be found")
    return layers


class Adapted(NamedTuple):
    """What `load_pretrained` could not take as it was."""

    fresh: list[str]  # paths of output layers that kept their own weights
    grey: str | None  # path of the first convolution, if its filters became those of grey images


def load_pretrained(model: nn.Module, weights: Mapping[str, Any]) -> Adapted:
    """Loads weights that may have been trained for other classes, or for colour instead of grey.

    Everything must fit, as in load_state_dict, with two exceptions. Output layers whose number of
    outputs differs keep the model's own fresh weights. A first convolution for one channel, where
    the weights are for three, gets the sums over them: what the network would see of a grey image
    whose three channels are alike.
    Raises ValueError with every other key that does not fit.
    """
    own = model.state_dict()
    fresh = [
        path
        for path in output_layers(model)
        if f"{path}.weight" in weights
        and np.shape(weights[f"{path}.weight"])[:1] != own[f"{path}.weight"].shape[:1]
    ]
    skipped = {f"{path}.{name}" for path in fresh for name in ("weight", "bias")}
    fitting = {name: own[name] if name in skipped else value for name, value in weights.items()}

    first = next((p for p, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")
    key = f"{first}.weight"
    shape = own[key].shape if first else ()
    grey = shape[1:2] == (1,) and np.shape(weights.get(key, ())) == (shape[0], 3, *shape[2:])
    if grey:
        fitting[key] = np.asarray(weights[key]).sum(axis=1, keepdims=True)
    model.load_state_dict(fitting)
    return Adapted(fresh, first if grey else None)


def expected_statistics(
    path: str | PathLike[str], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) by channel, in units of 255, of the images that a file's weights were trained on.

    A file written by `fastconv.train` says so; of others the statistics of ImageNet, usual for
    weights, are assumed, for grey images their averages. None for any other number of channels.
    """
    info = _read(path)[1]
    if len(info.get("mean", ())) == channels == len(info.get("std", ())):
        return tuple(info["mean"]), tuple(info["std"])
    return _IMAGENET.get(channels)


def backbone_modules(model: nn.Module) -> list[nn.Module]:
    """Every module below the model that is not part of its head and holds no part of it."""
    top = head(model)
    return [
        module
        for path, module in model.named_modules()
        if path and not f"{path}.".startswith(f"{top}.") and not f"{top}.".startswith(f"{path}.")
    ]


def freeze_backbone(model: nn.Module) -> None:
    """Makes the backbone a fixed function: no gradients, and evaluation mode.

    In evaluation mode batch norm uses its running statistics, which then stay as they are, and
    there is no dropout. `model.train()` puts the whole model into training mode, so call this
    again after it.
    """
    for module in backbone_modules(model):
        module.training = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
