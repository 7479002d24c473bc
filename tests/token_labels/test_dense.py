"""The tokens of timm's models, and what token labels supervise of them."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import textbook
import timm
import torch
from map_files import one_line
from torch import nn

from vip.errors import UserError
from vip.models.vision_permutator import VisionPermutator
from vip.token_labels.dense import DenseClassifier, TokenLayout, find_tokens

# options, input height and width, layout
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int], TokenLayout]] = {
    # convolutions
    "resnet18": ({}, (96, 160), TokenLayout("NCHW", (3, 5), 512)),
    "convnext_atto": ({}, (64, 96), TokenLayout("NCHW", (2, 3), 320)),
    "efficientnet_b0": ({}, (64, 64), TokenLayout("NCHW", (2, 2), 1280)),
    "mobilenetv3_small_050": ({}, (64, 96), TokenLayout("NCHW", (2, 3), 288)),
    # transformers
    "vit_tiny_patch16_224": (dict(img_size=(64, 96)), (64, 96), TokenLayout("NLC", (4, 6), 192, 1)),
    "vit_small_patch16_dinov3": (dict(img_size=64, depth=2), (64, 64), TokenLayout("NLC", (4, 4), 384, 5)),
    "vit_medium_patch16_reg4_gap_256": (
        dict(img_size=(96, 64), depth=2),
        (96, 64),
        TokenLayout("NLC", (6, 4), 512, 4),
    ),
    "deit_tiny_distilled_patch16_224": (dict(img_size=64), (64, 64), TokenLayout("NLC", (4, 4), 192, 2)),
    "cait_xxs24_224": (dict(img_size=64, depth=4), (64, 64), TokenLayout("NLC", (4, 4), 192, 1)),
    "volo_d1_224": (dict(img_size=64), (64, 64), TokenLayout("NLC", (4, 4), 384, 1)),
    "swin_tiny_patch4_window7_224": (
        dict(img_size=(64, 128), depths=(1, 1, 1, 1)),
        (64, 128),
        TokenLayout("NHWC", (2, 4), 768),
    ),
    "levit_128s": (dict(), (224, 224), TokenLayout("NLC", (4, 4), 384)),
    # MLPs
    "mixer_s16_224": (dict(img_size=(64, 96)), (64, 96), TokenLayout("NLC", (4, 6), 512)),
    "gmlp_s16_224": (dict(img_size=64), (64, 64), TokenLayout("NLC", (4, 4), 256)),
    "resmlp_12_224": (dict(img_size=64), (64, 64), TokenLayout("NLC", (4, 4), 384)),
    # ours
    "vip_nano4_32": (dict(img_size=(32, 48)), (32, 48), TokenLayout("NHWC", (4, 6), 128)),
    "lvvit_nano4_32": (dict(img_size=(32, 48)), (32, 48), TokenLayout("NLC", (8, 12), 96, 1)),
}
K = 7


class Case:
    """A model in eval mode, its weights wide enough for every part to count, and images for it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        options, size, self.layout = MODELS[name]
        self.model = timm.create_model(name, pretrained=False, num_classes=K, **options).eval()
        for p in self.model.parameters():
            # layers that begin as nothing, such as layer scales and the last norm of a block, shall count
            with torch.no_grad():
                p.add_(0.02 * torch.randn_like(p)) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
        self.size = (3, *size)
        self.images = torch.randn(3, *self.size)
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:  # with the statistics of new layers a deep network would not tell images apart
            with torch.no_grad():
                self.model.train()(self.images)
            self.model.eval()
        self.dense = DenseClassifier(copy.deepcopy(self.model), self.size).eval()


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = Case(request.param)
    yield case
    assert not case.dense.training, "a test has changed what the others use"


# --- where the tokens are


def test_find_tokens(case: Case) -> None:
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    for training in (True, False):
        case.model.train(training)
        assert find_tokens(case.model, case.size) == case.layout
        assert case.model.training is training
    # looking does not change running statistics
    assert all(t.equal(before[name]) for name, t in case.model.state_dict().items())


