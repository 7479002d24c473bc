"""Layers that architectures share, against torch's."""

import pytest
import torch
from torch import nn

from vip.models.layers import PatchConv2d


class _OnGpu(torch.Tensor):
    """Numbers of a CPU that say they are a GPU's, for which rows are filled up."""

    is_cuda = True


def _grads(loss: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("size", [(21, 12), (22, 15)], ids=["whole patches", "a rest"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_patches_as_a_convolution_takes_them(size: tuple[int, int], bias: bool, on_gpu: bool) -> None:
    conv = nn.Conv2d(3, 5, (7, 4), (7, 4), bias=bias).double()
    layer = PatchConv2d.from_conv(conv)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x.as_subclass(_OnGpu) if on_gpu else x), conv(x)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    weights = (x, *conv.parameters())
    weighed = torch.randn_like(expected)
    for mine, torchs in zip(
        _grads((found * weighed).sum(), *weights), _grads((expected * weighed).sum(), *weights), strict=True
    ):
        torch.testing.assert_close(mine.as_subclass(torch.Tensor), torchs)


def test_rows_of_a_gpu_are_a_multiple_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, widths = PatchConv2d(3, 5, 7).bfloat16(), []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *args: widths.append(x.shape[-1]) or linear(x, *args))
    x = torch.randn(2, 3, 14, 14, dtype=torch.bfloat16)
    layer(x), layer(x.as_subclass(_OnGpu))
    assert widths == [147, 152]


def test_keeps_names_weights_and_mode_of_the_convolution() -> None:
    conv = nn.Conv2d(3, 5, 7, 7).eval()
    before = torch.get_rng_state()
    layer = PatchConv2d.from_conv(conv)
    assert torch.equal(torch.get_rng_state(), before)  # seeded models stay what they were
    assert dict(layer.named_parameters()) == dict(conv.named_parameters()) and not layer.training
