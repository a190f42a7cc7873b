"""Which implementation of a convolution is fastest here: measured, written down, and used.

    fastconv.tune(model, images, "resnet50.tuning.json")  # measures; changes nothing
    fastconv.load_tuning("resnet50.tuning.json")          # from now on, in this process

A tuning file is plain JSON: the machine, and for each convolution of a training step and of a
forward pass in eval mode which implementation runs forward and both gradients, with the times that
were measured. It can be shipped with a program: it holds for the same instruction set, for exactly
its shapes (batch included), for any number of threads. Another implementation adds in another
order, so loading a file changes results by rounding; therefore nothing is ever loaded unless the
program calls `load_tuning` or its user sets FASTCONV_TUNING to a file.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fastconv import _C, __version__, runtime
from fastconv.checkpoint import atomic_write

__all__ = ["Tuning", "load_tuning", "loaded_tuning", "tune"]

FORMAT = "fastconv tuning 1"
# As the compiled module has a problem, and the names of its parts in a file.
Four: TypeAlias = tuple[int, int, int, int]
Two: TypeAlias = tuple[int, int]
Problem: TypeAlias = tuple[str, Four, Four, Two, Four, Two, int]
PARTS = ("dtype", "x", "w", "stride", "padding", "dilation", "groups")
DIRECTIONS = ("forward", "backward_input", "backward_weight")

SAMPLE_SECONDS = 1e-3  # shorter calls are timed several at a time
WARM_UP = 3  # calls that tell how long one takes; the fastest counts
HOPELESS = 4.0  # times the fastest after the warm-up: measured no more
MARGIN = 0.97  # of the time of the library's own choice: what noise cannot explain


@dataclass(frozen=True)
class Tuning:
    """What a tuning file holds.

    machine: where it was measured: cpu, isa, threads, precision, version.
    choices: a dict a convolution: dtype, the shapes x and w, stride, padding (top, bottom, left,
        right), dilation, groups; and for each direction that occurs {"implementation": what runs,
        "ms": {implementation: milliseconds}}, the library's own choice first. A direction that only
        one implementation computes is left out.
    """

    machine: dict[str, Any]
    choices: list[dict[str, Any]]

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the file that `load_tuning` reads."""
        head = json.dumps({"format": FORMAT, "machine": self.machine}, indent=1)
        lines = ",\n  ".join(json.dumps(choice) for choice in self.choices)  # one a convolution
        text = head.removesuffix("\n}") + f',\n "choices": [\n  {lines}\n ]\n}}\n'
        atomic_write(path, text.encode())

    def as_dict(self) -> dict[str, Any]:
        """Machine and choices as dicts, lists and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """How much was measured, and a line for each choice that is not the library's own."""
        made = [
            (choice, direction, choice[direction])
            for choice in self.choices
            for direction in DIRECTIONS
            if direction in choice
        ]
        lines = []
        for choice, direction, one in made:
            own = next(iter(one["ms"]))
            if one["implementation"] != own:
                chosen, before = one["ms"][one["implementation"]], one["ms"][own]
                lines.append(
                    f"x {choice['x']} w {choice['w']} {direction}: {one['implementation']} "
                    f"{chosen:.3f} ms, {own} {before:.3f} ms"
                )
        lines.append(
            f"{len(self.choices)} convolutions, {len(made)} choices, {len(lines)} of them other "
            "than the library's own"
        )
        return "\n".join(lines)


def tune(
    model: Callable[..., Any],
    input: Any,
    path: str | PathLike[str] | None = None,
    *,
    rounds: int = 7,
) -> Tuning:
    """Measures every implementation of every convolution of a model; writes the file `path`.

    A copy of the model runs one training step and one forward pass in eval mode on `input` (what
    the model takes: images [N, C, H, W]); then each distinct convolution is timed by itself, on
    random numbers, with the threads and the precision in use, `rounds` rounds in which the
    implementations take turns. Another than the library's own is chosen where its median is at
    least 3% lower. The model, the library's random numbers and what other threads of the process
    compute stay as they are; nothing is loaded.

    Raises ValueError when rounds < 1 or the model runs no convolution.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    found: dict[Problem, set[str]] = {}
    for problem, direction in _recorded(model, input):
        found.setdefault(problem, set()).add(direction)
    if not found:
        raise ValueError(f"{type(model).__name__} runs no convolution on this input")
    choices = [_choice(problem, directions, rounds) for problem, directions in found.items()]
    tuning = Tuning(_machine(), [choice for choice in choices if choice.keys() - set(PARTS)])
    if path is not None:
        tuning.save(path)
    return tuning


def load_tuning(path: str | PathLike[str] | None) -> None:
    """From now on, in the whole process, the convolutions of this file run as it says.

    It takes the place of a file loaded before; None: as if none had been. Convolutions that are not
    in the file are chosen as always; so is one whose implementation declines, such as Winograd
    after ``set_precision("strict")``. `fastconv.explain` shows what the file decided.

    Raises OSError when the file cannot be read, ValueError when it is no tuning file, was made for
    another instruction set or precision, or names an implementation that there is not.
    """
    if path is None:
        _C.set_tuning("", "", [])
        return
    name = fspath(path)
    try:
        content = json.loads(Path(path).read_text())
        machine, choices = _checked(content)
        _C.set_tuning(name, machine["isa"], choices)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} cannot be used for tuning: {error}") from None


def loaded_tuning() -> str | None:
    """The path of the tuning file in use."""
    return _C.tuning_source() or None


def _machine() -> dict[str, Any]:
    from fastconv.info import cpu_model

    return {
        "cpu": cpu_model(),
        "isa": runtime.isa(),
        "threads": runtime.get_num_threads(),
        "precision": runtime.get_precision(),
        "version": __version__,
    }


def _checked(content: Any) -> tuple[dict[str, Any], list[tuple[Problem, str, str]]]:
    """Machine, and (problem, direction, implementation) of each choice; ValueError, TypeError."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'it has no entry "format": "{FORMAT}"')
    machine, choices = content.get("machine"), content.get("choices")
    if not isinstance(machine, dict) or not isinstance(choices, list):
        raise ValueError("it has no machine or no choices")
    for key, here in (("isa", runtime.isa()), ("precision", runtime.get_precision())):
        if machine.get(key) != here:
            raise ValueError(f"it was made for {key} {machine.get(key)!r}, in use is {here!r}")
    made = []
    for choice in choices:
        if not isinstance(choice, dict) or not set(PARTS) <= choice.keys():
            raise ValueError(f"a choice must have {', '.join(PARTS)}, got {choice!r}")
        problem: Any = tuple(choice[part] for part in PARTS)
        for direction in choice.keys() - set(PARTS):
            name = choice[direction].get("implementation")
            if not isinstance(name, str):
                raise ValueError(f"no implementation for {direction} of {choice!r}")
            made.append((problem, direction, name))
    return machine, made