@torch.no_grad()
def test_tokens_are_where_their_pixels_are(case: Case) -> None:
    """Of the tokens in the corners, that one feels a change in a corner most which is there."""
    if case.name in ("efficientnet_b0", "mobilenetv3_small_050", "levit_128s"):
        pytest.skip("with random weights every token of these networks sees every pixel alike")
    _, height, width = case.size
    rows, columns = height // case.layout.grid[0], width // case.layout.grid[1]
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        changed = case.images.clone()
        i, j = (index % size for index, size in zip(corner, case.layout.grid, strict=True))
        changed[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] += 0.01
        a, b = (case.layout.tokens(case.model.forward_features(x)) for x in (case.images, changed))
        assert a.shape == (3, *case.layout.grid, case.layout.channels)
        change = (a - b).norm(dim=-1).mean(0)
        assert change[i, j] == change[[0, 0, -1, -1], [0, -1, 0, -1]].max(), change


@torch.no_grad()
def test_tokens_are_those_of_the_intermediate_features(case: Case) -> None:
    """timm's own way to get a map of features, where it is there and ends at the same layer."""
    if not hasattr(case.model, "forward_intermediates"):
        pytest.skip("no intermediates")
    features, (last,) = case.model.forward_intermediates(case.images, 1, norm=True, output_fmt="NCHW")
    tokens = case.layout.tokens(features).permute(0, 3, 1, 2)
    if last.shape != tokens.shape:
        pytest.skip("more layers after the last intermediate features")
    torch.testing.assert_close(tokens, last, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_single_tokens(case: Case) -> None:
    """A head that reads the mean gives, of single tokens, logits whose mean is that of the image."""
    features = case.model.forward_features(case.images)
    pool = case.model.global_pool if isinstance(getattr(case.model, "global_pool", None), str) else ""
    single = case.layout.single_tokens(features, pool)
    tokens = case.layout.tokens(features).flatten(0, 2)
    assert len(single) == len(tokens)
    if case.name in ("volo_d1_224", "lvvit_nano4_32"):
        return  # their heads over tokens can be asked directly
    logits = case.model.forward_head(single)
    assert logits.shape == (len(tokens), K)
    head = case.model.get_classifier()
    if case.name in ("convnext_atto", "mobilenetv3_small_050"):
        return  # a norm, or an activation, between the mean and the classifier: the means differ
    if case.layout.kind == "NLC" and pool == "token":  # the class token's classifier, asked about every token
        heads = head if isinstance(head, tuple) else (head,)
        expected = sum(h(tokens) for h in heads) / len(heads)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        return
    if case.name == "vit_medium_patch16_reg4_gap_256":
        expected = head(case.model.fc_norm(tokens))  # a norm after the mean
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        return
    mean = logits.unflatten(0, (3, -1)).mean(1)
    torch.testing.assert_close(mean, case.model(case.images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name, options, size",
    [
        ("crossvit_9_240", {}, (240, 240)),  # two grids
        ("pit_ti_224", {}, (224, 224)),  # the class token alone
        ("coat_lite_tiny", dict(img_size=64), (64, 64)),  # a class token of which the model does not tell
    ],
)
def test_models_without_tokens(name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=K, **options)
    for function in (find_tokens, DenseClassifier):
        with pytest.raises(UserError) as e:
            function(model, (3, *size))
        message = one_line(e.value)
        assert "no tokens" in message and name in message and f"{size[0]}x{size[1]}" in message


class Features(nn.Module):
    """Gives what it is told to."""

    num_classes, num_features = K, 6

    def __init__(self, features: Any, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.features = features
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, x: torch.Tensor) -> Any:
        return self.features


@pytest.mark.parametrize(
    "features, attributes, layout",
    [
        (torch.zeros(1, 6, 2, 3), {}, TokenLayout("NCHW", (2, 3), 6)),
        (torch.zeros(1, 2, 3, 6), {}, TokenLayout("NHWC", (2, 3), 6)),
        (torch.zeros(1, 6, 6, 6), {}, TokenLayout("NCHW", (6, 6), 6)),
        (torch.zeros(1, 6, 6, 6), dict(output_fmt="NHWC"), TokenLayout("NHWC", (6, 6), 6)),
        (torch.zeros(1, 6, 6), {}, TokenLayout("NLC", (2, 3), 6)),
        (torch.zeros(1, 7, 6), dict(cls_token=nn.Parameter(torch.zeros(1))), TokenLayout("NLC", (2, 3), 6, 1)),
        (torch.zeros(1, 6, 6), dict(cls_token=None), TokenLayout("NLC", (2, 3), 6)),
        (torch.zeros(1, 11, 6), dict(num_prefix_tokens=5), TokenLayout("NLC", (2, 3), 6, 5)),
        (torch.zeros(1, 150, 6), {}, TokenLayout("NLC", (10, 15), 6)),
        (torch.zeros(1, 7, 6), {}, None),  # on no grid
        (torch.zeros(1, 9, 6), {}, None),  # on a square one, the image is 2 to 3
        (torch.zeros(1, 1, 6), dict(num_prefix_tokens=1), None),  # none
        (torch.zeros(1, 6), {}, None),
        (torch.zeros(1, 5, 2, 3), {}, None),  # channels that no head can be made for
        (torch.zeros(1, 6, 5), {}, None),
        (torch.zeros(1, 6, 1, 2, 3), {}, None),
        (torch.zeros(1, 6, 2, 3), dict(num_features=None), None),
        ([torch.zeros(1, 6, 2, 3)], {}, None),
        ((torch.zeros(1, 6, 2, 3), torch.zeros(1, 6)), {}, None),
        (None, {}, None),
    ],
)
def test_layouts(features: Any, attributes: dict[str, Any], layout: TokenLayout | None) -> None:
    model = Features(features, **attributes)
    if layout is not None:
        assert find_tokens(model, (3, 32, 48)) == layout
        return
    with pytest.raises(UserError) as e:
        find_tokens(model, (3, 32, 48))
    assert "Features has no tokens" in one_line(e.value) and "32x48" in str(e.value)


def test_a_failing_search_leaves_the_mode() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1).train()
    with pytest.raises(UserError, match="height"):
        find_tokens(model, (3, 64, 64))
    assert model.training


def test_types_of_weights() -> None:
    model = timm.create_model("resnet18", num_classes=K, dtype=torch.bfloat16)
    dense = DenseClassifier(model, (3, 64, 64)).eval()
    cls, aux = dense(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16))
    assert cls.dtype is aux.dtype is model.aux_head.weight.dtype is torch.bfloat16


