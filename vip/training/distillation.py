"""Distillation: a teacher of any kind for timm's distillation tasks."""

import os
from typing import Any

import torch
from timm.task import (
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn
from torch.utils.data import Dataset

from vip.errors import UserError
from vip.training.config import EvaluationConfig, TrainConfig
from vip.training.factory import resolve_data_config
from vip.training.validation import check_classes, load_model
from vip.training.weights import check_model_name


class Teacher(DistillationTeacher):
    """timm's frozen teacher, which sees the student's images with the normalization and at the size it was trained on.

    Args:
        model: A timm model.
        own: Its data configuration: `input_size`, `mean` and `std`.
        student: The student's.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, own: dict[str, Any], student: dict[str, Any]) -> None:
        super().__init__(model)
        self.requires_grad_(False)
        self.size = tuple(own["input_size"][-2:])
        mean, std, own_mean, own_std = (
            torch.tensor(config[name])[None, :, None, None] for config in (student, own) for name in ("mean", "std")
        )
        self.same_normalization = bool((mean == own_mean).all() and (std == own_std).all())
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def normalize_input(self, input: torch.Tensor, *_: Any) -> torch.Tensor:
        """The student's images `[B, C, H, W]` as the teacher's; unlike timm's without waiting for the device."""
        if not self.same_normalization:
            input = input * self.scale + self.shift
        if tuple(input.shape[-2:]) != self.size:
            input = nn.functional.interpolate(input, self.size, mode="bicubic", antialias=True)
        return input


def create_teacher(config: TrainConfig, data: Dataset, student: Any, data_config: dict[str, Any]) -> Teacher:
    """Load the model that `--teacher` names.

    Args:
        config: The teacher, and where the data is.
        data: The training images.
        student: The model to train.
        data_config: What it sees.

    Raises:
        UserError: If there is no such teacher, or it is one of other classes or channels.
    """
    name = "" if os.path.exists(config.teacher) else config.teacher
    if name:
        try:
            check_model_name(name)
        except UserError as e:
            raise UserError(f"--teacher {name} is no checkpoint and no model: {e}") from e
    found = EvaluationConfig(
        model=name,
        pretrained=bool(name),
        data=config.data,
        class_map=config.class_map,
        fast_norm=config.fast_norm,
        no_kernels=config.no_kernels,
    )
    model: Any
    in_common = {"fast_norm", "no_kernels"}  # of the process, and the student decides
    found, model, checkpoint, source = load_model(found, "" if name else config.teacher, in_common)
    own = resolve_data_config(model, found)
    _check_match(model, own, student, data_config, source)
    try:
        check_classes(data, found, model, checkpoint)
    except UserError as e:
        raise UserError(f"--teacher {config.teacher}: {e}") from e
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Teacher(model, own, data_config)


def _check_match(model: Any, own: dict[str, Any], student: Any, data_config: dict[str, Any], source: str) -> None:
    """Refuse a teacher of another number of classes or channels than the student's."""
    for what, theirs, ours in (
        ("classes", model.num_classes, student.num_classes),
        ("channels", own["input_size"][0], data_config["input_size"][0]),
    ):
        if theirs != ours:
            raise UserError(
                f"The teacher {source} has {theirs} {what}, and the student {ours}: take a teacher that was trained on "
                "this data, or fine-tune it first."
            )


def create_distillation(
    config: TrainConfig, student: Any, teacher: Teacher, criterion: nn.Module, device: torch.device
) -> TrainingTask:
    """The task in which a student learns from labels and a teacher.

    Raises:
        UserError: If the student has no head for it.
    """
    teacher = teacher.to(device)
    common: dict[str, Any] = dict(
        task_loss_weight=1 - config.distill_alpha,
        distill_loss_weight=config.distill_alpha,
        device=device,
        verbose=False,
    )
    if config.distill_type == "feature":
        return FeatureDistillationTask(student, teacher, criterion, **common)
    if config.distill_type == "token":
        if not hasattr(student, "set_distilled_training"):
            raise UserError(
                "--distill-type token is for models with a distillation head, such as "
                f"deit_tiny_distilled_patch16_224, and {config.model} has none: leave it out."
            )
        return TokenDistillationTask(student, teacher, criterion, temperature=config.distill_temperature, **common)
    return LogitDistillationTask(student, teacher, criterion, temperature=config.distill_temperature, **common)
