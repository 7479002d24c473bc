"""The performance suite: what is said of speed, measured in one run against what it is said to be faster than."""

import dataclasses
import logging
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import inf
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from statistics import median

import torch
from torch._inductor import config as inductor
from tqdm import tqdm

from vip import ops
from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.contenders import Case, Contender, prepare, textbook
from vip.benchmark.measure import Step, free_memory, matmul_step, one_line, synchronize, take_turns, time_shares
from vip.benchmark.pipeline import data_path_ratios, epoch_ratios
from vip.benchmark.runner import MATMUL, PRODUCTS
from vip.data.augmentation import import_fast_images
from vip.models.vision_permutator import PermuteMlp
from vip.training.runtime import allow_fast_kernels, available_cores

_logger = logging.getLogger(__name__)

# tokens along an axis, channels and their segments, of vip_s7, of vip_m7 and vip_l7, and of vip_s14 too
LAYERS = ((32, 192, 32), (16, 384, 16), (32, 256, 32), (16, 512, 16))
MEMORY_BUDGET = 0.6  # what makes room for larger batches, and not speed; lower ones spare little more
MODELS = ("vip_m7", "vip_l7", "vip_s14", "lvvit_s")  # reported beside vip_s7
_LEFT_OUT = "left out: the time was over (--minutes sets more)"
_NO_KERNELS = "they are off, or not for this device, or not for so few images"
_AHEAD_SECONDS = 150  # what other processes have not compiled by then is compiled where it is measured
_MEMORY_OF_A_JOB = 45_000_000_000  # about what a training step of vip_l7 takes of a GPU at a batch of 256


@dataclass(frozen=True)
class Entry:
    """A way to run a model that takes turns with others."""

    model: str = "vip_s7"
    form: str = ""
    compiled: bool = False
    precision: str = "bfloat16"
    memory_budget: float | None = None

    def __str__(self) -> str:
        words = [self.form, self.model, self.precision, "compiled" if self.compiled else "eager"]
        words += [] if self.memory_budget is None else [f"(memory budget {self.memory_budget:g})"]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Finding:
    """A row of the table of targets.

    Attributes:
        what: What is compared, and in which setting.
        ratios: Of each round; empty where it could not be measured.
        target: What the median is to reach, None for a row that is reported beside.
        at_most: It is to stay below, and not to reach it.
        remark: What else there is to say, such as why it could not be measured.
        failed: It could not be measured because something failed.
    """

    what: str
    ratios: list[float]
    target: float | None = None
    at_most: bool = False
    remark: str = ""
    failed: bool = False

    @property
    def verdict(self) -> str:
        """'yes', 'no', or '-' where nothing was measured or is to be reached."""
        if not self.ratios or self.target is None:
            return "-"
        found = median(self.ratios)
        return "yes" if (found <= self.target if self.at_most else found >= self.target) else "no"


@dataclass(frozen=True)
class Part:
    """What is measured at once.

    Attributes:
        name: What it is called where it fails or is left out.
        find: Measures it.
        jobs: Entries and phases that it has to be compiled for.
    """

    name: str
    find: Callable[[BenchmarkConfig, torch.device], list[Finding]]
    jobs: tuple[tuple[Entry, str], ...] = ()


def check_suite() -> None:
    """Refuse to measure where something that the suite needs is missing.

    Raises:
        UserError: If the textbook models or libraries are not there.
    """
    textbook(torch.nn.Identity())
    import_fast_images()


def target_parts(device: torch.device) -> list[Part]:
    """What `vip_s7` and what surrounds it are to reach on a device."""
    gpu = device.type == "cuda"
    return [
        Part("inference", _on_gpu if gpu else _on_cpu, _jobs(_inference_on_gpu(), "inference") if gpu else ()),
        Part("training step", _training, _jobs(_training_entries(device), "train")),
        Part("training step in less memory", _lean_training, _jobs(_lean_entries(device), "train")),
        Part("time of an epoch", _epoch),
        Part("training data path", _data_path),
    ]


def beside_parts(device: torch.device) -> list[Part]:
    """What is reported beside: kernels by themselves, and the other models."""
    kernels: list[Part] = []
    if device.type == "cuda":
        kernels = [Part(f"kernels, {_named(layer)}", partial(kernel_findings, layer)) for layer in LAYERS]
        kernels.append(Part("kernels, small batch", small_batch_findings))
    return [*_others(False, device), *kernels, *_others(True, device)]


