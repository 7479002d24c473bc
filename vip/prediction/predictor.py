"""A trained model with its preprocessing and the names of its classes."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from timm.utils.distributed import is_distributed_env
from torch import nn

from vip.data.datasets import image_mode
from vip.data.images import UnreadableImage, decode_image
from vip.errors import UserError
from vip.prediction.classes import class_names
from vip.prediction.config import PredictConfig
from vip.prediction.heatmaps import Heatmap, TokenActivation
from vip.training.config import ValidateConfig
from vip.training.engine import infer
from vip.training.factory import resolve_data_config
from vip.training.runtime import Precision, setup_precision, setup_runtime
from vip.training.validation import load_model, prepare_model

_logger = logging.getLogger(__name__)

AnyImage: TypeAlias = str | Path | Image.Image
_Read: TypeAlias = torch.Tensor | UnreadableImage | OSError


@dataclass(frozen=True)
class ClassScore:
    """A class and its probability, by a softmax over all classes."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        image: The image, as it was given.
        classes: The likeliest classes, best first; none where the image cannot be read.
        heatmap: Which tokens drove a class, where that was asked for.
        error: Why the image cannot be read, empty where it can.
    """

    image: AnyImage
    classes: list[ClassScore]
    heatmap: Heatmap | None = None
    error: str = ""


class Predictor:
    """Predicts what is in images, which it reads, resizes, crops and normalizes as the model was validated.

    Args:
        model: A timm model, on the device to run it on.
        data_config: Its preprocessing as timm resolves it: input_size, mean, std, interpolation, crop_pct, crop_mode;
            the model's own if None.
        classes: Names of its classes, those of `class_names` if None.
        forward: Normalized images `[B, C, H, W]` to logits `[B, K]`, the model itself if None: a compiled one, say.
        mode: PIL mode of its images, RGB or L by its channels if None.
        batch_size: Images of a batch.
        workers: Threads that read images.
    """

    def __init__(
        self,
        model: Any,
        data_config: dict[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
        mode: str | None = None,
        batch_size: int = 64,
        workers: int = 4,
    ) -> None:
        self.model = model.eval()
        self.data_config = data_config or resolve_input_data_config(model, {})
        self.classes = list(classes or class_names(model.num_classes))
        self.forward = forward or model
        self.mode = image_mode(mode, self.data_config["input_size"][0])
        self.batch_size, self.workers = batch_size, workers
        self.transform = create_transform(**self.data_config, is_training=False)
        self.device = next(model.parameters()).device

    def predict(
        self, images: Iterable[AnyImage], top_k: int = 5, heatmaps: bool = False, heatmap_class: int | None = None
    ) -> Iterator[Prediction]:
        """Predict what is in images, in their order, a batch at a time.

        Args:
            images: Files, or PIL images.
            top_k: Classes to name, all where the model has fewer.
            heatmaps: Make a heat map for each image.
            heatmap_class: Index of the class of the heat maps, each image's likeliest if None.

        Raises:
            UserError: If the model gives numbers that are not finite, or cannot have heat maps.
        """
        activation = TokenActivation(self.model, self.data_config, self.mode) if heatmaps else None
        read = self._read_ahead(images)
        while batch := list(islice(read, self.batch_size)):
            pixels = [found for _, found in batch if isinstance(found, torch.Tensor)]
            predicted = self._predict(torch.stack(pixels), top_k, activation, heatmap_class) if pixels else iter(())
            for image, found in batch:
                if isinstance(found, torch.Tensor):
                    yield Prediction(image, *next(predicted))
                else:
                    yield Prediction(image, [], error=getattr(found, "strerror", None) or str(found))

    @torch.inference_mode()
    def _predict(
        self, images: torch.Tensor, top_k: int, activation: TokenActivation | None, heatmap_class: int | None
    ) -> Iterator[tuple[list[ClassScore], Heatmap | None]]:
        images = images.to(self.device)
        logits = self.forward(images).float()
        if not logits.isfinite().all():
            raise UserError(
                "The model's logits are not finite: leave out --amp or give --amp-dtype bfloat16, and see --mean and "
                "--std, or take another checkpoint."
            )
        probabilities, indices = logits.softmax(1).topk(min(top_k, logits.shape[1]))
        maps: list[Any] = [None] * len(images)
        if activation is not None:
            wanted = indices[:, 0] if heatmap_class is None else torch.full_like(indices[:, 0], heatmap_class)
            maps = activation(images, wanted)
        scores = [
            [ClassScore(index, self.classes[index], probability) for index, probability in zip(*row, strict=True)]
            for row in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]
        return iter(list(zip(scores, maps, strict=True)))

    def _read_ahead(self, images: Iterable[AnyImage]) -> Iterator[tuple[AnyImage, _Read]]:
        """Images in their order, made ready for the model by threads while it computes, or why they cannot be."""
        pool = ThreadPoolExecutor(self.workers)
        waiting: deque[Any] = deque()
        try:
            for image in images:
                waiting.append((image, pool.submit(self._read, image)))
                if len(waiting) > 2 * self.batch_size:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, image: AnyImage) -> _Read:
        try:
            if isinstance(image, Image.Image):
                return self.transform(image.convert(self.mode))
            with open(image, "rb") as file:
                return self.transform(decode_image(file, self.mode))
        except (UnreadableImage, OSError) as e:
            return e


def load_predictor(checkpoint: str | Path = "", **options: Any) -> Predictor:
    """Load a predictor from a checkpoint, or with the weights that timm has for a model.

    Args:
        checkpoint: A checkpoint, or the folder of a run; empty where `model` names one.
        **options: Options of `PredictConfig`, such as `device`, `img_size`, `use_ema`, `batch_size` and `model`; they
            win over what the checkpoint says.

    As the commands do, it lets a GPU search for the fastest convolutions and use TF32 for float32, in this process.

    Raises:
        UserError: If there is neither, or the checkpoint does not fit.
    """
    if is_distributed_env():
        raise UserError("Predictions are made in one process: start it without torchrun, or one process of Slurm.")
    given, config = set(options), PredictConfig(checkpoint=str(checkpoint), **options)
    if not (config.checkpoint or config.model):
        raise UserError("Nothing to predict with: give --checkpoint PATH, or --model NAME --pretrained.")
    names = {field.name for field in fields(PredictConfig)} & {field.name for field in fields(ValidateConfig)}
    shared = {name: getattr(config, name) for name in names - {"checkpoint"}}
    if not config.checkpoint and "pretrained" not in given:
        shared["pretrained"] = True  # as validation
    if not (config.checkpoint or shared["pretrained"]):
        _logger.warning(f"{config.model} has random weights: leave out --no-pretrained, or give a --checkpoint.")
    runtime = setup_runtime(config.device)
    model: Any
    evaluation, model, content, _ = load_model(ValidateConfig(**shared), config.checkpoint, given)
    if not model.num_classes:
        raise UserError(f"{evaluation.model} has no classes to predict: take another model.")
    data_config = resolve_data_config(model, evaluation)
    precision = setup_precision(evaluation, runtime.device)
    return Predictor(
        model.to(runtime.device),
        data_config,
        class_names(model.num_classes, content.get("class_to_idx")),
        _forward(prepare_model(model, evaluation, data_config, runtime, precision), evaluation, precision),
        evaluation.input_img_mode,
        evaluation.batch_size,
        config.workers,
    )


def _forward(model: nn.Module, config: ValidateConfig, precision: Precision) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(images: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            return infer(model, images, config.channels_last, config.tta)

    return forward
