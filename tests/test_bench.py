"""The benchmarks' arithmetic, and one quick run of each command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastconv
from bench import inference, layers, measure, models, performance, report, roofline, steps
from fastconv.models import create as create_model
from tests.cases import NETWORKS, SMALLCNN
from tests.test_process import interpreter_environment


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


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 32) for name in ("smallcnn", "resnet18_cifar", "resnet20_cifar")),
        *((name, 224) for name in ("resnet50", "densenet121", "googlenet", "efficientnet_b0")),
    ],
)
def test_the_layer_sets_are_those_of_the_models(name: str, size: int) -> None:
    """They are written by hand; the record of a forward pass tells whether they are complete."""
    model = create_model(name, image_size=size).eval()
    fastconv._C.start_recording()
    with fastconv.no_grad():
        model(np.zeros((1, 3, size, size), np.float32))
    recorded = {
        (*x[1:], *w, stride[0], padding[0], groups)
        for (_, x, w, stride, padding, _, groups), _ in fastconv._C.stop_recording()
        if x[2] > 1  # dense layers run as 1x1 convolutions of one pixel
    }
    assert recorded == {
        (*case.x_shape[1:], *case.w_shape, case.stride, case.padding, case.groups)
        for case in NETWORKS[name]
    }


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


def test_steps_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss further from the peer's than its layouts are from each other ends the run."""
    monkeypatch.setattr(steps, "step", lambda *_: fastconv.Tensor(1.0))
    model, (images, labels) = create_model("smallcnn"), steps.batch(2, (3, 32, 32))

    def compare(*theirs: float) -> list[float]:
        losses = {f"layout {i}": [loss] for i, loss in enumerate(theirs)}
        peer = SimpleNamespace(without_noise=lambda _: None, losses=lambda *_: losses)
        return steps.compare("m", model, images, labels, steps.SGD, peer)  # type: ignore[arg-type]

    near, far = 1 + 0.5 * steps.TOLERANCE, 1 + 1.5 * steps.TOLERANCE
    assert compare(1.0, 1.0) == [0]
    assert compare(near, near) == [pytest.approx(near - 1)]
    assert compare(far, near) == [pytest.approx(far - 1)]
    for theirs in [(far,), (far, far), (far, far + 0.1 * steps.TOLERANCE), (float("nan"),)]:
        with pytest.raises(SystemExit, match=r"m: the loss of step 1 is 1, PyTorch's .*layout 0"):
            compare(*theirs)


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
    assert result["not_frozen_ms"] > 0


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


def results_file(folder: Path, name: str, rows: list[report.Row], isa: str = "avx512") -> None:
    limit = roofline.Roofline(threads=1, peak=1e11, bandwidth={10: 5e10, 1000: 5e9})
    environment = {**report.environment(), "isa": isa}
    report.write_json(
        folder / f"{name}.json",
        {
            "bench": name,
            "environment": environment,
            "roofline": [limit.as_json()],
            "results": [row.as_json() for row in rows],
        },
    )


def layer(name: str, op: str, peer: float, *, group: str = "resnet50", tag: str = "") -> report.Row:
    case = {"r": 5, "s": 5, "stride": 1, "c": 32, "k": 64, "groups": 2}
    details = {"case": case, "traffic": 1e6}
    return replace(
        row([1.0, 1.0], op=op, tags=(tag,), NCHW=peer), group=group, name=name, details=details
    )


def test_a_row_is_read_back_as_it_was_written() -> None:
    written = layer("a", "fwd", 2.0, tag="1x1")
    content = json.loads(json.dumps(written.as_json()))
    assert report.row_from_json(content) == written
    assert report.row_from_json(json.loads(json.dumps(row([1.0]).as_json()))).ratio is None


def test_targets_are_judged_by_mean_and_lowest(tmp_path: Path) -> None:
    tag, tag5 = "3x3 s1 C,K>=64", "5x5 s1"
    results_file(
        tmp_path,
        "layers-resnet50",
        [
            layer("a", "fwd", 4.0, tag=tag),
            layer("b", "dgrad", 1.9, tag=tag),  # a mean of 2.76, but one below 2.0
            layer("c", "wgrad", 3.3, tag=tag),
            layer("d", "fwd", 0.5, tag=tag5),
        ],
    )
    results_file(tmp_path, "layers-avx2", [layer("a", "fwd", 3.0)], isa="avx2")
    step = replace(row([1.0], op="step", NCHW=3.5), group="steps", name="smallcnn batch 128 of 32")
    right = replace(step, details={"batch": 128, "least_flops": 0.5e11})
    wrong = replace(step, details={"batch": 1})
    slower = replace(right, peers={"NCHW": measure.Samples([9.0])})
    compiled = replace(right, peers={**right.peers, "compiled NCHW": measure.Samples([4.0])})
    results_file(tmp_path, "steps", [slower, wrong])
    results_file(tmp_path, "steps-smallcnn", [compiled])  # counts, having more peers
    runs = performance.load(tmp_path)
    assert [run.name for run in runs] == [
        "layers-resnet50",
        "layers-avx2",
        "steps",
        "steps-smallcnn",
    ]
    lines = performance.targets_table(runs).splitlines()

    def cells(work: str) -> list[str]:
        (line,) = (line for line in lines if line.startswith(f"| {work} "))
        return [cell.strip() for cell in line.strip("|").split("|")][1:]

    assert cells("3x3 stride 1, C, K >= 64: forward, input gradient") == [
        "1", "2", "2.60x", "2.76x", "127.63x", "2.00x", "1.90x", "no"
    ]  # fmt: skip
    assert cells("3x3 stride 1, C, K >= 64: weight gradient")[-1] == "yes"
    assert cells("5x5 stride 1")[-2:] == ["0.50x", "no"]
    assert cells("training step: smallcnn b128")[1:] == [
        "1", "3.00x", "3.50x", "7.00x", "-", "3.50x", "yes"
    ]  # fmt: skip
    assert cells("training step: vgg16 b4")[-1] == "not measured"
    assert cells("AVX2 on both sides: the layers of the four networks")[3] == "3.00x"
    assert cells("all layers of ResNet-50, VGG-16, SmallCNN, EfficientNet-B0")[1] == "4"


