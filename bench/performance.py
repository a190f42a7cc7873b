"""docs/performance.md and its pictures, written from the files of the other benchmarks.

    python -m bench.performance --measure     makes the files that are missing, then the page
    python -m bench.performance               the page from the files that are there

Each run of `RUNS` writes one file of the folder; a run that was cut short is repeated, one that has
its file is not. Every figure of the page comes from these files, losses included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import report
from bench.report import Row
from bench.roofline import Roofline, fewer_multiplications

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"

# The layer sets of the targets that are means over networks.
NETWORKS = ("resnet50", "vgg16", "smallcnn", "efficientnet_b0")


def layers_run(name: str, *more: str) -> list[str]:
    return ["bench.layers", "--set", name, "--budget", "0.1", *more]


# What is measured: the name of the file, and the benchmark with its options.
RUNS: dict[str, list[str]] = {
    **{f"layers-{name}": layers_run(name) for name in (*NETWORKS, "kinds")},
    "layers-avx2": layers_run(",".join(NETWORKS), "--avx2", "--threads", "2"),
    "steps": [
        "bench.steps",
        "--models",
        "resnet18_cifar,vgg16,resnet50,densenet121,googlenet,efficientnet_b0",
        "--no-compile",
        "--budget",
        "1",
    ],
    "steps-smallcnn": ["bench.steps", "--models", "smallcnn", "--budget", "5"],
    "steps-compiled": [
        "bench.steps",
        "--models",
        "resnet18_cifar",
        "--threads",
        "2",
        "--budget",
        "5",
    ],
    "inference": [
        "bench.inference",
        "--models",
        "resnet50,resnet18_cifar,smallcnn",
        "--batch",
        "1,8,32",
        "--budget",
        "1",
    ],
}


@dataclass(frozen=True)
class Target:
    """What the geometric mean of some rows must reach, and the lowest of them."""

    work: str
    mean: float
    lowest: float | None = None
    groups: tuple[str, ...] = ()  # all where empty
    tag: str | None = None
    ops: tuple[str, ...] = ()  # all where empty
    model: str | None = None
    batch: int | None = None
    isa: str | None = None  # the best one of the machine where None

    def takes(self, row: Row, isa: str, best_isa: str) -> bool:
        return (
            isa == (self.isa or best_isa)
            and (not self.groups or row.group in self.groups)
            and (self.tag is None or self.tag in row.tags)
            and (not self.ops or row.op in self.ops)
            and self.model in (None, row.name.split()[0])  # "resnet50 batch 8"
            and self.batch in (None, row.details.get("batch"))
        )

    def reached(self, ratios: Sequence[float]) -> bool:
        return report.geometric_mean(ratios) >= self.mean and min(ratios) >= (self.lowest or 0)


def layer_target(work: str, mean: float, lowest: float | None = None, **rows: Any) -> Target:
    return Target(work, mean, lowest, (*NETWORKS, "kinds"), **rows)


def step_target(model: str, batch: int, mean: float) -> Target:
    return Target(f"training step: {model} b{batch}", mean, None, ("steps",), model=model,
                  batch=batch)  # fmt: skip


def inference_target(model: str, batch: int, mean: float) -> Target:
    return Target(f"inference: {model} b{batch}", mean, None, ("inference",), model=model,
                  batch=batch)  # fmt: skip


TARGETS = [
    layer_target("3x3 stride 1, C, K >= 64: forward, input gradient", 2.6, 2.0,
                 tag="3x3 s1 C,K>=64", ops=("fwd", "dgrad")),
    layer_target("3x3 stride 1, C, K >= 64: weight gradient", 3.2, 2.4,
                 tag="3x3 s1 C,K>=64", ops=("wgrad",)),
    layer_target("1x1 at 56x56", 2.0, tag="1x1 at 56"),
    layer_target("1x1 at 14x14 and 7x7", 1.1, tag="1x1 at 14 and 7"),
    layer_target("3x3, C = 3: forward, weight gradient", 5.0, tag="3x3 C=3", ops=("fwd", "wgrad")),
    layer_target("7x7 stride 2, C = 3: forward, weight gradient", 1.1, tag="7x7 s2 C=3",
                 ops=("fwd", "wgrad")),
    layer_target("depthwise 3x3, 5x5, strides 1 and 2", 2.0, tag="depthwise"),
    layer_target("depthwise 5x5: weight gradient", 8.0, tag="depthwise 5x5", ops=("wgrad",)),
    layer_target("5x5 stride 1", 1.4, tag="5x5 s1"),
    layer_target("dilated 3x3", 1.8, tag="dilated 3x3"),
    *(
        layer_target(tag, 1.0, 0.9, tag=tag)
        for tag in ("3x3 s2", "7x7", "1x7, 7x1", "grouped", "C or K of 16 to 32")
    ),
    Target("all layers of ResNet-50, VGG-16, SmallCNN, EfficientNet-B0", 2.2, groups=NETWORKS),
    step_target("smallcnn", 128, 3.0),
    step_target("resnet18_cifar", 32, 2.5),
    step_target("vgg16", 4, 2.5),
    step_target("resnet50", 8, 2.0),
    step_target("densenet121", 8, 2.0),
    step_target("efficientnet_b0", 8, 2.0),
    inference_target("resnet50", 8, 1.3),
    inference_target("resnet50", 1, 1.2),
    inference_target("resnet18_cifar", 32, 1.8),
    Target("AVX2 on both sides: the layers of the four networks", 2.0, groups=NETWORKS,
           isa="avx2"),
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One file: its name, where it was measured, and what."""

    name: str
    environment: dict[str, Any]
    roofline: list[dict[str, Any]]
    rows: list[Row]

    @property
    def isa(self) -> str:
        isa: str = self.environment["isa"]
        return isa


