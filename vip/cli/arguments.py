"""Flags and YAML recipes, both made from option dataclasses."""

import argparse
import dataclasses
import datetime
import itertools
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import yaml
from timm.utils import ParseKwargs

from vip.errors import UserError
from vip.options import mistake, nearest, value_type

ConfigT = TypeVar("ConfigT")

MOST_NODES = 100_000  # of a recipe, whose aliases would let a few lines stand for any number of values
MOST_CHARACTERS = 3000  # of a value in it: Python neither reads nor prints a number of much more


class Parser(argparse.ArgumentParser):
    """Reports mistakes as `UserError`, suggests the nearest flag, and takes -1e-3 for a number and not for a flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf$")  # argparse's own knows no exponents

    def error(self, message: str) -> typing.NoReturn:
        """Raise the mistake that argparse found."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flags = [word for word in message.removeprefix(prefix).split() if word.startswith("-")]
            if flags:
                message += "." + nearest(flags[0].partition("=")[0], self._option_string_actions)
            else:
                message += "; repeat the flag of several values, or quote a pattern"
        raise UserError(f"{message} (--help lists what there is)")


def at_least(low: int) -> Callable[[str], int]:
    """Type of an argument: a whole number from `low` on."""

    def whole_number(text: str) -> int:
        with suppress(ValueError):
            if (number := int(text)) >= low:
                return number
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)}, expected a whole number of at least {low}")

    return whole_number


class _ParseKwargs(ParseKwargs):
    """timm's action, which leaves the check of its form to the caller."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if value and "=" not in value:
                parser.error(f"argument {option_string}: {value!r} is not of the form NAME=VALUE")
        super().__call__(parser, namespace, values, option_string)


class _WithoutEffect(argparse.Action):
    """Accepts a published flag that has lost its meaning, and says so once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _say_without_effect(str(option_string), str(self.help))


def _say_without_effect(name: str, reason: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {name} has no effect: {reason}.", file=sys.stderr)


def _add_field(group: Any, field: dataclasses.Field, annotation: Any) -> None:
    meta, name = field.metadata, field.name
    kind, is_list = value_type(annotation)
    text = meta["help"].replace("%", "%%")
    if meta["positional"]:
        nargs = "*" if is_list else "?"
        group.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, help=text, metavar=_placeholder(field))
        return
    flag = "--" + name.replace("_", "-")
    options: dict[str, Any] = dict(dest=name, default=argparse.SUPPRESS, help=text)
    if kind is bool and name.startswith("no_"):
        group.add_argument(flag, *meta["flags"], action="store_true", **options)
        group.add_argument(flag.replace("--no-", "--"), action="store_false", **dict(options, help=argparse.SUPPRESS))
    elif kind is bool:
        group.add_argument(flag, *meta["flags"], action=argparse.BooleanOptionalAction, **options)
    elif kind is dict:
        group.add_argument(flag, *meta["flags"], nargs="*", action=_ParseKwargs, metavar="NAME=VALUE", **options)
    else:
        if meta["append"]:
            options["action"] = "append"
        elif is_list:
            options["nargs"] = meta["count"] or "+"
        elif meta["const"] is not None:
            options.update(nargs="?", const=meta["const"])
        if not meta["choices"]:
            options["metavar"] = meta["metavar"] or {int: "N", float: "X"}.get(kind, "NAME")
        group.add_argument(flag, *meta["flags"], type=kind, choices=meta["choices"], **options)


def _placeholder(field: dataclasses.Field) -> str:
    return field.metadata["metavar"] or field.name.upper()


