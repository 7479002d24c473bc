"""Freezing: parts of a model that stay as they are while the others learn."""

from torch import nn

from vip.errors import UserError
from vip.options import nearest
from vip.training.weights import classifier_names

BACKBONE = "backbone"  # the name of all but the classifier


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Exempt parts of a model from training.

    Args:
        model: A timm model.
        parts: Names of modules or parameters, such as `network.0`, or `backbone` for all but the classifier.

    Raises:
        UserError: If the model has no such part, or nothing would be left to learn.
    """
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    for part in parts:
        if part == BACKBONE:
            heads = classifier_names(model)
            inside = {name for name in parameters if not any(_is_in(name, head) for head in heads)}
        else:
            inside = {name for name in parameters if _is_in(name, part)}
        if not inside:
            known = {name[:end] for name in parameters for end, c in enumerate(f"{name}.") if c == "."}
            top = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
            raise UserError(
                f"--freeze {part}: the model has no such part.{nearest(part, known)} Its parts are {top}, what is in "
                f"them, such as {next(iter(parameters)).rpartition('.')[0]}, and {BACKBONE} for all but the classifier."
            )
        frozen |= inside
    if len(frozen) == len(parameters):
        raise UserError(f"--freeze {' '.join(parts)} leaves nothing to learn: freeze less.")
    for name in frozen:
        parameters[name].requires_grad_(False)


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def hold_frozen(model: nn.Module) -> None:
    """Let frozen modules compute as in inference: no new statistics of BatchNorm, no dropout, no stochastic depth."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
