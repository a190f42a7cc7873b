"""Inference, a forward pass in evaluation mode, against PyTorch, ONNX Runtime and OpenVINO.

PyTorch counts with eager in NCHW and channels_last; the others optimise the graph that PyTorch
exports, and fastconv freezes the model (`fastconv.freeze`); the time of the model itself is kept
beside it. All have the same weights, images and threads, all compute in float32, and before the
clock starts their logits must agree. Those of the runtimes that are not installed are left out,
visibly.

    python -m bench.inference --models resnet50,resnet18_cifar --batch 1,8 --threads 1,2 --json F
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

import numpy as np

import fastconv
from bench import options, report, roofline, steps
from bench.measure import PAUSE, Call, alternate
from bench.models import compare_logits, forward_call, image_shape, published_size
from fastconv import models

MODELS = ["resnet50", "resnet18_cifar", "vgg16", "densenet121", "efficientnet_b0", "smallcnn"]
BATCHES = [1, 8]


def run(
    name: str,
    batch: int,
    limit: roofline.Roofline,
    arguments: argparse.Namespace,
    peer: ModuleType | None,
) -> report.Row:
    """Checks and times one model with one size of batch and number of threads."""
    images, _ = steps.batch(batch, image_shape(name, published_size(name)))
    fastconv.set_num_threads(limit.threads)
    model = models.create(name)
    flops = steps.training_flops(model, images) / 3
    plain = forward_call(model, images)
    frozen = fastconv.freeze(model, images)

    def ours() -> np.ndarray:
        return frozen(images).data

    peers: dict[str, Call] = {}
    details: dict[str, object] = {
        "batch": batch,
        "image_size": published_size(name),
        "least_flops": steps.least_flops(model, images, ("fwd",)),
    }
    if peer:
        from bench import runtimes

        peer.set_num_threads(limit.threads)
        state = model.state_dict()
        peers = peer.forwards(name, state, images)
        if not arguments.torch_only:
            peers.update(runtimes.forwards(name, state, images, limit.threads))
        del state  # while it refers to the weights, these are packed anew in every call
        details["difference"] = compare_logits(name, ours, peers)
    calls: dict[str, Call] = {"fastconv": ours, "not frozen": plain, **peers}
    samples = alternate(calls, arguments.budget, arguments.min_rounds, PAUSE)
    details["not_frozen_ms"] = samples.pop("not frozen").median * 1e3
    return report.Row(
        group="inference",
        name=f"{name} batch {batch}",
        op="forward",
        threads=limit.threads,
        flops=flops,
        bound=limit.bound(flops, 0),
        ours=samples.pop("fastconv"),
        peers=samples,
        details=details,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("inference", __doc__)
    options.add_comparison(parser, budget=10.0)
    options.add_choice(parser, "--models", models.available(), MODELS)
    parser.add_argument(
        "--batch", type=options.numbers, default=BATCHES, metavar="N,M", help="images in a batch"
    )
    parser.add_argument("--torch-only", action="store_true", help="PyTorch as the only peer")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    peer = options.peer_module(arguments)
    if peer and not arguments.torch_only:
        from bench import runtimes

        if runtimes.missing():
            print(f"not installed, so not measured: {', '.join(runtimes.missing())}")
    limits = [roofline.measure(threads) for threads in arguments.threads]
    rows = []
    for name in (name for name in arguments.models if arguments.filter in name):
        for batch in arguments.batch[:1] if arguments.quick else arguments.batch:
            for limit in limits:
                row = run(name, batch, limit, arguments, peer)
                report.progress(row)
                rows.append(row)
    report.finish("inference", rows, [limit.as_json() for limit in limits], arguments)


if __name__ == "__main__":
    main()
