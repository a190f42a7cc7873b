"""Result rows, the tables that are printed and the file that is kept."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import fastconv
from bench.measure import Samples

# Environment variables that change what is measured.
VARIABLES = ("OMP_", "GOMP_", "FASTCONV_", "ONEDNN_", "ATEN_", "MKL_")
PACKAGES = ("fastconv", "numpy", "torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Row:
    """fastconv and each mode of the peer, on the same work with the same number of threads."""

    group: str  # the layer set or the kind of benchmark that it belongs to
    name: str
    op: str
    threads: int
    flops: float
    bound: float  # seconds that the roofline allows
    ours: Samples
    peers: dict[str, Samples]
    tags: tuple[str, ...] = ()  # further groups to give a mean for
    details: dict[str, object] = field(default_factory=dict)  # for the file

    @property
    def gflops(self) -> float:
        return self.flops / self.ours.median / 1e9

    @property
    def fraction(self) -> float:
        """Of the roofline."""
        return self.bound / self.ours.median

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=lambda mode: self.peers[mode].median, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the fastest mode of the peer, by medians."""
        return self.peers[self.best_peer].median / self.ours.median if self.best_peer else None

    def as_json(self) -> dict[str, object]:
        return {
            "group": self.group,
            "name": self.name,
            "op": self.op,
            "threads": self.threads,
            "tags": self.tags,
            "flops": self.flops,
            "gflops": self.gflops,
            "roofline_ms": self.bound * 1e3,
            "roofline_fraction": self.fraction,
            "best_peer": self.best_peer,
            "ratio": self.ratio,
            "fastconv": self.ours.as_json(),
            "peers": {mode: samples.as_json() for mode, samples in self.peers.items()},
            **self.details,
        }


def row_from_json(content: dict[str, Any]) -> Row:
    """The row that as_json() wrote down."""
    names = {name for name in Row.__dataclass_fields__ if name in content}
    known = {name: content[name] for name in names}
    derived = {"gflops", "roofline_ms", "roofline_fraction", "best_peer", "ratio", "fastconv"}
    known["bound"] = content["roofline_ms"] / 1e3
    known["tags"] = tuple(content["tags"])
    known["ours"] = samples_from_json(content["fastconv"])
    known["peers"] = {mode: samples_from_json(of) for mode, of in content["peers"].items()}
    known["details"] = {k: v for k, v in content.items() if k not in names | derived}
    return Row(**known)


def samples_from_json(content: dict[str, Any]) -> Samples:
    return Samples([milliseconds / 1e3 for milliseconds in content["samples_ms"]])


@dataclass(frozen=True)
class Mean:
    """Geometric means over the rows of one group with one number of threads."""

    group: str
    threads: int
    rows: int
    ratios: dict[str, float]  # by operation, and "all"; empty without a peer
    lowest_ratio: float | None
    roofline_fraction: float


def means(rows: Sequence[Row]) -> list[Mean]:
    """Means of all rows, of each set and of each tag, for each number of threads."""
    groups = {"all": list(rows)}
    for row in rows:
        for group in (row.group, *row.tags):
            groups.setdefault(group, []).append(row)
    return [
        mean(group, threads, [row for row in members if row.threads == threads])
        for group, members in groups.items()
        for threads in sorted({row.threads for row in members})
    ]


def mean(group: str, threads: int, rows: Sequence[Row]) -> Mean:
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            ratios.setdefault(row.op, []).append(row.ratio)
            ratios.setdefault("all", []).append(row.ratio)
    return Mean(
        group=group,
        threads=threads,
        rows=len(rows),
        ratios={op: geometric_mean(values) for op, values in ratios.items()},
        lowest_ratio=min(ratios.get("all", []), default=None),
        roofline_fraction=geometric_mean(row.fraction for row in rows),
    )


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """A Markdown table with aligned columns: ``left`` columns of text, then numbers."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * (w - 1) + ("-" if i < left else ":") for i, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(aligned) + " |"

    return "\n".join([line(header), line(rule), *map(line, rows)])


def rows_table(rows: Sequence[Row]) -> str:
    header = ["set", "name", "op", "best PyTorch", "threads", "ms", "min ms", "GFLOP/s"]
    header += ["roofline", "PyTorch ms", "ratio"]
    return table(header, [_cells(row) for row in rows], left=4)


def _cells(row: Row) -> list[str]:
    best = row.best_peer
    return [
        row.group,
        row.name,
        row.op,
        best or "-",
        str(row.threads),
        f"{row.ours.median * 1e3:.3f}",
        f"{row.ours.minimum * 1e3:.3f}",
        f"{row.gflops:.1f}",
        f"{row.fraction:.0%}",
        f"{row.peers[best].median * 1e3:.3f}" if best else "-",
        times(row.ratio),
    ]


def means_table(means: Sequence[Mean]) -> str:
    """One line a group and number of threads: the ratio of each operation, of all, the lowest."""
    ops = list(dict.fromkeys(op for m in means for op in m.ratios if op != "all"))
    header = ["geometric mean of", "threads", "rows", *ops, "all", "lowest", "roofline"]
    lines = [
        [m.group, str(m.threads), str(m.rows)]
        + [times(m.ratios.get(op)) for op in (*ops, "all")]
        + [times(m.lowest_ratio), f"{m.roofline_fraction:.0%}"]
        for m in means
    ]
    return table(header, lines, left=1)


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def environment() -> dict[str, Any]:
    """What another run needs, to be compared with this one."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # busy processes in the last minute
        "isa": fastconv.isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
    }


def heading(environment: dict[str, Any]) -> str:
    versions = [f"{name} {v}" for name, v in environment["versions"].items() if v]
    commit = (environment["commit"] or "no commit")[:12]
    changed = " modified" if environment["modified"] else ""
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['isa']}; "
        f"load {environment['load']}; {', '.join(versions)}; {commit}{changed}; "
        f"{environment['date']}"
    )


def git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    """Its name, and family and model, which tell generations of the same name apart."""
    known: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        known.setdefault(key.strip(), value.strip())
    name = known.get("model name", platform.machine())
    if "cpu family" not in known or "model" not in known:
        return name
    return f"{name} (family {known['cpu family']}, model {known['model']})"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def progress(row: Row) -> None:
    """One line on stderr for each measurement, so that a long run shows its losses early."""
    line = f"{row.group} {row.name} {row.op} x{row.threads} {row.ours.median * 1e3:.3f} ms"
    print(line, times(row.ratio), file=sys.stderr, flush=True)


def finish(
    bench: str,
    rows: Sequence[Row],
    limits: Sequence[dict[str, object]],
    options: argparse.Namespace,
) -> None:
    """Prints the tables and writes the file."""
    if not rows:
        raise SystemExit(f"nothing to measure: no name contains {options.filter!r}")
    described, summary = environment(), means(rows)
    print(heading(described), rows_table(rows), means_table(summary), sep="\n\n")
    if options.json:
        content: dict[str, object] = {
            "bench": bench,
            "environment": described,
            "roofline": limits,
            "results": [row.as_json() for row in rows],
            "geometric_means": [asdict(mean) for mean in summary],
        }
        write_json(options.json, content)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
