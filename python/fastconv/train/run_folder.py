"""The files of a training run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from fastconv import checkpoint
from fastconv.train.config import TrainConfig


class RunFolder:
    """The files of a run."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.curves = self.path / "curves.png"

    def _files(self) -> list[Path]:
        files = (self.config, self.metrics, self.last, self.best, self.curves)
        return [file for file in files if file.exists()]

    def check_free(self, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path}: is a file, not a folder for a run")
        if self._files() and not overwrite:
            raise FileExistsError(f"{self.path}: holds a run already; resume it or overwrite it")

    def create(self, config: TrainConfig) -> None:
        """Makes the folder, removes the overwritten run, and writes the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self._files():
            file.unlink()
        checkpoint.atomic_write(self.config, (json.dumps(asdict(config), indent=2) + "\n").encode())

    def cut_metrics(self, lines: int) -> None:
        """Keeps this many lines; a resumed run writes those after its checkpoint again."""
        kept = self.metrics.read_bytes().splitlines(True)[:lines] if self.metrics.exists() else []
        checkpoint.atomic_write(self.metrics, b"".join(kept))

    def write_metrics(self, record: dict[str, Any]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync_metrics(self) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def find_checkpoint(path: str | PathLike[str]) -> Path:
    """The file itself, or the best or last checkpoint of a run's folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: no checkpoint of a run here")
