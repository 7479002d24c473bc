"""The performance suite: its findings by hand-made turns, and a whole run of small models."""

import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from textbook_model import TextbookPermuteMlp
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from training_command import Outcome

from vip import ops
from vip.benchmark import contenders, pipeline, suite
from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.contenders import Case
from vip.benchmark.suite import Entry, Finding, Group, measure
from vip.cli import benchmark as cli
from vip.errors import UserError
from vip.models.vision_permutator import PermuteMlp
from vip.reporting.benchmarks import findings_table, shares_table
from vip.training.runtime import allow_fast_kernels

CPU = torch.device("cpu")
QUICK = BenchmarkConfig(rounds=2, seconds=0.0, warmup=1, batch_size=[2])


@pytest.mark.parametrize("name", ["vip_nano4_32", "lvvit_t"])
def test_textbook_form_computes_the_same(name: str) -> None:
    size = {"lvvit_t": dict(img_size=32, depth=2)}.get(name, {})
    model = timm.create_model(name, **size).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    book = contenders.textbook(model)
    torch.testing.assert_close(book(x), expected, rtol=1e-10, atol=1e-12)
    kinds = {type(module).__name__ for module in book.modules()}
    assert (TextbookPermuteMlp.__name__ in kinds) == (name == "vip_nano4_32")
    assert not any(type(module) is PermuteMlp or getattr(module, "fused_attn", False) for module in book.modules())
    tokens: list[torch.Tensor] = []
    book.patch_embed.register_forward_hook(lambda *call: tokens.append(call[-1]))
    book(x)
    assert tokens[0].permute(0, 3, 1, 2).is_contiguous()  # as images come


def test_textbook_form_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.vip, "__file__", str(tmp_path / "vip/__init__.py"))
    with pytest.raises(UserError, match="use a checkout"):
        contenders.textbook(torch.nn.Identity())


def test_ratios_are_of_the_same_round() -> None:
    own, other = Entry(), Entry(form="textbook")
    group = Group(2, {own: 2, other: 2}, {own: [1.0, 2.0, 4.0], other: [3.0, 4.0, 12.0]})
    finding = group.faster("inference", own, other, 2.5)
    assert finding.ratios == [3.0, 2.0, 3.0] and finding.verdict == "yes"
    assert "textbook vip_s7 bfloat16 eager" in finding.what


@pytest.mark.parametrize(
    ("finding", "verdict"),
    [
        (Finding("a", [1.0, 2.0, 3.0], 2.0), "yes"),
        (Finding("a", [1.0, 2.0, 3.0], 2.1), "no"),
        (Finding("a", [0.5], 0.6, at_most=True), "yes"),
        (Finding("a", [0.7], 0.6, at_most=True), "no"),
        (Finding("a", [], 0.6), "-"),
        (Finding("a", [1.0]), "-"),
    ],
)
def test_verdicts(finding: Finding, verdict: str) -> None:
    assert finding.verdict == verdict
    row = findings_table([finding], {"cpu": "x"}, "1 round").splitlines()[2]
    assert f"| {verdict} |" in row and ("not measured" in row) == (not finding.ratios)


def test_entries_take_turns_and_are_compared_with_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(64, 64)
    monkeypatch.setattr(suite, "matmul_step", lambda dtype, device: (lambda: a @ a, 64**3))
    entries = [Entry("vip_nano4_32", form, precision="float32") for form in ("", "textbook", "optimized")]
    group = measure(entries, "inference", 2, QUICK, CPU)
    assert all(len(group.seconds[entry]) == len(group.share[entry]) == 2 for entry in entries)
    assert all(0 < group.share[entry][0] < 100 and (group.memory[entry] or 0) > 0 for entry in entries)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, not compiled, in the place of each of the suite's."""
    prepare = suite.prepare

    def small(case: Case, phase: str, config: BenchmarkConfig, device: torch.device) -> Any:
        config = dataclasses.replace(config, torchcompile=None)
        return prepare(dataclasses.replace(case, model="vip_nano4_32"), phase, config, device)

    monkeypatch.setattr(suite, "prepare", small)


