"""Which tokens drove a class: class activation of each token, drawn over the image."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vip.errors import UserError
from vip.token_labels.annotator import Annotator, averages

# Matplotlib's 'turbo' at 17 points, which is within 8 of 255 of it in between.
_TURBO = (
    "30123b 4040a2 466be3 4294ff 28bceb 18ddc2 32f298 6dfe62 a4fc3c cdec34 eecf3a fdac34 fb7e21 eb500e d02f05 a91601 "
    "7a0403"
)
_COLORS = np.frombuffer(bytes.fromhex(_TURBO), np.uint8).reshape(-1, 3)


@dataclass(frozen=True)
class Heatmap:
    """What every token of an image says of a class.

    Attributes:
        pixels: `[H, W, C]`, uint8: the image as the model saw it, in the PIL mode `mode`.
        activation: `[H', W']`, float32: the class's logit at each token.
        class_index: The class.
        mode: PIL mode of the pixels.
    """

    pixels: np.ndarray
    activation: np.ndarray
    class_index: int
    mode: str = "RGB"

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """Draw the activation over the image in gray: from blue where it is lowest to red where it is highest.

        Args:
            opacity: Share of the colors in the picture, the image has the rest.
        """
        height, width = self.pixels.shape[:2]
        image = Image.frombytes(self.mode, (width, height), self.pixels.tobytes()).convert("L").convert("RGB")
        lowest, highest = self.activation.min(), self.activation.max()
        scaled = (self.activation - lowest) / max(highest - lowest, np.finfo(np.float32).tiny)
        scaled = np.asarray(Image.fromarray(scaled).resize(image.size, Image.Resampling.BILINEAR))
        return Image.blend(image, Image.fromarray(colors(scaled)), opacity)


def colors(values: np.ndarray) -> np.ndarray:
    """Colors `[..., 3]`, uint8, for values from 0 to 1."""
    points = np.linspace(0, 1, len(_COLORS))
    channels = [np.interp(values, points, channel) for channel in _COLORS.T]
    return np.stack(channels, -1).round().astype(np.uint8)


class TokenActivation:
    """Class activation of a model's tokens.

    An auxiliary head is asked for each token where the model has one. Else the classifier is, which takes a model that
    reads the mean of its tokens apart exactly: the logits of the tokens average to those of the image.

    Args:
        model: A timm model, in evaluation mode.
        data_config: Its preprocessing, as timm resolves it.
        mode: PIL mode of its images.

    Raises:
        UserError: If the model has no tokens, or reads something else than their mean.
    """

    def __init__(self, model: Any, data_config: Mapping[str, Any], mode: str = "RGB") -> None:
        self.data_config, self.mode = data_config, mode
        name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        works = "heat maps work for models with an auxiliary head, and for those whose classifier is one linear layer "
        works += "on the mean of a feature map or of tokens: vip_*, lvvit_*, resmlp_*, resnet*, ..."
        if not model.num_classes:
            raise UserError(f"{name} has no classes; {works}")
        size = tuple(data_config["input_size"])
        try:
            self.annotator = Annotator(model, size, top_k=1)
            exact = getattr(model, "aux_head", None) is not None or averages(self.annotator, size)
        except UserError as e:
            raise UserError(f"{e} So it has no heat map; {works}") from e
        if not exact:
            raise UserError(f"{name} does not read the mean of its tokens, so none of them has a share; {works}")

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, classes: torch.Tensor) -> list[Heatmap]:
        """Heat maps of normalized images `[B, C, H, W]` for a class `[B]` each."""
        dense = self.annotator.dense_logits(self.annotator.model.forward_features(images)).float()
        activation = dense.gather(-1, classes[:, None, None, None].expand(*dense.shape[:3], 1))[..., 0]
        mean, std = (images.new_tensor(self.data_config[name])[:, None, None] for name in ("mean", "std"))
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        of_each = zip(pixels.cpu().numpy(), activation.cpu().numpy(), classes.tolist(), strict=True)
        return [Heatmap(*found, self.mode) for found in of_each]


def name_pictures(images: Iterable[str], folder: str | Path) -> dict[str, Path]:
    """A PNG file in a folder for each image file, below it as the images are below the folder they have in common.

    Files that differ in their ending or in case alone are numbered.

    Raises:
        UserError: If it would lie among the images, of which it might take the place.
    """
    paths = {image: os.path.abspath(image) for image in images}
    common = os.path.commonpath([os.path.dirname(path) for path in paths.values()])
    taken: dict[str, str] = {}
    pictures = {}
    for image, path in paths.items():
        stem, number = os.path.splitext(os.path.relpath(path, common))[0], 1
        name = stem
        while taken.setdefault(name.casefold(), path) != path:
            number += 1
            name = f"{stem}-{number}"
        pictures[image] = Path(folder, f"{name}.png")
    folders = {os.path.realpath(os.path.dirname(path)) for path in paths.values()}
    if among := [picture for picture in pictures.values() if os.path.realpath(picture.parent) in folders]:
        raise UserError(f"The heat map {among[0]} would lie among the images: name another folder.")
    return pictures
