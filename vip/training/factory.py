"""Models, losses and optimizers from the configuration, all of them timm's."""

import logging
from collections.abc import Iterable
from typing import Any

import timm
import torch
import torch._functorch.config as functorch_config  # where torch has its memory budget
from safetensors import SafetensorError
from timm.data import resolve_input_data_config
from timm.layers import set_fast_norm
from timm.loss import create_classification_loss
from timm.models import parse_model_name, resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs, param_groups_weight_decay
from timm.task import TrainingTask
from torch import nn

from vip import ops
from vip.data.config import InputConfig
from vip.errors import UserError
from vip.options import nearest
from vip.training.config import ModelConfig, PrecisionConfig, RegularizationConfig, TrainConfig
from vip.training.runtime import onednn_multiplies
from vip.training.weights import check_model_name

_logger = logging.getLogger(__name__)

# what models and optimizers raise at arguments that they cannot take
_ARGUMENT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
_HUB_ADVICE = (
    " It was looked for on the Hugging Face Hub and among what came from there before: look at the name and the "
    "connection, set HF_HUB_OFFLINE=1 to take what is here without asking, or name a copy: --model local-dir:FOLDER."
)
_MODEL_OPTIONS = ("model_kwargs", "gp", "img_size", "input_size", "in_chans", "num_classes", "drop", "drop_block")


def create_model(config: Any, num_classes: int | None, **kwargs: Any) -> nn.Module:
    """Create a model by name through timm.

    Args:
        config: A `ModelConfig` that is also an `InputConfig`.
        num_classes: Classes of the head, the model's own default if None.
        **kwargs: Other arguments of the model.

    Raises:
        UserError: If the name is unknown or the model does not take an argument.
    """
    assert isinstance(config, ModelConfig) and isinstance(config, InputConfig)
    check_model_name(config.model)
    set_fast_norm(config.fast_norm)  # of the process, as the kernels are
    ops.set_kernels(False if config.no_kernels else None)
    kwargs = {"num_classes": num_classes, "global_pool": config.gp or None, **kwargs, **config.model_kwargs}
    try:
        args = resolve_model_input_args(
            config.model,
            _requested_input(config),
            pretrained=config.pretrained,
            scriptable=config.torchscript,
            **kwargs,
        )
        return timm.create_model(**args)
    except _ARGUMENT_ERRORS as e:
        reason = _first_line(e)
        given = [name for name in _MODEL_OPTIONS if getattr(config, name, None) not in (None, {})]
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        said = f" It was given {flags}." if given else ""
        if config.pretrained and "pretrained=False" in reason:  # words for programs
            reason = "there are no pretrained weights for it: give a checkpoint, or do without --pretrained"
        advice = _HUB_ADVICE if isinstance(e, OSError) and parse_model_name(config.model)[0] == "hf-hub" else ""
        raise UserError(f"Cannot create {config.model}: {reason}.{said}{advice}") from e


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _requested_input(config: InputConfig) -> dict[str, Any]:
    return {"img_size": config.img_size, "input_size": config.input_size, "in_chans": config.in_chans}


