"""Options of the benchmark."""

from dataclasses import dataclass

from vip.options import Options, option

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class RowsConfig(Options):
    """Rows: every model at every image size and batch size."""

    models: list[str] = option([], "timm names or patterns, such as 'vip_*' (default: --table published)")
    table: str = option("", "a list of models: the comparison table as published", choices=("", "published"))
    suite: str = option(
        "",
        "performance: what is said of speed, measured (from a checkout); scale: growth, and what a training takes",
        choices=("", "performance", "scale"),
    )
    baseline: str = option("", "model that ratios refer to (default: vip_s7 if it is there, else the first)")
    img_size: list[int] = option([], "image sizes, several for a sweep (default: each model's own)", low=1)
    batch_size: list[int] = option([32], "batch sizes, several for a sweep", "-b", low=1)
    width: list[float] = option([1.0], "factors of the channels of a vip_*, several for a sweep", low=0.01, high=100)


@dataclass(kw_only=True)
class SettingConfig(Options):
    """Setting."""

    bench: str = option("both", "what to time", choices=("inference", "train", "both"))
    device: str | None = option(None, "device (default: cuda where there is one, else cpu)")
    precision: str = option(
        "float32",
        "precision: of weights and images in inference; of mixed precision, with float32 weights, in training",
        choices=PRECISIONS,
    )
    channels_last: bool = option(False, "channels-last memory layout")
    torchcompile: str | None = option(
        None, "compile the models, with this backend", const="inductor", metavar="BACKEND"
    )
    torchcompile_mode: str | None = option(None, "mode of torch.compile, such as max-autotune")
    memory_budget: float | None = option(
        None, "share of the activations' memory that a compiled training step may take", low=0, high=1
    )
    no_kernels: bool = option(False, "let torch compute what this package has GPU kernels for, as VIP_KERNELS=0 does")
    opt: str = option("adamw", "optimizer of the training step: any name timm knows")
    seed: int = option(42, "random seed of weights and images")


@dataclass(kw_only=True)
class TimingConfig(Options):
    """Timing."""

    rounds: int = option(5, "rounds, in each of which all models take a turn", low=1)
    seconds: float = option(1.0, "time of a turn (default of --suite on a GPU: 0.5)", low=0, high=3600)
    minutes: float | None = option(
        None, "time after which --suite performance begins nothing beside its targets (default: 6 on a GPU)", low=0
    )
    warmup: int = option(3, "steps of a model before anything is timed", low=1)

    @property
    def turns(self) -> str:
        """How long is timed, in words."""
        return f"{self.rounds} round{'' if self.rounds == 1 else 's'} of {self.seconds:g} s"


@dataclass(kw_only=True)
class OutputConfig(Options):
    """Results."""

    format: str = option("markdown", "what to print", choices=("markdown", "csv", "json"))
    out: str = option("", "file for the Markdown table of --suite", metavar="FILE")
    output: str = option("", "folder for the table in all formats and the plots (default: output/benchmark/<time>)")


@dataclass(kw_only=True)
class BenchmarkConfig(RowsConfig, SettingConfig, TimingConfig, OutputConfig):
    """Options of `vip benchmark`."""

    @property
    def setting(self) -> str:
        """What all rows have in common, in words."""
        words = [self.precision, self.turns]
        words += ["channels last"] if self.channels_last else []
        words += (
            [f"torch.compile ({self.torchcompile}, {self.torchcompile_mode or 'default'})"] if self.torchcompile else []
        )
        return ", ".join(words + ([f"training with {self.opt}"] if "train" in self.phases else []))

    @property
    def phases(self) -> tuple[str, ...]:
        """What is timed, of 'inference' and 'train'."""
        return ("inference", "train") if self.bench == "both" else (self.bench,)
