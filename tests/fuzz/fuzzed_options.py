"""Options drawn from what the option dataclasses say of themselves, as flags and as a YAML recipe."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from vip.options import value_type

Known = Mapping[str, Sequence[Any]]  # values of the options that name something

# Options that are not drawn, and why.
LEFT_OUT = {
    "pretrained": "downloads weights",
    "dataset_download": "downloads a data set",
    "log_wandb": "reaches a server",
    "tf_preprocessing": "takes seconds to import tensorflow, or to miss it",
    "dist_timeout": "of several processes",
}

# Options of which more is no mistake but takes as much longer: the most that is drawn, and from where on it is absurd.
MOST: dict[str, tuple[float, float]] = {
    "workers": (0, float("inf")),  # a process each
    "img_size": (64, 10**8),
    "input_size": (64, 10**8),
    "in_chans": (8, 10**8),
    "num_classes": (100, 10**9),
    "aug_splits": (4, 101),
    "aug_repeats": (4, 1001),
    "recount": (10, 1001),
}

TEXTS = ["", " ", "none", "x", "0", "1e400", "nan", "ä", "数", "\u202e", "a\nb", "\0", "%s", "{}", "..", "a=b"]
TEXTS += ["x" * 300]
NUMBERS = [0, 1, 2, 3, 7, -1, -2, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**310]
FLOATS = [0.0, -0.0, 0.5, 0.999, 1.0, 1.5, 2.0, -1.0, 1e-300, 1e-8, 1e8, 1e300, *map(float, ("nan", "inf", "-inf"))]


@dataclass(frozen=True)
class Drawn:
    """A value of an option, given as a flag or in a recipe."""

    name: str
    value: Any
    in_recipe: bool = False
    append: bool = False  # each use of the flag adds a value

    def words(self) -> list[str]:
        """The words of a command line."""
        flag = "--" + self.name.replace("_", "-")
        if isinstance(self.value, bool):
            bare = self.name.removeprefix("no_").replace("_", "-")
            return [f"--{bare}" if self.value != self.name.startswith("no_") else f"--no-{bare}"]
        if isinstance(self.value, dict):
            return [flag, *(f"{name}={value}" for name, value in self.value.items())]
        if isinstance(self.value, list) and not self.append:
            return [flag, *map(str, self.value)]
        return [f"{flag}={value}" for value in (self.value if isinstance(self.value, list) else [self.value])]


def in_range(kind: type, meta: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that an option takes, those near its bounds more often than not."""
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    low, high = (default if bound is None else bound for bound, default in ((meta["low"], 0), (meta["high"], 9)))
    high = max(low, high)
    if kind is int:
        return st.integers(int(low), min(int(high), int(low) + 9)) | st.sampled_from([int(low), int(high)])
    if kind is float:
        near = st.floats(low, low + (high - low) / 10)
        return st.sampled_from([float(low), float(high)]) | st.floats(low, high) | near
    return st.sampled_from(TEXTS)


def out_of_range(kind: type, meta: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values beyond the bounds of an option, huge ones, and some that are of another type."""
    if meta["choices"]:
        return st.sampled_from([str(meta["choices"][-1]).upper(), *TEXTS])
    bounds = [b for b in (meta["low"], meta["high"]) if b is not None]
    if kind is int:
        edges = [int(b) + d for b in bounds for d in (-1, 1)]
        return st.sampled_from([*edges, *NUMBERS]) | st.sampled_from([0.5, float("nan"), "", "x"])
    if kind is float:
        edges = [b + d for b in bounds for d in (-0.5, -1e-9, 1e-9, 0.5)]
        return st.sampled_from([*edges, *FLOATS]) | st.floats() | st.sampled_from(["", "x"])
    return st.text(max_size=8)


def values_of(field: dataclasses.Field, annotation: Any, known: Known, tame: bool) -> st.SearchStrategy[Any]:
    """Values of an option that it may take, or (not `tame`) that it mostly may not."""
    kind, is_list = value_type(annotation)
    if field.name in known:
        values: st.SearchStrategy[Any] = st.sampled_from(known[field.name])
    elif kind is bool:
        return st.booleans()
    elif kind is dict:
        names = st.sampled_from(known[f"{field.name}.names"])
        arguments = st.sampled_from([*NUMBERS, *FLOATS, *TEXTS, None, True, [1, 2], {}])
        return st.dictionaries(names if tame else names | st.text(max_size=3), arguments, max_size=2)
    else:
        values = (in_range if tame else out_of_range)(kind, field.metadata)
    if field.name in MOST:
        most, absurd = MOST[field.name]
        values = values.filter(lambda v: isinstance(v, str) or not most < v < absurd)
    if not is_list:
        return values
    count = field.metadata["count"]
    return st.lists(values, min_size=count or 1, max_size=count or 3) if tame else st.lists(values, max_size=4)


def anything() -> st.SearchStrategy[Any]:
    """What YAML can say in the place of a value."""
    scalars = st.none() | st.booleans() | st.sampled_from([*NUMBERS, *FLOATS, *TEXTS])
    scalars |= st.dates() | st.datetimes() | st.binary(max_size=3)
    lists = st.lists(scalars, max_size=3)
    mappings = st.dictionaries(st.text(max_size=2), scalars | lists, max_size=2)
    return scalars | lists | mappings | st.lists(mappings, max_size=2)


@st.composite
def options(draw: st.DrawFn, config_class: type, known: Known) -> list[Drawn]:
    """One to six options of a configuration, often of one help group, and of at most one a value that is a mistake."""
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.name not in LEFT_OUT}
    groups = [[n for n in vars(base).get("__annotations__", {}) if n in fields] for base in config_class.__mro__]
    group = draw(st.sampled_from([sorted(fields), *filter(None, groups)]))
    names = draw(st.lists(st.sampled_from(group), min_size=1, max_size=6, unique=True))
    mistaken = draw(st.none() | st.sampled_from(names))  # of two mistakes the first would hide the other
    drawn = []
    for name in names:
        in_recipe = draw(st.booleans())
        if name == mistaken and in_recipe and name not in MOST and draw(st.booleans()):
            value = draw(anything())
        else:
            value = draw(values_of(fields[name], hints[name], known, tame=name != mistaken))
        in_recipe = in_recipe or "\0" in str(value)  # which no shell passes on
        drawn.append(Drawn(name, value, in_recipe, fields[name].metadata["append"]))
    return drawn


def command_line(
    drawn: Sequence[Drawn], base: Mapping[str, Any], recipe: Path, positional: Sequence[str] = ("data",)
) -> list[str]:
    """The words of a command with options that take the place of those of `base`.

    Args:
        drawn: The options.
        base: Other options and their values.
        recipe: Where to write a recipe.
        positional: Options that are arguments without a flag.
    """
    taken = {option.name for option in drawn}
    if "img_size" in taken or "input_size" in taken:
        taken |= {"img_size", "input_size"}
    if "data_dir" in taken and len(positional) == 1:
        taken.add("data")
    given = [*(Drawn(name, value) for name, value in base.items() if name not in taken), *drawn]
    if any(option.name in positional and option.in_recipe for option in given):  # the others would take its place
        given = [dataclasses.replace(o, in_recipe=o.in_recipe or o.name in positional) for o in given]
    flags = [option for option in given if not option.in_recipe]
    words = [str(option.value) for name in positional for option in flags if option.name == name]
    words += [word for option in flags if option.name not in positional for word in option.words()]
    if content := {option.name: option.value for option in given if option.in_recipe}:
        recipe.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        words += ["--config", str(recipe)]
    return words