def build_parser(config_class: type, prog: str, without_effect: Mapping[str, str]) -> argparse.ArgumentParser:
    """Make the parser of an option dataclass, a help group for each of its base classes."""
    hints = typing.get_type_hints(config_class)
    places = [f for f in dataclasses.fields(config_class) if f.metadata["positional"]]
    named = [f"[{_placeholder(f)}{' ...' * value_type(hints[f.name])[1]}]" for f in places]
    usage = " ".join([prog, *named, "[options]"])
    parser = Parser(prog=prog, usage=usage, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML recipe; flags win")
    replaced = {flag.partition(" ")[0] for flag in without_effect}
    fields = {f.name: f for f in dataclasses.fields(config_class) if f"--{f.name.replace('_', '-')}" not in replaced}
    for base in reversed(config_class.__mro__):
        own = [name for name in vars(base).get("__annotations__", {}) if name in fields]
        if not own:
            continue
        group = parser.add_argument_group((base.__doc__ or "").split(".")[0].split(";")[0])
        for name in own:
            _add_field(group, fields.pop(name), hints[name])
    group = parser.add_argument_group("Accepted without effect")
    for flag, reason in without_effect.items():
        flag, _, value = flag.partition(" ")
        nargs = None if value else 0
        group.add_argument(flag, nargs=nargs, metavar=value, action=_WithoutEffect, dest=argparse.SUPPRESS, help=reason)
    return parser


def _convert(name: str, value: Any, field: dataclasses.Field, annotation: Any) -> Any:
    """Check and convert a YAML value as the flag of the same name would."""
    kind, is_list = value_type(annotation)
    if value is None:
        if field.default is not None and types.NoneType not in typing.get_args(annotation):
            raise UserError(f"{name} has no value; give one or leave it out.")
        return None
    converted = [_convert_scalar(v, kind) for v in (value if is_list and isinstance(value, list) else [value])]
    found, expected = mistake(converted if is_list else converted[0], annotation, field.metadata)
    if expected:
        raise UserError(f"{name} is {reprlib.repr(found)}, expected {expected}.")
    return converted if is_list else converted[0]


def _convert_scalar(value: Any, kind: Any) -> Any:
    """A YAML value as a flag would have it, the value itself where it is of another type."""
    if isinstance(value, bool):
        return value
    if kind is str:  # YAML reads numbers and days, such as 2024-01-31, where names are meant
        return str(value) if isinstance(value, int | float | datetime.date) else value
    with suppress(ValueError, OverflowError):
        if kind is float and isinstance(value, int | str):  # it reads 1e-3 as a text
            return float(value)
        if kind is int and (isinstance(value, str) or isinstance(value, float) and value.is_integer()):
            return int(value)
    return value


def _load_yaml(file: Any) -> Any:
    """What `yaml.safe_load` gives, `{}` for nothing, unless aliases make it more than `MOST_NODES` values."""
    loader = yaml.SafeLoader(file)
    try:
        document = loader.get_single_node()
        for count, node in enumerate(_nodes(document)):
            if count >= MOST_NODES:
                raise ValueError(f"it holds more than {MOST_NODES} values, with those that aliases repeat")
            if isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_CHARACTERS:
                raise ValueError(f"it holds a value of more than {MOST_CHARACTERS} characters")
        return (loader.construct_document(document) if document else None) or {}
    finally:
        loader.dispose()


def _nodes(node: Any) -> Iterator[Any]:
    """A node of a YAML document and all within it, at every place where it appears."""
    yield node
    if isinstance(node, yaml.CollectionNode):
        for child in itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value:
            yield from _nodes(child)


def read_recipe(path: str, config_class: type, without_effect: Mapping[str, str] = types.MappingProxyType({})) -> dict:
    """Read a YAML recipe, whose keys are the long flags with `-` or `_`.

    Raises:
        UserError: If the file is missing or no mapping, a key is unknown or a value of the wrong type.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = _load_yaml(file)
    except OSError as e:
        raise UserError(f"Cannot read the recipe {path}: {e.strerror}.") from e
    except RecursionError as e:
        raise UserError(f"The recipe {path} is nested too deeply, expected a mapping of option to value.") from e
    # what a tag promises and a value does not keep, such as a month 13, fails in many ways
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as e:
        raise UserError(f"The recipe {path} is not YAML: {' '.join(str(e).split())[:300]}") from e
    if not isinstance(content, dict):
        raise UserError(f"The recipe {path} holds a {type(content).__name__}, expected a mapping of option to value.")
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    aliases = {f.lstrip("-").replace("-", "_"): n for n, field in fields.items() for f in field.metadata["flags"]}
    ignored = {f.partition(" ")[0].lstrip("-").replace("-", "_"): reason for f, reason in without_effect.items()}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = aliases.get(name, name)
        if name in ignored:
            _say_without_effect(str(key), ignored[name])
        elif name not in fields:
            raise UserError(f"Unknown option {key!r} in {path}.{nearest(name, fields)}")
        else:
            values[name] = _convert(f"{key} in {path}", value, fields[name], hints[name])
    return values


def parse(
    config_class: type[ConfigT],
    argv: Sequence[str],
    prog: str,
    without_effect: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[ConfigT, set[str]]:
    """Parse a command line: flags over the recipe of `--config` over defaults.

    Returns:
        The configuration, and the names of the options that were given.

    Raises:
        UserError: If the command line or the recipe is wrong.
    """
    given = vars(build_parser(config_class, prog, without_effect).parse_intermixed_args(argv))
    recipe = given.pop("config", None)
    if recipe is not None:
        read = read_recipe(recipe, config_class, without_effect)
        for alternatives in getattr(config_class, "alternatives", ()):
            if alternatives & given.keys():
                read = {name: value for name, value in read.items() if name not in alternatives}
        given = {**read, **given}
    defaults: dict[str, Any] = getattr(config_class, "defaults_of", lambda given: {})(given)
    return config_class(**{**defaults, **given}), set(given)
