"""Averages of a model's weights over the steps of its training."""

from __future__ import annotations

import copy

import numpy as np

from fastconv import ops
from fastconv.module import Module

__all__ = ["EMA"]


class EMA:
    """An exponential moving average of the weights (Polyak and Juditsky 1992, in the usual form).

    average += (1 - d) (weight - average), d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2,
    ...: the average forgets the random start quickly. Running statistics of batch norms are
    averaged, too, so that they belong to the averaged weights; counters are copied.

    model    the averaged model, to evaluate or to save; in evaluation mode
    updates  how many updates there were
    """

    def __init__(self, model: Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def count(self) -> float:
        """Counts an update; by which share of the distance the average moves in it."""
        self.updates += 1
        return 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))

    def update(self, model: Module) -> None:
        """Takes the present weights of the model into the average."""
        share = self.count()
        values = model.state_dict()
        floats = []
        for name, average in self.model.state_dict().items():
            if np.issubdtype(average.dtype, np.floating):
                floats.append((average, values[name]))
            else:
                average[...] = values[name]
        ops.move_towards([a for a, _ in floats], [v for _, v in floats], share)
