"""Options of training and validation. Defaults are those of the published training script."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vip.data.config import AugmentationConfig, DatasetConfig, InputConfig, LoaderConfig
from vip.options import Options, option
from vip.token_labels.config import PUBLISHED_DEFAULTS, TokenLabelConfig

TEST_SETS = ("imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "imagenet-real")


@dataclass(kw_only=True)
class ModelConfig(Options):
    """Model."""

    model: str = option("vip_s7", "model: any name timm knows")
    pretrained: bool = option(False, "start from the weights that timm has for the model")
    num_classes: int | None = option(None, "classes (default: those of the training set)", metavar="N", low=1)
    gp: str | None = option(None, "global pooling: avg, max, avgmax, catavgmax (default: the model's)")
    model_kwargs: dict = option({}, "other arguments of the model, as name=value")
    channels_last: bool = option(False, "channels-last memory layout")
    torchscript: bool = option(False, "run the model through torch.jit.script")
    torchcompile: str | None = option(None, "compile the model, with this backend", const="inductor", metavar="BACKEND")
    torchcompile_mode: str | None = option(None, "mode of torch.compile, such as max-autotune")
    fast_norm: bool = option(False, "normalize in low precision under AMP (Apex's fused kernel where it is installed)")
    no_kernels: bool = option(False, "let torch compute what this package has GPU kernels for, as VIP_KERNELS=0 does")


@dataclass(kw_only=True)
class PrecisionConfig(Options):
    """Device and precision."""

    device: str | None = option(None, "device (default: cuda where there is one, else cpu)")
    amp: bool = option(False, "mixed precision")
    amp_dtype: str = option("float16", "low precision of --amp", choices=("float16", "bfloat16"))
    native_amp: bool = option(False, "the same as --amp")
    apex_amp: bool = option(False, "float16 mixed precision with dynamic loss scaling, by Apex where apex.amp exists")

    @property
    def mixed_precision(self) -> bool:
        """Whether anything asks for mixed precision."""
        return self.amp or self.native_amp or self.apex_amp


@dataclass(kw_only=True)
class StartConfig(Options):
    """Where the weights start."""

    initial_checkpoint: str = option("", "load these weights, which must fit the model exactly", metavar="PATH")
    finetune: str = option("", "load these weights; the head and the image size may differ", metavar="PATH")
    freeze: list[str] = option(
        [], "parts that stay as they are: names such as network.0, or backbone for all but the head", metavar="PART"
    )
    resume: str = option(
        "", "continue this checkpoint's run; auto: of --experiment", "-r", const="auto", metavar="PATH"
    )
    resume_elastic: bool = option(False, "resume with another batch size or number of processes")
    no_resume_opt: bool = option(False, "do not restore the optimizer on --resume")
    eval_checkpoint: str = option("", "only validate this checkpoint", "--eval_checkpoint", metavar="PATH")
    transfer_learning: str = option("", "published transfer script: start from --transfer-model", const="true")
    transfer_model: str = option("", "the same as --finetune", metavar="PATH")
    transfer_ratio: float = option(
        0.01, "with --transfer-learning: learning rate of the backbone over the head's", low=0
    )
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    memory_budget: float | None = option(
        None, "share of the activations' memory that --torchcompile may take: it recomputes the cheapest", low=0, high=1
    )


DISTILLATIONS = ("logit", "feature", "token")


@dataclass(kw_only=True)
class DistillationConfig(Options):
    """Distillation."""

    teacher: str = option(
        "",
        "model to learn from, too: a checkpoint, a run's folder, or a name timm has weights for",
        metavar="PATH|NAME",
    )
    distill_type: str = option(
        "logit", "what is learned from it; token is for models with a distillation head", choices=DISTILLATIONS
    )
    distill_alpha: float = option(0.5, "weight of the teacher in the loss, the labels have the rest", low=0, high=1)
    distill_temperature: float = option(
        2.0, "divides both models' logits before they are compared, not of feature", low=0.01, high=1000
    )


@dataclass(kw_only=True)
class RegularizationConfig(Options):
    """Loss and regularization."""

    smoothing: float = option(0.1, "label smoothing", low=0, high=0.999)
    jsd_loss: bool = option(False, "Jensen-Shannon loss over augmentation splits, with --aug-splits", "--jsd")
    bce_loss: bool = option(False, "binary cross-entropy instead of cross-entropy")
    bce_sum: bool = option(False, "sum the binary cross-entropy over classes")
    bce_target_thresh: float | None = option(
        None, "binarize mixed targets at this value, with --bce-loss", low=0, high=1
    )
    drop: float | None = option(None, "dropout before the head", low=0, high=0.999)
    drop_path: float | None = option(0.1, "stochastic depth", low=0, high=0.999)
    drop_connect: float | None = option(None, "old name of --drop-path", low=0, high=0.999)
    drop_block: float | None = option(None, "drop-block rate, for models that have it", low=0, high=0.999)
    bn_tf: bool = option(False, "TensorFlow's BatchNorm momentum and epsilon")
    bn_momentum: float | None = option(None, "BatchNorm momentum", low=0, high=1)
    bn_eps: float | None = option(None, "BatchNorm epsilon", low=0)
    sync_bn: bool = option(False, "synchronize BatchNorm across processes")
    dist_bn: str = option(
        "",
        "BatchNorm statistics after an epoch: reduce averages those of all processes, else they are the first one's",
        choices=("", "reduce", "broadcast"),
    )


@dataclass(kw_only=True)
class OptimizerConfig(Options):
    """Optimizer."""

    opt: str = option("adamw", "optimizer: any name timm knows, fused* ones by Apex")
    opt_eps: float | None = option(None, "epsilon of the optimizer", low=0)
    opt_betas: list[float] | None = option(None, "betas of the optimizer", low=0, high=1)
    momentum: float = option(0.9, "momentum, for optimizers that have it", low=0, high=1)
    weight_decay: float = option(0.05, "weight decay", "--wd", low=0)
    layer_decay: float | None = option(
        None, "learning rate factor from each layer to the one before", low=0.001, high=1
    )
    opt_kwargs: dict = option({}, "other arguments of the optimizer, as name=value")
    clip_grad: float | None = option(None, "gradient clipping: norm, value, or AGC factor", low=0)
    clip_mode: str = option("norm", "what --clip-grad limits", choices=("norm", "value", "agc"))
    grad_accum_steps: int = option(1, "batches whose gradients are summed before an update", metavar="N", low=1)


SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant", "none")


@dataclass(kw_only=True)
class ScheduleConfig(Options):
    """Learning rate schedule."""

    sched: str = option("cosine", "schedule", choices=SCHEDULES)
    sched_on_updates: bool = option(False, "step the schedule at every update instead of every epoch")
    lr: float = option(5e-4, "learning rate", low=0)
    lr_base: float | None = option(None, "instead of --lr: the rate at --lr-base-size images an update", low=0)
    lr_base_size: int = option(256, "images an update that --lr-base is for", low=1)
    lr_noise: list[float] | None = option(None, "on and off points of learning rate noise, as shares of the schedule")
    lr_noise_pct: float = option(0.67, "limit of the noise, as share of the rate", low=0.01, high=1)
    lr_noise_std: float = option(1.0, "standard deviation of the noise", low=0, high=10)
    lr_cycle_mul: float = option(1.0, "growth of the cycle length", low=0.01, high=10)
    lr_cycle_decay: float = option(0.5, "decay of the learning rate from cycle to cycle", low=0, high=1)
    lr_cycle_limit: int = option(1, "number of cycles", low=1, high=100)
    lr_k_decay: float = option(1.0, "k-decay of cosine and poly", low=0, high=10)
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up", low=0)
    min_lr: float = option(1e-5, "lowest learning rate", low=0)
    epochs: int = option(300, "epochs, without cool-down", metavar="N", low=1)
    epoch_repeats: float = option(0.0, "passes over the data in one epoch, for streamed data sets that can", low=0)
    start_epoch: int | None = option(None, "epoch to start at", metavar="N", low=0)
    decay_milestones: list[int] = option([90, 180, 270], "epochs at which multistep decays")
    decay_epochs: float = option(
        30.0, "epochs between decays of step, or length of the decay of wsd and rsqrt", low=0.001
    )
    warmup_epochs: int = option(10, "epochs of warm-up", metavar="N", low=0)
    warmup_prefix: bool = option(False, "warm-up epochs do not count as --epochs")
    cooldown_epochs: int = option(10, "epochs at the lowest rate after the schedule", metavar="N", low=0)
    patience_epochs: int = option(10, "epochs without improvement before plateau decays", metavar="N", low=0)
    decay_rate: float = option(0.1, "factor of a decay, power of poly", "--dr", low=0, high=10)


@dataclass(kw_only=True)
class EmaConfig(Options):
    """Moving average of the weights."""

    model_ema: bool = option(False, "keep a moving average of the weights and evaluate it")
    model_ema_force_cpu: bool = option(False, "keep the average on the CPU and do not evaluate it")
    model_ema_decay: float = option(0.99996, "decay of the average", low=0, high=1)
    model_ema_warmup: bool = option(False, "let the decay grow in the first steps")


@dataclass(kw_only=True)
class RunConfig(Options):
    """Run."""

    train_split: str = option("train", "training split")
    val_split: str = option("validation", "validation split")
    train_num_samples: int | None = option(
        None, "images of the training split, for streamed data sets", low=1, high=2**63 - 1
    )
    val_num_samples: int | None = option(
        None, "images of the validation split, for streamed data sets", low=1, high=2**63 - 1
    )
    batch_size: int = option(64, "batch of one process", "-b", "--b", metavar="N", low=1)
    validation_batch_size_multiplier: int = option(1, "validation batch over training batch", "-vb", metavar="N", low=1)
    validation_batch_size: int | None = option(None, "validation batch of one process", metavar="N", low=1)
    seed: int = option(42, "seed", low=0, high=2**31)
    log_interval: int = option(50, "batches between lines in the log", metavar="N", low=1)
    recovery_interval: int = option(0, "batches between saves within an epoch, 0 for none", metavar="N", low=0)
    recovery_minutes: float = option(15.0, "minutes between saves within an epoch, 0 for none", metavar="N", low=0)
    checkpoint_hist: int = option(10, "best checkpoints to keep", metavar="N", low=1)
    on_save_error: str = option(
        "stop", "what to do when a checkpoint or a result cannot be written", choices=("stop", "continue")
    )
    save_images: bool = option(False, "save the first training batch of each log interval as an image")
    output: str = option("", "folder of all runs (default: output/train)", metavar="DIR")
    experiment: str = option("", "folder of this run (default: time, model and size)", metavar="NAME")
    eval_metric: str = option("top1", "metric that picks the best checkpoint", choices=("top1", "top5", "loss"))
    tta: int = option(0, "test-time augmentation: 2 averages an image and its mirror image", choices=(0, 1, 2))
    dist_backend: str | None = option(None, "torch.distributed backend (default: nccl on GPUs, gloo on CPUs)")
    dist_timeout: float = option(1800.0, "seconds to wait for another process that hangs", metavar="X", low=1)
    log_tensorboard: bool = option(False, "write TensorBoard files into the run's folder")
    log_wandb: bool = option(False, "log to Weights & Biases")
    wandb_project: str | None = option(None, "Weights & Biases project")


@dataclass(kw_only=True)
class TrainConfig(
    RunConfig,
    EmaConfig,
    ScheduleConfig,
    OptimizerConfig,
    TokenLabelConfig,
    DistillationConfig,
    RegularizationConfig,
    AugmentationConfig,
    LoaderConfig,
    InputConfig,
    StartConfig,
    PrecisionConfig,
    ModelConfig,
    DatasetConfig,
):
    """Everything a training run can be told."""

    # Of options that say the same thing, a flag replaces all that a recipe says.
    alternatives = (
        {"data", "data_dir"},
        {"img_size", "input_size"},
        {"lr", "lr_base"},
        {"drop_path", "drop_connect"},
        {"amp", "native_amp", "apex_amp"},
        {"finetune", "transfer_model", "initial_checkpoint"},
    )

    @staticmethod
    def defaults_of(given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that depend on what is given."""
        return PUBLISHED_DEFAULTS if given.get("token_label") else {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transfer_learning.lower() in ("false", "no", "none", "0"):  # a text in the published script
            self.transfer_learning = ""

    @property
    def eval_batch_size(self) -> int:
        """Validation batch of one process."""
        return self.validation_batch_size or self.batch_size * self.validation_batch_size_multiplier


@dataclass(kw_only=True)
class EvaluationConfig(LoaderConfig, InputConfig, PrecisionConfig, ModelConfig, DatasetConfig):
    """Evaluation."""

    alternatives = ({"data", "data_dir"}, {"img_size", "input_size"}, {"amp", "native_amp", "apex_amp"})

    batch_size: int = option(256, "batch size", "-b", metavar="N", low=1)
    workers: int = option(4, "loader processes", "-j", metavar="N", low=0)
    use_ema: bool | None = option(None, "use the averaged weights (default: where the checkpoint has them)")
    tf_preprocessing: bool = option(False, "TensorFlow's preprocessing, needs tensorflow")
    seed: int = option(42, "seed", low=0, high=2**31)


@dataclass(kw_only=True)
class ValidateConfig(EvaluationConfig):
    """Everything a validation can be told; what is not given comes from the checkpoint, then from the model."""

    model: str = option("", "model, or models by commas or pattern (default: what the checkpoint holds)", "-m")
    checkpoint: list[str] = option(
        [], "a checkpoint, a folder of a run, or a quoted glob pattern; may be repeated", metavar="PATH", append=True
    )
    split: str = option("validation", "split to validate on")
    num_samples: int | None = option(None, "images of the split, for streamed data sets", low=1, high=2**63 - 1)
    real_labels: str = option("", "ImageNet ReaL labels, any of which is right", metavar="FILE")
    test_set: str = option(
        "", "DATA is this test set of ImageNet models, with its own classes or labels", choices=("", *TEST_SETS)
    )
    valid_labels: str = option("", "only these class indices can be predicted, one a line", metavar="FILE")
    tta: int = option(0, "test-time augmentation: 2 averages an image and its mirror image", choices=(0, 1, 2))
    test_pool: bool = option(False, "pool at test time when the image is larger than in training, for CNNs")
    num_gpu: int = option(1, "GPUs to spread a batch over", metavar="N", low=1)
    log_freq: int = option(50, "batches between lines in the log", metavar="N", low=1)
    predictions: str = option("", "write what was predicted of each image, for vip report", metavar="FILE.npz")
    results_file: str = option("", "write the results to this file", metavar="FILE")
    results_format: str = option("", "its format (default: by its ending, else csv)", choices=("", "csv", "json"))


@dataclass(kw_only=True)
class GenerateConfig(EvaluationConfig):
    """Label maps by an annotator; what is not given comes from its checkpoint, then from the model."""

    token_label_root: str | None = option(None, "folder to write the label maps to", positional=True)
    model: str = option("", "annotator: any timm model with spatial features or tokens", "-m")
    checkpoint: str = option("", "its checkpoint, or the folder of a run", metavar="PATH")
    split: str = option("", "split to annotate (default: train/ of DATA where there is one, else DATA itself)")
    transfer: bool = option(False, "the images are of other classes than the annotator's: do not compare them")
    top_k: int = option(5, "classes to keep of each cell", metavar="N", low=1)
    format: str = option(
        "published", "a file an image, as published; or packed into a few", choices=("published", "packed")
    )
    log_freq: int = option(10, "batches between lines in the log", metavar="N", low=1)


# Published flags without a meaning today, with the placeholder of their value if they take one, and why.
TRAIN_FLAGS_WITHOUT_EFFECT = {
    "--local_rank N": "torchrun tells each process its rank in the environment",
    "--local-rank N": "torchrun tells each process its rank in the environment",
    "--split-bn": "timm's split BatchNorm has no counterpart in these training tasks",
    "--num-gpu N": "the number of processes decides, see distributed_train.sh",
    "--use-multi-epochs-loader": "loader processes are always kept between epochs",
    "--worker-seeding NAME": "torch seeds Python, NumPy and torch in every loader process",
    "--amp-impl NAME": "--amp is torch's own, --apex-amp is Apex's where it exists",
    "--fuser NAME": "torch picks the fuser of TorchScript models",
}
GENERATE_FLAGS_WITHOUT_EFFECT = {
    "--num-gpu N": "the number of processes decides, see distributed_train.sh",
    "--torchscript": "the annotator's features are read inside the model",
    "--legacy-jit": "torch has one TorchScript executor today",
}
VALIDATE_FLAGS_WITHOUT_EFFECT = {
    "--legacy-jit": "torch has one TorchScript executor today",
    "--fuser NAME": "torch picks the fuser of TorchScript models",
}
