"""Fine-tuning: frozen parts, layer decay, new heads, other sizes, and the recipes of models/finetune."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import CLASSES, quick
from timm.models import save_for_hf
from torch import nn
from training_command import Outcome

from vip.cli.arguments import parse
from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.factory import create_optimizer
from vip.training.freezing import freeze, hold_frozen
from vip.training.runtime import Runtime
from vip.training.trainer import Trainer, train
from vip.training.weights import load_finetune

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "models/finetune").glob("*.yaml"))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pth.tar", weights_only=True)["state_dict"]


# --- layer decay


def layers_of(name: str) -> list[set[str]]:
    """Parameters layer by layer, as the forward pass goes through them; the final norm is the last block's."""
    model: Any = timm.create_model(name, device="meta")
    stages = model.network if hasattr(model, "network") else [model.blocks]
    blocks = [block for stage in stages for block in (stage if isinstance(stage, nn.Sequential) else [stage])]
    inner = [{id(p) for p in block.parameters()} for block in blocks]
    inner[-1] |= {id(p) for p in model.norm.parameters()}
    heads = {id(p) for head in (model.head, model.aux_head) if head is not None for p in head.parameters()}
    stem = {id(p) for p in model.parameters()} - heads - set().union(*inner)
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[i] for i in layer} for layer in (stem, *inner, heads)]


@pytest.mark.parametrize("name", ["vip_nano4_32", "vip_s7", "vip_m7", "lvvit_s"])
def test_each_block_is_a_layer_of_layer_decay(name: str) -> None:
    layers = layers_of(name)
    model: Any = timm.create_model(name, device="meta")
    names = {id(p): n for n, p in model.named_parameters()}
    config = TrainConfig(model=name, layer_decay=0.8, opt="sgd")
    optimizer = create_optimizer(config, model, images_per_update=1)
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales.keys() == set().union(*layers) == set(names.values())
    for distance, layer in enumerate(reversed(layers)):
        assert layer and {round(scales[n], 9) for n in layer} == {round(0.8**distance, 9)}, distance


# --- frozen parts


def test_frozen_parts_by_name() -> None:
    def learning(*parts: str) -> set[str]:
        model = timm.create_model("vip_nano4_32", num_classes=3)
        freeze(model, list(parts))
        return {name for name, p in model.named_parameters() if p.requires_grad}

    everything = learning()
    assert len(everything) == 110
    assert learning("backbone") == {"head.weight", "head.bias"}
    first = {n for n in everything if n.startswith(("patch_embed.", "network.0."))}
    assert learning("patch_embed", "network.0") == everything - first and len(first) > 2
    assert learning("norm.bias") == everything - {"norm.bias"}
    for name, heads in (("lvvit_s", {"head", "aux_head"}), ("deit_tiny_distilled_patch16_224", {"head", "head_dist"})):
        model = timm.create_model(name, device="meta")
        freeze(model, ["backbone"])
        assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == heads


@pytest.mark.parametrize("part", ["networks.0", "network.", "net", "", "network.99"])
def test_parts_that_are_not_there(part: str) -> None:
    with pytest.raises(UserError, match="the model has no such part"):
        freeze(timm.create_model("vip_nano4_32", device="meta"), [part])
    with pytest.raises(UserError, match="Did you mean network.0"):
        freeze(timm.create_model("vip_nano4_32", device="meta"), ["networks.0"])


def test_something_has_to_be_left() -> None:
    model = timm.create_model("vip_nano4_32", device="meta")
    with pytest.raises(UserError, match="nothing to learn"):
        freeze(model, ["backbone", "head"])


def test_frozen_parts_compute_as_in_inference() -> None:
    """Stochastic depth, dropout and BatchNorm, while all else is in training."""
    model: Any = timm.create_model("test_resnet", drop_path_rate=0.5, drop_rate=0.5)
    freeze(model, ["conv1", "bn1", "layer1"])
    model.train()
    hold_frozen(model)
    frozen = {name for name, m in model.named_modules() if not m.training}
    expected = {n for n, _ in model.named_modules() if n and n.split(".")[0] in ("conv1", "bn1", "layer1")}
    assert frozen == expected
    permutator: Any = timm.create_model("vip_nano4_32", drop_path_rate=0.5)
    freeze(permutator, ["network.4"])
    permutator.train()
    hold_frozen(permutator)
    x = torch.randn(8, 4, 4, 128)
    assert torch.equal(permutator.network[4](x), permutator.network[4](x))


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.0}, {"torchscript": True}, {"torchcompile": "eager"}], ids=str
)
def test_frozen_parts_stay_to_the_bit(options: dict[str, Any], colours: Path, tmp_path: Path) -> None:
    """Statistics of BatchNorm, too; weight decay, averaging, accumulation and clipping reach none of them."""
    source = timm.create_model("test_resnet", num_classes=4)
    torch.save(source.state_dict(), tmp_path / "start.pth")
    frozen = ("conv1.", "bn1.", "layer1.")
    config = quick(
        colours, tmp_path, model="test_resnet", img_size=32, finetune=str(tmp_path / "start.pth"), epochs=1,
        freeze=["conv1", "bn1", "layer1"], **{"weight_decay": 0.5, "clip_grad": 1.0, **options},
        model_ema=True, model_ema_decay=0.5, grad_accum_steps=2,
    )  # fmt: skip
    train(config)
    content = torch.load(tmp_path / "run/last.pth.tar", weights_only=True)
    for weights in (content["state_dict"], content["state_dict_ema"]):
        same = {name for name, before in source.state_dict().items() if torch.equal(weights[name], before)}
        assert {name for name in weights if name.startswith(frozen)} <= same
        others = {name for name in weights if "running" in name or name.startswith("fc.")} - {
            name for name in weights if name.startswith(frozen)
        }
        assert len(others) > 10 and not others & same
    learning = sum(not n.startswith(frozen) for n, _ in source.named_parameters())
    assert len(content["optimizer"]["state"]) == learning


