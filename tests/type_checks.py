"""Types and shapes are checked at every call of vaetrain's functions, by jaxtyping and beartype (`--jaxtyping-packages`).

They take nine seconds to prepare six thousand functions, of which a test process calls a few hundred: here each is prepared when
it is first called.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping


def at_first_call(check_calls: Callable) -> Callable:
    """`jaxtyping.jaxtyped`, whose functions are prepared late."""

    @functools.wraps(check_calls)
    def decorator(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: decorator(function, **options)
        if not inspect.isfunction(function):
            return check_calls(function, **options)
        checked = functools.cache(lambda: check_calls(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return checked()(*args, **kwargs)

        return call

    return decorator


def install() -> None:
    """Before anything of vaetrain is imported."""
    jaxtyping.jaxtyped = at_first_call(jaxtyping.jaxtyped)
