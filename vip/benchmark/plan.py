"""What a training on ImageNet takes: reckoned from what one device and one core were measured to do."""

from dataclasses import dataclass

TRAIN_IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000
DEVICES_OF_NODE = 8


@dataclass(frozen=True)
class Plan:
    """A training of a model on a number of devices, each as fast as the one that was measured.

    Attributes:
        model: Its name.
        params: Its parameters.
        devices: Devices, of which eight share a node.
        batch_size: Images of a device in an update.
        images_per_second: Training rate of one device by its steps alone.
        images_per_core: Images a second that one core decodes and augments.
        cores: Cores that feed a device.
        recipe: Learning rate of the recipe, and the images of its updates.
        epochs: Epochs.
    """

    model: str
    params: int
    devices: int
    batch_size: int
    images_per_second: float
    images_per_core: float
    cores: float
    recipe: tuple[float, int]
    epochs: int = 300

    @property
    def update_size(self) -> int:
        """Images of an update."""
        return self.devices * self.batch_size

    @property
    def cores_of_node(self) -> float:
        """Cores of a node whose loaders keep up with its devices."""
        return min(self.devices, DEVICES_OF_NODE) * self.images_per_second / self.images_per_core

    @property
    def loader_limits(self) -> bool:
        """Whether the loaders, and not the devices, say how long an epoch takes."""
        return self.cores * self.images_per_core < self.images_per_second

    @property
    def epoch_seconds(self) -> float:
        """Time of an epoch, by the slower of devices and loaders; validation is a forward pass of three products."""
        rate = min(self.images_per_second, self.cores * self.images_per_core) * self.devices
        return (TRAIN_IMAGES + VALIDATION_IMAGES / 3) / rate

    @property
    def hours(self) -> float:
        """Time of the training."""
        return self.epochs * self.epoch_seconds / 3600

    @property
    def sent(self) -> float:
        """Bytes that each device sends for an update: float32 gradients, all-reduced in a ring."""
        return 2 * (self.devices - 1) / self.devices * 4 * self.params

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a device that would hide the all-reduce behind the backward pass, two thirds of a step."""
        return self.sent / (self.batch_size / self.images_per_second * 2 / 3)

    def learning_rate(self, power: float) -> float:
        """The recipe's rate at this size of updates, by the linear rule (power 1) or the square root's (0.5)."""
        rate, size = self.recipe
        return rate * (self.update_size / size) ** power
