"""Holds python/fastconv/_C.pyi against the compiled module: the same names, the same arguments.

pybind11 writes each function's signature into the first line of its docstring, which is what is
compared: a stub that forgets a function or an argument, or promises one too many, is an error.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import fastconv._C as compiled

STUB = Path(__file__).parent.parent / "python" / "fastconv" / "_C.pyi"
Arguments = list[tuple[str, bool]]  # name, and whether it has a default


def public_names(tree: ast.Module) -> dict[str, ast.stmt]:
    names: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
    return {name: node for name, node in names.items() if not name.startswith("_")}


def stub_arguments(function: ast.FunctionDef) -> Arguments:
    positional = [*function.args.posonlyargs, *function.args.args]
    first_default = len(positional) - len(function.args.defaults)
    arguments = [(argument.arg, i >= first_default) for i, argument in enumerate(positional)]
    keywords = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return arguments + [(argument.arg, default is not None) for argument, default in keywords]


def compiled_arguments(docstring: str) -> Arguments | None:
    """The arguments in "name(x: type, y: type = 1, *, z: type) -> type"; None for other text."""
    match = re.match(r"\w+\((.*)\) ->", docstring)
    if match is None:
        return None
    parts, depth = [""], 0
    for character in match[1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    named = [part.strip() for part in parts if part.strip() not in ("", "*", "/")]
    return [(re.split(r"[:=\s]", part)[0], "=" in part) for part in named]


def problems(tree: ast.Module, module: ModuleType) -> list[str]:
    stub = public_names(tree)
    runtime = {name for name in vars(module) if not name.startswith("_")}
    found = [f"{name}: in the module, not in the stub" for name in sorted(runtime - stub.keys())]
    found += [f"{name}: in the stub, not in the module" for name in sorted(stub.keys() - runtime)]
    for name in sorted(stub.keys() & runtime):
        node = stub[name]
        if not isinstance(node, ast.FunctionDef):
            continue
        expected = compiled_arguments(getattr(module, name).__doc__ or "")
        if expected is None:
            found.append(f"{name}: the module gives no signature for it")
        elif stub_arguments(node) != expected:
            found.append(f"{name}: arguments {stub_arguments(node)}, in the module {expected}")
    return found


if __name__ == "__main__":
    found = problems(ast.parse(STUB.read_text()), compiled)
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
