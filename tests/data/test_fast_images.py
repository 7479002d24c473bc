"""`--fast-images` against Pillow and timm: the same random numbers, and the same pixels but for rounding."""

import io
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation

from vip.data import fast_images
from vip.data.augmentation import create_mixup, create_train_transform
from vip.data.fast_images import FastCrop, decode_fast
from vip.data.images import UnreadableImage, decode_image
from vip.data.moves import MOVES
from vip.data.order import seed_generators
from vip.errors import UserError
from vip.training.config import TrainConfig

INPUT = dict(input_size=(3, 64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic")


def photograph(width: int = 160, height: int = 120, mode: str = "RGB") -> Image.Image:
    """Smooth shapes in colours, as in photographs, where filters of one kind agree."""
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


# --- decoding


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpegs_are_decoded_to_the_same_bytes(mode: str, options: dict[str, Any]) -> None:
    file = encoded(photograph(mode=mode), **options)
    expected = np.asarray(decode_image(io.BytesIO(file.getvalue())))
    decoded = decode_fast(file)
    assert isinstance(decoded, torch.Tensor) and decoded.dtype == torch.uint8
    np.testing.assert_array_equal(decoded.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "file",
    [encoded(photograph(mode="CMYK")), encoded(photograph(), "PNG"), encoded(photograph(mode="P"), "GIF")],
    ids=["CMYK JPEG", "PNG", "GIF"],
)
def test_other_files_are_decoded_by_pillow(file: io.BytesIO) -> None:
    expected = decode_image(io.BytesIO(file.getvalue()))
    assert decode_fast(io.BytesIO(file.getvalue())) == expected


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_images_of_other_modes_are_decoded_by_pillow(mode: str) -> None:
    decoded = decode_fast(encoded(photograph()), mode)
    assert isinstance(decoded, Image.Image) and decoded.mode == mode


def test_damaged_files_are_refused_for_the_same_reason() -> None:
    data = encoded(photograph()).getvalue()
    for damaged in (data[: len(data) // 2], data[:20], b"\xff\xd8\xff" + bytes(100), b""):
        reasons = []
        for decode in (decode_fast, decode_image):
            with pytest.raises(UnreadableImage) as refused:
                decode(io.BytesIO(damaged))
            reasons.append(str(refused.value))
        assert reasons[0] == reasons[1]


def test_large_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_images.simplejpeg, "decode_jpeg", lambda data: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="strips"):
        decode_fast(encoded(Image.new("RGB", (600, 2))))


# --- cropping and resizing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("size", [(160, 120), (40, 50), (333, 500)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_crops_are_those_of_timm(interpolation: str, size: tuple[int, int], mode: str) -> None:
    image = photograph(*size, mode=mode)
    pixels = torch.from_numpy(np.array(image)).reshape(*size[::-1], -1).permute(2, 0, 1)
    crops = [make(64, interpolation=interpolation) for make in (RandomResizedCropAndInterpolation, FastCrop, FastCrop)]
    for seed in range(20):
        results = []
        for crop, source in zip(crops, (image, image, pixels), strict=True):
            random.seed(seed)
            results.append((np.asarray(crop(source)).astype(int), random.getstate()))
        assert results[0][1] == results[1][1] == results[2][1], "as many random numbers were drawn"
        assert abs(results[0][0] - results[1][0]).max() <= 2
        np.testing.assert_array_equal(results[1][0], results[2][0])


# --- the policy


@pytest.mark.parametrize("amount", [-0.3, 0.07, 0.3])
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_moves_are_those_of_timm(name: str, amount: float, resample: Any, mode: str) -> None:
    image = photograph(mode=mode)
    fill: Any = (124, 116, 104) if mode == "RGB" else 124
    amount = {"Rotate": 100 * amount, "TranslateX": 50 * amount, "TranslateY": 50 * amount}.get(name, amount)
    expected = np.asarray(NAME_TO_OP[name](image, amount, fillcolor=fill, resample=resample)).astype(int)
    moved = np.asarray(fast_images._warp(name, image, amount, fillcolor=fill, resample=resample)).astype(int)
    difference = abs(moved - expected)
    assert difference.mean() < 1, "of 256"
    assert (difference > 16).mean() < 0.02, "along the edges, which are blended with what fills up"


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "augmix-m5-w4-d2", "3a", "none"])
def test_samples_are_those_of_timm(policy: str) -> None:
    config = TrainConfig(aa=policy)
    plain = create_train_transform(config, INPUT)
    config.fast_images = True
    fast = create_train_transform(config, INPUT)
    file = encoded(photograph())
    differences = []
    for seed in range(60):
        samples = []
        for transform, decode in ((plain, decode_image), (fast, decode_fast)):
            seed_generators(seed, devices=False)
            sample = transform(decode(io.BytesIO(file.getvalue())))
            samples.append((sample.float(), random.random(), float(torch.rand(()))))
        assert samples[0][1:] == samples[1][1:], "as many random numbers were drawn"
        differences.append(float((samples[0][0] - samples[1][0]).abs().mean()))
    assert np.median(differences) < 0.5 and max(differences) < 8, "levels of 256"


@pytest.mark.parametrize("options", [{"cutmix": 0.0}, {"mixup": 0.0}, {"mixup_prob": 0.5}], ids=str)
def test_batches_are_mixed_as_by_timm(options: dict[str, Any]) -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = [(image, i) for i, image in enumerate(images)]
    plain, fast = (create_mixup(TrainConfig(fast_images=f, **options), 10, 0.1, collate=True) for f in (False, True))
    assert type(plain) is not type(fast)
    for seed in range(20):
        mixed = []
        for mixup in (plain, fast):
            seed_generators(seed, devices=False)
            mixed.append(mixup([(image.clone(), i) for image, i in batch]))
        torch.testing.assert_close(mixed[0][1], mixed[1][1], rtol=0, atol=0)
        assert (mixed[0][0].int() - mixed[1][0].int()).abs().max() <= 1


# --- mistakes


@pytest.mark.parametrize(
    "options",
    [{"no_aug": True}, {"train_crop_mode": "rkrc"}, {"train_interpolation": "lanczos", "aa": "none"}],
    ids=str,
)
def test_other_crops_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--fast-images knows random resized crops"):
        create_train_transform(TrainConfig(fast_images=True, **options), INPUT)


@pytest.mark.parametrize("library", ["cv2", "simplejpeg"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "vip.data.fast_images")
    with pytest.raises(UserError, match=rf"--fast-images.*{library}.*pip install"):
        create_train_transform(TrainConfig(fast_images=True), INPUT)
