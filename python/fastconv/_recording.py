"""Who notes the operations of this thread, for `fastconv.freezing`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
# record(function, arguments, options, output): function(*arguments, **options) gave output.
Record: TypeAlias = "Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]"


class _Thread(threading.local):
    record: Record | None = None


thread = _Thread()


def recorded(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates an operation: a pass that is being noted holds it as one call."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        record = thread.record
        if record is None:
            return function(*arguments, **options)
        thread.record = None  # what it calls belongs to it
        try:
            output = function(*arguments, **options)
        finally:
            thread.record = record
        record(function, arguments, options, output)
        return output

    return call
