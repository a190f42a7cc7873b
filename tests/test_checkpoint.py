"""Weight files and training states: values come back, others can read them, damage is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastconv import checkpoint

safetensors = pytest.importorskip("safetensors.numpy")

STATE = {
    "model": {
        "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
        "bn.num_batches_tracked": np.array(7, np.int64),
    },
    "optimizer": {
        "state": {
            0: {"step": 3, "exp_avg": np.ones(5)},
            1: {"step": 4, "exp_avg": np.zeros((0, 2))},
        },
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "nesterov": True, "params": [0, 1]}],
    },
    "random": (2**64 - 1, 12),
    "numbers": [0.1, 1e-300, float("inf"), -0.0, np.float32(0.1), np.int64(3)],
    "nothing": None,
    "text": "$äöü",
    "$array": "a key that looks like a mark",
}


def test_state_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, STATE, {"model": "smallcnn"})
    state, info = checkpoint.load_state(path)
    assert info == {"model": "smallcnn"}
    assert list(state) == list(STATE)
    np.testing.assert_array_equal(state["model"]["conv.weight"], STATE["model"]["conv.weight"])
    assert state["model"]["bn.num_batches_tracked"].shape == ()
    assert state["model"]["bn.num_batches_tracked"].dtype == np.int64
    assert list(state["optimizer"]["state"]) == [0, 1]
    assert state["optimizer"]["state"][1]["exp_avg"].shape == (0, 2)
    assert state["optimizer"]["state"][0]["exp_avg"].dtype == np.float64
    assert state["optimizer"]["param_groups"] == [
        {"lr": 0.1, "betas": [0.9, 0.999], "nesterov": True, "params": [0, 1]}
    ]
    assert state["random"] == [2**64 - 1, 12]
    assert state["numbers"] == [0.1, 1e-300, float("inf"), -0.0, float(np.float32(0.1)), 3]
    assert str(state["numbers"][3]) == "-0.0"
    assert state["nothing"] is None
    assert state["text"] == "$äöü"
    assert state["$array"] == "a key that looks like a mark"


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    """In other processes too, where strings hash differently."""
    code = (
        "import sys, numpy as np; from fastconv import checkpoint;"
        "checkpoint.save_state(sys.argv[1], {'model': {str(i): np.full(3, i) for i in range(9)}},"
        " {'a': 1, 'b': 2})"
    )
    files = [tmp_path / name for name in ("one", "two")]
    for seed, file in enumerate(files):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=environment)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_any_memory_order_is_saved_by_its_values(tmp_path: Path) -> None:
    dense = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    last = np.ascontiguousarray(dense.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    path = tmp_path / "weights.safetensors"
    checkpoint.save_weights(path, {"dense": dense, "last": last, "every other": dense[:, :, ::2]})
    weights, _ = checkpoint.load_weights(path)
    np.testing.assert_array_equal(weights["last"], dense)
    np.testing.assert_array_equal(weights["every other"], dense[:, :, ::2])


def test_weights_are_plain_safetensors_with_plain_names(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    checkpoint.save_weights(path, STATE["model"], {"classes": ["a", "b"]})
    assert set(safetensors.load_file(path)) == set(STATE["model"])
    weights, info = checkpoint.load_weights(path)
    assert set(weights) == set(STATE["model"])
    assert info == {"classes": ["a", "b"]}
    with pytest.raises(ValueError, match=r"weights\.safetensors: not a training state"):
        checkpoint.load_state(path)


def test_weights_of_a_training_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, STATE, {"model": "smallcnn"})
    weights, info = checkpoint.load_weights(path)
    assert set(weights) == set(STATE["model"])
    assert info == {"model": "smallcnn"}


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.save_file({"w": np.ones(3, np.float32)}, path, metadata={"format": "pt"})
    weights, info = checkpoint.load_weights(path)
    assert weights["w"].tolist() == [1, 1, 1]
    assert info == {}


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "huge header"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, STATE)
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[: len(content) - 7],
            "text": b"not a weight file at all",
            "huge header": (2**63 - 1).to_bytes(8, "little") + content[8:],
        }[damage]
    )
    with pytest.raises(ValueError, match=r"state\.safetensors: not a readable safetensors file"):
        checkpoint.load_state(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_weights(tmp_path / "missing.safetensors")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    metadata = {"fastconv": json.dumps({"format": 99, "kind": "weights"})}
    safetensors.save_file({"w": np.ones(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        checkpoint.load_weights(path)


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, {"model": {}, "step": 1})

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save_state(path, {"model": {}, "step": 2})
    assert checkpoint.load_state(path)[0]["step"] == 1
    checkpoint.save_state(
        path, {"model": {}, "step": 3}
    )  # the left-over temporary is in no one's way
    assert checkpoint.load_state(path)[0]["step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_without_safetensors_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install 'fastconv\[train\]'"):
        checkpoint.save_weights(tmp_path / "weights.safetensors", {})
