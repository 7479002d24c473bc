"""The training task of token labeling."""

from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from vip.token_labels.config import TokenLabelConfig
from vip.token_labels.dense import DenseClassifier
from vip.token_labels.loss import TokenLabelCrossEntropy
from vip.token_labels.mixing import draw_mix_tokens
from vip.token_labels.targets import TokenLabels, dense_targets


class TokenLabelTask(ClassificationTask):
    """timm's classification task with a target for every token.

    Validation and the checkpoint's `state_dict` are of the model as inference uses it; an auxiliary head that only
    training uses is in the checkpoint's `task_state`.

    Args:
        model: The model with its auxiliary head.
        config: Weights of the loss, MixToken.
        smoothing: Label smoothing.
        device: Device.
    """

    def __init__(
        self, model: DenseClassifier, config: TokenLabelConfig, smoothing: float, device: torch.device
    ) -> None:
        criterion = TokenLabelCrossEntropy(config.dense_weight, config.cls_weight, config.ground_truth)
        super().__init__(model, criterion, device=device, verbose=False)
        self.grid, self.mix_alpha, self.smoothing = model.grid, config.mix_token, smoothing
        self.num_classes, self.has_training_aid = model.model.num_classes, model.has_training_aid

    def forward(self, input: torch.Tensor, target: TokenLabels | torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images `[B, C, H, W]`.
            target: Their labels, or their class indices `[B]`.
        """
        labels = TokenLabels(target) if isinstance(target, torch.Tensor) else target
        mix = draw_mix_tokens(self.grid, self.mix_alpha)
        swapped = 0.0 if mix is None else float(mix.float().mean())
        cls, tokens = self.trainable_module(input, None if mix is None else mix.to(input.device, non_blocking=True))
        # as exact as the logits of the maps, and half the size of the outputs
        targets = dense_targets(labels, self.num_classes, self.grid, self.smoothing, torch.float16)
        return {"loss": self.criterion(cls, tokens, targets, swapped), "output": cls}

    def compile(  # type: ignore[override]  # as in timm's task
        self, backend: str = "inductor", mode: str | None = None, **kwargs: Any
    ) -> nn.Module:
        """Compile the training and the inference pass; returns the model that validation calls."""
        model = self.get_eval_model()
        super().compile(backend=backend, mode=mode, **kwargs)
        self.eval_model: nn.Module = torch.compile(model, backend=backend, mode=mode, **kwargs)  # type: ignore[assignment]
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """The model as inference calls it."""
        if module is None and not ema and hasattr(self, "eval_model"):
            return self.eval_model
        dense = self.get_trainable_module(ema=ema) if module is None else module
        return None if dense is None else unwrap_model(dense).model

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        """The inference model's `state_dict`, and what only training needs beside it."""
        state = super().get_checkpoint_state(ema, unwrap_fn)
        suffix = "_ema" if ema else ""
        weights = state[f"state_dict{suffix}"]
        if self.has_training_aid:
            aids = {name: value for name, value in weights.items() if name.startswith("aux_head.")}
            state[f"task_state{suffix}"] = aids
            state[f"state_dict{suffix}"] = {name: value for name, value in weights.items() if name not in aids}
        return state