# --- the outputs


@torch.no_grad()
def test_outputs(case: Case) -> None:
    cls, aux = case.dense(case.images)
    assert case.dense.grid == case.layout.grid
    assert cls.shape == (3, K) and aux.shape == (3, *case.layout.grid, K)
    model = case.dense.model
    tokens = case.layout.tokens(model.forward_features(case.images))
    torch.testing.assert_close(aux, model.aux_head(tokens))
    logits = model(case.images)
    if case.name == "lvvit_nano4_32":  # inference adds the tokens' strongest response, training tells them apart
        torch.testing.assert_close(logits, cls + 0.5 * aux.flatten(1, 2).amax(1))
        return
    torch.testing.assert_close(cls, logits)
    if case.name == "volo_d1_224":  # its class output has that sum in it
        of_class = model.head(model.forward_features(case.images)[:, 0])
        torch.testing.assert_close(cls, of_class + 0.5 * aux.flatten(1, 2).amax(1))
    else:
        torch.testing.assert_close(cls, case.model(case.images))  # the head that was put in changes nothing


def test_the_auxiliary_head(case: Case) -> None:
    head = case.dense.model.aux_head
    assert isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (case.layout.channels, K)
    own = [name for name in case.model.state_dict() if name.startswith("aux_head.")]
    if case.name in ("volo_d1_224", "lvvit_nano4_32"):  # theirs, and inference needs it
        assert own == ["aux_head.weight", "aux_head.bias"] and not case.dense.has_training_aid
        assert head.weight.equal(case.model.aux_head.weight)
    else:
        assert own == [] and case.dense.has_training_aid
        assert 0.01 < head.weight.std() < 0.03 and not head.bias.any()


