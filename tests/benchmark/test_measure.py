"""Turns by a clock that the test turns, and memory against what was allocated."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vip.benchmark import measure
from vip.benchmark.measure import _kind, is_out_of_memory, one_line, peak_memory, take_turn, take_turns, time_shares

CPU = torch.device("cpu")


class Clock:
    """A clock that only steps move, and a record of them."""

    def __init__(self) -> None:
        self.now, self.speed = 0.0, 1.0
        self.calls: list[str] = []

    def step(self, name: str, seconds: float, fails_at: int = 0, error: Exception | None = None) -> Callable[[], None]:
        def step() -> None:
            self.calls.append(name)
            self.now += seconds * self.speed
            if error is not None and self.calls.count(name) == fails_at:
                raise error

        return step


@contextmanager
def clock() -> Iterator[Clock]:
    fake = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: fake.now))
        yield fake


# --- turns


@settings(deadline=None)
@given(st.floats(1e-4, 10), st.integers(1, 50))
def test_a_turn_is_the_mean_of_its_steps(seconds: float, repeats: int) -> None:
    with clock() as fake:
        assert take_turn(fake.step("a", seconds), repeats, CPU) == pytest.approx(seconds)
        assert len(fake.calls) == repeats


def turns_taken(count: int, rounds: int) -> list[list[str]]:
    """The steps of each round, in the order of their turns."""
    ends: list[str] = []
    with clock() as fake:
        steps = {str(i): fake.step(str(i), 1.0) for i in range(count)}
        turns = take_turns(steps, rounds, 0.0, CPU, lambda: ends.append(fake.calls[-1]))
    assert list(turns) == list(steps)
    assert all(len(turn.seconds) == rounds and not turn.error for turn in turns.values())
    return [ends[i * count : (i + 1) * count] for i in range(rounds)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9))
def test_rounds_go_there_and_back_and_begin_one_further_on(count: int, rounds: int) -> None:
    orders = turns_taken(count, rounds)
    for i, order in enumerate(orders):
        assert sorted(order) == [str(k) for k in range(count)]
        if i % 2:
            assert order == orders[i - 1][::-1]
        elif i:
            assert order == orders[i - 2][1:] + orders[i - 2][:1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_all_stand_in_each_place_and_before_and_behind_each_other_as_often(count: int) -> None:
    orders = turns_taken(count, 2 * count)
    for place in range(count):
        assert set(Counter(order[place] for order in orders).values()) == {2}
    before = Counter(pair for order in orders for pair in pairwise(order))
    assert all(before[b, a] == number for (a, b), number in before.items())


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 3), min_size=1, max_size=4), st.floats(0, 5), st.integers(1, 4))
def test_turns_have_about_the_seconds_asked_for(durations: list[float], seconds: float, rounds: int) -> None:
    taken: list[tuple[str, float, int]] = []
    with clock() as fake:
        last = [0.0, 0]

        def on_turn() -> None:
            taken.append((fake.calls[-1], fake.now - last[0], len(fake.calls) - last[1]))
            last[:] = fake.now, len(fake.calls)

        steps = {str(i): fake.step(str(i), duration) for i, duration in enumerate(durations)}
        turns = take_turns(steps, rounds, seconds, CPU, on_turn)
    assert len(taken) == rounds * len(steps)
    for i, (name, time, calls) in enumerate(taken):
        duration = durations[int(name)]
        if i < len(steps):  # in the first round one step tells how many make a turn
            time, calls = time - duration, calls - 1
        assert calls >= 1
        assert calls == 1 and duration >= seconds - duration / 2 or abs(time - seconds) <= duration / 2 + 1e-6
    for name, turn in turns.items():
        assert turn.seconds == pytest.approx([durations[int(name)]] * rounds)


@pytest.mark.parametrize("call, left", [(1, 0), (2, 0), (4, 2), (6, 4)])
def test_a_step_that_fails_stops_alone(call: int, left: int) -> None:
    """Its first call tells how long it takes, each later one is a turn here."""
    ends = 0

    def on_turn() -> None:
        nonlocal ends
        ends += 1

    error = ValueError("\nout of luck\nand more of it\n")
    with clock() as fake:
        steps = {"a": fake.step("a", 1.0), "b": fake.step("b", 2.0, call, error), "c": fake.step("c", 3.0)}
        turns = take_turns(steps, 5, 0.0, CPU, on_turn)
        assert fake.calls.count("b") == call
    assert turns["a"].seconds == [1.0] * 5 and turns["c"].seconds == [3.0] * 5
    assert turns["b"].seconds == [2.0] * left and turns["b"].error == "out of luck"
    assert not turns["a"].error and not turns["c"].error
    assert ends == 15, "a progress bar would not get to its end"


def test_an_interrupt_is_no_error_of_a_step() -> None:
    def step() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns({"a": step}, 1, 0.0, CPU)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.1, 20), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 1), min_size=2, max_size=4),
)
def test_a_slow_round_is_slow_for_all(slowness: list[float], durations: list[float]) -> None:
    """The machine changes its speed with every round: times change, ratios of a round do not."""
    done = 0
    with clock() as fake:

        def on_turn() -> None:
            nonlocal done
            done += 1
            fake.speed = slowness[min(done // len(durations), len(slowness) - 1)]

        fake.speed = slowness[0]
        steps = {i: fake.step(str(i), duration) for i, duration in enumerate(durations)}
        turns = take_turns(steps, len(slowness), 0.0, CPU, on_turn)
    for i, turn in turns.items():
        assert turn.seconds == pytest.approx([factor * durations[i] for factor in slowness])
        ratios = [own / base for own, base in zip(turn.seconds, turns[0].seconds, strict=True)]
        assert ratios == pytest.approx([durations[i] / durations[0]] * len(slowness))


# --- errors


def test_one_line() -> None:
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError()) == one_line(ValueError(" \n")) == "ValueError"


def test_one_line_of_a_backend_that_fails() -> None:
    def backend(graph: object, inputs: object) -> None:
        raise RuntimeError("there is no compiler here")

    with pytest.raises(Exception) as caught:
        torch.compile(nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    assert "there is no compiler here" in one_line(caught.value)


def test_errors_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")) and is_out_of_memory(MemoryError())
    for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(RuntimeError("FIND was unable to find an engine to execute this computation"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# --- memory


@settings(max_examples=12, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 5000), st.just(0)), max_size=12))
def test_peak_of_a_random_step(sizes: list[int]) -> None:
    """Numbers allocate so many floats; a zero frees the oldest."""

    def step() -> None:
        kept: list[torch.Tensor] = []
        for size in sizes:
            if size:
                kept.append(torch.empty(size))
            elif kept:
                kept.pop(0)

    changes: list[int] = []
    kept: list[int] = []
    for size in sizes:
        if size:
            kept.append(size)
        changes.append(4 * size or (-4 * kept.pop(0) if kept else 0))
    before = torch.empty(10**6)  # counts for nothing
    assert peak_memory(step, CPU) == max(accumulate(changes), default=0)
    assert len(before) == 10**6


def test_peak_of_a_model() -> None:
    linear, x = nn.Linear(64, 32), torch.randn(16, 64)

    @torch.inference_mode()
    def forward() -> None:
        torch.relu(linear(x))

    def backward() -> None:
        torch.relu(linear(x)).sum().backward()
        linear.zero_grad()

    assert peak_memory(forward, CPU) == 2 * 16 * 32 * 4
    gradients = (64 * 32 + 32) * 4
    assert gradients < peak_memory(backward, CPU) < gradients + 6 * 16 * 32 * 4


def test_a_step_that_only_frees_has_no_peak() -> None:
    held = [torch.empty(1000)]
    assert peak_memory(held.clear, CPU) == 0


def test_nobody_knows_the_memory_of_other_devices() -> None:
    assert peak_memory(lambda: pytest.fail("it was run"), torch.device("meta")) is None


@pytest.mark.parametrize("fails", [False, True])
def test_standard_error_comes_back(capfd: pytest.CaptureFixture, fails: bool) -> None:
    def step() -> None:
        os.write(2, b"noise of a library\n")
        if fails:
            raise ValueError("no luck")

    open_files = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else None
    if fails:
        with pytest.raises(ValueError, match="no luck"):
            peak_memory(step, CPU)
    else:
        peak_memory(step, CPU)
    os.write(2, b"after\n")
    print("later", file=sys.stderr)
    assert capfd.readouterr().err == "after\nlater\n"
    if open_files is not None:
        assert len(os.listdir("/proc/self/fd")) == open_files


LIMIT = """
import resource
import torch
from vip.benchmark import measure
from vip.benchmark.measure import is_out_of_memory, within_available_memory