def load(folder: Path) -> list[Run]:
    """The runs whose files are in the folder, in the order of RUNS.

    Of work that several have measured, the one with the most modes of the peer counts.
    """
    files = {name: folder / f"{name}.json" for name in RUNS}
    contents = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    runs = [
        Run(
            name,
            content["environment"],
            content["roofline"],
            [report.row_from_json(result) for result in content["results"]],
        )
        for name, content in contents.items()
    ]
    fullest: dict[tuple[str, ...], Row] = {}
    for run in runs:
        for row in run.rows:
            known = fullest.setdefault(work(run, row), row)
            if len(row.peers) > len(known.peers):
                fullest[work(run, row)] = row
    return [
        replace(run, rows=[row for row in run.rows if fullest[work(run, row)] is row])
        for run in runs
    ]


def work(run: Run, row: Row) -> tuple[str, ...]:
    return run.isa, row.group, row.name, row.op, str(row.threads)


def best_isa(runs: Iterable[Run]) -> str:
    """That of the runs that hold nobody back."""
    return next((run.isa for run in runs if "avx2" not in run.name), "")


def measured(target: Target, runs: Sequence[Run], threads: int) -> list[tuple[Run, Row]]:
    """The rows that the target speaks of, each with its run."""
    best = best_isa(runs)
    return [
        (run, row)
        for run in runs
        for row in run.rows
        if row.threads == threads and row.ratio is not None and target.takes(row, run.isa, best)
    ]


def ratio_at_limit(run: Run, row: Row) -> float | None:
    """The ratio of kernels without any loss: at the FMA peak with the fewest multiplications, or,
    of a layer, at the bandwidth of memory where that takes longer. None where neither is known."""
    details: dict[str, Any] = row.details
    if row.ratio is None or not {"case", "least_flops"} & details.keys():
        return None
    limits = next(limit for limit in run.roofline if limit["threads"] == row.threads)
    bandwidths = {int(size): rate * 1e9 for size, rate in limits["bandwidth_gb_per_s"].items()}
    limit = Roofline(row.threads, limits["peak_gflops"] * 1e9, bandwidths)
    if "least_flops" in details:
        least = limit.bound(details["least_flops"], 0)
    else:
        case = details["case"]
        fewer = fewer_multiplications(
            (case["r"], case["s"]), case["stride"], case["c"] // case["groups"],
            case["k"] // case["groups"], row.op,
        )  # fmt: skip
        least = limit.bound(row.flops / fewer, details["traffic"])
    return row.ratio * row.ours.median / least


def mean(ratios: Sequence[float]) -> str:
    return report.times(report.geometric_mean(ratios) if ratios else None)


