"""The examples do what they say, with the real libraries, and what those compute is what timm's model computes."""

import importlib
from pathlib import Path

import pytest
import timm
import torch

import vip.cli
from vip.errors import UserError

pytest.importorskip("sklearn", reason="the examples learn scikit-learn's digits")

MODELS = ["vip_nano4_32", "lvvit_nano4_32"]


def images(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size)


def all_have_gradients(module: torch.nn.Module) -> bool:
    return all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def run(example: object, capsys: pytest.CaptureFixture, *argv: object) -> str:
    """What an example says."""
    assert vip.cli.run("example", example.main, [str(a) for a in argv]) == 0
    return capsys.readouterr().out


# --- transformers


@pytest.mark.parametrize(
    ("model", "size", "strides"),
    [("vip_nano4_32", 32, (4, 8, 8, 8)), ("vip_nano4_32", 64, (4, 8, 8, 8)), ("lvvit_nano4_32", 48, (4, 4, 4, 4))],
)
def test_timm_backbone_under_upernet(model: str, size: int, strides: tuple[int, ...]) -> None:
    pytest.importorskip("transformers", reason="pip install '.[examples]'")
    from examples.transformers_segmentation import create

    segmenter = create(model, None if size == 32 else size)
    x = images((size, size))
    maps = segmenter.backbone(x).feature_maps
    assert [tuple(m.shape[2:]) for m in maps] == [(size // s, size // s) for s in strides]
    assert [m.shape[1] for m in maps] == segmenter.backbone.channels

    output = segmenter(pixel_values=x, labels=torch.randint(0, 11, (2, size, size)))
    assert output.logits.shape == (2, 11, size, size)
    output.loss.backward()
    assert all_have_gradients(segmenter.backbone)


def test_timm_backbone_computes_what_timm_does() -> None:
    pytest.importorskip("transformers", reason="pip install '.[examples]'")
    from examples.transformers_segmentation import create

    backbone = create("vip_nano4_32", 64, out_indices=(0, 1, 3)).backbone.eval()
    model = timm.create_model("vip_nano4_32", features_only=True, img_size=64, out_indices=(0, 1, 3)).eval()
    model.load_state_dict(backbone._backbone.state_dict())
    x = images((64, 64))
    with torch.no_grad():
        assert all(map(torch.equal, backbone(x).feature_maps, model(x)))


def test_segmentation_by_upernet_learns(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers", reason="pip install '.[examples]'")
    from examples import transformers_segmentation

    first, last = [float(word) for word in run(transformers_segmentation, capsys, "--steps", 12).split() if "." in word]
    assert last < 0.9 * first


def test_classification_by_the_timm_wrapper(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What is loaded gives an image the same pixels and the same logits as timm does with the same weights."""
    transformers = pytest.importorskip("transformers", reason="pip install '.[examples]'")
    from examples import transformers_classification as example

    out = run(example, capsys, "--epochs", 1, "--output", tmp_path)
    assert float(out.partition(": ")[2].partition("%")[0]) > 30, "chance is 10 %"

    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    model = timm.create_model("vip_nano4_32", num_classes=10).eval()
    model.load_state_dict(wrapper.timm_model.state_dict())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = example.digits()[0][5]
    pixel_values = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image)["pixel_values"]
    assert torch.equal(pixel_values, transform(image)[None])
    with torch.no_grad():
        output = wrapper(pixel_values, output_hidden_states=True)
        assert torch.equal(output.logits, model(pixel_values))
        assert list(output.hidden_states[0].shape) == [1, 64, 8, 8]


@pytest.mark.parametrize("model", MODELS)
def test_timm_wrapper_at_another_size(model: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install '.[examples]'")
    from examples.transformers_classification import create

    wrapper = create(model, img_size=[48, 64]).eval()
    wrapper.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = images((48, 64))
    with torch.no_grad():
        assert torch.equal(again(x).logits, wrapper(x).logits)


# --- torchvision


@pytest.mark.parametrize("model", MODELS)
def test_detector_takes_images_of_any_size(model: str) -> None:
    from examples.torchvision_detection import create

    detector = create(model, [0, 3])
    seen: list[tuple[int, ...]] = []
    detector.backbone.body.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    sizes = [(37, 91), (64, 64), (130, 50), (200, 31)]
    batch = [torch.rand(3, *size) for size in sizes]
    targets = [{"boxes": torch.tensor([[3.0, 4.0, 20.0, 25.0]]), "labels": torch.tensor([3])} for _ in sizes]
    losses = detector.train()(batch, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and all_have_gradients(detector.backbone)

    detector.score_thresh = 0.0
    with torch.no_grad():
        for image, (height, width) in zip(batch, sizes, strict=True):
            output = detector.eval()([image])[0]  # one by one, so that each has a size of its own for the backbone
            x0, y0, x1, y1 = output["boxes"].unbind(1)
            assert len(x0) and (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= width).all() and (y1 <= height).all()
            assert output["labels"].max() <= 10
    assert len(set(seen)) > 3


def test_detector_learns_to_find_digits(capsys: pytest.CaptureFixture) -> None:
    from examples import torchvision_detection

    out = run(torchvision_detection, capsys, "--steps", 12)
    first, last = [float(word) for word in out.splitlines()[0].replace(",", "").split() if "." in word]
    assert last < 0.9 * first and "before" in out


# --- fastai and Lightning


def test_vision_learner_learns(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("fastai", reason="pip install '.[examples]'")
    from examples import fastai_finetune

    out = run(fastai_finetune, capsys, "--epochs", 1).splitlines()[-1]
    assert float(out.partition(": ")[2].partition("%")[0]) > 30, "chance is 10 %"


@pytest.mark.parametrize("model", MODELS)
def test_vision_learner_reads_the_pooled_features(model: str) -> None:
    """fastai pools by itself what it takes for `[B, C, H, W]`, which our features are not."""
    learner = pytest.importorskip("fastai.vision.learner", reason="pip install '.[examples]'")
    network, cfg = learner.create_timm_model(model, 10, pretrained=False)
    body, head = network.eval()
    own = timm.create_model(model, num_classes=0).eval()
    own.load_state_dict(body.model.state_dict())
    x = images((32, 32))
    with torch.no_grad():
        assert torch.equal(body(x), own(x)) and body(x).shape == (2, own.num_features)
        assert head(body(x)).shape == (2, 10)


def test_lightning_learns_and_loads_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("lightning", reason="pip install '.[examples]'")
    from examples import lightning_train

    out = run(lightning_train, capsys, "--epochs", 1, "--output", tmp_path)
    accuracy = float(out.partition("vip_nano4_32: ")[2].partition("%")[0]) / 100
    path = out.partition("checkpoint: ")[2].strip()
    again = lightning_train.Classifier.load_from_checkpoint(path, map_location="cpu").eval()
    hits = [again.model(x).argmax(1) == y for x, y in lightning_train.digits()[1]]
    assert torch.cat(hits).float().mean().item() == pytest.approx(accuracy, abs=1e-3) and accuracy > 0.2


# --- mistakes


@pytest.mark.parametrize("name", ["lightning", "fastai", "transformers", "torchvision"])
def test_unknown_models_are_refused_in_a_line(name: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip(name, reason="pip install '.[examples]'")
    from importlib import import_module

    kinds = {"lightning": "train", "fastai": "finetune", "transformers": "classification", "torchvision": "detection"}
    example = import_module(f"examples.{name}_{kinds[name]}")
    assert vip.cli.run(name, example.main, ["--model", "vip_nano4_23"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: error: No model is called 'vip_nano4_23'") and "vip_nano4_32" in error


# --- mistakes


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("fastai_finetune", "--epochs"),
        ("lightning_train", "--epochs"),
        ("torchvision_detection", "--steps"),
        ("transformers_classification", "--epochs"),
        ("transformers_segmentation", "--steps"),
    ],
)
def test_nothing_to_train_for(name: str, flag: str) -> None:
    pytest.importorskip(name.partition("_")[0], reason="pip install '.[examples]'")
    example = importlib.import_module(f"examples.{name}")
    with pytest.raises(UserError, match=f"{flag}: '0', expected a whole number of at least 1"):
        example.main([flag, "0"])
