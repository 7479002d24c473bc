"""Options as dataclass fields that carry their own help text, from which flags and YAML keys are both made."""

import dataclasses
import difflib
import os
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from vip.errors import UserError

LARGEST = 2**31  # whole numbers beyond count nothing that fits into memory, and not all libraries take them


def option(
    default: Any,
    help: str,
    *flags: str,
    choices: Iterable[Any] | None = None,
    metavar: str | None = None,
    positional: bool = False,
    const: Any = None,
    append: bool = False,
    count: int | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag and a YAML key.

    Args:
        default: Default value.
        help: Help text.
        *flags: Other spellings of the flag; the flag made of the field's name always exists.
        choices: The only values allowed.
        metavar: Placeholder of the value in the help.
        positional: The field is a positional argument that may be left out.
        const: Value of the flag when it is given without one.
        append: A list to which each use of the flag adds one value.
        count: Number of values of a list, any if None.
        low: Lowest value allowed; of whole numbers -`LARGEST` if None.
        high: Highest value allowed; of whole numbers `LARGEST` if None.
    """
    metadata = dict(
        help=help,
        flags=flags,
        choices=tuple(choices) if choices else None,
        metavar=metavar,
        positional=positional,
        const=const,
        append=append,
        count=count,
        low=low,
        high=high,
    )
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Options:
    """Base of option dataclasses, which checks types, choices, and that numbers are finite and in range.

    Raises:
        UserError: If a value is none that its option takes.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            found, expected = mistake(getattr(self, field.name), hints[field.name], field.metadata)
            if expected:
                raise UserError(f"--{field.name.replace('_', '-')} is {reprlib.repr(found)}, expected {expected}.")


def value_type(annotation: Any) -> tuple[Any, bool]:
    """The scalar type of an annotation, and whether it is a list of them."""
    if isinstance(annotation, types.UnionType):
        annotation = next(t for t in typing.get_args(annotation) if t is not types.NoneType)
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def mistake(value: Any, annotation: Any, meta: Mapping[str, Any]) -> tuple[Any, str]:
    """What is wrong with the value of an option, and what was expected; the latter is empty if nothing is."""
    if value is None:
        return None, ""
    kind, is_list = value_type(annotation)
    count, choices = meta["count"], meta["choices"]
    values = value if is_list else [value]
    whole = isinstance(values, list | tuple) and count in (None, len(values))
    if not whole or not all(_fits(v, kind) for v in values):
        return value, f"{count or 'a list of'} {kind.__name__} values" if is_list else kind.__name__
    if choices and any(v not in choices for v in values):
        return value, f"one of {', '.join(map(repr, choices))}"
    ranges = ((v, _expected(v, meta["low"], meta["high"])) for v in values if kind in (int, float))
    return next(((v, expected) for v, expected in ranges if expected), (None, ""))


def _fits(value: Any, kind: Any) -> bool:
    if kind is str:
        return isinstance(value, os.PathLike) or (isinstance(value, str) and "\0" not in value)
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _expected(number: float, low: float | None, high: float | None) -> str:
    """What was expected in the place of a number, empty if it is in range."""
    limit = LARGEST if isinstance(number, int) else sys.float_info.max
    least, most = -limit if low is None else low, limit if high is None else high
    if least <= number <= most:
        return ""
    if high is None and low is not None and number < low:
        return f"at least {low}"
    if low is None and high is not None and number > high:
        return f"at most {high}"
    if isinstance(number, float) and None in (low, high):
        return "a finite number"
    return f"{least} to {most}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known names nearest to `name`, empty if none is near.

    Example:
        >>> nearest("vip_s8", ["vip_s7", "vip_m7", "resnet50"])
        ' Did you mean vip_s7 or vip_m7?'
        >>> nearest("xyz", ["vip_s7"])
        ''
    """
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""
