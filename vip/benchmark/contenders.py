"""Models with a step to time: a forward pass, or one step of training as `vip train` takes it."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask

import vip
from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.counts import Counts, count
from vip.benchmark.measure import Step, free_memory, is_out_of_memory, one_line, peak_memory, synchronize
from vip.errors import UserError
from vip.models.inference import optimize_for_inference
from vip.training.config import TrainConfig
from vip.training.engine import TrainState, train_step
from vip.training.factory import (
    choose_attention,
    compile_task,
    create_criterion,
    create_model,
    create_optimizer,
    resolve_data_config,
)
from vip.training.runtime import setup_precision

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A model at an image size, its own if None, and a batch size.

    Attributes:
        form: Empty for the model as it is, 'textbook' as its paper spells it out, 'optimized' for inference.
        width: Factor of its channels.
    """

    model: str
    img_size: int | None
    batch_size: int
    form: str = ""
    width: float = 1.0


@dataclass
class Contender:
    """A case that is ready to take turns.

    Attributes:
        step: What is timed.
        counts: Size of the model and cost of an image.
        input_size: Channels, height and width of an image.
        batch_size: Images of a step; fewer than the case asks for where memory did not suffice.
        memory: Peak memory in bytes: weights, gradients, optimizer state and activations; None if unknown.
        first_seconds: Time of the first step, with compilation.
    """

    step: Step
    counts: Counts
    input_size: tuple[int, ...]
    batch_size: int
    memory: int | None
    first_seconds: float


def prepare(case: Case, phase: str, config: BenchmarkConfig, device: torch.device) -> Contender:
    """Create and warm up a model, with half the batch as often as memory does not suffice.

    Args:
        case: The model.
        phase: 'inference' or 'train'.
        config: Setting and warm-up.
        device: Device.

    Raises:
        UserError: If the model does not exist, not take the image size, or not fit with a batch of one.
    """
    batch_size = case.batch_size
    while True:
        try:
            return _prepare(case, batch_size, phase, config, device)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            reason = one_line(e)
        free_memory(device)  # out of the handler, as the exception held what the step had allocated
        if batch_size == 1:
            raise UserError(f"{case.model} does not fit into memory with a batch of one: {reason}")
        batch_size //= 2
        _logger.warning(f"{case.model}: out of memory in {phase}, trying a batch of {batch_size}.")


def _prepare(case: Case, batch_size: int, phase: str, config: BenchmarkConfig, device: torch.device) -> Contender:
    torch.manual_seed(config.seed)
    training = _training_config(case, config)
    model: Any = create_model(training, None)
    if case.width != 1:
        dims = tuple(round(stage["num_chs"] * case.width) for stage in model.feature_info)
        try:
            model = create_model(training, None, embed_dims=dims)
        except UserError as e:
            raise UserError(f"--width {case.width:g} is for a vip_* whose segments divide the new channels. {e}") from e
    input_size = tuple(resolve_data_config(model, training)["input_size"])
    counts = count(model, input_size)
    model = _in_form(model.to(device), case.form, config).to(device)  # compiled for where it is
    images = torch.randn(batch_size, *input_size, device=device)
    if config.channels_last:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    create = _inference_step if phase == "inference" else _training_step
    if case.form == "optimized" and config.torchcompile:
        config = dataclasses.replace(config, torchcompile=None)  # it is compiled already
    step, resident = create(model, images, config, training)

    start = time.perf_counter()
    step()
    synchronize(device)
    first_seconds = time.perf_counter() - start
    for _ in range(config.warmup - 1):
        step()
    peak = peak_memory(step, device)
    memory = None if peak is None else peak + sum(t.nbytes for t in resident())
    return Contender(step, counts, input_size, batch_size, memory, first_seconds)


def _in_form(model: Any, form: str, config: BenchmarkConfig) -> Any:
    if form == "textbook":
        return textbook(model)
    if form == "optimized":
        return optimize_for_inference(model, getattr(torch, config.precision), compiled=bool(config.torchcompile))
    return model


def textbook(model: torch.nn.Module) -> torch.nn.Module:
    """The model as its paper spells it out, by the code that the tests compare it with.

    Raises:
        UserError: Where there are no tests, as in an installed package.
    """
    folder = Path(vip.__file__).parents[1] / "tests"
    found = PathFinder.find_spec("textbook_model", [str(folder)])
    if found is None or found.loader is None:
        raise UserError(f"The textbook models are those of the tests, and there are none at {folder}: use a checkout.")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module.textbook(model)


def _training_config(case: Case, config: BenchmarkConfig) -> TrainConfig:
    return TrainConfig(
        model=case.model,
        img_size=case.img_size,
        opt=config.opt,
        no_kernels=config.no_kernels,
        drop_path=None,
        amp=config.precision != "float32",
        amp_dtype="bfloat16" if config.precision == "float32" else config.precision,
    )


def _inference_step(
    model: Any, images: torch.Tensor, config: BenchmarkConfig, training: TrainConfig
) -> tuple[Step, Callable[[], Iterable[torch.Tensor]]]:
    dtype = getattr(torch, config.precision)
    model, images = model.to(dtype).eval(), images.to(dtype)
    choose_attention(model, training, images.device, training=False)
    weights = [*model.parameters(), *model.buffers()]
    if config.torchcompile:
        model = torch.compile(model, backend=config.torchcompile, mode=config.torchcompile_mode)

    @torch.inference_mode()
    def step() -> None:
        model(images)

    return step, lambda: weights


def _training_step(
    model: Any, images: torch.Tensor, config: BenchmarkConfig, training: TrainConfig
) -> tuple[Step, Callable[[], Iterable[torch.Tensor]]]:
    choose_attention(model, training, images.device, training=True)
    optimizer = create_optimizer(training, model, len(images))
    # images are not mixed here, but their targets have the form that mixing gives them
    target = torch.rand(len(images), model.num_classes, device=images.device).softmax(-1)
    task = ClassificationTask(model, create_criterion(training), device=images.device, verbose=False)
    if config.torchcompile:
        compile_task(task, config)
    state = TrainState(task, optimizer, None, setup_precision(training, images.device))
    task.train()

    def step() -> None:
        train_step(state, training, images, target, share=1.0, update=True)

    def resident() -> list[torch.Tensor]:
        states = (value for values in optimizer.state.values() for value in values.values())
        return [*model.parameters(), *model.buffers(), *(s for s in states if isinstance(s, torch.Tensor))]

    return step, resident
