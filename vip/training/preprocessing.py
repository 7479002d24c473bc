"""What images a model takes and what its outputs are called, as files and repositories of models say it."""

from collections.abc import Mapping
from typing import Any

from timm.data import resolve_input_data_config
from torch import nn


def describe(
    model: nn.Module, data_config: Mapping[str, Any] | None = None, class_to_idx: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Describe the input and the output of a model, under timm's names.

    Args:
        model: A model of timm's.
        data_config: Its pre-processing; None: the model's own.
        class_to_idx: Its classes; None: those that its configuration names, if it does.

    Returns:
        `architecture`, `num_classes`, `input_size` (channels, height, width), `mean` and `std` of values from 0 to 1,
        `crop_pct`, `crop_mode`, `interpolation`, and `label_names` in the order of the outputs where they are known.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    data_config = data_config or resolve_input_data_config(model, {})
    classes: Any = getattr(model, "num_classes", None)
    about = {"architecture": cfg.get("architecture") or type(model).__name__, "num_classes": classes}
    for name in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"):
        value = data_config[name]
        about[name] = list(value) if isinstance(value, tuple) else value
    names = label_names(model)
    if class_to_idx:
        by_index = {index: name for name, index in class_to_idx.items() if isinstance(index, int)}
        names = [str(by_index.get(index, index)) for index in range(classes)]
    return {**about, **({"label_names": names} if names else {})}


def label_names(model: nn.Module) -> list[str]:
    """Names of a published model's outputs in their order, empty where its configuration names none, or others."""
    names: Any = getattr(model, "pretrained_cfg", {}).get("label_names")
    fit = isinstance(names, (list, tuple)) and len(names) == getattr(model, "num_classes", None)
    return [str(name) for name in names] if fit else []