def _recorded(model: Callable[..., Any], input: Any) -> Iterator[tuple[Problem, str]]:
    """The convolutions of a training step and of a forward pass in eval mode of a copy."""
    from fastconv import nn
    from fastconv.tensor import Tensor, no_grad

    images = input if isinstance(input, Tensor) else Tensor(input)
    twin, state = copy.deepcopy(model), nn.get_rng_state()
    _C.start_recording()
    try:
        if isinstance(twin, nn.Module):
            twin.train()
        loss = sum((y.sum() for y in _tensors(twin(images))), Tensor(np.float32(0)))
        if loss.requires_grad:
            loss.backward()
        if isinstance(twin, nn.Module):
            twin.eval()
        with no_grad():
            twin(images)
    finally:
        problems = _C.stop_recording()
        nn.set_rng_state(state)
    for parts, direction in problems:
        problem: Any = tuple(tuple(p) if isinstance(p, list) else p for p in parts)
        yield problem, direction


def _tensors(output: Any) -> Iterator[Any]:
    """Of what a model returns: a tensor, or tensors in tuples, lists and dicts."""
    if hasattr(output, "requires_grad"):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _choice(problem: Problem, directions: set[str], rounds: int) -> dict[str, Any]:
    choice: dict[str, Any] = dict(zip(PARTS, problem, strict=True))
    calls: dict[str, Callable[[], object]] = {}
    for direction in DIRECTIONS:
        # The reference is there to be right, and comes last; alone, it is no choice.
        names = [n for n in _C.conv2d_candidates(problem, direction) if n != "reference"]
        if direction in directions and len(names) > 1:
            calls = calls or _calls(problem)
            milliseconds = _measured(calls[direction], names, rounds)
            best = min(milliseconds, key=milliseconds.__getitem__)
            if milliseconds[best] > MARGIN * milliseconds[names[0]]:
                best = names[0]
            choice[direction] = {"implementation": best, "ms": milliseconds}
    return choice


def _calls(problem: Problem) -> dict[str, Callable[[], object]]:
    """Each direction on random operands in channels-last memory."""
    dtype, x_shape, w_shape, stride, padding, dilation, groups = problem
    rng = np.random.default_rng(0)

    def operand(shape: Sequence[int]) -> np.ndarray:
        n, c, h, w = shape
        return rng.standard_normal((n, h, w, c), np.dtype(dtype).type).transpose(0, 3, 1, 2)

    settings = stride, padding, dilation, groups
    x, w = operand(x_shape), operand(w_shape)
    dy = operand(_C.conv2d_output_shape(list(x_shape), list(w_shape), *settings))
    return {
        "forward": lambda: _C.conv2d(x, w, None, None, *settings, ""),
        "backward_input": lambda: _C.conv2d_backward(dy, x, w, *settings, [True, False, False]),
        "backward_weight": lambda: _C.conv2d_backward(dy, x, w, *settings, [False, True, False]),
    }


def _measured(call: Callable[[], object], names: Sequence[str], rounds: int) -> dict[str, float]:
    """The median milliseconds of each implementation."""

    def seconds(name: str, times: int) -> float:
        _C.set_algorithm(name)  # of this thread alone
        try:
            start = time.perf_counter()
            for _ in itertools.repeat(None, times):
                call()
            return (time.perf_counter() - start) / times
        finally:
            _C.set_algorithm("")

    first = {name: min(seconds(name, 1) for _ in range(WARM_UP)) for name in names}
    fastest = min(first.values())
    times = max(1, round(SAMPLE_SECONDS / max(fastest, 1e-9)))
    running = [name for name in names if first[name] <= HOPELESS * fastest]
    samples = {name: [] if name in running else [first[name]] for name in names}
    for i in range(rounds):
        for name in running[i % len(running) :] + running[: i % len(running)]:
            samples[name].append(seconds(name, times))
    return {name: round(statistics.median(of) * 1e3, 4) for name, of in samples.items()}