def resolve_data_config(model: nn.Module, config: InputConfig) -> dict[str, Any]:
    """Input size, normalization, crop and interpolation: from the configuration, else from the model.

    Raises:
        UserError: If they contradict the model.
    """
    wanted = {
        **_requested_input(config),
        **{k: getattr(config, k) or None for k in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
    }
    try:
        return resolve_input_data_config(model, wanted)
    except (ValueError, AssertionError) as e:
        raise UserError(f"{e} See --mean, --std, --input-size, --img-size and --in-chans.") from e


def create_training_model(config: TrainConfig, num_classes: int | None) -> nn.Module:
    """Create the model to train, with its regularization and BatchNorm settings."""
    regularization = {
        "drop_rate": config.drop,
        "drop_path_rate": config.drop_path if config.drop_connect is None else config.drop_connect,
        "drop_block_rate": config.drop_block,
    }
    default = RegularizationConfig().drop_path
    try:
        model = create_model(config, num_classes, **regularization)
    except UserError as e:
        if "'drop_path_rate'" not in str(e) or config.drop_path != default:
            raise
        _logger.warning(f"{config.model} has no stochastic depth: the default --drop-path {default} does not apply.")
        model = create_model(config, num_classes, **dict(regularization, drop_path_rate=None))
    _set_batch_norm(model, config)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # every timm model has it
    return model


def _set_batch_norm(model: nn.Module, config: RegularizationConfig) -> None:
    momentum = config.bn_momentum or (0.01 if config.bn_tf else None)  # TensorFlow: 0.99, counted the other way
    eps = config.bn_eps or (1e-3 if config.bn_tf else None)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if (momentum or eps) and not norms:
        _logger.warning("The model has no BatchNorm: --bn-tf, --bn-momentum and --bn-eps change nothing.")
    for norm in norms:
        norm.momentum = momentum or norm.momentum
        norm.eps = eps or norm.eps


def choose_attention(model: nn.Module, config: PrecisionConfig, device: torch.device, training: bool) -> None:
    """Let a model compute with the attention that is faster where it runs.

    Two products and a softmax are on a CPU that trains in bfloat16, where the backward pass of torch's fused attention
    takes a step of a transformer down to 0.8 of its speed, and in float32 where oneDNN multiplies, as the products in
    the fused one are MKL's. Elsewhere the fused one is faster, and takes less memory.

    Args:
        model: Any timm model, changed in place.
        config: The precision.
        device: Where it runs.
        training: Whether it has a backward pass.
    """
    if config.mixed_precision:
        plain = training and config.amp_dtype == "bfloat16"
    else:
        plain = onednn_multiplies()
    if device.type == "cpu" and plain:
        layers: Iterable[Any] = model.modules()
        for layer in layers:
            if hasattr(layer, "fused_attn"):
                layer.fused_attn = False


def check_compile_backend(name: str | None) -> None:
    """Refuse a backend that torch.compile does not know.

    Raises:
        UserError: With the nearest ones it does.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if name and name not in known:
        raise UserError(f"--torchcompile {name} is no backend of torch.compile.{nearest(name, known)} Try inductor.")


def compile_task(task: TrainingTask, config: Any) -> Any:
    """Compile the model of a task in place.

    Args:
        task: The task.
        config: `torchcompile`, `torchcompile_mode` and `memory_budget`.

    Returns:
        The compiled model.
    """
    # of the process, and read when a model runs for the first time
    functorch_config.activation_memory_budget = 1.0 if config.memory_budget is None else config.memory_budget
    return task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)


def create_criterion(config: TrainConfig) -> nn.Module:
    """Create the training loss.

    Raises:
        UserError: If the loss options contradict each other.
    """
    loss_type = "jsd" if config.jsd_loss else "bce" if config.bce_loss else "ce"
    try:
        return create_classification_loss(
            loss_type,
            smoothing=config.smoothing,
            soft_targets=config.mixup_active and not config.jsd_loss,
            bce_sum=config.bce_sum,
            bce_target_thresh=config.bce_target_thresh,
            jsd_splits=config.aug_splits,
        )
    except ValueError as e:
        raise UserError(f"{e} See --jsd-loss, --aug-splits, --bce-loss, --bce-sum and --bce-target-thresh.") from e


def create_optimizer(config: TrainConfig, model: nn.Module, images_per_update: int) -> torch.optim.Optimizer:
    """Create the optimizer, without weight decay on biases and norms; `--lr-base` sets `config.lr`.

    Raises:
        UserError: If the optimizer is unknown or not installed, or does not take an argument.
    """
    if config.lr_base is not None:
        config.lr = config.lr_base * images_per_update / config.lr_base_size
    device = next(model.parameters()).device
    kwargs = {**optimizer_kwargs(config), **config.opt_kwargs}
    chosen = {"fused", "foreach", "differentiable"} & kwargs.keys()
    if config.opt.lower() in ("adam", "adamw") and device.type in ("cpu", "cuda") and not chosen:
        kwargs["fused"] = True  # one pass over the weights
    groups: nn.Module | list[dict[str, Any]] = model
    if config.transfer_learning:
        groups = _transfer_groups(model, config.weight_decay, config.transfer_ratio)
    try:
        _try_step(kwargs, device)
        return create_optimizer_v2(groups, **kwargs)
    except (*_ARGUMENT_ERRORS, ImportError) as e:
        known = [str(name) for name in list_optimizers()]
        hint = "" if config.opt.lower() in known else nearest(config.opt, known)
        reason = "--opt-betas has too few numbers" if isinstance(e, IndexError) else _first_line(e)
        raise UserError(
            f"Cannot create the optimizer {config.opt}: {reason}.{hint} See --opt, --opt-betas, --opt-eps and "
            "--opt-kwargs."
        ) from e


def _try_step(kwargs: dict[str, Any], device: torch.device) -> None:
    """Take a step with an optimizer of these arguments, many of which are first looked at there."""
    model = nn.ParameterList(torch.ones(2, 2, device=device) for _ in range(2))  # nn.Linear would draw random numbers
    optimizer = create_optimizer_v2(model, **{**kwargs, "layer_decay": None})
    loss = torch.stack([(p**2).sum() for p in model]).sum()
    loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
    optimizer.step()


def _transfer_groups(model: nn.Module, weight_decay: float, ratio: float) -> list[dict[str, Any]]:
    """Parameter groups in which the backbone learns at `ratio` of the head's rate, as the published transfer script."""
    head = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]  # every timm model has it
    groups = []
    for group in param_groups_weight_decay(model, weight_decay, model.no_weight_decay()):  # type: ignore[operator]
        for in_head in (True, False):
            params = [p for p in group["params"] if (id(p) in head) == in_head]
            if params:
                groups.append({**group, "params": params, "lr_scale": 1.0 if in_head else ratio})
    return groups
