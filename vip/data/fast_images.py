"""The training images of `--fast-images`: Pillow's slow steps done by faster libraries.

The random numbers that are drawn are those of timm's transforms, so that an image is cropped, turned and coloured as
it is without them; its pixels differ by the rounding and the filters of the libraries.
"""

import io
import random
from collections.abc import Sequence
from typing import IO, Any

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import get_image_size, pil_to_tensor

from vip.data.augmentation import CollateMixup
from vip.data.fast_ops import accelerate_op, to_pillow
from vip.data.images import check_size, decode_image
from vip.data.moves import policy_ops

cv2.setNumThreads(0)  # loader processes are as many as there are cores

# They take no tensors, or round them in another way.
_OF_PILLOW = (
    AugMixAugment,
    MaybeToTensor,
    transforms.ColorJitter,
    transforms.RandomApply,
    transforms.RandomGrayscale,
)


def decode_fast(file: IO[bytes], mode: str = "RGB") -> Image.Image | torch.Tensor:
    """Decode an image file, a colour JPEG to `[3, H, W]` in bytes, anything else as `decode_image` does.

    Raises:
        UnreadableImage: As `decode_image` does.
    """
    data = file.read()
    if mode == "RGB" and simplejpeg.is_jpeg(data):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            check_size(width, height)
            if colorspace in ("YCbCr", "Gray"):
                return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
        except ValueError:  # damaged, of which Pillow may make more, and says what it is
            pass
    return decode_image(io.BytesIO(data), mode)


class FastCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by torch, whose filters are Pillow's."""

    def __call__(self, img: Image.Image | torch.Tensor) -> torch.Tensor:
        """Crop and resize an image, or its bytes `[C, H, W]`, to bytes of which those of a pixel are neighbours."""
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        mode: InterpolationMode = self.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        # of an image of a pixel or two timm's crop may be no row or no column
        columns, rows = get_image_size(img)
        top, left, height, width = min(top, rows - 1), min(left, columns - 1), max(height, 1), max(width, 1)
        if isinstance(img, torch.Tensor):
            crop = img[:, top : top + height, left : left + width]
        else:
            crop = pil_to_tensor(img.crop((left, top, left + width, top + height)))
        crop = crop[None].contiguous(memory_format=torch.channels_last)  # for which torch has the faster filter
        return F.interpolate(crop, self.size, mode=mode.value, antialias=True)[0]


class FastCollateMixup(CollateMixup):
    """timm's mixup and CutMix of whole batches while collating, mixed by OpenCV, which rounds as timm does."""

    def _mix_batch_collate(self, output: torch.Tensor, batch: Sequence[Any]) -> float:
        lam, use_cutmix = self._params_per_batch()
        images, out = [image.permute(1, 2, 0).numpy() for image, *_ in batch], output.numpy()
        if use_cutmix:
            (top, bottom, left, right), lam = cutmix_bbox_and_lam(
                output.shape, lam, ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam
            )
        for own, other, planes in zip(images, reversed(images), out, strict=True):
            mixed = own if lam == 1 or use_cutmix else cv2.addWeighted(own, lam, other, 1 - lam, 0)
            cv2.split(mixed.astype(np.uint8, copy=False), list(planes))
            if lam != 1 and use_cutmix:
                planes[:, top:bottom, left:right] = other[top:bottom, left:right].transpose(2, 0, 1)
        return lam


def accelerate(transform: Any) -> Any:
    """Replace the slow steps of a training transform of timm, in place.

    Args:
        transform: What `timm.data.create_transform(..., is_training=True)` gave, with bilinear or bicubic resizing.
    """
    steps = []
    for step in transform.transforms:
        if type(step) is RandomResizedCropAndInterpolation:
            step.__class__ = FastCrop
        elif isinstance(step, RandAugment | AutoAugment):
            for op in policy_ops(step):
                accelerate_op(op)
            if isinstance(step, RandAugment):
                step.ops = np.array(step.ops)  # which NumPy would make of a list for each image
        elif isinstance(step, _OF_PILLOW):
            steps.append(transforms.Lambda(_to_pillow))
        steps.append(step)
    transform.transforms = steps
    return transform


def _to_pillow(image: Image.Image | torch.Tensor) -> Image.Image:
    return to_pillow(image) if isinstance(image, torch.Tensor) else image
