"""The device's geometry, and its tensor-core kernels run thread by thread by an emulator, no GPU.

Each is a C++ program of `tests/cuda`, built here with the machine's compiler; skipped where there
is none. Numbers are small integers, so a result is right or wrong, with no tolerance.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests" / "cuda"


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler: the device's kernels are not emulated")
    return found


@pytest.mark.parametrize("program", sorted(path.stem for path in SOURCES.glob("test_*.cpp")))
def test_on_the_host(program: str, tmp_path: Path) -> None:
    built = tmp_path / program
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    folders = [f"-I{ROOT / 'csrc'}", f"-I{SOURCES}"]
    source = str(SOURCES / f"{program}.cpp")
    subprocess.run([compiler(), *flags, *folders, source, "-o", str(built)], check=True)
    result = subprocess.run([built], capture_output=True, text=True, check=False)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
