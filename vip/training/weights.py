"""Weights: reading checkpoint files safely, recognising what they hold, and loading them with clear errors."""

import functools
import hashlib
import importlib
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict, parse_model_name
from timm.models._manipulate import adapt_input_conv
from torch import nn

from vip.errors import UserError
from vip.files import UnreadableFile, check_records, load_without_code
from vip.options import nearest

_logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]

ENTRIES = {"averaged": ("state_dict_ema", "model_ema"), "plain": ("state_dict", "model")}  # as timm names them
CHECKSUM = "tensors_sha256"  # in the metadata of safetensors files, which have no checksum of their own


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file at `path`: a file, or the best (else last) checkpoint of a run's folder.

    Raises:
        UserError: If there is none.
    """
    path = Path(path)
    if os.path.isdir(path):
        for name in ("model_best.pth.tar", "last.pth.tar"):
            if (path / name).is_file():
                return path / name
        files = sorted(f for ext in ("*.pth.tar", "*.pth", "*.pt", "*.safetensors") for f in path.glob(ext))
        if len(files) == 1:
            return files[0]
        found = f"{len(files)} checkpoints to choose from" if files else "no checkpoint"
        raise UserError(f"The folder {path} holds {found} and no model_best.pth.tar; name the file.")
    if not os.path.isfile(path):  # which is false as well for what can be no path, where that of pathlib raises
        raise UserError(f"There is no checkpoint at {path}.")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file (`.pth`, `.pth.tar`, `.safetensors`) without running any code it may hold.

    Returns:
        Its content: a training state with `state_dict`, or bare weights.

    Raises:
        UserError: If the file is missing, damaged (the checksums in it are checked), or needs unpickling code.
    """
    path = find_checkpoint(path)
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_safetensors(path)
        else:
            check_records(path)
            content = load_without_code(path)
    except UnreadableFile as e:
        if e.code:
            raise UserError(
                f"{path} is refused: {e}. Save its weights alone, with torch.save(model.state_dict(), ...), where you "
                "trust it."
            ) from e
        raise UserError(f"{path} is no checkpoint or is damaged ({e}); take another one of the run.") from e
    except OSError as e:
        raise UserError(f"Cannot read {path} ({e.strerror or e}).") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a checkpoint or a dictionary of weights.")
    return content


def load_safetensors(path: Path) -> StateDict:
    """The tensors of a safetensors file.

    Raises:
        UnreadableFile: If it is damaged, by the format or by the checksum where it has one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get(CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as e:
        raise UnreadableFile(type(e).__name__, []) from e
    if recorded is not None and recorded != tensors_checksum(tensors):
        raise UnreadableFile("its tensors are not what was written", [])
    return tensors


def tensors_checksum(tensors: StateDict) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_sets(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Which entries of a checkpoint hold weights, 'averaged' before 'plain'; none if it is bare weights."""
    found = {
        kind: next((name for name in names if isinstance(checkpoint.get(name), dict) and checkpoint[name]), "")
        for kind, names in ENTRIES.items()
    }
    return {kind: name for kind, name in found.items() if name}


def state_dict_of(checkpoint: dict[str, Any], use_ema: bool | None, path: str | Path = "checkpoint") -> StateDict:
    """The weights of a checkpoint without DDP and compile prefixes.

    Args:
        checkpoint: What `read_checkpoint` gave.
        use_ema: Take the averaged weights; None: where there are any.
        path: Name for messages.

    Raises:
        UserError: If averaged weights are asked for and there are none, or there are no weights at all.
    """
    sets = weight_sets(checkpoint)
    if use_ema and "averaged" not in sets:
        raise UserError(f"{path} has no averaged weights; leave out --use-ema.")
    name = sets.get("plain", "") if use_ema is False else next(iter(sets.values()), "")
    state = checkpoint[name] if name else checkpoint
    named = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    )
    if not named or not state:
        raise UserError(f"{path} holds no weights: expected a dictionary of tensors, or one under 'state_dict'.")
    return clean_state_dict(state)


def _is_fixed(name: str) -> bool:
    """Whether the shape of a parameter follows from the architecture, not from classes, channels or image size."""
    return not name.startswith(
        ("head.", "aux_head.", "patch_embed.proj.", "patch_embed.conv1.", "pos_embed")
    ) and not name.endswith((".mlp_h.weight", ".mlp_w.weight"))


def recognise(state_dict: StateDict) -> str | None:
    """The name of the model of this library whose parameters these are, whatever classes and image size."""
    shapes = {k: v.shape for k, v in state_dict.items() if _is_fixed(k)}
    names = timm.list_models(module=[m for m in timm.list_modules() if m in _our_modules()])
    return next((name for name in names if shapes == _fixed_shapes(name)), None)


@functools.cache
def _fixed_shapes(name: str) -> dict[str, torch.Size]:
    model = timm.create_model(name, device="meta")
    return {k: v.shape for k, v in model.state_dict().items() if _is_fixed(k)}


def _our_modules() -> set[str]:
    import vip.models

    return {Path(str(f)).stem for f in Path(vip.models.__file__).parent.glob("*.py")}


def count_classes(name: str, state_dict: StateDict) -> int | None:
    """The classes of the head in the weights of a model that timm knows by `name`, None where they are not told."""
    cfg = timm.get_pretrained_cfg(name)
    classifiers = cfg.classifier if cfg is not None and cfg.classifier else ()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        weight = state_dict.get(f"{classifier}.weight")
        if weight is not None and weight.ndim:
            return len(weight)
    return None


