"""The loss of token labeling, against torch's cross-entropy and sums over single images."""

import pytest
import torch
import torch.nn.functional as F

from vip.token_labels.loss import TokenLabelCrossEntropy, cross_entropy
from vip.token_labels.targets import DenseTargets

BATCH, GRID, CLASSES = 4, (2, 3), 7


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_targets() -> DenseTargets:
    """The strongest classes of ground truth and class target agree in the first two images alone."""
    ground_truth = torch.full((BATCH, CLASSES), 0.01, dtype=torch.float64)
    cls = draw(BATCH, CLASSES, seed=1).softmax(-1)
    for i, label in enumerate(cls.argmax(1).tolist()):
        ground_truth[i, label if i < 2 else (label + 1) % CLASSES] = 1 - 0.01 * (CLASSES - 1)
    return DenseTargets(ground_truth, cls, draw(BATCH, *GRID, CLASSES, seed=2).softmax(-1))


def reference(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.reshape(-1, CLASSES), target.reshape(-1, CLASSES))


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, *GRID), (1, 1, 1)])
def test_cross_entropy_is_torchs(shape: tuple[int, ...]) -> None:
    """Value and gradient, also for targets that do not sum to 1, as smoothed ones."""
    logits, target = draw(*shape, CLASSES).requires_grad_(), 1.1 * draw(*shape, CLASSES, seed=1).softmax(-1)
    ours, theirs = cross_entropy(logits, target), reference(logits, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("target_type", [torch.float16, torch.float32])
@pytest.mark.parametrize("logit_type", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(logit_type: torch.dtype, target_type: torch.dtype) -> None:
    logits = draw(BATCH, *GRID, CLASSES, scale=5).to(logit_type)
    target = draw(BATCH, *GRID, CLASSES, seed=1).softmax(-1).to(target_type)
    loss = cross_entropy(logits, target)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), reference(logits.double(), target.double()), rtol=1e-5, atol=0)


def test_extreme_logits_give_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([[0.1, 0.8, 0.1]], dtype=torch.float16))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert loss.item() == pytest.approx(0.8 * 6e4 + 0.1 * 3e4, rel=1e-3)


@pytest.mark.parametrize("cls_weight, dense_weight", [(1.0, 1.0), (1.0, 0.5), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_weights(cls_weight: float, dense_weight: float) -> None:
    cls, tokens, targets = draw(BATCH, CLASSES), draw(BATCH, *GRID, CLASSES, seed=3), draw_targets()
    loss = TokenLabelCrossEntropy(dense_weight, cls_weight)(cls, tokens, targets)
    expected = cls_weight * reference(cls, targets.cls) + dense_weight * reference(tokens, targets.tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def corrected(targets: DenseTargets) -> torch.Tensor:
    """The class target with the image's own class: half of each, or a tenth where they disagree."""
    rows = []
    for own, of_map in zip(targets.ground_truth, targets.cls, strict=True):
        share = 0.5 if own.argmax() == of_map.argmax() else 0.1
        rows.append(share * own + (1 - share) * of_map)
    return torch.stack(rows)


@pytest.mark.parametrize("swapped", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("ground_truth", [False, True])
def test_class_target(ground_truth: bool, swapped: float) -> None:
    """Corrected first, then mixed with the batch in reverse order by the swapped share; tokens keep theirs."""
    cls, tokens, targets = draw(BATCH, CLASSES), draw(BATCH, *GRID, CLASSES, seed=3), draw_targets()
    agree = targets.ground_truth.argmax(1) == targets.cls.argmax(1)
    assert agree.tolist() == [True, True, False, False]
    expected = torch.zeros((), dtype=torch.float64)
    target = corrected(targets) if ground_truth else targets.cls
    for i in range(BATCH):
        mixed = (1 - swapped) * target[i] + swapped * target[BATCH - 1 - i]
        expected += F.cross_entropy(cls[i], mixed) / BATCH
    expected += reference(tokens, targets.tokens)
    loss = TokenLabelCrossEntropy(ground_truth=ground_truth)(cls, tokens, targets, swapped)
    # the published 0.9 and 0.5 are float32
    torch.testing.assert_close(loss, expected, rtol=1e-7 if ground_truth else 1e-12, atol=0)
    assert draw_targets().cls.equal(targets.cls), "targets are not changed in place"
