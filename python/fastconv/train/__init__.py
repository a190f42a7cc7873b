"""Training: the loop (`loop.py`), what a run is made of (`config.py`, `recipe.py`), one step
(`step.py`; `graph.py` as a CUDA graph, `steps.py` which of them), the evaluation, averaged weights,
progress on the screen and the folder of a run."""

from .config import TrainConfig, load_config
from .ema import EMA
from .evaluation import Evaluation, evaluate
from .graph import GraphedStep
from .loop import Result, resume, train
from .recipe import load_model
from .step import TrainingError, train_step

__all__ = [
    "EMA",
    "Evaluation",
    "GraphedStep",
    "Result",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "load_config",
    "load_model",
    "resume",
    "train",
    "train_step",
]
