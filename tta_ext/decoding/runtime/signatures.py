"""Signatures for functions that hand their keywords on: what ``help()`` and editors show."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

__all__ = ["keywords_of"]

F = TypeVar("F", bound=Callable[..., Any])


def keywords_of(
    source: Callable[..., Any], *without: str, also: Iterable[str] = ()
) -> Callable[[F], F]:
    """Spell the ``**options`` of a function out as the keyword arguments of who receives them.

    A function that takes no ``**options`` is left as it is.

    Type checkers read the same from ``Unpack[...]`` in the function's annotations.

    Args:
        source: a function, or a class such as a dataclass.
        without: keywords of it that the function supplies itself.
        also: keywords with the default None that it takes out before.
    """

    def decorate(function: F) -> F:
        # What a parent class has spelt out already is spelt out anew.
        function = getattr(function, "spelt", function)
        mine = inspect.signature(function)
        kinds = {p.kind for p in mine.parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return function

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        shown = [p for p in mine.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in shown} | {"self", *without}
        keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        shown += [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(source).parameters.values()
            if p.kind in keyword and p.name not in taken
        ]
        names = {p.name for p in shown}
        shown += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in also
            if name not in names
        ]
        call.spelt = function  # type: ignore[attr-defined]
        call.__signature__ = mine.replace(parameters=shown)  # type: ignore[attr-defined]
        return cast("F", call)

    return decorate
