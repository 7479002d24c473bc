"""Writing the weights of a checkpoint in another layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from vip.checkpoints.reading import LAYOUTS, label, open_checkpoint, text
from vip.errors import UserError
from vip.files import replacing, save
from vip.training.weights import CHECKSUM, ENTRIES, find_checkpoint, tensors_checksum


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        weights: 'averaged', 'plain', both, or empty where the source does not say.
        tensors: Tensors in the file.
        bytes: Size of the file.
        left_out: Entries of the source that the file does not have.
    """

    weights: str
    tensors: int
    bytes: int
    left_out: list[str]


def layout_of(output: Path) -> str:
    """The layout that the ending of a file stands for.

    Raises:
        UserError: If it stands for none.
    """
    for layout in reversed(LAYOUTS):
        if output.name.endswith(LAYOUTS[layout]):
            return layout
    endings = ", ".join(ending for endings in LAYOUTS.values() for ending in endings)
    raise UserError(f"{output} ends in none of {endings}; name it so that its ending says what it holds.")


def bare_layout(output: Path) -> str:
    """The layout that the ending of a file of bare weights stands for."""
    return "safetensors" if layout_of(output) == "safetensors" else "pth"


def check_output(output: Path, layout: str, overwrite: bool) -> None:
    """Refuse an output before anything is read.

    Raises:
        UserError: If it is there, is below no folder, or has the ending of another layout.
    """
    if (layout == "safetensors") != (layout_of(output) == "safetensors"):
        raise UserError(f"{output} would be read by its ending, which is not that of the layout {layout}; rename it.")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output} is {'a folder' if output.is_dir() else 'in no folder'}; name a file in a folder.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already: name another --output, or add --overwrite.")


def convert(
    path: str | Path, output: Path, layout: str, use_ema: bool | None = None, overwrite: bool = False
) -> Written:
    """Write the weights of a checkpoint in another layout.

    Args:
        path: A file, or the folder of a run: its best checkpoint, else its last.
        output: File to write.
        layout: One of `LAYOUTS`: the published layout has plain and averaged weights, the others have one of them.
        use_ema: Take the averaged weights; None: where there are any.
        overwrite: Replace the output.

    Raises:
        UserError: If the checkpoint cannot be read, or the output cannot be written.
    """
    check_output(output, layout, overwrite)
    source = open_checkpoint(find_checkpoint(path))
    weights = source.weights(use_ema)
    arch = None if layout == "pth" else source.model(weights) or text(source.content.get("arch"))
    told = {"epoch": source.number("epoch"), "arch": arch, "metric": source.number("metric")}
    facts: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    facts["version"] = 2  # in which `epoch` is the one that ended
    sets = source.sets or {"plain": "state_dict"}
    if layout == "published":
        states = {ENTRIES[kind][0]: source.weights(kind == "averaged") for kind in sets}
        write(output, layout, {**facts, **states}, {})
    else:
        kind = "plain" if use_ema is False else next(iter(sets))
        sets = {kind: sets[kind]}
        write(output, layout, weights, facts)
    kept = {*sets.values(), *({} if layout == "pth" else facts)}
    left_out = [label(name) for name in source.content if name not in kept]
    kinds = " and ".join(sets) if source.sets else ""
    return Written(kinds, len(weights) * len(sets), output.stat().st_size, left_out)


def write(output: Path, layout: str, content: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write weights and, to safetensors, facts about them.

    Raises:
        UserError: If the file cannot be written, or its format cannot hold them.
    """
    try:
        if layout != "safetensors":
            return save(content, output)
        if "__metadata__" in content:  # of which safetensors would make a file that it cannot read
            raise ValueError("no tensor in safetensors can be called __metadata__")
        # the format has no shared memory
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}
        metadata = {"format": "pt", **{name: str(value) for name, value in facts.items()}}
        data = safetensors.torch.save(tensors, {**metadata, CHECKSUM: tensors_checksum(tensors)})
        with replacing(output) as path:
            path.write_bytes(data)  # safetensors would make a file that other users cannot read
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as e:  # torch and safetensors raise them all
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise UserError(f"Cannot write {output} ({reason}).") from e
