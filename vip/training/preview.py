"""What training sees: the first images of its loader, augmented and mixed, with their labels."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from vip.data.loaders import naming_lost_workers
from vip.data.order import STEP, EpochOrder, derive_seed, seed_generators
from vip.errors import UserError
from vip.token_labels.dense import DenseClassifier
from vip.token_labels.targets import TokenLabels, dense_targets
from vip.training.config import TrainConfig
from vip.training.runtime import setup_runtime
from vip.training.trainer import Trainer


@dataclass(frozen=True)
class Preview:
    """Training images and what they are labeled with.

    Attributes:
        pictures: The images, without normalization.
        shares: Shares `[N, K]` of the classes in each image, without label smoothing.
        tokens: Probabilities `[N, H', W', K]` of the classes of each token, None without token labels.
        class_to_idx: Names and indices of the classes, None where the data set has no names.
    """

    pictures: list[Image.Image]
    shares: torch.Tensor
    tokens: torch.Tensor | None
    class_to_idx: dict[str, int] | None


class _Feed(Trainer):
    """The data side of a trainer: its loader is the trainer's own, and what else it is made of is left out."""

    def _build_state(self, model: Any, dense: DenseClassifier | None) -> None:
        self.num_classes = int(model.num_classes)
        self.grid = None if dense is None else dense.grid

    def pictures(self, images: torch.Tensor) -> list[Image.Image]:
        """Images `[B, C, H, W]` as they were before normalization."""
        mean, std = (torch.tensor(self.data_config[name]).view(-1, 1, 1) for name in ("mean", "std"))
        bands = ((images.cpu().float() * std + mean).clamp(0, 1) * 255).round().byte().numpy()
        mode = self.config.input_img_mode or ("L" if images.shape[1] == 1 else "RGB")
        return [Image.merge(mode, [Image.fromarray(band) for band in image]).convert("RGB") for image in bands]

    def labels(self, target: torch.Tensor | TokenLabels) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shares of the classes in the images of a batch, and in their tokens, on the CPU."""
        if self.grid is not None:
            labels = target if isinstance(target, TokenLabels) else TokenLabels(target)
            targets = dense_targets(labels, self.num_classes, self.grid)
            return targets.ground_truth.cpu(), targets.tokens.cpu()
        assert isinstance(target, torch.Tensor)
        if target.ndim == 1:
            return F.one_hot(target, self.num_classes).float().cpu(), None
        smoothing = self.config.smoothing
        return ((target - smoothing / self.num_classes) / (1 - smoothing)).cpu(), None


def preview(config: TrainConfig, count: int) -> Preview:
    """Read the first images of a training's first epoch.

    Args:
        config: The training.
        count: Images to read; there are fewer where the epoch has fewer.

    Raises:
        UserError: If training would refuse the data or the options of its augmentation.
    """
    no_weights = dict(pretrained=False, initial_checkpoint="", finetune="", transfer_learning="", eval_checkpoint="")
    config = dataclasses.replace(config, **no_weights)  # type: ignore[arg-type]  # of two types
    runtime = setup_runtime(config.device, workers=config.workers)
    feed = _Feed(config, runtime)
    pictures: list[Image.Image] = []
    labels = []
    order = feed.train_loader.sampler
    if isinstance(order, EpochOrder):
        order.set_epoch(0)
    with naming_lost_workers(runtime.rank, feed.train_data):
        for i, (images, target) in enumerate(feed.train_loader):
            seed_generators(derive_seed(config.seed, 0, STEP, i, runtime.rank))  # as the training loop does
            images, target = images.to(runtime.device), target.to(runtime.device)
            if feed.mix_batch is not None:
                images, target = feed.mix_batch(images, target)
            if config.aug_splits > 1:  # the views of an image side by side
                views = torch.arange(len(images)).view(config.aug_splits, -1).T.flatten()
                images, target = images[views], target[views]
            labels.append(feed.labels(target))
            pictures += feed.pictures(images[: count - len(pictures)])
            if len(pictures) == count:
                break
    if not labels:
        raise UserError(
            f"The training set has no whole batch of {config.batch_size} images: use a smaller --batch-size."
        )
    shares = torch.cat([of_images for of_images, _ in labels])[:count]
    of_tokens = [tokens for _, tokens in labels if tokens is not None]
    tokens = torch.cat(of_tokens)[:count] if of_tokens else None
    return Preview(pictures, shares, tokens, feed.class_to_idx)