real, cpu, mega = measure._kilobytes, torch.device("cpu"), 2**20
measure._kilobytes = lambda path, name: 200 * 1024 if name == "MemAvailable" else real(path, name)
before = resource.getrlimit(resource.RLIMIT_DATA)
try:
    with within_available_memory(cpu):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        assert soft != before[0] and hard == before[1]
        torch.empty(100 * mega, dtype=torch.uint8)
        try:
            torch.empty(400 * mega, dtype=torch.uint8)
        except Exception as e:
            assert is_out_of_memory(e), e
        else:
            raise SystemExit("400 MB of 200 MB were given")
        torch.empty(100 * mega, dtype=torch.uint8)
        raise KeyError("of the block")
except KeyError:
    pass
assert resource.getrlimit(resource.RLIMIT_DATA) == before
torch.empty(400 * mega, dtype=torch.uint8)

with within_available_memory(torch.device("cuda")):
    assert resource.getrlimit(resource.RLIMIT_DATA) == before

lower = (real("/proc/self/status", "VmData") + 100 * 1024) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (lower, before[1]))
with within_available_memory(cpu):
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == lower
assert resource.getrlimit(resource.RLIMIT_DATA)[0] == lower
print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_more_memory_than_there_is_becomes_an_error() -> None:
    result = subprocess.run([sys.executable, "-c", LIMIT], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "well\n"), result.stderr