def check_model_name(name: str) -> None:
    """Refuse a name timm does not know, with the nearest ones it does; what is elsewhere is first seen when loaded.

    Raises:
        UserError: If the model is unknown, or its weights after the dot, or the source before the colon.
    """
    try:
        if parse_model_name(name)[0]:
            return
    except ValueError as e:
        raise UserError(f"No model is called {name!r}: {e}") from e
    model = name.partition(".")[0]
    if not timm.is_model(model):
        raise UserError(f"No model is called {name!r}.{nearest(name, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as e:
        known = timm.list_models(f"{model}.*", pretrained=True)
        raise UserError(f"No weights are called {name!r}.{nearest(name, known)}") from e


def filter_for(model: nn.Module, state_dict: StateDict) -> StateDict:
    """Apply the model family's own `checkpoint_filter_fn`: old names, other image sizes."""
    module = importlib.import_module(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    return convert(state_dict, model) if convert else state_dict


def load_weights(model: nn.Module, state_dict: StateDict, path: str | Path, source: StateDict | None = None) -> None:
    """Load weights that must fit the model; another image size is resampled.

    Args:
        model: The model to load into.
        state_dict: The weights.
        path: Where they come from, for messages.
        source: What the file held, where `state_dict` was changed since.

    Raises:
        UserError: If they do not fit; the message says what differs.
    """
    own = {k: v.shape for k, v in model.state_dict().items()}
    resampled = sum(k in own and v.shape != own[k] for k, v in state_dict.items())
    state_dict = filter_for(model, state_dict)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        raise UserError(_describe_mismatch(model, state_dict, path, recognise(source or state_dict))) from e
    if resampled:
        _logger.info(f"Resampled {resampled} of {len(own)} tensors in {path} to the model's image size")


def _describe_mismatch(model: nn.Module, state_dict: StateDict, path: str | Path, found: str | None) -> str:
    own = model.state_dict()
    other = [k for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
    heads = [k for k in other if k.startswith("head.")]
    wrong = [k for k in other if _is_fixed(k) or k.startswith("patch_embed.proj")]
    missing, unknown = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    if heads and not (wrong or missing or unknown):
        there, here = len(state_dict[heads[0]]), len(own[heads[0]])
        return (
            f"{path} has {there} classes, the model {here}; use --num-classes {there} with data of as many, or train "
            "from it with --finetune, which makes a new head."
        )
    facts = Counter({"of another shape": len(wrong), "missing": len(missing), "unknown": len(unknown)})
    counts = ", ".join(f"{n} {what}" for what, n in facts.items() if n)
    example = ""
    if wrong:
        key = wrong[0]
        example = f" For example {key} is {list(state_dict[key].shape)} there and {list(own[key].shape)} in the model."
    elif missing or unknown:
        example = f" For example {min(missing or unknown)} is {'missing' if missing else 'unknown'}."
    advice = (
        f" It holds {found}: use --model {found}." if found and found != name else " Check --model and --model-kwargs."
    )
    return f"The weights in {path} do not fit {name}: {counts or 'some'} of {len(own)} tensors.{example}{advice}"


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that classify, as timm's configuration of the model has them."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def load_finetune(model: nn.Module, path: str | Path, class_to_idx: dict[str, int] | None = None) -> str:
    """Load the weights of another task: the head is made anew where its classes differ, other sizes are resampled.

    Args:
        model: The model to load into.
        path: A checkpoint; its averaged weights are taken where it has them.
        class_to_idx: The classes now, None where they have no names: then only their number tells that they differ.

    Returns:
        One line on what was kept and what was made anew.

    Raises:
        UserError: If anything but the head, the image size and the input channels differs.
    """
    checkpoint = read_checkpoint(path)
    source = state_dict_of(checkpoint, None, path)
    state_dict = dict(source)
    named = [c for c in (checkpoint.get("class_to_idx"), class_to_idx) if isinstance(c, dict)]
    classes = [sorted(map(str, c.items())) for c in named]  # as text: a file may hold anything
    renamed = len(classes) == 2 and [] not in classes and classes[0] != classes[1]
    own, cfg = model.state_dict(), getattr(model, "pretrained_cfg", {})
    remade = []
    for classifier in classifier_names(model):
        for key in (f"{classifier}.weight", f"{classifier}.bias"):
            if key in own and (key not in state_dict or state_dict[key].shape != own[key].shape):
                there = f"{len(state_dict[key])} classes" if key in state_dict else "none"
                remade.append(f"{key} ({there} there, {len(own[key])} here)")
                state_dict[key] = own[key]
            elif key in own and renamed:
                remade.append(f"{key} (other classes there)")
                state_dict[key] = own[key]
            elif key not in own:
                state_dict.pop(key, None)
    first = f"{cfg.get('first_conv')}.weight"
    if first in own and first in state_dict and own[first].shape[1] != state_dict[first].shape[1]:
        remade.append(f"{first} ({state_dict[first].shape[1]} channels there, {own[first].shape[1]} here, converted)")
        state_dict[first] = adapt_input_conv(own[first].shape[1], state_dict[first])
    resampled = [k for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
    load_weights(model, state_dict, path, source)
    parts = [f"kept {len(own) - len(remade) - len(resampled)} of {len(own)} tensors"]
    if resampled:
        parts.append(f"resampled {len(resampled)} to the new image size")
    parts.append(f"made anew: {', '.join(remade)}" if remade else "nothing made anew")
    return f"Fine-tuning {path}: {'; '.join(parts)}."