def test_rows_of_a_gpu(small_models: None) -> None:
    """What is compared there, on a CPU, for which it has no targets."""
    findings = suite._on_gpu(QUICK, CPU)
    assert [finding.target for finding in findings] == [2.5, 1.4, 1.0, 0.45, None]
    assert all(len(finding.ratios) == 2 for finding in findings)
    assert "optimized vip_s7 bfloat16 compiled against textbook vip_s7 bfloat16 eager" in findings[0].what


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with small models, compiled as the large ones are."""
    prepare, model = suite.prepare, "vip_nano4_32"
    monkeypatch.setattr(suite, "prepare", lambda case, *rest: prepare(dataclasses.replace(case, model=model), *rest))
    gpu = torch.device("cuda")
    compiled = partial(suite._other, "vip_s14", "inference", True)
    layer = partial(suite.kernel_findings, (64, 384, 16))  # so large that eager mode has kernels for a few images
    for part in (suite._on_gpu, suite._training, suite._lean_training, compiled, layer, suite.small_batch_findings):
        assert all(finding.ratios for finding in part(QUICK, gpu))
    for shares in suite.where_time_goes(QUICK, gpu).values():
        assert isinstance(shares, dict) and shares["matrix products"] > 0 and sum(shares.values()) == pytest.approx(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_epochs_on_a_gpu() -> None:
    ratios, _ = pipeline.epoch_ratios(torch.device("cuda"), QUICK, "vip_nano4_32")
    assert len(ratios) == 2 and all(0.5 < ratio < 20 for ratio in ratios)


def test_models_are_compiled_for_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []

    def look(model: torch.nn.Module, *args: Any, compiled: bool) -> torch.nn.Module:
        seen.extend({weight.device for weight in model.parameters()})
        return model

    monkeypatch.setattr(contenders, "optimize_for_inference", look)
    case = Case("vip_nano4_32", None, 1, form="optimized")
    with pytest.raises(RuntimeError, match="meta"):  # it cannot be waited for
        contenders._prepare(case, 1, "inference", QUICK, torch.device("meta"))
    assert seen == [torch.device("meta")]


def test_what_is_compiled_is_compiled_ahead_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a run of parts compiles, before the first of them that does."""
    done: list[Any] = []
    monkeypatch.setattr(suite, "compile_ahead", lambda jobs, *args: done.append(jobs))
    inference, training = (Entry(compiled=True), "inference"), (Entry(compiled=True), "train")
    parts = [
        suite.Part("a", lambda *args: done.append("a") or []),
        suite.Part("b", lambda *args: done.append("b") or [], (inference,)),
        suite.Part("c", lambda *args: done.append("c") or [], (training,)),
    ]
    suite.run_parts(parts, QUICK, torch.device("cuda"), lambda findings: None)
    assert done == ["a", [inference, training], "b", "c"]
    suite.run_parts(parts, QUICK, CPU, lambda findings: None)
    assert done[4:] == ["a", "b", "c"]
    compiled = {str(job[0]) for part in suite.target_parts(torch.device("cuda")) for job in part.jobs}
    assert compiled == {
        *("textbook vip_s7 bfloat16 compiled", "optimized vip_s7 bfloat16 compiled", "vip_s7 bfloat16 compiled"),
        *("resmlp_24_224 bfloat16 compiled", "vip_s7 bfloat16 compiled (memory budget 0.6)"),
    }


