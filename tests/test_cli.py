"""The command line: results on stdout, one-line errors on stderr, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastconv
from fastconv import cli, train

QUICK = ("--model=lenet5", "--epochs=1", "--batch-size=250")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCONV_DEBUG", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The message of a command that fails with one line."""
    found, out, err = run(capsys, *arguments)
    assert found == code, err
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("fastconv: error: ")
    assert "Traceback" not in err
    return last.removeprefix("fastconv: error: ")


def as_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastconv", *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"fastconv {fastconv.__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("train", "eval", "show", "summary", "tune", "info"):
        assert command in out
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert "--checkpoint-every" in out


def test_defaults_in_the_help_are_those_of_the_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = " ".join(run(capsys, "train", "--help")[1].split())
    config = train.TrainConfig()
    for option, value in (
        ("--model NAME name of the model", config.model),
        ("--epochs N times through the training images", config.epochs),
        ("--batch-size N images a batch, in each process", config.batch_size),
        ("--warmup-steps N steps of linear warm-up", config.warmup_steps),
        ("--log-every N steps between two lines of metrics.jsonl", config.log_every),
        ("--checkpoint-every N steps between two checkpoints", config.checkpoint_every),
        ("--prefetch N batches prepared ahead", config.prefetch),
    ):
        assert f"{option} ({value})" in out


def test_python_m_fastconv() -> None:
    done = as_module("--version")
    assert (done.returncode, done.stdout) == (0, f"fastconv {fastconv.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("train", "--speed=9"), "unrecognized arguments: --speed=9"),
        (("train", "--epochs=many"), "--epochs: invalid int value: 'many'"),
        (("train", "--epochs=0"), "epochs must be at least 1 and below inf, got 0"),
        (("train", "--milestones=3,x"), "expected numbers as 10,15, got '3,x'"),
        (("train", "--hue=0.7"), "hue must lie between 0 and 0.5, got 0.7"),
        (("train", "--lr=nan"), "lr must be at least 0 and below inf, got nan"),
        (("train", "--model=vgg99"), "unknown model 'vgg99', expected one of"),
        (("train", "--data=svhn"), "unknown data 'svhn'"),
        (("train", "--data=cifar10"), "'cifar10' is read from files"),
        (("train", "--data=mnist", "--data-dir=nowhere"), "nowhere: no such folder"),
        (("train", "--out=a", "--resume=b"), "--resume: not allowed with argument --out"),
        (("train", "--resume=nowhere"), "nowhere: no run to resume here"),
        (("eval", "nowhere.safetensors"), "nowhere.safetensors"),
        (("eval",), "required: CHECKPOINT"),
        (("summary", "vgg99"), "unknown model 'vgg99'"),
        (("summary", "smallcnn", "--input-size=3,32"), "expected C,H,W, got '3,32'"),
        (("summary", "smallcnn", "--input-size=3,0,32"), "sizes must be positive, got '3,0,32'"),
        (("summary", "smallcnn", "--input-size=3,32,16"), "square images, got 32 x 16"),
        (("summary", "smallcnn", "--input-size=3,2,2"), "2"),
        (("tune", "smallcnn", "--batch-size=0"), "batch-size must be at least 1, got 0"),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in error_of(capsys, *arguments)
    assert os.listdir() == []  # nothing is left behind


def test_failures_on_the_way_have_another_code(capsys: pytest.CaptureFixture[str]) -> None:
    wild = ("--optimizer=sgd", "--lr=1e30", "--warmup-steps=0", "--no-save")
    message = error_of(capsys, "train", *QUICK, *wild, code=1)
    assert "the loss is" in message


def test_unexpected_errors_are_one_line_unless_debugged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(train.loop, "evaluate", broken)
    arguments = ("train", *QUICK, "--no-save")
    assert error_of(capsys, *arguments, code=1) == "KeyError: 'surprise'"
    monkeypatch.setenv("FASTCONV_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(arguments)


def test_train_and_eval(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    code, out, err = run(capsys, "train", *QUICK, "--json", "--seed=3", "--threads=2")
    assert code == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert 0 <= result["test_accuracy"] <= 1
    assert result["images_per_second"] > 0
    assert (result["epochs"], result["steps"], result["seed"]) == (1, 16, 3)
    assert (result["model"], result["data"], result["out"]) == (
        "lenet5", "mnist5k", "runs/lenet5-mnist5k",
    )  # fmt: skip
    assert "epoch 1/1" in err
    assert "\x1b" not in err

    best = "runs/lenet5-mnist5k/best.safetensors"
    code, out, _ = run(capsys, "eval", "runs/lenet5-mnist5k", "--json", "--batch-size=333")
    assert code == 0
    measured = json.loads(out)
    assert measured["checkpoint"] == best
    assert measured["accuracy"] == result["best_test_accuracy"]
    assert (measured["images"], measured["split"]) == (1000, "test")
    assert measured["accuracy"] <= measured["top5_accuracy"] <= 1
    assert sum(measured["confusion"][i][i] for i in range(10)) == 1000 * measured["accuracy"]
    assert list(measured["class_accuracies"]) == list("0123456789")
    code, out, _ = run(capsys, "eval", best, "--split=train", "--threads=1")
    assert code == 0
    *table, figures = out.splitlines()
    assert table[0].split() == [*"0123456789", "right"]
    assert [row.split()[0] for row in table[1:]] == list("0123456789")
    assert len({len(row) for row in table}) == 1
    assert figures.startswith("accuracy ")
    assert ", top-5 " in figures
    assert figures.endswith(" on 4,000 images")
    assert "threads must be at least 1, got 0" in error_of(capsys, "eval", best, "--threads=0")
    assert "batch_size must be at least 1" in error_of(capsys, "eval", best, "--batch-size=0")

    # Without --out a second run gets a folder of its own; with the same --out it is refused.
    code, out, _ = run(capsys, "train", *QUICK)
    assert code == 0
    assert out.splitlines()[0].startswith("test accuracy ")
    assert out.splitlines()[1] == "run in runs/lenet5-mnist5k-2"
    again = ("train", *QUICK, "--out=runs/lenet5-mnist5k")
    assert "holds a run already" in error_of(capsys, *again)
    assert run(capsys, *again, "--overwrite")[0] == 0

    resume = ("train", "--resume=runs/lenet5-mnist5k-2")
    assert run(capsys, *resume, "--json")[0] == 0
    assert "keeps its epochs" in error_of(capsys, *resume, "--epochs=9")
    Path(best).write_bytes(b"damaged")
    assert "not a readable safetensors file" in error_of(capsys, "eval", best)


def test_eval_refuses_data_of_another_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    assert run(capsys, "train", *QUICK, "--out=run")[0] == 0
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 * 2))
    message = error_of(
        capsys, "eval", "run/last.safetensors", "--data=cifar10", f"--data-dir={tmp_path}"
    )
    assert "takes images (28, 28, 1) of 10 classes, cifar10 has (28, 28, 3)" in message


def test_show(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    assert run(capsys, "train", *QUICK, "--out=run")[0] == 0
    code, out, _ = run(capsys, "show", "run", "--index=7", "--layers=features.0,features.2")
    assert (code, out) == (0, "run/filters.png\nrun/features.png\n")
    code, out, _ = run(capsys, "show", "run/last.safetensors", "--out=pictures", "--json")
    assert (code, json.loads(out)) == (
        0, {"pictures": ["pictures/filters.png", "pictures/features.png"]},
    )  # fmt: skip
    assert "no layer 'conv9'" in error_of(capsys, "show", "run", "--layers=conv9")
    assert "not allowed with" in error_of(capsys, "show", "run", "--image=a.png", "--index=1")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = error_of(capsys, "show", "run", code=1)
    assert message == "pictures need matplotlib: pip install 'fastconv[plot]'"


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "summary", "smallcnn")
    assert code == 0
    assert out.splitlines()[0] == "SmallCNN, input 3x32x32, one image"
    assert out.splitlines()[-1].split()[:2] == ["total", "545,290"]
    code, out, _ = run(
        capsys, "summary", "smallcnn", "--input-size=1,28,28", "--num-classes=7", "--json"
    )
    assert code == 0
    summary = json.loads(out)
    assert summary["input_shape"] == [1, 28, 28]
    assert summary["rows"][-1]["output_shape"] == [7]


def test_tune(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("tune", "resnet8_cifar", "--batch-size=2", "--threads=1")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out.endswith("written to tuning.json\n") and "convolutions" in out
    code, out, _ = run(capsys, *arguments, "--out=other.json", "--json")
    assert code == 0
    assert json.loads(out) | {"format": "fastconv tuning 1"} == json.loads(
        Path("other.json").read_text()
    )
    fastconv.load_tuning("other.json")
    assert f"{'tuning':<16} other.json" in run(capsys, "info")[1]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert fastconv.__version__ in out
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    assert out.count("\n") == 1
    assert isinstance(json.loads(out), dict)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m fastconv summary resnet20_cifar | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "ResNet, input 3x32x32, one image\n"
    assert done.stderr == ""
