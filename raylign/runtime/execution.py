"""How the library runs a Ray Data job: order kept, progress as asked, and errors of its own types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from raylign import errors

if TYPE_CHECKING:
    import ray.data


@contextmanager
def execution(dataset: ray.data.Dataset, *, show_progress: bool = False) -> Iterator[None]:
    """Order kept and progress bars as asked while this data set runs; its context is shared with the caller's.

    Raises:
        RaylignError: the error that an actor raised. Ray Data 2.60 hands on its traceback as text and loses its type.
    """
    context = dataset.context
    before = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, show_progress
    try:
        with own_errors():
            yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the raylign error that a task or actor raised as itself, without Ray's wrapping.

    A task's error is a cause of Ray's; of an actor that failed to start, Ray Data 2.60 hands on the traceback as text.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while isinstance(cause, ray.exceptions.RayError):  # Ray's error is also an instance of the type that it carries
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, errors.RaylignError):
            raise cause from None
        found = re.findall(r"^raylign\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
        if not found:
            raise
        name, message = found[-1]
        raise getattr(errors, name)(message) from error