def test_without_a_linux_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_kilobytes", lambda path, name: None)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    with measure.within_available_memory(CPU):
        torch.empty(10)


def test_numbers_of_linux(tmp_path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       4030000 kB\nMemAvailable:    123456 kB\nHugePages_Total:       0\n")
    assert measure._kilobytes(str(path), "MemAvailable") == 123456
    assert measure._kilobytes(str(path), "Available") is None
    assert measure._kilobytes(str(path), "HugePages_Total") is None
    assert measure._kilobytes(str(tmp_path / "nowhere"), "MemAvailable") is None


def test_products_of_the_matrix_product() -> None:
    step, products = measure.matmul_step(torch.float32, CPU)
    with FlopCounterMode(display=False) as flops:
        step()
    assert flops.get_total_flops() == 2 * products == 2 * 2048**3
    assert peak_memory(step, CPU) < 2048**2, "it allocates its result each time"


def test_shares_of_time_are_of_the_kinds_of_operations() -> None:
    a = torch.randn(512, 512)
    products = time_shares(lambda: a @ a, CPU)
    copies = time_shares(lambda: [a.t().contiguous() for _ in range(20)], CPU)
    assert sum(products.values()) == pytest.approx(1) and products["matrix products"] > 0.8
    assert sum(copies.values()) == pytest.approx(1) and copies["copies"] > 0.6


def test_shares_of_a_gpu_are_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(key: str, device: str, seconds: float, annotation: bool = False) -> SimpleNamespace:
        times = dict(self_device_time_total=seconds, self_cpu_time_total=100.0)
        return SimpleNamespace(
            key=key, device_type=SimpleNamespace(name=device), is_user_annotation=annotation, **times
        )

    events = [event("nvjet_x", "CUDA", 3.0), event("_mix_kernel", "CUDA", 3.0), event("Memcpy DtoD", "CUDA", 2.0)]
    events += [event("aten::mm", "CPU", 3.0), event("a region", "CUDA", 8.0, annotation=True)]
    profiler = nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(measure, "profile", lambda activities: profiler)
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    shares = time_shares(lambda: None, torch.device("cuda"))
    assert shares["matrix products"] == 0.75 and shares["copies"] == 0.25 and sum(shares.values()) == 1
    events[:] = events[3:]
    with pytest.raises(RuntimeError, match="saw no kernels"):
        time_shares(lambda: None, torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_TNT", "matrix products"),
        ("_mix_kernel", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "activations"),
        ("void at::native::GammaBetaBackwardCUDAKernelTemplate<float>", "norms, means and softmax"),
        ("void cunn_SoftMaxForward<8, float>", "norms, means and softmax"),
        ("void at::native::CatArrayBatchedCopy<float>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "other element by element",
        ),
        ("ncclDevKernel_SendRecv", "rest"),
    ],
)
def test_kernels_by_their_names(name: str, kind: str) -> None:
    assert _kind(name) == kind
