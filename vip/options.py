"""Options as dataclass fields that carry their own help text, from which flags and YAML keys are both made."""

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterable
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
    """Base of option dataclasses, which checks that numbers are finite and in range.

    Raises:
        UserError: If one is not.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, list | tuple) else [value]:
                if not isinstance(number, int | float):
                    continue
                if expected := _expected(number, field.metadata["low"], field.metadata["high"]):
                    raise UserError(f"--{field.name.replace('_', '-')} is {reprlib.repr(number)}, expected {expected}.")


def _expected(number: float, low: float | None, high: float | None) -> str:
    """What was expected in the place of a number, empty if it is in range."""
    if isinstance(number, float) and not math.isfinite(number):
        return "a finite number"
    limit = LARGEST if isinstance(number, int) else math.inf
    least, most = -limit if low is None else low, limit if high is None else high
    if least <= number <= most:
        return ""
    if number < least and most == limit:
        return f"at least {least}"
    return f"at most {most}" if number > most and least == -limit else f"{least} to {most}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known names nearest to `name`, empty if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""