def targets_table(runs: Sequence[Run]) -> str:
    """A line a target and number of threads that was measured."""
    header = ["work", "threads", "rows", "target", "geometric mean", "at the limits", "none below",
              "lowest"]  # fmt: skip
    lines = []
    counts = sorted({row.threads for run in runs for row in run.rows})
    for target in TARGETS:
        lowest = report.times(target.lowest)
        found = [(threads, measured(target, runs, threads)) for threads in counts]
        for threads, rows in [(n, rows) for n, rows in found if rows] or [(0, [])]:
            ratios = [row.ratio for _, row in rows if row.ratio is not None]
            at_limits = [ratio for run, row in rows if (ratio := ratio_at_limit(run, row))]
            lines.append([
                target.work, str(threads or "-"), str(len(ratios)), report.times(target.mean),
                mean(ratios), mean(at_limits), lowest, report.times(min(ratios, default=None)),
                "not measured" if not ratios else "yes" if target.reached(ratios) else "no",
            ])  # fmt: skip
    return report.table([*header, "reached"], lines, left=1)


def whole_models(runs: Sequence[Run], group: str) -> str | None:
    """A table of the training steps or of inference, None where there are none."""
    rows = [row for run in runs for row in run.rows if row.group == group]
    if not rows:
        return None
    header = ["work", "best peer", "threads", "fastconv ms", "peer ms", "ratio", "of the FMA peak"]
    lines = []
    for row in rows:
        best, plain = row.best_peer, row.details.get("not_frozen_ms")
        lines.append([
            row.name, best or "-", str(row.threads), f"{row.ours.median * 1e3:.2f}",
            f"{row.peers[best].median * 1e3:.2f}" if best else "-", report.times(row.ratio),
            f"{row.fraction:.0%}", "-" if plain is None else f"{plain:.2f}",
        ])  # fmt: skip
    if group != "inference":
        return report.table(header, [line[:-1] for line in lines], left=2)
    return report.table([*header, "not frozen ms"], lines, left=2)


def losses(rows: Sequence[Row]) -> str:
    """Every row whose ratio is below 1, the lowest first."""
    lost = [row for row in rows if row.ratio is not None and row.ratio < 1]
    if not lost:
        return "None."
    return report.rows_table(sorted(lost, key=lambda row: row.ratio or 0))


def layer_rows(runs: Sequence[Run], isa: str) -> list[Row]:
    return [row for run in runs if run.isa == isa for row in run.rows if "case" in row.details]


def headings(runs: Sequence[Run]) -> str:
    """Where and when each file was measured; one line for files that agree."""
    files: dict[str, list[str]] = {}
    for run in runs:
        files.setdefault(report.heading(run.environment), []).append(f"`{run.name}.json`")
    return "\n".join(f"- {', '.join(names)}: {heading}." for heading, names in files.items())


def sections(runs: Sequence[Run], pictures: Sequence[Path]) -> Iterator[str]:
    yield "# Performance"
    yield "Made by `python -m bench.performance`; do not edit by hand."
    yield headings(runs)
    yield EXPLANATION.strip()
    yield "## Targets"
    yield targets_table(runs)
    for title, group in (("Training steps", "steps"), ("Inference", "inference")):
        table = whole_models(runs, group)
        if table:
            yield f"## {title}"
            yield table
    best = best_isa(runs)
    for isa in dict.fromkeys(run.isa for run in runs):
        rows = layer_rows(runs, isa)
        if not rows:
            continue
        note = "" if isa == best else ", both sides held to it"
        yield f"## Layers, {isa}{note}"
        yield from (f"![{path.stem}]({path.name})" for path in pictures if isa == best)
        yield report.means_table(report.means(rows))
        yield f"### Where PyTorch is faster, {isa}"
        yield losses(rows)