def _others(compiled: bool, device: torch.device) -> Iterator[Part]:
    for model, phase in product(MODELS, PRODUCTS):
        jobs = _jobs(_other_entries(model, phase, compiled, device), phase)
        yield Part(f"{_phase(phase, compiled)}, {model}", partial(_other, model, phase, compiled), jobs)


def _jobs(entries: Iterable[Entry], phase: str) -> tuple[tuple[Entry, str], ...]:
    return tuple((entry, phase) for entry in entries if entry.compiled)


def compile_ahead(
    jobs: list[tuple[Entry, str]], config: BenchmarkConfig, device: torch.device, until: float = inf
) -> None:
    """Let other processes compile, side by side, what this one then finds in torch's cache on disk.

    What fails there fails here, too, and is told both times. As with all processes that are spawned, the script that is
    run has to be one that can be imported.

    Args:
        jobs: Entries and phases.
        config: Batch size of the models, the first of `batch_size`.
        device: Device of the models.
        until: Time, as `time.monotonic` tells it, at which they are stopped.
    """
    cores, room = available_cores(), len(jobs)
    if device.type == "cuda":
        room = max(2, torch.cuda.get_device_properties(device).total_memory // _MEMORY_OF_A_JOB)
    at_once = min(len(jobs), cores // 2, room)
    if at_once < 2:
        return
    context, waiting = multiprocessing.get_context("spawn"), list(jobs)
    running: list[SpawnProcess] = []
    end = min(until, time.monotonic() + _AHEAD_SECONDS)
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < at_once:
            arguments = (*waiting.pop(0), config, device, cores // at_once)
            running.append(context.Process(target=_compile, args=arguments, daemon=True))
            running[-1].start()
        wait([process.sentinel for process in running], max(0.0, end - time.monotonic()))
        running = [process for process in running if process.is_alive()]
    for process in running:
        process.terminate()
        process.join()


def _compile(entry: Entry, phase: str, config: BenchmarkConfig, device: torch.device, threads: int) -> None:
    inductor.compile_threads = threads
    allow_fast_kernels()  # as the command does, and what is compiled depends on
    try:
        if device.index is not None:
            torch.cuda.set_device(device)
        _prepare(entry, phase, config.batch_size[0], dataclasses.replace(config, warmup=1), device)
    except Exception as e:  # of whatever kind, the suite goes on, and has it as an error where it measures this
        _logger.warning(f"{entry} is not compiled ahead: {one_line(e)}")


def run_parts(
    parts: Iterable[Part],
    config: BenchmarkConfig,
    device: torch.device,
    on_findings: Callable[[list[Finding]], object],
    until: float = inf,
) -> list[Finding]:
    """Measure part by part; what fails is a finding with a remark.

    Args:
        parts: The parts.
        config: Rounds, seconds and warm-up; batch size of the models, the first of `batch_size`.
        device: Device of the models.
        on_findings: Called after each part with all that was found so far.
        until: Time, as `time.monotonic` tells it, from which on no part is begun.

    Returns:
        What was found.
    """
    findings: list[Finding] = []
    parts = list(parts)
    jobs = [job for part in parts for job in part.jobs]
    for part in tqdm(parts, "Suite", leave=False, disable=None):
        if part.jobs and jobs and device.type == "cuda":  # what is packed for a CPU is not kept on disk
            ahead, jobs = jobs, []
            try:
                compile_ahead(ahead, config, device, (time.monotonic() + until) / 2)  # the other half is to measure
            except Exception as e:  # without it, all is compiled where it is measured
                _logger.warning(f"Nothing is compiled ahead: {one_line(e)}")
        begin = time.monotonic()
        if begin >= until:
            findings.append(Finding(part.name, [], remark=_LEFT_OUT))
            continue
        try:
            free_memory(device)  # raises where a kernel has left a GPU unusable
            found = part.find(config, device)
        except Exception as e:  # one part may fail in a way of its own, and the others are worth having
            found = [Finding(part.name, [], remark=one_line(e), failed=True)]
        for finding in found:
            if finding.failed:
                _logger.warning(f"{finding.what}: {finding.remark}")
        findings += found
        on_findings(findings)
        _logger.info(f"{part.name}: {time.monotonic() - begin:.0f} s.")
    return findings


@dataclass
class Group:
    """Entries that took turns.

    Attributes:
        batch_size: Images of a step that were asked for.
        batch_sizes: Images of a step, by entry, fewer where memory did not suffice.
        seconds: Of an image, by entry, in each round.
        memory: Peak memory of a step in bytes, by entry.
        share: Share of the rate of a large matrix product, by entry, in each round.
        errors: Why an entry could not be measured, by entry; it is in none of the others.
    """

    batch_size: int
    batch_sizes: dict[Entry, int] = field(default_factory=dict)
    seconds: dict[Entry, list[float]] = field(default_factory=dict)
    memory: dict[Entry, int | None] = field(default_factory=dict)
    share: dict[Entry, list[float]] = field(default_factory=dict)
    errors: dict[Entry, str] = field(default_factory=dict)

    def faster(self, what: str, own: Entry, other: Entry, target: float | None = None) -> Finding:
        """How much faster an entry is than another."""
        what = f"{what}: {own} against {other}"
        if failure := self._failure(what, target, own, other):
            return failure
        ratios = [b / a for a, b in zip(self.seconds[own], self.seconds[other], strict=True)]
        speeds = [1 / median(self.seconds[entry]) for entry in (own, other)]
        taken = " and ".join(f"{speed:{',.0f' if speed >= 100 else '.3g'}}" for speed in speeds)
        return Finding(what, ratios, target, remark=f"{taken} img/s{self._batches(own, other)}")

    def share_of_product(self, what: str, own: Entry, target: float) -> Finding:
        """The share of the rate of a large matrix product that an entry reaches."""
        what = f"{what}: {own}, share of the matrix product"
        return self._failure(what, target, own) or Finding(what, self.share[own], target)

    def memory_share(self, what: str, own: Entry, other: Entry, limit: float | None = None) -> list[Finding]:
        """The peak memory of an entry over another's, where the device tells."""
        what = f"{what}: peak memory, {own} against {other}"
        if failure := self._failure(what, limit, own, other):
            return [dataclasses.replace(failure, at_most=True)]
        taken, theirs = self.memory[own], self.memory[other]
        if not taken or not theirs:
            return []
        batches = self._batches(own, other)
        remark = f"{taken / 1e9:.2f} and {theirs / 1e9:.2f} GB{batches}"
        # of batches that differ it says nothing about the limit
        return [Finding(what, [taken / theirs], None if batches else limit, True, remark)]

    def _failure(self, what: str, target: float | None, *entries: Entry) -> Finding | None:
        failed = [f"{entry}: {self.errors[entry]}" for entry in entries if entry in self.errors]
        return Finding(what, [], target, remark="; ".join(failed), failed=True) if failed else None

    def _batches(self, own: Entry, other: Entry) -> str:
        sizes = [self.batch_sizes[entry] for entry in (own, other)]
        return "" if sizes == [self.batch_size] * 2 else f", batches of {sizes[0]} and {sizes[1]}"


def measure(
    entries: Iterable[Entry], phase: str, batch_size: int, config: BenchmarkConfig, device: torch.device
) -> Group:
    """Let entries take turns.

    Args:
        entries: Those entries.
        phase: 'inference' or 'train'.
        batch_size: Images of a step.
        config: Rounds, seconds, warm-up.
        device: Device.
    """
    torch._dynamo.reset()  # torch would run what it has compiled for one memory budget for another, too
    group = Group(batch_size)
    contenders: dict[Entry, Contender] = {}
    for entry in entries:
        try:
            free_memory(device)  # of one that failed, which its exception held
            contenders[entry] = _prepare(entry, phase, batch_size, config, device)
        except Exception as e:  # one may fail in a way of its own, and the others are worth having
            group.errors[entry] = one_line(e)
    products = {
        precision: matmul_step(getattr(torch, precision), device) for precision in {e.precision for e in contenders}
    }
    steps: dict[Hashable, Step] = {(MATMUL, precision): step for precision, (step, _) in products.items()}
    steps.update((entry, contender.step) for entry, contender in contenders.items())
    turns = take_turns(steps, config.rounds, config.seconds, device)
    for entry, contender in contenders.items():
        of_product = turns[MATMUL, entry.precision]
        if error := turns[entry].error or of_product.error:
            group.errors[entry] = error
            continue
        group.seconds[entry] = [seconds / contender.batch_size for seconds in turns[entry].seconds]
        group.memory[entry] = contender.memory
        group.batch_sizes[entry] = contender.batch_size
        macs, work = contender.counts.macs * PRODUCTS[phase], products[entry.precision][1]
        pairs = zip(group.seconds[entry], of_product.seconds, strict=True)
        group.share[entry] = [macs / own / (work / product) for own, product in pairs]
    return group


def _prepare(entry: Entry, phase: str, batch_size: int, config: BenchmarkConfig, device: torch.device) -> Contender:
    config = dataclasses.replace(
        config,
        precision=entry.precision,
        torchcompile="inductor" if entry.compiled else None,
        memory_budget=entry.memory_budget,
    )
    contender = prepare(Case(entry.model, None, batch_size, entry.form), phase, config, device)
    synchronize(device)
    return contender


def _inference_on_gpu() -> tuple[Entry, ...]:
    """The textbook, the model as it is, the textbook compiled, the model at its best, and its rival."""
    return (
        Entry(form="textbook"),
        Entry(),
        Entry(form="textbook", compiled=True),
        Entry(form="optimized", compiled=True),
        Entry("resmlp_24_224", compiled=True),
    )


def _on_gpu(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    batch, entries = config.batch_size[0], _inference_on_gpu()
    book, own, book_compiled, best, rival = entries
    group = measure(entries, "inference", batch, config, device)
    what = f"inference, batch {batch}"
    return [
        group.faster(what, best, book, 2.5),
        group.faster(what, best, book_compiled, 1.4),
        group.faster(what, best, rival, 1.0),
        group.share_of_product(what, best, 0.45),
        group.faster(what, own, book),
    ]


def _on_cpu(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    batch = config.batch_size[0]
    book, own = Entry(form="textbook", precision="float32"), Entry(precision="float32")
    compiled = Entry(form="optimized", compiled=True, precision="float32")
    entries = [book, own, compiled]
    bfloat16 = Entry(form="optimized", compiled=True)
    if torch.cpu._is_avx512_bf16_supported():
        entries.append(bfloat16)
    group = measure(entries, "inference", batch, config, device)
    what = f"inference, batch {batch}"
    findings = [group.faster(what, own, book, 1.0), group.faster(what, compiled, book, 1.25)]
    if bfloat16 in entries:
        findings.append(group.faster(what, bfloat16, book, 2.0))
    return findings


def _training_entries(device: torch.device) -> tuple[Entry, ...]:
    """The textbook, the model as it is, and both compiled."""
    own = Entry(precision="bfloat16" if device.type == "cuda" else "float32")
    book = dataclasses.replace(own, form="textbook")
    return book, own, dataclasses.replace(book, compiled=True), dataclasses.replace(own, compiled=True)


def _training(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    batch, entries = config.batch_size[0], _training_entries(device)
    book, own, book_compiled, best = entries
    group = measure(entries, "train", batch, config, device)
    what, targets = f"training step, batch {batch}", (2.0, 1.3) if device.type == "cuda" else (None, None)
    return [
        group.faster(what, best, book, targets[0]),
        group.faster(what, best, book_compiled, targets[1]),
        group.faster(what, own, book),
        *(row for entry in (best, book_compiled, own) for row in group.memory_share(what, entry, book)),
    ]


def _lean_entries(device: torch.device) -> tuple[Entry, Entry]:
    book, *_, best = _training_entries(device)
    return book, dataclasses.replace(best, memory_budget=MEMORY_BUDGET)


def _lean_training(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    """A group of its own: of two memory budgets for the same model, torch.compile would use the first for both."""
    batch, entries = config.batch_size[0], _lean_entries(device)
    book, lean = entries
    group = measure(entries, "train", batch, config, device)
    what, limit = f"training step, batch {batch}", 0.6 if device.type == "cuda" else None
    return [group.faster(what, lean, book), *group.memory_share(what, lean, book, limit)]


def kernel_findings(layer: tuple[int, int, int], config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    """Inference of a Permute-MLP by the kernels of `vip.ops` against torch.

    Args:
        layer: Tokens along an axis, channels and their segments.
        config: Rounds, seconds and batch size.
        device: Device.
    """
    length, dim, segments = layer
    # four batches where the kernels take as much: one product is done before Python has started the next
    batch = min(4 * config.batch_size[0], ops.MOST_ELEMENTS // (length**2 * dim))
    what = f"{_named(layer)}, bfloat16, batch {batch}: kernels against torch"
    x = torch.randn(batch, length, length, dim, device=device, dtype=torch.bfloat16)
    if not ops.use_kernels(x.unflatten(3, (segments, -1))):
        return [Finding(what, [], remark=_NO_KERNELS)]
    mlp = PermuteMlp(dim, segments, (length, length), device=device, dtype=torch.bfloat16)
    own, other = _with_kernels_and_without(partial(_infer, mlp, x), config, device)
    flops = 4 * x.numel() * (length * dim // segments + dim)
    remark = f"{median(own) * 1e6:,.0f} and {median(other) * 1e6:,.0f} us; {flops / median(own) / 1e12:,.0f} TFLOP/s"
    return [Finding(what, [b / a for a, b in zip(own, other, strict=True)], 1.0, remark=remark)]


def small_batch_findings(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    """The smallest batch of which the kernels mix every block in eager mode, where Python may be what is slow."""
    least = [-(-ops.LEAST_IN_EAGER // (length**2 * dim)) for length, dim, _ in LAYERS[:2]]
    entry = Entry()
    what = f"inference, batch {max(least)}: {entry}, kernels against torch"
    x = torch.empty(ops.LEAST_IN_EAGER // 2, 1, 1, 1, 2, device=device, dtype=torch.bfloat16)
    if not ops.use_kernels(x):
        return [Finding(what, [], remark=_NO_KERNELS)]
    own, other = _with_kernels_and_without(
        _prepare(entry, "inference", max(least), config, device).step, config, device
    )
    return [Finding(what, [b / a for a, b in zip(own, other, strict=True)], 1.0)]


def _with_kernels_and_without(
    step: Step, config: BenchmarkConfig, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of a step in each round."""
    steps: dict[Hashable, Step] = {on: partial(_with_kernels, on, step) for on in (True, False)}
    for run in steps.values():
        run()  # compiles
    turns = take_turns(steps, config.rounds, config.seconds / 10, device)
    if errors := [turn.error for turn in turns.values() if turn.error]:
        raise RuntimeError(errors[0])
    return turns[True].seconds, turns[False].seconds


def _named(layer: tuple[int, int, int]) -> str:
    length, dim, segments = layer
    return f"{length}x{length} tokens, {segments} segments of {dim // segments}"


def _with_kernels(on: bool, step: Step) -> None:
    ops.set_kernels(on)
    try:
        step()
    finally:
        ops.set_kernels(None)


def _infer(mlp: PermuteMlp, x: torch.Tensor) -> None:
    with torch.inference_mode():
        mlp(x)


def _other_entries(model: str, phase: str, compiled: bool, device: torch.device) -> tuple[Entry, Entry]:
    book = Entry(model, "textbook", compiled, "bfloat16" if device.type == "cuda" else "float32")
    return dataclasses.replace(book, form="optimized" if compiled and phase == "inference" else ""), book


def _other(model: str, phase: str, compiled: bool, config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    """None of the other models may be slower than as its paper spells it out, or take more memory."""
    batch, entries = config.batch_size[0], _other_entries(model, phase, compiled, device)
    own, book = entries
    if device.type == "cuda":  # where there is more to measure
        config = dataclasses.replace(config, rounds=min(config.rounds, 3), seconds=config.seconds / 2)
    group = measure(entries, phase, batch, config, device)
    what = f"{_phase(phase)}, batch {batch}"
    memory = group.memory_share(what, own, book) if phase == "train" else []
    return [group.faster(what, own, book, 1.0), *memory]


def _phase(phase: str, compiled: bool = False) -> str:
    return ("training step" if phase == "train" else phase) + (", compiled" if compiled else "")


def where_time_goes(config: BenchmarkConfig, device: torch.device) -> dict[str, dict[str, float] | str]:
    """Shares of the time of a step by kind of operation, for the models whose paths differ; why not, where it fails.

    Args:
        config: Batch size, the first of `batch_size`, and warm-up.
        device: Device of the models.
    """
    precision = "bfloat16" if device.type == "cuda" else "float32"
    entries = [Entry(form="textbook", precision=precision), Entry(precision=precision)]
    entries.append(Entry("resmlp_24_224", precision=precision))
    shares: dict[str, dict[str, float] | str] = {}
    for phase, entry in product(PRODUCTS, entries):
        name = f"{_phase(phase)}: {entry}"
        try:
            free_memory(device)
            shares[name] = time_shares(_prepare(entry, phase, config.batch_size[0], config, device).step, device)
        except Exception as e:  # a profiler may fail in a way of its own, and the others are worth having
            shares[name] = one_line(e)
    return shares


def _data_path(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    """The training data path of one core."""
    ratios, remark = data_path_ratios(config.rounds)
    what = "training data path, one core, 500x375 JPEGs, published recipe: --fast-images against timm's loader"
    return [Finding(what, ratios, 1.5, remark=remark)]


def _epoch(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
    """An epoch of `distributed_train.sh` against its steps alone."""
    ratios, remark = epoch_ratios(device, config)
    what = "time of an epoch of distributed_train.sh, eager, against its steps alone, plain images"
    return [Finding(what, ratios, 1.03, at_most=True, remark=remark)]
