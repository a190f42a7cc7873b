"""Every model of fastconv.models: its size, its checks, and its time against PyTorch.

PyTorch counts with the faster of NCHW and channels_last, eager. Both sides have the same weights
and images; before the clock starts, the logits and the loss of a training step must agree. The
checks are the tests of the models, run here, never assumed.

Timings want a quiet machine and the checks do not, so they are separate runs. What F holds already
is kept and not measured again: repeat a run that was cut short, and it goes on.

    python -m bench.models --check --json F
    python -m bench.models --threads 2 --json F --markdown docs/models.md
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import fastconv
from bench import options, report, roofline, steps
from bench.measure import Call, alternate
from fastconv import models, nn
from fastconv.summary import summarize
from tests.architectures import ARCHITECTURES, create

# The side of the images that the publication of the model gives; 224 where nothing is said here.
PUBLISHED_SIZE = {
    **dict.fromkeys(("lenet5", "smallcnn", "textbook_stack"), 32),
    **dict.fromkeys(("resnet8_cifar", "resnet18_cifar", "resnet20_cifar"), 32),
    "inception_v3": 299,
    **dict(
        zip(
            (f"efficientnet_b{i}" for i in range(1, 8)),
            (240, 260, 300, 380, 456, 528, 600),
            strict=True,
        )
    ),
}
# Beyond the arguments of the checks, which leave its auxiliary head out.
SETTINGS = {"inception_v3": {"aux_logits": True}}
TRAINED_SIZE = {"inception_v3": 299}  # its auxiliary head takes no less; 64 or less for the others
TRAINED_BATCH = 4
TRAINING = steps.Training("SGD", {"lr": 1e-4, "momentum": 0.9}, checked_steps=1)
LOGITS_LIMIT = 1e-4  # relative L2, between two float32 sums of different order

TEST_FILES = ("tests/test_architectures.py", "tests/test_trajectory.py")
# What a check is called in the table: the tests that make it, their first parameter a model.
CHECKS = {
    "keys": ("test_parameters_and_keys",),
    "logits": ("test_same_weights_give_the_same_logits",),
    "gradients": ("test_same_gradients",),
    "published": ("test_published_figures",),
    "losses": ("test_losses_stay_together", "test_every_family_learns_digits"),
}
MARKS = {"passed": "✓", "failed": "✗", None: "-"}

Content = dict[str, Any]  # of the JSON file


def image_shape(name: str, size: int) -> tuple[int, int, int]:
    return ARCHITECTURES[name].in_channels, size, size


def published_size(name: str) -> int:
    return PUBLISHED_SIZE.get(name, 224)


def trained_size(name: str) -> int:
    return TRAINED_SIZE.get(name, min(64, published_size(name)))


def figures(name: str) -> Content:
    """What fastconv.summary says about the model at its published size.

    The receptive field is that of the last plane, in front of the global mean or the dense layers.
    """
    size = published_size(name)
    summary = summarize(
        create(name, image_size=size, **SETTINGS.get(name, {})), image_shape(name, size)
    )
    planes = [row for row in summary.rows if len(row.output_shape) == 3 and row.output_shape[1] > 1]
    return {
        "image_size": size,
        "parameters": summary.parameters,
        "multiply_adds": summary.multiply_adds,
        "receptive_field": planes[-1].receptive_field,
    }


def forward_call(model: nn.Module, images: np.ndarray) -> Callable[[], np.ndarray]:
    model.eval()

    def forward() -> np.ndarray:
        with fastconv.no_grad():
            return model(images).data

    return forward


def compare_logits(
    name: str, ours: Callable[[], np.ndarray], peers: dict[str, Call]
) -> dict[str, float]:
    """The relative L2 of the logits for each mode of the peer; ends the run if they differ."""
    found, differences = ours(), {}
    for mode, call in peers.items():
        expected = np.asarray(call())
        difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        if not difference <= LOGITS_LIMIT:
            raise SystemExit(f"{name}: logits differ from PyTorch's ({mode}) by {difference:.2g}")
        differences[mode] = difference
    return differences


def measure(
    name: str,
    model: nn.Module,
    op: str,
    limit: roofline.Roofline,
    arguments: argparse.Namespace,
    peer: ModuleType | None,
) -> report.Row:
    """Checks and times one image forward ("forward"), or a training step ("step")."""
    size, batch = published_size(name), 1
    if op == "step":
        size, batch = trained_size(name), 2 if arguments.quick else TRAINED_BATCH
    images, labels = steps.batch(batch, image_shape(name, size))
    fastconv.set_num_threads(limit.threads)
    model.train()
    flops = steps.training_flops(model, images) / (1 if op == "step" else 3)
    peers: dict[str, Call] = {}
    details: dict[str, object] = {"image_size": size, "batch": batch}
    if peer:
        peer.set_num_threads(limit.threads)
    if op == "step":
        if peer:
            details["difference"] = steps.compare(
                name, copy.deepcopy(model), images, labels, TRAINING, peer
            )
            peers = peer.steps(name, model.state_dict(), images, labels, TRAINING)
        ours: Call = partial(
            steps.step, model, TRAINING.optimizer_of(model.parameters()), images, labels
        )
    else:
        ours = forward = forward_call(model, images)
        if peer:
            peers = peer.forwards(name, model.state_dict(), images)
            details["difference"] = compare_logits(name, forward, peers)
    samples = alternate({"fastconv": ours, **peers}, arguments.budget, arguments.min_rounds)
    return report.Row(
        group="models",
        name=name,
        op=op,
        threads=limit.threads,
        flops=flops,
        bound=limit.bound(flops, 0),
        ours=samples.pop("fastconv"),
        peers=samples,
        details=details,
    )


def run_checks(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The outcomes of the tests of the named models: {model: {check: "passed" or "failed"}}."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "outcomes.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TEST_FILES]
        if len(names) < len(models.available()):
            command += ["-k", " or ".join(names)]  # and others whose names contain one of them
        # The table needs the outcomes, whatever they are, so the exit status does not matter.
        subprocess.run([*command, f"--junitxml={junit}"], cwd=Path(__file__).parents[1])
        if not junit.exists():
            raise SystemExit("pytest did not get as far as running the checks")
        found = outcomes(junit.read_text())
    return {name: found.get(name, {}) for name in names}


def outcomes(junit: str) -> dict[str, dict[str, str]]:
    """Of pytest's report in JUnit's XML. A check that was skipped or not run is left out; one that
    several tests make has passed if all of them have."""
    check_of = {test: check for check, tests in CHECKS.items() for test in tests}
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        test, _, parameters = case.get("name", "").rstrip("]").partition("[")
        check, results = check_of.get(test), {child.tag for child in case}
        if check is None or "skipped" in results:
            continue
        model = found.setdefault(parameters.split("-")[0], {})
        if results & {"failure", "error"} or model.get(check) == "failed":
            model[check] = "failed"
        else:
            model[check] = "passed"
    return found


def markdown(content: Content) -> str:
    rows = [
        cells(name, threads, content)
        for name in content["models"]
        for threads in sorted({r["threads"] for r in content["results"]}) or [0]
    ]
    header = ["model", "parameters", "multiply-adds (M)", "receptive field", "image", "threads"]
    header += ["forward ms", "PyTorch ms", "ratio", "batch", "step ms", "PyTorch ms", "ratio"]
    parts = [
        "# Models",
        "Made by `python -m bench.models`; do not edit by hand.",
        report.heading(content["environment"]) + ".",
        report.table([*header, *CHECKS], rows, left=1),
        *means(content["results"]),
        EXPLANATION.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def cells(name: str, threads: int, content: Content) -> list[str]:
    model, checks = content["models"][name], content["checks"].get(name, {})
    field = model["receptive_field"]
    timed = {
        result["op"]: result
        for result in content["results"]
        if (result["name"], result["threads"]) == (name, threads)
    }
    forward, step = timed.get("forward"), timed.get("step")
    return [
        f"`{name}`",
        f"{model['parameters']:,}",
        f"{model['multiply_adds'] / 1e6:,.1f}",
        "x".join(map(str, dict.fromkeys(field))) if field else "-",
        str(model["image_size"]),
        str(threads or "-"),
        *times(forward),
        f"{step['batch']} of {step['image_size']}" if step else "-",
        *times(step),
        *(MARKS[checks.get(check)] for check in CHECKS),
    ]


def times(result: Content | None) -> list[str]:
    """Our median, that of the peer's better mode, and how many times faster ours is."""
    if result is None:
        return ["-"] * 3
    best = result["best_peer"]
    theirs = f"{result['peers'][best]['median_ms']:.2f}" if best else "-"
    return [f"{result['fastconv']['median_ms']:.2f}", theirs, report.times(result["ratio"])]


