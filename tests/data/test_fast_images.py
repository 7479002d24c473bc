"""`--fast-images` against Pillow and timm: the same random numbers, and the same pixels but for rounding."""

import io
import pickle
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.functional import pil_to_tensor

from vip.data import fast_images
from vip.data.augmentation import create_mixup, create_train_transform
from vip.data.fast_images import FastCrop, decode_fast
from vip.data.images import UnreadableImage, decode_image
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


def levels(image: Image.Image | torch.Tensor) -> np.ndarray:
    """The levels of an image, `[C, H, W]`."""
    return (image if isinstance(image, torch.Tensor) else pil_to_tensor(image)).numpy().astype(int)


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
            results.append((levels(crop(source)), random.getstate()))
        assert results[0][1] == results[1][1] == results[2][1], "as many random numbers were drawn"
        assert abs(results[0][0] - results[1][0]).max() <= 2
        np.testing.assert_array_equal(results[1][0], results[2][0])


# --- the policy


POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights-mstd0.5", "original", "augmix-m5-w4-d2", "3a", "none"]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("policy", POLICIES)
def test_samples_are_those_of_timm(policy: str, mode: str) -> None:
    channels = len(Image.new(mode, (1, 1)).getbands())
    model = INPUT | dict(input_size=(channels, 64, 64), mean=(0.5,) * channels, std=(0.5,) * channels)
    plain, fast = (
        create_train_transform(TrainConfig(aa=policy, input_img_mode=mode, fast_images=f), model) for f in (False, True)
    )
    fast = pickle.loads(pickle.dumps(fast))  # as loader processes get it
    file = encoded(photograph())
    differences = []
    for seed in range(60):
        samples = []
        for transform, decode in ((plain, decode_image), (fast, decode_fast)):
            seed_generators(seed, devices=False)
            sample = transform(decode(io.BytesIO(file.getvalue()), mode))
            samples.append((sample.float(), random.random(), np.random.rand(), float(torch.rand(()))))
        assert samples[0][1:] == samples[1][1:], "as many random numbers were drawn"
        assert samples[0][0].shape == samples[1][0].shape
        differences.append(float((samples[0][0] - samples[1][0]).abs().mean()))
    assert np.median(differences) < 1 and max(differences) < 8, "levels of 256"


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "none"])
def test_samples_without_the_prefetcher_are_those_of_timm(policy: str) -> None:
    options: Any = dict(aa=policy, no_prefetcher=True, reprob=0.0)
    plain, fast = (create_train_transform(TrainConfig(fast_images=f, **options), INPUT) for f in (False, True))
    differences = []
    for seed in range(20):
        samples = []
        for transform in (plain, fast):
            seed_generators(seed, devices=False)
            samples.append(transform(photograph()))
        assert samples[0].dtype == samples[1].dtype == torch.float32
        differences.append(float((samples[0] - samples[1]).abs().mean()))
    assert np.median(differences) < 0.5 / 127.5 and max(differences) < 8 / 127.5


def test_parts_of_a_split_batch_are_those_of_timm() -> None:
    config = TrainConfig(aa="rand-m9-mstd0.5-inc1", aug_splits=2, reprob=0.0)
    plain = create_train_transform(config, INPUT)
    config.fast_images = True
    fast = create_train_transform(config, INPUT)
    for seed in range(20):
        views = []
        for first, second, last in (plain, fast):
            seed_generators(seed, devices=False)
            image = first(photograph())
            augmented = last(second(image))  # which is not done in place
            views.append((levels(last(image)), levels(augmented), random.random()))
        assert views[0][2] == views[1][2]
        assert abs(views[0][0] - views[1][0]).max() <= 2
        assert abs(views[0][1] - views[1][1]).mean() < 8


@pytest.mark.parametrize("options", [{"cutmix": 0.0}, {"mixup": 0.0}, {"mixup_prob": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [(6, 3, 16, 20), (6, 1, 16, 20), (2, 4, 5, 3)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batches_are_mixed_as_by_timm(options: dict[str, Any], shape: tuple[int, ...], memory_format: Any) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = [(image, i) for i, image in enumerate(images.contiguous(memory_format=memory_format))]
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


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3)])
def test_images_of_a_pixel_or_two_are_cropped(size: tuple[int, int]) -> None:
    """Of which timm's crop may leave no row or no column."""
    crop = fast_images.FastCrop(8, scale=(0.08, 1.0))
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    for seed in range(200):
        random.seed(seed)
        made = crop(image)
        assert made.shape == (3, 8, 8) and (made == 77).all()
