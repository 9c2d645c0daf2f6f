"""Does a configured value fit a Python annotation? Used where values come from text, not from code."""

import collections.abc
import types
import typing
from typing import Any, Literal, Union


class Mismatch(ValueError):
    """The value does not fit; the message reads on from the parameter's name."""


def coerce(value: Any, annotation: Any) -> Any:
    """Return `value` as `annotation` wants it (int -> float, list -> tuple, nothing else) or raise Mismatch."""
    if _fits_loosely(annotation):
        return value
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return coerce(value, args[0])
    if origin in (Union, types.UnionType):
        return _one_of(value, args, annotation)
    if origin is Literal:
        if value in args:
            return value
        raise Mismatch(f"is {value!r}; choose one of {', '.join(map(repr, args))}")
    if origin is not None:
        return _container(value, origin, args, annotation)
    if annotation is float and type(value) is int:
        return float(value)
    if annotation is None:
        annotation = type(None)
    wrong_bool = isinstance(value, bool) and annotation in (int, float)
    if isinstance(annotation, type) and (wrong_bool or not isinstance(value, annotation)):
        raise Mismatch(f"wants {_name(annotation)}, not {_describe(value)}")
    return value


def _fits_loosely(annotation: Any) -> bool:
    """Annotations that a value cannot be held against: Any, type variables, structural protocols."""
    protocol = getattr(annotation, "_is_protocol", False)  # typing.is_protocol from Python 3.13 on
    return annotation is Any or isinstance(annotation, typing.TypeVar | str) or protocol


def _one_of(value: Any, choices: tuple[Any, ...], annotation: Any) -> Any:
    if any(isinstance(choice, type) and type(value) is choice for choice in choices):
        return value
    reasons = []
    for choice in choices:
        try:
            return coerce(value, choice)
        except Mismatch as error:
            reasons.append(str(error))
    structured = [r for r, c in zip(reasons, choices, strict=True) if typing.get_origin(c) is Literal]
    raise Mismatch(structured[0] if structured else f"wants {_name(annotation)}, not {_describe(value)}")


def _container(value: Any, origin: Any, args: tuple[Any, ...], annotation: Any) -> Any:
    wanted = Mismatch(f"wants {_name(annotation)}, not {_describe(value)}")
    if origin in (tuple, list, collections.abc.Sequence):
        if not isinstance(value, list | tuple):
            raise wanted
        kinds = args if origin is tuple and Ellipsis not in args else args[:1] * len(value)
        if len(kinds) != len(value) and args:
            raise wanted
        return (list if origin is list else tuple)(map(coerce, value, kinds or [Any] * len(value)))
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise wanted
        return {coerce(k, args[0]): coerce(v, args[1]) for k, v in value.items()}
    if origin is collections.abc.Callable:
        if not callable(value):
            raise wanted
        return value
    if isinstance(origin, type) and not isinstance(value, origin):
        raise wanted
    return value


def _name(annotation: Any) -> str:
    if typing.get_origin(annotation) is None and isinstance(annotation, type):
        return "None" if annotation is type(None) else annotation.__name__
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(_name, typing.get_args(annotation)))
    return str(annotation).replace("typing.", "")


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