def means(results: Sequence[Content]) -> Iterator[str]:
    groups: dict[tuple[str, int], list[float]] = {}
    for result in results:
        if result["ratio"] is not None:
            groups.setdefault((result["op"], result["threads"]), []).append(result["ratio"])
    for (op, threads), ratios in sorted(groups.items()):
        yield (
            f"Ratio of the {op}, threads {threads}: geometric mean of {len(ratios)} models "
            f"{report.times(report.geometric_mean(ratios))}, lowest {report.times(min(ratios))}."
        )


EXPLANATION = f"""
- Parameters, multiply-adds and receptive field are those of `fastconv.summary` for one image of the
  size in column *image*, that of the model's publication; the receptive field is that of the last
  plane in front of the global mean or the dense layers.
- *forward*: one such image, eval mode. *step*: forward, cross-entropy (with the auxiliary heads'),
  backward and SGD with momentum on a batch of images of the size given.
- Medians of alternating rounds in one process, the same weights and threads on both sides. PyTorch
  is eager, in the faster of NCHW and channels_last, its SGD fused; the ratio is its time by
  fastconv's, so above 1 fastconv is faster. Before each timing the logits agreed to a relative L2
  of {LOGITS_LIMIT:g}, the loss of a training step without dropout to {steps.TOLERANCE:g} and what
  PyTorch's two layouts differ by.
- The last columns are the outcomes of the tests of each model against PyTorch, run at the same
  commit: ✓ passed, ✗ failed, - not made for this model. *keys*: number of parameters, names
  and shapes of the state_dict. *logits*: relative L2 at most 1e-5. *gradients*: of every parameter,
  at most 1e-4. *published*: multiply-adds or receptive field equal to figures of others.
  *losses*: the same in every step of a training, made for one member of each family.
  Those of Inception v3 are of the model without its auxiliary head; its times are with it.
- A dash in place of a time: not measured.
"""