@pytest.mark.slow
def test_what_was_compiled_ahead_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By other processes, one of which fails; and not compiled again here."""
    monkeypatch.setattr(suite, "available_cores", lambda: 4)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    job = Entry("vip_nano4_32", compiled=True, precision="float32"), "inference"
    failing = Entry("vip_nano4_32", form="nonsense", precision="nonsense"), "inference"
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    allow_fast_kernels()  # as the command does
    begin = time.monotonic()
    suite.compile_ahead([job, failing], QUICK, CPU)
    assert time.monotonic() - begin < suite._AHEAD_SECONDS
    counters["inductor"].clear()
    group = measure([job[0]], "inference", 2, QUICK, CPU)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    assert not group.errors
    found = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
    assert found == (1, 0)


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_what_is_compiled_ahead_is_so_on_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    current: list[Any] = []

    def prepare(*args: Any) -> None:
        current.append(args[-1])
        raise RuntimeError("no GPU")

    monkeypatch.setattr(suite, "allow_fast_kernels", lambda: None)
    monkeypatch.setattr(suite, "_prepare", prepare)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    suite._compile(Entry(compiled=True), "train", QUICK, torch.device(name), inductor.compile_threads)
    assert current == [torch.device(name)] * (2 if name == "cuda:1" else 1), "without a number it is the current one"
    assert "vip_s7 bfloat16 compiled is not compiled ahead: no GPU" in caplog.text


def end_at_once(*args: Any) -> None:
    os._exit(1)


def sleep_long(*args: Any) -> None:
    time.sleep(600)


@pytest.mark.parametrize(("job", "limit", "least"), [(end_at_once, 60.0, 0.0), (sleep_long, 3.0, 3.0)])
def test_processes_that_die_or_hang(
    job: Callable[..., None], limit: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not waited for beyond the limit, and none is left."""
    monkeypatch.setattr(suite, "available_cores", lambda: 4)
    monkeypatch.setattr(suite, "_compile", job)
    monkeypatch.setattr(suite, "_AHEAD_SECONDS", limit)
    begin = time.monotonic()
    suite.compile_ahead(3 * [(Entry(compiled=True), "train")], QUICK, CPU)
    assert least <= time.monotonic() - begin < 50 and not multiprocessing.active_children()


def test_nothing_is_lost_where_nothing_can_be_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(suite, "compile_ahead", fail)
    finding = Finding("a", [1.0])
    part = suite.Part("a", lambda *args: [finding], ((Entry(compiled=True), "train"),))
    assert suite.run_parts([part, part], QUICK, torch.device("cuda"), lambda findings: None) == [finding, finding]
    assert caplog.text.count("Nothing is compiled ahead: no more processes") == 1


def test_what_is_compiled_ahead_leaves_half_the_time_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[float] = []
    monkeypatch.setattr(suite, "compile_ahead", lambda jobs, config, device, until: ends.append(until))
    job = Entry(compiled=True), "train"
    now = time.monotonic()
    parts = [suite.Part("a", lambda *args: [Finding("a", [1.0])], (job,))]
    assert suite.run_parts(parts, QUICK, torch.device("cuda"), print, now + 100)[0].ratios
    assert suite.run_parts(parts, QUICK, torch.device("cuda"), print, now)[0].remark == suite._LEFT_OUT
    assert ends[0] == pytest.approx(now + 50, abs=10) and ends[1] < time.monotonic(), "no time, nothing compiled"


def test_a_batch_that_was_halved_is_told() -> None:
    own, other = Entry(), Entry(form="textbook")
    group = Group(4, {own: 4, other: 2}, {own: [1.0], other: [2.0]})
    assert group.faster("speed", own, other).remark == "1 and 0.5 img/s, batches of 4 and 2"
    group.batch_sizes[other] = 4
    assert group.faster("speed", own, other).remark == "1 and 0.5 img/s"


