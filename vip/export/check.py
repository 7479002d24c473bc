"""What a file computes, held against the model that it was made of."""

from collections.abc import Callable

import torch
from torch import nn

Run = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE = 1e-4  # of the largest output
BATCHES = (1, 3)  # other ones than a model is exported with


def largest_difference(run: Run, model: nn.Module, example: torch.Tensor) -> float:
    """Compare what a file computes with what the model does, on random images in batches of several sizes.

    Args:
        run: Runs the file.
        model: The model, in evaluation mode.
        example: A batch of images, for their shape and where they are.

    Returns:
        The largest difference of an output over the largest absolute output of the batch, nan where one is no number.
    """
    differences = []
    for count in BATCHES:
        images = torch.randn(count, *example.shape[1:], device=example.device)
        expected, found = model(images), run(images)
        if found.shape != expected.shape:
            raise ValueError(f"it gives {list(found.shape)} for {count} images, expected {list(expected.shape)}.")
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        differences.append((found.to(expected) - expected).abs().max() / scale)
    return torch.stack(differences).max().item()