def test_the_fewest_multiplications() -> None:
    """Winograd's tiles in six points an axis, where the library has them; else those of a sum."""
    fewer = roofline.fewer_multiplications
    assert fewer((3, 3), 1, 64, 64, "dgrad") == 4
    assert fewer((5, 5), 1, 64, 64, "wgrad") == pytest.approx(100 / 36)
    assert fewer((7, 7), [1, 1], 64, 64, "fwd") == pytest.approx(49 * 9 / 121)
    assert fewer((1, 7), (1, 1), 64, 64, "fwd") == pytest.approx(7 * 3 / 11)
    assert [fewer((3, 3), 1, 3, 64, op) for op in ("fwd", "dgrad", "wgrad")] == [2, 1, 2]
    assert fewer((3, 3), (2, 1), 64, 64, "fwd") == fewer((3, 3), 1, 64, 8, "fwd") == 1
    assert fewer((1, 1), 1, 64, 64, "fwd") == fewer((2, 2), 1, 64, 64, "fwd") == 1


def test_least_flops_of_a_model() -> None:
    """SmallCNN: the first layer's input gradient is left out, dense layers count as they are."""
    model, (images, _) = create_model("smallcnn"), steps.batch(2, (3, 32, 32))
    first, second, dense = (2 * 2 * n for n in (32 * 32 * 27 * 32, 16 * 16 * 288 * 64, 525_568))
    assert steps.least_flops(model, images, ("fwd",)) == first / 2 + second / 4 + dense
    assert steps.least_flops(model, images) == 2 * first / 2 + 3 * (second / 4 + dense)


def test_the_page_has_every_loss_and_its_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [layer("won", "fwd", 2.0), layer("lost", "dgrad", 0.4), layer("drawn", "wgrad", 0.9)]
    results_file(tmp_path, "layers-resnet50", rows)
    page = tmp_path / "docs" / "page.md"
    performance.main(["--folder", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    lost = text.partition("Where PyTorch is faster")[2]
    assert lost.index("lost") < lost.index("drawn") and "won" not in lost
    for name in ("performance_ratio.png", "performance_roofline.png"):
        assert f"({name})" in text and (page.parent / name).stat().st_size > 1000
    assert performance.losses([rows[0]]) == "None."


def test_runs_that_have_their_file_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, returncode=1)

    results_file(tmp_path, "layers-resnet50", [layer("a", "fwd", 2.0)])
    monkeypatch.setattr(performance.subprocess, "run", fake)
    performance.measure(tmp_path)
    assert len(ran) == len(performance.RUNS) - 1
    assert not any("resnet50" in command for command in ran[:4])
    assert all(command[-2:][0] == "--json" for command in ran)


def test_the_runs_are_commands_that_parse() -> None:
    for name, (module, *words) in performance.RUNS.items():
        parse = {"bench.layers": layers.parse, "bench.steps": steps.parse}.get(module)
        if parse and "--avx2" not in words:
            assert parse(words).budget > 0, name


def test_layers_fall_into_the_kinds_of_the_targets() -> None:
    cases = {case.name: layers.tags(case) for network in NETWORKS.values() for case in network}
    assert cases["resnet50/64-64_3x3_56"] == ("3x3 s1 C,K>=64",)
    assert cases["resnet50/64-256_1x1_56"] == ("1x1", "1x1 at 56")
    assert cases["resnet50/3-64_7x7_224_s2"] == ("7x7 s2 C=3",)
    assert cases["vgg16/3-64_3x3_224"] == ("3x3 C=3",)
    assert cases["efficientnet_b0/dw144_5x5_56_s2"] == ("depthwise", "depthwise 5x5")
    assert cases["kinds/256-256_3x3_28_d2"] == ("dilated 3x3",)
    assert cases["kinds/128-128_3x3_56_g32"] == ("grouped",)
    known = {tag for kinds in cases.values() for tag in kinds}
    assert {t.tag for t in performance.TARGETS if t.tag} <= known


def test_avx2_holds_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    if "avx2" not in fastconv.available_isas():
        pytest.skip("no AVX2 here")
    path = tmp_path / "layers.json"
    script = (
        "from bench import layers; layers.main(['--avx2', '--quick', '--set', 'smallcnn', '--ops',"
        f"'fwd', '--threads', '1', '--budget', '0', '--min-rounds', '1', '--json', {str(path)!r}]);"
        "import torch; print(torch.backends.cpu.get_cpu_capability())"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=interpreter_environment(FASTCONV_ISA=None),
        cwd=Path(layers.__file__).parents[1],
    )
    assert out.stdout.strip().endswith("AVX2"), out.stderr
    environment = json.loads(path.read_text())["environment"]
    assert environment["isa"] == "avx2"
    assert environment["variables"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    with pytest.raises(SystemExit, match="nothing has been computed"):
        layers.main(["--avx2"])  # this process has computed with other kernels


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit):
        layers.main(["--set", "resnet51"])
    with pytest.raises(SystemExit, match="nothing to measure"):
        layers.main(["--no-peer", "--filter", "no such layer", "--threads", "1"])