EXPLANATION = """
Times are medians of alternating rounds in one process, with the same threads on both sides. The
ratio is the time of the peer's fastest mode by fastconv's, so above 1 fastconv is faster. PyTorch's
modes are eager NCHW and eager channels_last, and for the training steps that have them in their
file, both compiled. In inference fastconv's model is frozen (`fastconv.freeze`), as the runtimes
compile theirs; *not frozen* is the model itself. fastconv's time holds everything a call does for
its user. Every result was compared with the peer's in the same run. *roofline*: the share of the
time that the machine's own limits, measured in the same run, allow a direct algorithm; Winograd can
pass 100%. *at the limits*: the geometric mean that kernels without any loss would have against the
peer of the same run, at the FMA peak with the fewest multiplications of the library's algorithms,
or for layers at the bandwidth of memory where that takes longer. No code for this machine can pass
it with these algorithms; whole models stay further below, since everything but convolutions and
dense layers counts as free there.
The files are in `bench/results`, with every sample.
"""


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """The pictures of the layers on the best ISA with the most threads; none without layers."""
    rows = layer_rows(runs, best_isa(runs))
    threads = max((row.threads for row in rows), default=0)
    rows = [row for row in rows if row.threads == threads]
    if not rows:
        return []
    limits = next(
        limit
        for run in runs
        for limit in run.roofline
        if run.isa == best_isa(runs) and limit["threads"] == threads
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "performance_ratio.png", folder / "performance_roofline.png"]
    draw_ratios(rows, threads, paths[0])
    draw_roofline(rows, limits, paths[1])
    return paths


def draw_ratios(rows: Sequence[Row], threads: int, path: Path) -> None:
    """One panel an operation: the ratio of each layer, sorted, a colour a set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    ops, groups = list(dict.fromkeys(row.op for row in rows)), sorted({row.group for row in rows})
    panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
    for axes, op in zip(panels, ops, strict=True):
        known = [(row.ratio, row.group) for row in rows if row.op == op and row.ratio is not None]
        ordered = sorted(known)
        for i, group in enumerate(groups):
            places = [j for j, (_, its) in enumerate(ordered) if its == group]
            heights = [ordered[j][0] for j in places]
            axes.plot(places, heights, "o", ms=3, color=f"C{i}", label=group)
        axes.axhline(1, color="black", lw=0.8)
        axes.set(title=op, xlabel="layers, by ratio", yscale="log")
        axes.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"times PyTorch's speed, {threads} threads")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def draw_roofline(rows: Sequence[Row], limits: dict[str, Any], path: Path) -> None:
    """Each layer's flops a second over its flops a byte, under the limits that were measured."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    intensity = np.geomspace(1, 2000, 100)
    bandwidths = limits["bandwidth_gb_per_s"].values()
    for rate, style in ((max(bandwidths), "-"), (min(bandwidths), "--")):
        ceiling = np.minimum(limits["peak_gflops"], rate * intensity)
        axes.plot(intensity, ceiling, style, color="black", lw=1, label=f"{rate:.0f} GB/s")
    for i, op in enumerate(dict.fromkeys(row.op for row in rows)):
        of_op = [row for row in rows if row.op == op]
        axes.plot(
            [row.flops / float(str(row.details["traffic"])) for row in of_op],
            [row.gflops for row in of_op],
            "o",
            ms=3,
            color=f"C{i}",
            label=op,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="flops of the direct algorithm a byte of the operands",
        ylabel=f"GFLOP/s, {limits['threads']} threads",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def command(name: str, folder: Path) -> list[str]:
    return ["python", "-m", *RUNS[name], "--json", str(folder / f"{name}.json")]


def measure(folder: Path) -> None:
    """Makes the files that are missing, one process a run; goes on where one fails."""
    for name in RUNS:
        if (folder / f"{name}.json").exists():
            continue
        words = command(name, folder)
        print(*words, file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            print(f"{name}: failed, and is left out", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.performance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the files")
    parser.add_argument("--page", type=Path, default=PAGE, help="to write; pictures lie beside it")
    parser.add_argument("--measure", action="store_true", help="make the files that are missing")
    parser.add_argument("--list", action="store_true", help="print the commands, and no more")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(" ".join(command(name, arguments.folder)) for name in RUNS))
        return
    if arguments.measure:
        measure(arguments.folder.resolve())
    runs = load(arguments.folder)
    if not runs:
        raise SystemExit(f"no results in {arguments.folder}: measure them with --measure")
    pictures = draw(runs, arguments.page.parent)
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text("\n\n".join(sections(runs, pictures)) + "\n")
    print(f"{arguments.page} from {', '.join(run.name for run in runs)}")


if __name__ == "__main__":
    main()
