"""Tuning: what is measured, what the file decides, and that nothing is decided without it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastconv as fc
from fastconv import nn, tuning
from tests.cases import ConvCase
from tests.conftest import forced
from tests.reference import assert_same_bits, normal
from tests.test_process import interpreter_environment

CASE = ConvCase("3x3", 2, 32, 13, 12, 48, 3, 3, padding=1)
DIRECTIONS = ("forward", "backward_input", "backward_weight")


def results(case: ConvCase = CASE) -> list[np.ndarray]:
    """y, dx, dw."""
    x, w = normal(case, "x", shape=case.x_shape), normal(case, "w", shape=case.w_shape)
    y = fc.conv2d(x, w, **case.arguments)
    return [y, *fc.conv2d_backward(y, x, w, **case.arguments, needs=(True, True, False))[:2]]


def rows(direction: str, case: ConvCase = CASE) -> list[tuple[str, str | None]]:
    return fc.explain(
        "conv2d", case.x_shape, case.w_shape, **case.arguments, direction=direction
    )  # fmt: skip


def content(**changes: Any) -> dict[str, Any]:
    """A file that has the direct engine run CASE in every direction."""
    choice = {
        "dtype": "float32",
        "x": CASE.x_shape,
        "w": CASE.w_shape,
        "stride": (1, 1),
        "padding": (1, 1, 1, 1),
        "dilation": (1, 1),
        "groups": 1,
        **{name: {"implementation": "direct", "ms": {}} for name in DIRECTIONS},
    }
    machine = {"isa": fc.isa(), "precision": "default"}
    return {"format": tuning.FORMAT, "machine": machine, "choices": [choice], **changes}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuning.json"


@contextmanager
def unchanged() -> Iterator[None]:
    before = [rows(direction) for direction in DIRECTIONS]
    yield
    assert [rows(direction) for direction in DIRECTIONS] == before
    assert fc.loaded_tuning() is None


def test_the_file_decides_for_its_problems(isa: str, path: Path) -> None:
    other = ConvCase("another batch", 3, 32, 13, 12, 48, 3, 3, padding=1)
    chosen, others = results(), results(other)
    with forced("direct"):
        direct = results()
    assert not np.array_equal(chosen[0], direct[0])  # or the test could not fail
    path.write_text(json.dumps(content()))
    fc.load_tuning(path)
    assert fc.loaded_tuning() == str(path)
    for found, expected in zip(results(), direct, strict=True):
        assert_same_bits(found, expected)
    for found, expected in zip(results(other), others, strict=True):
        assert_same_bits(found, expected)
    fc.load_tuning(None)
    for found, expected in zip(results(), chosen, strict=True):
        assert_same_bits(found, expected)
    assert fc.loaded_tuning() is None


def test_only_the_directions_of_the_file(path: Path) -> None:
    chosen = results()
    with forced("direct"):
        direct = results()
    whole = content()
    del whole["choices"][0]["forward"], whole["choices"][0]["backward_weight"]
    path.write_text(json.dumps(whole))
    fc.load_tuning(path)
    y, dx, dw = results()
    assert_same_bits(y, chosen[0])
    assert_same_bits(dw, chosen[2])
    with forced("winograd"):  # dy is the y of Winograd
        x, w = (normal(CASE, n, shape=s) for n, s in (("x", CASE.x_shape), ("w", CASE.w_shape)))
        y = fc.conv2d(x, w, **CASE.arguments)
    with forced("direct"):
        assert_same_bits(dx, fc.conv2d_backward(y, x, w, **CASE.arguments)[0])
    assert direct[1] is not None


def test_explain_names_the_file(path: Path) -> None:
    path.write_text(json.dumps(content()))
    assert rows("forward")[-1] == ("winograd", None)
    fc.load_tuning(path)
    for direction in DIRECTIONS:
        walk = rows(direction)
        assert walk[-1] == ("direct", None)
        assert dict(walk)["winograd"] == f"direct was chosen by tuning file '{path}'"
    whole = content()
    whole["choices"][0]["forward"]["implementation"] = "winograd"
    path.write_text(json.dumps(whole))
    fc.load_tuning(path)
    assert rows("forward")[-1] == ("winograd", None)
    fc.set_precision("strict")  # what declines cannot run
    walk = rows("forward")
    assert walk[-1] == ("direct", None)
    assert dict(walk)["winograd"] == f"chosen by tuning file '{path}', but strict precision"


def test_another_instruction_set_in_use_is_not_the_file_s(path: Path) -> None:
    path.write_text(json.dumps(content()))
    fc.load_tuning(path)
    previous = fc.isa()
    others = [name for name in fc.available_isas() if name != previous]
    if not others:
        pytest.skip("a single instruction set")
    try:
        fc._C.set_isa(others[0])
        assert fc.explain("conv2d", CASE.x_shape, CASE.w_shape, padding=1)[-1][0] == "winograd"
    finally:
        fc._C.set_isa(previous)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "format"),
        ({"machine": {"isa": "neon", "precision": "default"}}, "isa 'neon'"),
        ({"machine": {"isa": fc.isa(), "precision": "strict"}}, "precision 'strict'"),
        ({"machine": None}, "no machine"),
        ({"choices": [{"dtype": "float32"}]}, "must have"),
        ({"forward": {"implementation": "fft"}}, "no implementation 'fft' of forward"),
        ({"forward": {}}, "no implementation for forward"),
        ({"sideways": {"implementation": "direct"}}, "direction must be"),
        ({"w": (48, 31, 3, 3)}, "31"),
        ({"x": (1, 2)}, "tuning"),
        ({"dtype": "int8"}, "int8"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, path: Path
) -> None:
    whole = content()
    place = whole if set(change) <= set(whole) else whole["choices"][0]
    place.update(change)
    path.write_text(json.dumps(whole))
    with unchanged(), pytest.raises(ValueError, match=message) as error:
        fc.load_tuning(path)
    assert str(path) in str(error.value)


def test_no_json_and_no_file(path: Path) -> None:
    path.write_text("tuning")
    with unchanged(), pytest.raises(ValueError, match="cannot be used"):
        fc.load_tuning(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        fc.load_tuning(path)


def test_the_environment_variable(path: Path) -> None:
    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", f"import fastconv; {script}"],
            capture_output=True,
            text=True,
            env=interpreter_environment(FASTCONV_TUNING=str(path), FASTCONV_ISA=fc.isa()),
        )

    path.write_text(json.dumps(content()))
    assert run("print(fastconv.loaded_tuning())").stdout.strip() == str(path)
    path.write_text("{}")
    assert "cannot be used for tuning" in run("pass").stderr


class Net(nn.Module):
    """Every way in which a model meets a convolution."""

    def __init__(self) -> None:
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.5)
        self.twice = nn.Conv2d(16, 16, 1)

    def forward(self, x: Any) -> Any:
        y = self.norm(self.up(self.depthwise(self.first(x))))
        return {"one": self.twice(y), "two": (self.dropout(self.twice(y)),)}


def test_every_convolution_of_a_step_is_recorded() -> None:
    found: dict[Any, set[str]] = {}
    for (_, x, w, *_), direction in tuning._recorded(Net(), np.ones((2, 3, 9, 9), np.float32)):
        found.setdefault((x, w), set()).add(direction)
    whole = set(DIRECTIONS)
    assert found == {
        ((2, 3, 9, 9), (16, 3, 3, 3)): whole - {"backward_input"},  # images need no gradient
        ((2, 16, 9, 9), (16, 1, 3, 3)): whole,
        ((2, 16, 8, 8), (16, 16, 2, 2)): whole,  # the transposed one is an input gradient
        ((2, 16, 8, 8), (16, 16, 1, 1)): whole,
    }


def test_tuning_measures_and_changes_nothing(path: Path) -> None:
    model, images = Net(), np.ones((2, 3, 9, 9), np.float32)
    before, state = model.state_dict(), nn.get_rng_state()
    values = {key: np.array(value) for key, value in before.items()}
    with unchanged():
        found = fc.tune(model, images, path, rounds=1)
    assert nn.get_rng_state() == state and model.training
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, values[key])
    assert all(parameter.grad is None for parameter in model.parameters())
    for choice in found.choices:
        for direction in choice.keys() & set(DIRECTIONS):
            one = choice[direction]
            assert one["implementation"] in one["ms"] and len(one["ms"]) > 1
            assert "reference" not in one["ms"]
    assert json.loads(path.read_text())["machine"] == found.machine
    assert set(found.machine) == {"cpu", "isa", "threads", "precision", "version"}
    assert f"{len(found.choices)} convolutions" in str(found)
    fc.load_tuning(path)


def test_the_fastest_is_chosen_unless_noise_explains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"winograd": 1.0, "direct": 0.98}
    monkeypatch.setattr(tuning, "_measured", lambda call, names, rounds: times)
    model, images = nn.Conv2d(32, 32, 3, padding=1), np.ones((1, 32, 16, 16), np.float32)
    (choice,) = fc.tune(model, images).choices
    assert choice["forward"] == {"implementation": "winograd", "ms": times}
    times["direct"] = 0.9
    found = fc.tune(model, images)
    assert found.choices[0]["forward"]["implementation"] == "direct"
    assert "forward: direct 0.900 ms, winograd 1.000 ms" in str(found)


def test_what_cannot_be_tuned() -> None:
    with pytest.raises(ValueError, match="no convolution"):
        fc.tune(nn.ReLU(), np.ones((1, 3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="rounds"):
        fc.tune(nn.Conv2d(3, 3, 1), np.ones((1, 3, 4, 4), np.float32), rounds=0)


def test_forcing_stays_in_its_thread() -> None:
    seen: list[bool] = []
    chosen = results()[0]
    with forced("direct"):
        other = threading.Thread(target=lambda: seen.append(np.array_equal(results()[0], chosen)))
        other.start()
        other.join()
        assert not np.array_equal(results()[0], chosen)
    assert seen == [True]