def test_frozen_run_says_how_much_is_frozen(colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Trainer(quick(colours, tmp_path, freeze=["backbone"]), Runtime(torch.device("cpu")))
    total = sum(p.numel() for p in timm.create_model("vip_nano4_32", num_classes=4).parameters())
    assert f"{total - 129 * 4:,} of them are frozen" in caplog.text


# --- the head


def test_head_is_made_anew_for_other_classes_of_the_same_number(tmp_path: Path) -> None:
    source = timm.create_model("vip_nano4_32", num_classes=2)
    content = {"state_dict": source.state_dict(), "class_to_idx": {"cat": 0, "dog": 1}}
    torch.save(content, tmp_path / "pets.pth.tar")
    cases = [({"cat": 0, "dog": 1}, True), ({"cat": 0, "horse": 1}, False), ({"dog": 0, "cat": 1}, False), (None, True)]
    for classes, kept in cases:
        model = timm.create_model("vip_nano4_32", num_classes=2)
        own = model.head.weight.clone()
        said = load_finetune(model, tmp_path / "pets.pth.tar", classes)
        assert torch.equal(model.head.weight, source.head.weight if kept else own)
        assert ("head.weight (other classes there)" in said) == (not kept)
        torch.testing.assert_close(model.norm.weight, source.norm.weight)
    torch.save({**content, "class_to_idx": {"cat": torch.ones(3), 7: "dog"}}, tmp_path / "strange.pth.tar")
    assert "other classes" in load_finetune(model, tmp_path / "strange.pth.tar", {"cat": 0, "dog": 1})


# --- recipes


@pytest.fixture(scope="module")
def two_colours(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the classes, as data to fine-tune on."""
    root = tmp_path_factory.mktemp("two")
    for split in ("train", "val"):
        (root / split).mkdir()
        for name in CLASSES[:2]:
            (root / split / name).symlink_to(colours / split / name)
    return root


@pytest.fixture(scope="module")
def starts(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    """The same weights as a run, as a published file, and as what timm calls pretrained."""
    folder = tmp_path_factory.mktemp("starts")
    train(quick(colours, folder, epochs=1))
    weights = weights_of(folder / "run")
    torch.save(weights, folder / "published.pth.tar")
    model = timm.create_model("vip_nano4_32", num_classes=4)
    model.load_state_dict(weights)
    save_for_hf(model, str(folder / "hub"))
    return {
        "run": ("--model", "vip_nano4_32", "--finetune", folder / "run"),
        "published": ("--model", "vip_nano4_32", "--finetune", folder / "published.pth.tar"),
        "pretrained": ("--model", f"local-dir:{folder / 'hub'}", "--pretrained"),
    }


@pytest.mark.parametrize("start", ["run", "published", "pretrained"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(
    recipe: Path, start: str, two_colours: Path, starts: dict, tmp_path: Path, command: Callable, request: Any
) -> None:
    """From weights of other classes; what a recipe freezes is as it was, and all else has learned."""
    config, _ = parse(TrainConfig, [str(two_colours), "--config", str(recipe)], "vip train")
    size = 48 if config.img_size else 32
    output = ("--output", tmp_path, "--experiment", "run", "--img-size", size)
    # the rate is at its lowest in the warm-up, and a step of it would be lost in float16's rounding of the log alone
    quick_flags = ("--epochs", 1, "--warmup-epochs", 0, "--device", "cpu", "-j", 0, "-b", 8)
    done: Outcome = command("train", two_colours, "--config", recipe, *starts[start], *quick_flags, *output)
    assert done.status == 0, done.err
    tuned = weights_of(tmp_path / "run")
    assert tuned["head.weight"].shape[0] == 2
    source = weights_of(Path(starts["run"][-1]))
    for name, before in source.items():
        if name.startswith("head.") or before.shape != tuned[name].shape:
            continue
        frozen = any(part == "backbone" or name.startswith(f"{part}.") for part in config.freeze)
        assert torch.equal(tuned[name], before) == frozen, name
    assert (tuned["network.0.0.attn.mlp_h.weight"].shape[0] > source["network.0.0.attn.mlp_h.weight"].shape[0]) == (
        size == 48
    )


def test_recipes_are_known() -> None:
    """Each is named where one looks for it."""
    assert {path.stem for path in RECIPES} == {"full", "head", "high_resolution", "partial"}
    for document in ("models/README.md", "docs/finetune.md"):
        text = (ROOT / document).read_text()
        for path in RECIPES:
            assert os.path.relpath(path, (ROOT / document).parent) in text, (document, path.name)


def test_flags_win_over_what_a_recipe_freezes() -> None:
    argv = ["data", "--config", str(ROOT / "models/finetune/partial.yaml"), "--freeze", "norm"]
    assert parse(TrainConfig, argv, "vip train")[0].freeze == ["norm"]