def test_one_that_fails_is_a_row_of_its_own(small_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = suite.prepare

    def fail(case: Case, *args: Any) -> Any:
        if case.model == "resmlp_24_224":
            raise RuntimeError("no compiler")
        contender = prepare(case, *args)
        if case.form == "optimized":
            contender.step = lambda: 1 / 0
        return contender

    monkeypatch.setattr(suite, "prepare", fail)
    against_book, against_compiled, against_rival, share, eager = suite._on_gpu(QUICK, CPU)
    assert len(eager.ratios) == 2 and not eager.failed
    for finding in (against_book, against_compiled, against_rival, share):
        assert finding.failed and finding.target and not finding.ratios and "division by zero" in finding.remark
    assert against_rival.remark.endswith("resmlp_24_224 bfloat16 compiled: no compiler")


def test_peak_memory_of_one_that_fails() -> None:
    own, other = Entry(), Entry(form="textbook")
    group = Group(4, errors={own: "no room"}, memory={other: 4})
    (finding,) = group.memory_share("step", own, other, 0.6)
    assert finding.failed and finding.at_most and finding.target == 0.6 and "no room" in finding.remark
    group = Group(4, memory={own: 3, other: 4})
    group.batch_sizes = {own: 4, other: 4}
    (finding,) = group.memory_share("step", own, other, 0.6)
    assert finding.ratios == [0.75] and finding.verdict == "no" and finding.at_most
    group.batch_sizes[own] = 2
    (finding,) = group.memory_share("step", own, other, 0.6)
    assert finding.verdict == "-" and finding.remark.endswith("batches of 2 and 4")
    assert not Group(4, memory={own: None, other: None}).memory_share("step", own, other), (
        "of a device that does not tell"
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("phase", suite.PRODUCTS)
def test_rows_of_other_models(phase: str, compiled: bool, small_models: None) -> None:
    speed, *memory = suite._other("vip_l7", phase, compiled, QUICK, CPU)
    assert len(speed.ratios) == 2 and speed.target == 1 and len(memory) == (phase == "train")
    own = ("optimized " if compiled and phase == "inference" else "") + "vip_l7 float32 "
    own += "compiled" if compiled else "eager"
    assert f": {own} against textbook vip_l7 float32 {own.split()[-1]}" in speed.what


def test_rows_of_training(small_models: None) -> None:
    findings, lean = suite._training(QUICK, CPU), suite._lean_training(QUICK, CPU)
    assert len(findings) == 6 and len(lean) == 2
    assert all(finding.ratios and finding.target is None for finding in findings + lean)
    assert "peak memory" in lean[1].what and "peak memory" not in lean[0].what
    for finding in lean:
        assert "vip_s7 float32 compiled (memory budget 0.6) against textbook vip_s7 float32 eager" in finding.what


def test_kernels_are_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, used = (4, 12, 3), []
    assert not suite.kernel_findings(layer, QUICK, CPU)[0].ratios, "torch is not compared with itself"
    monkeypatch.setattr(ops, "use_kernels", lambda x: used.append(ops._enabled) or ops._enabled)
    added: list[bool] = []
    monkeypatch.setattr(ops, "weighted_mix", lambda x, *args: added.append(ops._enabled) or x.flatten(3))
    findings = suite.kernel_findings(layer, QUICK, CPU)
    assert len(findings) == 1 and len(findings[0].ratios) == 2 and findings[0].target == 1
    assert "4x4 tokens, 3 segments of 4, bfloat16, batch 8" in findings[0].what
    assert set(used) == {True, False} and set(added) == {True} and ops._enabled


def test_kernels_are_compared_with_torch_in_the_smallest_batch(
    monkeypatch: pytest.MonkeyPatch, small_models: None
) -> None:
    assert not suite.small_batch_findings(QUICK, CPU)[0].ratios
    monkeypatch.setattr(ops, "LEAST_IN_EAGER", 5 * 32 * 32 * 192 - 1)
    monkeypatch.setattr(ops, "use_kernels", lambda x: ops._enabled)
    monkeypatch.setattr(ops, "weighted_mix", lambda x, *args: x.flatten(3))
    (finding,) = suite.small_batch_findings(QUICK, CPU)
    assert "batch 10: vip_s7 bfloat16 eager, kernels against torch" in finding.what, "half the elements in stage two"
    assert len(finding.ratios) == 2 and finding.target == 1


def test_kernels_that_fail_in_a_turn_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[torch.Tensor] = []

    def infer(mlp: torch.nn.Module, x: torch.Tensor) -> None:
        if ops._enabled and started:
            raise RuntimeError("CUDA error")
        started.append(x)

    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    monkeypatch.setattr(suite, "_infer", infer)
    with pytest.raises(RuntimeError, match="CUDA error"):
        suite.kernel_findings((4, 12, 3), QUICK, CPU)


@pytest.mark.slow
def test_the_suite_writes_every_row(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_models: None
) -> None:
    monkeypatch.setattr(suite, "MODELS", ("vip_m7",))
    monkeypatch.setattr(suite, "data_path_ratios", lambda rounds: ([1.0], "here"))

    def no_epoch(*args: Any) -> Any:
        raise RuntimeError("no epoch")

    monkeypatch.setattr(suite, "epoch_ratios", no_epoch)
    out = tmp_path / "new/table.md"
    flags = ("--device", "cpu", "--rounds", 1, "--seconds", 0, "--warmup", 1, "-b", 4)
    outcome = command("benchmark", "--suite", "performance", "--out", out, *flags)
    assert outcome.status == 1, "a part failed"
    table = out.read_text()
    for what in ("float32 eager against textbook", "training step", "vip_m7", "fast-images", "peak memory"):
        assert what in table
    assert "| inference: textbook vip_s7 float32 eager |" in table and "matrix products" in table
    assert "| time of an epoch | not measured |" in table and "no epoch" in table


@pytest.fixture
def no_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "where_time_goes", lambda *args: {})


def test_what_is_measured_is_kept(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_shares: None
) -> None:
    def stopped(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "_on_cpu", lambda *args: [Finding("the first group", [1.5], 1.0)])
    monkeypatch.setattr(suite, "_training", stopped)
    out = tmp_path / "table.md"
    assert command("benchmark", "--suite", "performance", "--out", out, "--device", "cpu").status == 130
    assert "the first group | 1.50" in out.read_text() and "Unfinished" in out.read_text()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_targets_come_first_and_the_rest_while_there_is_time(
    kind: str, command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_shares: None
) -> None:
    now, asked = [0.0], []

    def find(name: str, *args: Any) -> list[Finding]:
        now[0] += 60
        asked.append(name)
        return [Finding(f"{name} {args[:-2]}", [1.5])]

    monkeypatch.setattr(suite.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cli, "setup_runtime", lambda name: SimpleNamespace(device=torch.device(kind)))
    monkeypatch.setattr(suite, "free_memory", lambda device: None)
    monkeypatch.setattr(cli, "environment", lambda device: {})
    monkeypatch.setattr(cli, "clocks", lambda device: {"megahertz": now[0]})
    targets = ["_on_gpu" if kind == "cuda" else "_on_cpu", "_training", "_lean_training", "_epoch", "_data_path"]
    for name in (*targets, "_other", "kernel_findings"):
        monkeypatch.setattr(suite, name, partial(find, name))
    out = tmp_path / "table.md"
    assert command("benchmark", "--suite", "performance", "--out", out, "--minutes", 6.5).status == 0
    assert asked == [*targets, "_other", "_other"], "the last was begun in time"
    left_out = [line for line in out.read_text().splitlines() if "--minutes" in line]
    assert len(left_out) == 2 * 4 - 2 + (5 if kind == "cuda" else 0) + 2 * 4
    assert "| inference, vip_l7 | not measured |" in left_out[0]
    assert "| training step, compiled, lvvit_s |" in left_out[-1]
    assert "5 rounds of " in out.read_text() and "; 7.0 minutes." in out.read_text()
    assert "megahertz 60.0" in out.read_text(), "after the first part, while the device is warm"

    asked.clear()
    assert command("benchmark", "--suite", "performance", "--out", out).status == 0
    assert len(asked) == (6 if kind == "cuda" else 5 + 16), "six minutes on a GPU"


def test_what_fails_is_a_failure(
    command: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    no_shares: None,
) -> None:
    def fail(config: BenchmarkConfig, device: torch.device) -> list[Finding]:
        raise RuntimeError("no such luck")

    parts = [suite.Part("a part", fail), suite.Part("another", lambda *args: [Finding("a row", [1.5], 1.0)])]
    monkeypatch.setattr(cli, "target_parts", lambda device: parts)
    monkeypatch.setattr(cli, "beside_parts", lambda device: [])
    out = tmp_path / "table.md"
    flags = ("--suite", "performance", "--out", out, "--device", "cpu")
    assert command("benchmark", *flags).status == 1 and "a part: no such luck" in caplog.text
    assert "| a part | not measured | - | - | no such luck |" in out.read_text() and "| a row | 1.50" in out.read_text()
    del parts[0]
    assert command("benchmark", *flags).status == 0
    monkeypatch.setattr(cli, "where_time_goes", lambda *args: {"inference": "no profiler"})
    assert command("benchmark", *flags).status == 1 and "| inference | no profiler |" in out.read_text()


def test_a_gpu_that_is_lost_leaves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels leave it that read where they must not: everything that follows fails."""

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(suite, "free_memory", lost)
    findings = suite.run_parts(suite.target_parts(CPU), QUICK, CPU, lambda findings: None)
    assert len(findings) == 5 and all(finding.failed and "illegal" in finding.remark for finding in findings)
    shares = suite.where_time_goes(QUICK, CPU)
    header, line, *rows = shares_table(shares).splitlines()
    assert {text.count("|") for text in (header, line, *rows)} == {3} and len(rows) == 6


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_targets_of_training_are_those_of_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(entries: list[Entry], phase: str, batch: int, *args: Any) -> Group:
        each = dict.fromkeys
        return Group(batch, each(entries, batch), each(entries, [1.0]), each(entries, 2))

    monkeypatch.setattr(suite, "measure", measured)
    found = [f for part in (suite._training, suite._lean_training) for f in part(QUICK, torch.device(kind))]
    targets = {f.what.partition(": ")[2]: (f.target, f.at_most) for f in found if f.target}
    best, book = "vip_s7 bfloat16 compiled", "textbook vip_s7 bfloat16"
    gpu = {
        f"{best} against {book} eager": (2.0, False),
        f"{best} against {book} compiled": (1.3, False),
        f"peak memory, {best} (memory budget 0.6) against {book} eager": (0.6, True),
    }
    assert targets == (gpu if kind == "cuda" else {})


def test_epochs_are_compared_with_the_steps_around_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, rates = iter([1.0, 3.0, 5.0, 7.0]), iter([[9, 9, 2, 1], [9, 9, 1, 1], [9, 9, 4, 1]])
    monkeypatch.setattr(pipeline, "prepare", lambda *args: SimpleNamespace(step=None))
    monkeypatch.setattr(pipeline, "_median_seconds", lambda *args: next(seconds))
    monkeypatch.setattr(pipeline, "_run_epochs", lambda *args: next(rates))
    ratios, remark = pipeline.epoch_ratios(CPU, QUICK, "vip_nano4_32")
    assert ratios == [4 / 2 / 2, 4 / 1 / 2, 4 / 1 / 4, 4 / 1 / 4, 4 / 4 / 6, 4 / 1 / 6]
    assert "1.0 img/s by its steps alone" in remark


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"status 2: .*There is no data set at .*nowhere"):
        pipeline._run_epochs(tmp_path / "run", str(tmp_path / "nowhere"), "--model", "vip_nano4_32", "--device", "cpu")


def test_shares_that_fail_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(step: Any, device: torch.device) -> dict[str, float]:
        if step == "train":
            raise RuntimeError("no profiler")
        return {"copies": 0.25, "rest": 0.75}

    monkeypatch.setattr(suite, "_prepare", lambda entry, phase, *args: SimpleNamespace(step=phase))
    monkeypatch.setattr(suite, "time_shares", shares)
    lines = shares_table(suite.where_time_goes(QUICK, CPU)).splitlines()
    assert lines[0] == "| time of a step | copies | rest |" and len(lines) == 2 + 6
    assert lines[2] == "| inference: textbook vip_s7 float32 eager | 25% | 75% |"
    assert lines[5] == "| training step: textbook vip_s7 float32 eager | no profiler |"


def test_what_cannot_be_written_is_printed(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_shares: None
) -> None:
    folder = tmp_path / "folder"

    def lost(*args: Any) -> list[Finding]:
        folder.rmdir()
        folder.write_text("a file")
        return [Finding("the first group", [1.5], 1.0)]

    monkeypatch.setattr(suite, "_on_cpu", lost)
    for name in ("_training", "_lean_training", "_other", "_data_path", "_epoch"):
        monkeypatch.setattr(suite, name, lambda *args: [Finding("another group", [2.5], 1.0)])
    outcome = command("benchmark", "--suite", "performance", "--out", folder / "table.md", "--device", "cpu")
    assert outcome.status == 2 and f"Cannot write to {folder}" in outcome.err and "--out." in outcome.err
    assert "the first group | 1.50" in outcome.out and "another group | 2.50" in outcome.out


@pytest.mark.parametrize("name", ["performance", "scale"])
def test_what_is_missing_is_said_before_anything_is_measured(
    name: str, command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vip.data.fast_images", None)
    monkeypatch.setattr(suite, "prepare", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr("vip.benchmark.runner.prepare", lambda *args: pytest.fail("measured"))
    outcome = command("benchmark", "--suite", name, "--out", tmp_path / "x", "--device", "cpu")
    assert outcome.status == 2 and "vision-permutator[fast]" in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite", "performance"), "add --out FILE"),
        (("--out", "x"), "--out is for the table of --suite"),
        (("--minutes", "5"), "--minutes is for --suite performance"),
        (("--suite", "scale", "--out", "x", "--minutes", "5"), "--minutes is for --suite performance"),
        (("--suite", "performance", "--out", "x", "--models", "vip_s7"), "leave out --models"),
        (("--suite", "performance", "--out", "."), "--out . is a folder"),
        (("--suite", "scale", "--out", "x", "-b", "4", "8"), "--suite takes one --batch-size, 2 given"),
    ],
)
def test_mistakes(flags: tuple[str, ...], message: str, command: Callable[..., Outcome]) -> None:
    outcome = command("benchmark", *flags, "--device", "cpu")
    assert outcome.status == 2 and message in outcome.err


def test_photographs_are_as_large_as_photographs(tmp_path: Path) -> None:
    assert 60_000 < pipeline.write_photographs(tmp_path, 2) / 2 < 200_000


@pytest.mark.slow
def test_data_path_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, size = pipeline.data_path_seconds(rounds=2, images=32)
    assert 80e3 < size < 150e3
    monkeypatch.setattr(pipeline, "data_path_seconds", lambda rounds: (seconds, size))
    ratios, remark = pipeline.data_path_ratios(rounds=2)
    assert ratios == [a / b for a, b in zip(seconds["timm"], seconds["fast"], strict=True)]
    assert len(ratios) == 2 and all(0.5 < ratio < 10 for ratio in ratios) and "timm" in remark


@pytest.mark.slow
def test_epoch_ratios() -> None:
    ratios, remark = pipeline.epoch_ratios(CPU, QUICK, "vip_nano4_32")
    assert len(ratios) == 6 and "vip_nano4_32" in remark
    # of single epochs less can be asked, as other work may take the cores between one and its steps
    assert 0.5 < median(ratios) < 10 and all(0.1 < ratio < 20 for ratio in ratios)
