"""Pictures of what Permute-MLPs do: which tokens they mix, and how they weigh their branches."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from vip.errors import UserError
from vip.models.vision_permutator import AxisMix, PermuteMlp
from vip.reporting.plots import COLORS, add_title, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BRANCHES = ("height", "width", "channel")
_MOST_COLUMNS = 9


def find_permute_mlps(model: nn.Module) -> dict[str, PermuteMlp]:
    """The Permute-MLPs of a model by the names of their blocks, in order.

    Raises:
        UserError: If it has none.
    """
    layers = {name.rpartition(".")[0]: m for name, m in model.named_modules() if isinstance(m, PermuteMlp)}
    if not layers:
        known = ", ".join(timm.list_models(module="vision_permutator"))
        raise UserError(
            f"{type(model).__name__} has no Permute-MLP, whose mixing this draws: give a checkpoint of {known}, or of "
            "a model made of their layers."
        )
    return layers


def token_mixing(layer: AxisMix) -> torch.Tensor:
    """How strongly each token of an axis reads each other one.

    Returns:
        `[H, H]`, the Frobenius norm of each `[S, S]` part of the mixing matrix; a row is an output.
    """
    segment = layer.segment_dim
    parts = layer.weight.detach().unflatten(1, (-1, segment)).unflatten(0, (-1, segment))
    return torch.linalg.vector_norm(parts.float(), dim=(1, 3))


@torch.inference_mode()
def branch_weights(model: nn.Module, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The weights that Permute-MLPs give to their branches, averaged over images and channels.

    Args:
        model: A model with Permute-MLPs.
        batches: Images `[B, C, H, W]`.

    Returns:
        `[blocks, 3]` for height, width and channel, each row summing to one, and the number of images.

    Raises:
        UserError: If the model has no Permute-MLPs, there is no image, or a weight is not finite.
    """
    layers = find_permute_mlps(model).values()
    sums = [torch.zeros(3, dtype=torch.float64) for _ in layers]

    def add(total: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            total.add_(output.double().unflatten(1, (-1, 3)).softmax(-1).mean(1).sum(0).cpu())  # laid out as [C, 3]

        return hook

    hooks = [layer.reweight.register_forward_hook(add(total)) for layer, total in zip(layers, sums, strict=True)]
    images = 0
    try:
        for batch in batches:
            if len(batch):  # of which some could be read
                model(batch)
                images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise UserError("None of the images can be read: take others, or more of them.")
    if not all(total.isfinite().all() for total in sums):
        raise UserError("The weights of the branches are not finite: take another checkpoint.")
    return torch.stack(sums) / images, images


def draw_mixing(layers: dict[str, PermuteMlp], title: str, full: bool = False) -> "Figure":
    """Draw the height and width mixing of each block.

    Args:
        layers: Permute-MLPs by the names of their blocks.
        title: Title of the picture.
        full: Draw the whole `[H * S, H * S]` matrices instead of the norms of their `[S, S]` parts.

    Raises:
        UserError: If matplotlib is not installed.
    """
    names = list(layers)
    columns = min(len(names), _MOST_COLUMNS)
    bands = [names[i : i + columns] for i in range(0, len(names), columns)]
    largest = max(mix.in_features for layer in layers.values() for mix in (layer.mlp_h, layer.mlp_w))
    side = max(1.4, largest / 150) if full else 1.4  # a dot of the picture for each weight, or more
    figure, axes = new_figure(columns, side, side + 0.35, 2 * len(bands))
    for ax in axes:
        ax.set_axis_off()
    for i, band in enumerate(bands):
        for j, name in enumerate(band):
            for k, mix in enumerate((layers[name].mlp_h, layers[name].mlp_w)):
                label = f"{name}\n{BRANCHES[k]}" if k == 0 else BRANCHES[k]
                _draw_matrix(axes[(2 * i + k) * columns + j], mix, label, full)
    what = "weights, red negative, blue positive" if full else "Frobenius norms of the weights between tokens, black 0"
    add_title(figure, f"{title}: {what}; rows are outputs, columns inputs; each picture up to its own largest")
    return figure


def _draw_matrix(ax: Any, mix: AxisMix, label: str, full: bool) -> None:
    matrix = mix.weight.detach().float() if full else token_mixing(mix)
    largest = float(matrix.abs().max())
    style = dict(cmap="RdBu", vmin=-largest) if full else dict(cmap="magma", vmin=0)
    ax.imshow(matrix.cpu().numpy(), vmax=largest, interpolation="nearest", **style)
    ax.set_title(f"{label}, up to {largest:.2g}", fontsize=7)


def draw_branch_weights(names: Iterable[str], weights: torch.Tensor, title: str) -> "Figure":
    """Draw the weights of the branches of each block as stacked bars.

    Args:
        names: Names of the blocks.
        weights: `[blocks, 3]`, as `branch_weights` gives.
        title: Title of the picture.

    Raises:
        UserError: If matplotlib is not installed.
    """
    names = list(names)
    figure, (ax,) = new_figure(width=max(6.4, 0.45 * len(names) + 1.5))
    bottom = torch.zeros(len(names), dtype=weights.dtype)
    for branch, share, color in zip(BRANCHES, weights.T, COLORS, strict=False):
        bars = ax.bar(names, share, bottom=bottom, color=color, label=branch, width=0.85)
        ax.bar_label(bars, fmt="{:.0%}", label_type="center", fontsize=7, color="white")
        bottom = bottom + share
    for third in (1 / 3, 2 / 3):
        ax.axhline(third, color="white", linestyle=":", linewidth=1)
    ax.grid(False)
    ax.set(ylabel="weight of the branch", ylim=(0, 1))
    ax.tick_params(axis="x", rotation=90, labelsize=8)
    add_title(figure, title)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return figure
