"""What is predicted, against `vip validate` and a pipeline of timm's own."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from training_command import Outcome

from vip.data.digits import write_digits
from vip.errors import UserError
from vip.prediction.predictor import Prediction, Predictor, _forward, load_predictor
from vip.training.config import ValidateConfig
from vip.training.runtime import setup_precision

# Nobody's defaults, so that what does not obey them is found out.
PREPROCESSING = {
    "crop_pct": 0.6,
    "crop_mode": "border",
    "interpolation": "bilinear",
    "mean": [0.3, 0.5, 0.2],
    "std": [0.4, 0.2, 0.3],
}
SIZE = 48
CLASSES = {name: i for i, name in enumerate("0123456789")}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def images(digits: Path) -> list[Path]:
    """One image of each digit, then a second one, and so on."""
    folders = [sorted((digits / "val" / name).iterdir()) for name in CLASSES]
    return [folder[i] for i in range(4) for folder in folders]


def random_model(seed: int, **options: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vip_nano4_32", img_size=SIZE, num_classes=10, **options).eval()


def undecided_model(seed: int, images: list[Path]) -> torch.nn.Module:
    """A random model to which no class is the likeliest of all images."""
    model = random_model(seed)
    with torch.no_grad():
        features = model.forward_features(prepare(images)).mean((1, 2))
        model.head.weight *= 50
        model.head.bias -= model.head(features).mean(0)
    return model


@pytest.fixture(scope="module")
def plain(images: list[Path]) -> torch.nn.Module:
    return undecided_model(0, images)


@pytest.fixture(scope="module")
def averaged(images: list[Path]) -> torch.nn.Module:
    return undecided_model(1, images)


@pytest.fixture(scope="module")
def checkpoint(plain: torch.nn.Module, averaged: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "odd.pth.tar"
    content = {
        "arch": "vip_nano4_32",
        "state_dict": plain.state_dict(),
        "state_dict_ema": averaged.state_dict(),
        "args": {"img_size": SIZE, **PREPROCESSING},
        "class_to_idx": CLASSES,
    }
    torch.save(content, path)
    return path


def prepare(images: list[Path], **options: object) -> torch.Tensor:
    """Images as timm prepares them."""
    transform = create_transform((3, SIZE, SIZE), **{**PREPROCESSING, **options})
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in images])


def by_timm(model: torch.nn.Module, images: list[Path], **options: object) -> torch.Tensor:
    """Probabilities of a plain pipeline, an image at a time."""
    with torch.no_grad():
        return torch.cat([model(image[None]).softmax(1) for image in prepare(images, **options)])


def probabilities(predictions: list[Prediction]) -> torch.Tensor:
    """Those of all classes, in their order; the scores must be sorted and named."""
    rows = []
    for prediction in predictions:
        assert not prediction.error
        values = [score.probability for score in prediction.classes]
        assert values == sorted(values, reverse=True)
        assert all(CLASSES[score.name] == score.index for score in prediction.classes)
        rows.append([score.probability for score in sorted(prediction.classes, key=lambda s: s.index)])
    return torch.tensor(rows)


def load(checkpoint: Path, **options: object) -> Predictor:
    return load_predictor(checkpoint, **{"device": "cpu", **options})


def test_agrees_with_a_plain_pipeline(checkpoint: Path, averaged: torch.nn.Module, images: list[Path]) -> None:
    expected = by_timm(averaged, images)
    assert len(set(expected.argmax(1).tolist())) > 2, "the model always says the same"
    for batch_size in (1, 7, 64):
        found = list(load(checkpoint, batch_size=batch_size).predict(images, top_k=10))
        assert [prediction.image for prediction in found] == images
        torch.testing.assert_close(probabilities(found), expected, atol=1e-5, rtol=1e-4)
    default_crop = by_timm(averaged, images, crop_pct=0.9, crop_mode="center")
    assert (default_crop - expected).abs().max() > 0.01, "the preprocessing makes no difference"


def test_counts_agree_with_validate(
    checkpoint: Path, digits: Path, command: Callable[..., Outcome], plain: torch.nn.Module
) -> None:
    options = ("--checkpoint", checkpoint, "--device", "cpu", "-b", "50", "--no-use-ema")
    said = command("validate", digits, *options, "-j", "0").out.partition("--result\n")[2]
    paths = sorted((digits / "val").glob("*/*.png"))
    found = list(load(checkpoint, use_ema=False, batch_size=33).predict(map(str, paths)))
    named = [[score.name for score in prediction.classes] for prediction in found]
    hits = [names.index(p.parent.name) for names, p in zip(named, paths, strict=True) if p.parent.name in names]
    row = json.loads(said)
    assert row["count"] == len(paths) == 360
    assert 0 < row["correct1"] < row["correct5"] < 360
    assert row["correct1"] == hits.count(0)
    assert row["correct5"] == len(hits)


def test_averaged_weights_and_plain_ones(
    checkpoint: Path, images: list[Path], plain: torch.nn.Module, averaged: torch.nn.Module
) -> None:
    for use_ema, model in ((None, averaged), (True, averaged), (False, plain)):
        found = probabilities(list(load(checkpoint, use_ema=use_ema).predict(images, top_k=10)))
        torch.testing.assert_close(found, by_timm(model, images), atol=1e-5, rtol=1e-4)


def test_flags_win(checkpoint: Path, averaged: torch.nn.Module, images: list[Path]) -> None:
    predictor = load(checkpoint, crop_pct=1.0, img_size=32)
    assert predictor.data_config["input_size"] == (3, 32, 32) and predictor.data_config["crop_pct"] == 1.0
    assert predictor.data_config["interpolation"] == "bilinear"
    assert next(predictor.predict(images)).classes


def test_mirror_images(checkpoint: Path, averaged: torch.nn.Module, images: list[Path]) -> None:
    batch = prepare(images)
    with torch.no_grad():
        expected = ((averaged(batch) + averaged(batch.flip(3))) / 2).softmax(1)
    found = probabilities(list(load(checkpoint, tta=2).predict(images, top_k=10)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_mirror_images_by_what_writes_over_what_it_gave() -> None:
    """As what is compiled with CUDA graphs does."""
    config, x = ValidateConfig(tta=2), torch.randn(2, 3, 4, 4)
    weights, given = torch.randn(48, 5), torch.empty(2, 5)
    forward = _forward(lambda x: given.copy_(x.flatten(1) @ weights), config, setup_precision(config, x.device))
    torch.testing.assert_close(forward(x), (x + x.flip(3)).flatten(1) @ weights / 2)


def test_low_precision_is_nearly_the_same(checkpoint: Path, images: list[Path]) -> None:
    exact = probabilities(list(load(checkpoint).predict(images, top_k=10)))
    low = probabilities(list(load(checkpoint, amp=True, amp_dtype="bfloat16").predict(images, top_k=10)))
    assert 0 < (exact - low).abs().max() < 0.3


def test_gray_models_see_gray_images(digits: Path, tmp_path: Path) -> None:
    model = random_model(2, in_chans=1)
    args = {"img_size": SIZE, "in_chans": 1}
    torch.save({"arch": "vip_nano4_32", "state_dict": model.state_dict(), "args": args}, tmp_path / "gray.pth.tar")
    predictor = load(tmp_path / "gray.pth.tar")
    color = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256))])
    assert predictor.mode == "L"
    with torch.no_grad():
        expected = model(predictor.transform(color.convert("L"))[None]).softmax(1)[0].max().item()
    prediction = next(predictor.predict([color], top_k=1))
    assert prediction.classes[0].probability == pytest.approx(expected, rel=1e-4)
    assert prediction.classes[0].name == f"class {prediction.classes[0].index}"


def test_color_mode_of_the_checkpoint(tmp_path: Path) -> None:
    model = random_model(3)
    args = {"img_size": SIZE, "input_img_mode": "HSV"}
    torch.save({"arch": "vip_nano4_32", "state_dict": model.state_dict(), "args": args}, tmp_path / "hsv.pth.tar")
    assert load(tmp_path / "hsv.pth.tar").mode == "HSV"
    assert load(tmp_path / "hsv.pth.tar", input_img_mode="YCbCr").mode == "YCbCr"
    with pytest.raises(UserError, match="have 1 channels and the model takes 3"):
        load(tmp_path / "hsv.pth.tar", input_img_mode="L")


def test_what_cannot_be_read_has_its_place(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(images[0].read_bytes()[:60])
    bad = [tmp_path / "text.png", tmp_path / "half.png", tmp_path / "nowhere.png", tmp_path]
    mixed = [bad[0], images[0], images[0], bad[1], bad[2], Image.open(images[1]), bad[3]]
    for batch_size in (1, 2, 100):
        found = list(load(checkpoint, batch_size=batch_size).predict(mixed))
        assert [prediction.image for prediction in found] == mixed
        assert [bool(p.error) for p in found] == [not p.classes for p in found]
        assert [bool(p.error) for p in found] == [True, False, False, True, True, False, True]
        assert "no image" in found[0].error and found[4].error == "No such file or directory"
        assert found[1].classes[0].probability == pytest.approx(found[2].classes[0].probability, abs=1e-6)


def test_reads_ahead_by_two_batches_and_no_more(checkpoint: Path, images: list[Path]) -> None:
    taken = itertools.count()
    endless = (image for image in itertools.cycle(images) if next(taken) >= 0)
    predictions = load(checkpoint, batch_size=3, workers=1).predict(endless)
    for _ in range(7):
        next(predictions)
    predictions.close()
    assert next(taken) <= 9 + 2 * 3 + 1


def test_top_k(checkpoint: Path, images: list[Path]) -> None:
    predictor = load(checkpoint)
    assert [len(next(predictor.predict(images, top_k=k)).classes) for k in (1, 5, 10, 99)] == [1, 5, 10, 10]


def test_a_model_in_memory() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=1000)
    predictor = Predictor(model)
    assert not model.training and predictor.data_config == timm.data.resolve_model_data_config(model)
    prediction = next(predictor.predict([Image.radial_gradient("L")]))
    info = ImageNetInfo()
    assert [score.name for score in prediction.classes] == [
        info.index_to_description(score.index) for score in prediction.classes
    ]


def test_a_named_model_takes_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def create_model(**kwargs: object) -> torch.nn.Module:
        asked.append(kwargs["pretrained"])
        return create(**{**kwargs, "pretrained": False})

    monkeypatch.setattr("vip.training.factory.timm.create_model", create_model)
    for options in ({}, {"pretrained": True}, {"pretrained": False}):
        load_predictor(model="vip_nano4_32", device="cpu", **options)
    assert asked == [True, True, False]


def test_logits_that_are_not_finite(images: list[Path]) -> None:
    model = random_model(4)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        next(Predictor(model).predict(images))


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "Nothing to predict with"),
        ({"model": "vip_s77"}, "Did you mean vip_s7"),
        ({"checkpoint": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
        ({"model": "vip_nano4_32", "pretrained": False, "num_classes": 1, "device": "gpu"}, "No device"),
        ({"model": "vip_nano4_32", "pretrained": False, "img_size": 33}, "33 does not work"),
    ],
)
def test_mistakes(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_predictor(**{"device": "cpu", **options})


def test_not_under_torchrun(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        load(checkpoint)


def test_numpy_arrays_of_a_notebook(checkpoint: Path) -> None:
    array = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    assert len(next(load(checkpoint).predict([Image.fromarray(array)])).classes) == 5