def test_every_parameter_gets_a_gradient(case: Case) -> None:
    dense = copy.deepcopy(case.dense).train()
    parameters = dict(dense.named_parameters())
    for mix in (None, torch.rand(case.layout.grid) < 0.5):
        for loss in ("both", "tokens"):
            dense.zero_grad()
            cls, aux = dense(case.images, mix)
            (aux.square().mean() + (cls.square().mean() if loss == "both" else 0)).backward()
            without = {name for name, p in parameters.items() if p.grad is None or not p.grad.norm() > 0}
            assert all(p.grad.isfinite().all() for p in parameters.values() if p.grad is not None)
            if loss == "both":
                assert without == set()
            else:
                assert "model.aux_head.weight" not in without and len(without) < len(parameters) / 2


# --- MixToken


@torch.no_grad()
def test_no_token_and_every_token_mixed(case: Case) -> None:
    cls, aux = case.dense(case.images)
    none, every = torch.zeros(case.layout.grid, dtype=torch.bool), torch.ones(case.layout.grid, dtype=torch.bool)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(case.dense(case.images, none), (cls, aux), **close)
    # all swapped, the images are each other: the class output stays so, the tokens' outputs are swapped back
    torch.testing.assert_close(case.dense(case.images, every), (cls.flip(0), aux), **close)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_some_tokens_mixed(case: Case, batch: int) -> None:
    """The outputs are those of images mixed by hand, where both images' tokens are of patches of pixels."""
    x = case.images[:batch]
    mask = torch.zeros(case.layout.grid, dtype=torch.bool)
    mask[:2, 1:] = True
    mixed = x.clone()
    rows, columns = (size // count for size, count in zip(case.size[1:], case.layout.grid, strict=True))
    for b in range(batch):
        for i, j in mask.nonzero().tolist():
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            mixed[(b, slice(None), *place)] = x[(batch - 1 - b, slice(None), *place)]
    cls, aux = case.dense(x, mask)
    if case.name == "lvvit_nano4_32":  # mixes tokens, which see more than their pixels in its stem of convolutions
        assert cls.shape == (batch, K)
        return
    expected_cls, mixed_aux = case.dense(mixed)
    expected = mixed_aux.clone()
    expected[:, mask] = mixed_aux.flip(0)[:, mask]
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((cls, aux), (expected_cls, expected), **close)
    if batch > 1:  # with itself an image mixes to itself
        assert not torch.allclose(cls[0], case.dense(x)[0][0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_pixels_where_the_grid_does_not_divide_them() -> None:
    """Of 80 pixels a stride of 32 makes 3 tokens; each pixel goes with the nearest."""
    dense = DenseClassifier(timm.create_model("resnet18", num_classes=K).eval(), (3, 80, 80)).eval()
    assert dense.grid == (3, 3)
    seen = []
    dense.model.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.stack((torch.zeros(3, 80, 80), torch.ones(3, 80, 80)))
    dense(x, torch.eye(3, dtype=torch.bool))
    swapped = seen[0][0, 0]
    nearest = torch.arange(80) * 3 // 80
    assert swapped.equal((nearest[:, None] == nearest[None]).float()) and seen[0][1].equal(1 - seen[0][0])


# --- making the classifier


def test_a_model_without_classes() -> None:
    for name in ("resnet18", "vip_nano4_32", "lvvit_nano4_32"):
        model = timm.create_model(name, num_classes=0)
        with pytest.raises(UserError) as e:
            DenseClassifier(model, (3, 64, 64) if name == "resnet18" else (3, 32, 32))
        assert "classes" in one_line(e.value)


def test_an_auxiliary_head_that_was_switched_off_is_made() -> None:
    for name in ("volo_d1_224", "lvvit_nano4_32"):
        option = dict(use_aux_head=False) if name == "volo_d1_224" else dict(aux_head=False)
        size = 64 if name == "volo_d1_224" else 32
        model = timm.create_model(name, num_classes=K, img_size=size, **option)
        dense = DenseClassifier(model, (3, size, size)).eval()
        cls, aux = dense(torch.randn(1, 3, size, size))
        assert cls.shape == (1, K) and aux.shape == (1, *dense.grid, K)


def test_dropout_of_the_head() -> None:
    dense = DenseClassifier(timm.create_model("vip_nano4_32", num_classes=K, drop_rate=0.5), (3, 32, 32)).train()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(dense(x)[1], dense(x)[1])
    dense.eval()
    torch.testing.assert_close(dense(x), dense(x), rtol=0, atol=0)


# --- the auxiliary head of Vision Permutator


def nano(**options: Any) -> VisionPermutator:
    """vip_nano4_32 in float64 with an auxiliary head, its weights wide enough for every branch to count."""
    torch.manual_seed(0)
    options = {"num_classes": K, "aux_head": True, "dtype": torch.float64, **options}
    model = timm.create_model("vip_nano4_32", **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, p[0].numel() ** -0.5) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def pixels(size: tuple[int, int] = (32, 32), batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (40, 24)])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_permutator_dense_outputs_are_the_textbooks(size: tuple[int, int], mixed: bool, batch: int) -> None:
    model, x = nano(img_size=size), pixels(size, batch)
    grid = size[0] // 8, size[1] // 8
    mask = torch.rand(grid) < 0.4
    mask[0, 0], mask[-1, -1] = True, False
    images = x.numpy()
    if mixed:  # each patch is embedded by itself, so the textbook can mix pixels
        mix_pixels = np.kron(mask.numpy(), np.ones((8, 8), dtype=bool))
        images = np.where(mix_pixels, images[::-1], images)
    weights = {name: t.numpy() for name, t in model.state_dict().items()}
    features = textbook.stages(images, weights, layers=(2, 1, 2, 1), segments=(8, 4, 4, 4))[-1]
    tokens = textbook.layer_norm(features, textbook.part(weights, "norm"), 1e-5)
    expected_cls = textbook.linear(tokens.mean((1, 2)), textbook.part(weights, "head"))
    expected_aux = textbook.linear(tokens, textbook.part(weights, "aux_head"))
    if mixed:
        expected_aux = np.where(mask.numpy()[..., None], expected_aux[::-1], expected_aux)
    cls, aux = model.forward_dense(x, mask if mixed else None)
    np.testing.assert_allclose(cls.detach().numpy(), expected_cls, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(aux.detach().numpy(), expected_aux, rtol=1e-9, atol=1e-9)


def test_permutator_forward_does_not_use_it() -> None:
    model, x = nano(), pixels()
    other = nano(aux_head=False)
    state = model.state_dict()
    assert set(state) - set(other.state_dict()) == {"aux_head.weight", "aux_head.bias"}
    other.load_state_dict({name: t for name, t in state.items() if not name.startswith("aux_head.")})
    assert model(x).equal(other(x)) and model.forward_dense(x)[0].equal(model(x))
    model.train()(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"aux_head.weight", "aux_head.bias"}


def test_permutator_has_none_unless_asked() -> None:
    assert timm.create_model("vip_nano4_32").aux_head is None
    assert nano(num_classes=0).aux_head is None
    for model in (nano(aux_head=False), nano(num_classes=0)):
        with pytest.raises(ValueError, match="aux_head=True"):
            model.forward_dense(pixels())


def test_permutator_reset_classifier_keeps_it() -> None:
    model, x = nano(), pixels()
    model.reset_classifier(4)
    cls, aux = model.forward_dense(x)
    assert cls.shape == (2, 4) and aux.shape == (2, 4, 4, 4) and aux.dtype is torch.float64
    model.reset_classifier(3, "max")  # tokens are not pooled
    assert model.forward_dense(x)[1].shape == (2, 4, 4, 3)
    model.reset_classifier(0)
    assert model.aux_head is None and not [name for name in model.state_dict() if "head" in name]
    other = nano(aux_head=False)
    other.reset_classifier(4)
    assert other.aux_head is None


def test_permutator_dense_classifier_uses_the_one_there_is() -> None:
    model, x = nano(), pixels()
    head = model.aux_head
    dense = DenseClassifier(model, (3, 32, 32)).eval()
    assert model.aux_head is head
    torch.testing.assert_close(dense(x), model.forward_dense(x), rtol=0, atol=0)
