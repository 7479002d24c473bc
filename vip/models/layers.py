"""What several architectures share."""

import torch


def mix_tokens(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """MixToken: swap the tokens under a mask with those of the batch in reverse order (arXiv 2104.10858, section 3.3).

    Args:
        x: Tokens `[B, H, W, C]`.
        mix: Boolean mask `[h, w]`; each of its elements covers the same number of tokens.
    """
    rows, columns = x.shape[1] // mix.shape[0], x.shape[2] // mix.shape[1]
    mix = mix.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return torch.where(mix[None, :, :, None], x.flip(0), x)
