"""The benchmarks' arithmetic, and one quick run of each command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import inference, layers, measure, models, report, roofline, steps
from tests.cases import SMALLCNN


def row(
    ours: list[float], *, op: str = "fwd", tags: tuple[str, ...] = (), **peers: float
) -> report.Row:
    return report.Row(
        group="net",
        name="layer",
        op=op,
        threads=1,
        flops=6e9,
        bound=0.5,
        ours=measure.Samples(ours),
        peers={mode: measure.Samples([seconds]) for mode, seconds in peers.items()},
        tags=tags,
    )


def test_ratio_is_the_best_peer_over_our_median() -> None:
    result = row([1.0, 2.0, 6.0], NCHW=9.0, channels_last=5.0)
    assert result.best_peer == "channels_last"
    assert result.ratio == 2.5
    assert result.gflops == 3.0
    assert result.fraction == 0.25


def test_without_a_peer_there_is_no_ratio() -> None:
    assert row([1.0]).ratio is None
    assert "| -" in report.rows_table([row([1.0])])


def test_means_of_all_rows_of_each_set_and_of_each_tag() -> None:
    rows = [row([1.0], NCHW=1.0, tags=("1x1",)), row([1.0], op="dgrad", NCHW=4.0)]
    means = {mean.group: mean for mean in report.means(rows)}
    assert means["all"].ratios == {"fwd": 1, "all": pytest.approx(2), "dgrad": pytest.approx(4)}
    assert means["net"].ratios == means["all"].ratios
    assert means["1x1"].ratios == {"fwd": 1, "all": 1}
    assert means["all"].lowest_ratio == 1
    assert "| net " in report.means_table(list(means.values()))


def test_table_is_aligned() -> None:
    lines = report.table(["name", "ms"], [["a", "1.0"], ["long name", "10.0"]], left=1).split("\n")
    assert lines[2] == "| a         |  1.0 |"
    assert len({len(line) for line in lines}) == 1


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    samples = measure.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, budget=0, min_rounds=3
    )
    assert [len(s.seconds) for s in samples.values()] == [3, 3]
    order = "".join(calls)
    first, second, third = order.find("ab", 4), order.find("ba", 4), order.rfind("ab")
    assert 0 < first < second < third  # a b, then b a, then a b


def test_roofline_takes_the_bandwidth_of_the_nearest_working_set() -> None:
    limit = roofline.Roofline(threads=1, peak=100.0, bandwidth={10: 50.0, 1000: 5.0})
    assert limit.bound(flops=1000, traffic=20) == 10  # flops decide
    assert limit.bound(flops=0, traffic=20) == 0.4
    assert limit.bound(flops=0, traffic=900) == 180


def test_a_wrong_result_ends_the_run() -> None:
    case = layers.tiny(SMALLCNN[0])
    x, w, dy = layers.operands(case)
    ours = layers.our_call(case, "fwd", x, w, dy)
    right = np.array(ours())
    assert layers.compare(case, "fwd", ours, {"peer": lambda: right}) == {"peer": 0}
    with pytest.raises(SystemExit, match="differs from PyTorch peer"):
        layers.compare(case, "fwd", ours, {"peer": lambda: right * 1.001})


def test_layers_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "layers.json"
    options = [
        "--quick",
        "--set",
        "smallcnn",
        "--threads",
        "1",
        "--budget",
        "0",
        "--min-rounds",
        "2",
    ]
    layers.main([*options, "--json", str(path)])
    assert "smallcnn/3-32_3x3_32" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["environment"]["versions"]["torch"]
    assert len(content["results"]) == 3 * len(SMALLCNN)
    for result in content["results"]:
        assert set(result["peers"]) == {"NCHW", "channels_last"}
        assert len(result["fastconv"]["samples_ms"]) == 2


def test_steps_quick(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "steps.json"
    options = ["--quick", "--threads", "1", "--budget", "0", "--min-rounds", "2"]
    steps.main([*options, "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["peers"]) == {"NCHW", "channels_last"}
    assert max(result["difference"]) < steps.TOLERANCE


@pytest.mark.parametrize("runtimes", [False, True], ids=["torch", "runtimes"])
def test_inference_quick(tmp_path: Path, runtimes: bool) -> None:
    pytest.importorskip("torchvision")
    modes = {"NCHW", "channels_last"}
    if runtimes:
        for package in ("onnx", "onnxruntime", "openvino"):
            pytest.importorskip(package)
        modes |= {"ONNX Runtime", "OpenVINO"}
    path = tmp_path / "inference.json"
    options = ["--quick", "--models", "smallcnn", "--threads", "1", "--budget", "0"]
    options += [] if runtimes else ["--torch-only"]
    inference.main([*options, "--min-rounds", "2", "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["peers"]) == set(result["difference"]) == modes


def test_models_quick(tmp_path: Path) -> None:
    """Checks and timings in runs of their own, which complete one file."""
    pytest.importorskip("torchvision")
    path, page = tmp_path / "models.json", tmp_path / "models.md"
    files = ["--models", "lenet5,smallcnn", "--json", str(path), "--markdown", str(page)]
    models.main([*files, "--check", "--filter", "lenet5"])
    models.main([*files, "--quick", "--threads", "1", "--budget", "0", "--min-rounds", "2"])
    content = json.loads(path.read_text())
    assert [(r["name"], r["op"]) for r in content["results"]] == [
        (name, op) for name in ("lenet5", "smallcnn") for op in ("forward", "step")
    ]
    for result in content["results"]:
        assert set(result["peers"]) == {"NCHW", "channels_last"}
    lenet5, smallcnn = (line for line in page.read_text().split("\n") if line.startswith("| `"))
    assert "61,706" in lenet5 and lenet5.count("✓") == 4  # nobody published its multiply-adds
    assert "545,290" in smallcnn and "✓" not in smallcnn


def test_a_check_that_failed_or_did_not_run_has_no_tick() -> None:
    cases = {
        "test_parameters_and_keys[a]": "",
        "test_same_weights_give_the_same_logits[a]": "<failure/>",
        "test_same_gradients[a]": "<error/>",
        "test_published_figures[a]": "<skipped/>",
        "test_losses_stay_together[a-SGD]": "<failure/>",
        "test_losses_stay_together[a-AdamW]": "",
    }
    xml = "".join(f'<testcase name="{name}">{child}</testcase>' for name, child in cases.items())
    assert models.outcomes(f"<testsuite>{xml}</testsuite>") == {
        "a": {"keys": "passed", "logits": "failed", "gradients": "failed", "losses": "failed"}
    }


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit):
        layers.main(["--set", "resnet51"])
    with pytest.raises(SystemExit, match="nothing to measure"):
        layers.main(["--no-peer", "--filter", "no such layer", "--threads", "1"])