def kept(path: Path | None) -> Content:
    """What the file holds already, if library and tests are still the same; the commit and the
    date become those of now."""
    now = report.environment()
    if path is None or not path.exists():
        return {
            "bench": "models",
            "environment": now,
            "roofline": [],
            "models": {},
            "checks": {},
            "results": [],
        }
    content: Content = json.loads(path.read_text())
    before = content["environment"]
    commits = before["commit"], now["commit"]
    if not same_code(*commits):
        raise SystemExit(f"{path} is of commit {commits[0]}, and {commits[1]} has other code")
    now["modified"] = now["modified"] or before["modified"]
    return {**content, "environment": now}


def same_code(before: str | None, now: str | None) -> bool:
    """Whether library and tests are the same in two commits. Outside a repository there are none:
    two such runs are taken for runs of one copy."""
    if before is None or now is None:
        return before is now
    changes = report.git("diff", "--quiet", before, now, "--", ":/python", ":/csrc", ":/tests")
    return changes is not None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("models", __doc__)
    options.add_comparison(parser, budget=2.0)
    options.add_choice(parser, "--models", models.available(), models.available())
    parser.add_argument("--check", action="store_true", help="run the checks, time nothing")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write the table to F")
    parser.set_defaults(threads=[len(os.sched_getaffinity(0))])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    names = list(steps.chosen(arguments))
    if not names:
        raise SystemExit(f"nothing to measure: no name contains {arguments.filter!r}")
    checks = run_checks(names) if arguments.check else {}
    content = kept(arguments.json)
    content["checks"].update(checks)

    def save() -> None:
        if arguments.json:
            report.write_json(arguments.json, content)

    for name in names:
        content["models"].setdefault(name, None)
        content["models"][name] = content["models"][name] or figures(name)
    content["models"] = dict(sorted(content["models"].items()))
    if not arguments.check:
        peer = options.peer_module(arguments)
        done = {(r["name"], r["op"], r["threads"]) for r in content["results"]}
        for threads in arguments.threads:
            limit = roofline.measure(threads)
            content["roofline"].append(limit.as_json())
            for name in names:
                ops = [op for op in ("forward", "step") if (name, op, threads) not in done]
                if not ops:
                    continue
                model = models.create(name)
                for op in ops:
                    row = measure(name, model, op, limit, arguments, peer)
                    report.progress(row)
                    content["results"].append(row.as_json())
                    save()
    save()
    text = markdown(content)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
