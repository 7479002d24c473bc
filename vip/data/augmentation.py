"""Augmentation: timm's transforms, mixup and CutMix, as the options describe them."""

from types import ModuleType
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP

from vip.data.config import AugmentationConfig
from vip.errors import UserError


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep `bits` bits of each channel.

    timm's increasing policies also ask for 0 bits. Pillow used to give a black image for that, which is what the
    published recipes were trained with, and refuses it today.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


NAME_TO_OP.update({name: _posterize for name in NAME_TO_OP if name.startswith("Posterize")})


class CollateMixup(FastCollateMixup):
    """Mixes while collating; switching it off reaches the copies in loader processes that are already running."""

    def __init__(self, **kwargs: Any) -> None:
        self._enabled = torch.ones(1, dtype=torch.bool).share_memory_()
        super().__init__(**kwargs)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed."""
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(enabled)


def create_mixup(config: Any, num_classes: int, smoothing: float, collate: bool) -> Mixup | None:
    """Mixup and CutMix as a collate function or as a function of a batch, None where both are off.

    Args:
        config: An `AugmentationConfig` that is also a `LoaderConfig`.
        num_classes: Classes of the targets.
        smoothing: Label smoothing of the targets.
        collate: Mix while collating.
    """
    if not config.mixup_active:
        return None
    kind: type[Mixup] = CollateMixup if collate else Mixup
    if collate and config.fast_images:
        kind = import_fast_images().FastCollateMixup
    return kind(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def check_cutmix(config: AugmentationConfig, input_size: tuple[int, ...]) -> None:
    """Refuse a range of CutMix boxes that holds no whole pixel.

    Args:
        config: Range, None for none.
        input_size: Channels, height and width of an image.

    Raises:
        UserError: If there is none.
    """
    if config.cutmix_minmax is None:
        return
    low, high = config.cutmix_minmax
    if any(int(side * low) >= int(side * high) for side in input_size[1:]):
        raise UserError(
            f"--cutmix-minmax is {low} to {high}, expected the smaller number first and at least a pixel of "
            f"{tuple(input_size[1:])} between them."
        )


def create_train_transform(config: Any, data_config: dict[str, Any]) -> Any:
    """The training transform.

    Args:
        config: An `AugmentationConfig` that is also a `LoaderConfig`.
        data_config: What timm resolved for the model.

    Raises:
        UserError: If the augmentation policy is unknown, or cannot treat the images or use the interpolation.
    """
    if not config.no_aug and _policy(config):
        _check_policy(config)
    try:
        transform = _create_transform(config, data_config)
    except (AssertionError, KeyError, ValueError, IndexError) as e:
        raise UserError(
            f"--aa {config.aa} is no augmentation policy timm knows ({type(e).__name__} {e}); try "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, 3a, or none."
        ) from e
    if not config.fast_images:
        return transform
    fast_images = import_fast_images()
    interpolation, crop_mode = config.train_interpolation, config.train_crop_mode
    if config.no_aug or crop_mode not in (None, "rrc") or interpolation not in ("random", "bilinear", "bicubic"):
        raise UserError(
            "--fast-images knows random resized crops with bilinear and bicubic filters: leave out --no-aug, "
            "--train-crop-mode and --train-interpolation, or --fast-images."
        )
    parts = transform if isinstance(transform, tuple) else (transform,)  # of --aug-splits, of which one may be None
    fast = tuple(part and fast_images.accelerate(part) for part in parts)
    return fast if isinstance(transform, tuple) else fast[0]


def import_fast_images() -> ModuleType:
    """The module of `--fast-images`, which needs libraries that nothing else does.

    Raises:
        UserError: If one is missing.
    """
    try:
        import vip.data.fast_images as fast_images
    except ImportError as e:
        raise UserError(
            f"--fast-images: {e}; pip install 'vision-permutator[fast]' or simplejpeg opencv-python-headless."
        ) from e
    return fast_images


def _policy(config: AugmentationConfig) -> str | None:
    return None if config.aa in (None, "", "none") else config.aa


def _check_policy(config: Any) -> None:
    """Refuse what would fail only in the middle of an epoch, when an operation is drawn that Pillow cannot do."""
    mode, interpolation = config.input_img_mode or "RGB", config.train_interpolation
    if mode not in ("L", "RGB"):
        raise UserError(
            f"--aa {config.aa} has operations for RGB and gray images alone, not for --input-img-mode {mode}: add "
            "--aa none."
        )
    if interpolation not in ("random", "nearest", "bilinear", "bicubic") and not config.aa.startswith("3a"):
        raise UserError(
            f"--aa {config.aa} rotates and shears, which --train-interpolation {interpolation} cannot: use random, "
            "nearest, bilinear or bicubic, or --aa none."
        )


def _create_transform(config: Any, data_config: dict[str, Any]) -> Any:
    return create_transform(
        data_config["input_size"],
        is_training=True,
        no_aug=config.no_aug,
        train_crop_mode=config.train_crop_mode,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        color_jitter_prob=config.color_jitter_prob,
        grayscale_prob=config.grayscale_prob,
        gaussian_blur_prob=config.gaussian_blur_prob,
        auto_augment=_policy(config),
        interpolation=data_config["interpolation"] if config.no_aug else config.train_interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        re_num_splits=erasing_splits(config),
        use_prefetcher=not config.no_prefetcher,
        separate=config.aug_splits > 1,
    )


def erasing_splits(config: AugmentationConfig) -> int:
    """Splits of a batch of which random erasing leaves the first alone, 0 for none."""
    return (config.aug_splits or 2) if config.resplit else 0
