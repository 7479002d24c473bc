"""Data and trainings of the data-efficiency study."""

import json
import time
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from studies.data_efficiency import __main__ as command
from studies.data_efficiency import runs, training
from studies.data_efficiency.models import ABLATIONS, BASELINE, MODELS, SIZES, Size, build
from studies.data_efficiency.training import Batches, Job, normalize, share
from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.runtime import Runtime

CPU = torch.device("cpu")


# --- the share of the data


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 9))
def test_share_of_each_class(sizes: list[int], fraction: float, seed: int) -> None:
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)], dtype=torch.long)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    if not len(labels):
        return
    chosen = share(labels, fraction, seed)
    assert len(chosen.unique()) == len(chosen)
    found = Counter(labels[chosen].tolist())
    for label, size in enumerate(sizes):
        assert abs(found[label] - fraction * size) <= 0.5
    assert torch.equal(share(labels, fraction, seed), chosen)


def test_shares_of_a_seed_are_nested_and_those_of_two_are_not() -> None:
    """So a smaller share of a seed has no image that the larger one lacks; seeds draw independently of each other."""
    labels = torch.arange(5000) % 10
    tenth, third, whole = (set(share(labels, fraction, 0).tolist()) for fraction in (0.1, 0.3, 1.0))
    assert tenth < third < whole == set(range(5000)) and (len(tenth), len(third)) == (500, 1500)
    common = len(tenth & set(share(labels, 0.1, 1).tolist()))
    assert 25 <= common <= 80  # 50 are expected of independent draws, with a deviation below 7


# --- batches


def numbered(count: int) -> torch.Tensor:
    """Images that hold their number in every pixel, as red + 250 green + 1; nothing is black, as margins are."""
    number = torch.arange(count)
    colours = torch.stack([number % 250 + 1, number // 250 + 1, torch.full_like(number, 7)], 1)
    return colours[:, :, None, None].expand(-1, -1, 32, 32).to(torch.uint8)


def bytes_of(images: torch.Tensor) -> torch.Tensor:
    return ((images * 0.5 + 0.5) * 255).round().to(torch.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 8), st.integers(1, 3), st.integers(0, 5))
def test_each_image_once_a_pass_over_the_data(count: int, batch: int, length: int, passes: int, seed: int) -> None:
    """Whatever a pass of the stream is: it goes on where the last one ended."""
    batches = Batches(numbered(count), torch.arange(count) * 3, batch, length, seed)
    assert len(batches) == length
    seen: list[int] = []
    for _ in range(passes):
        for images, labels in batches:
            assert images.shape == (batch, 3, 32, 32) and images.dtype == torch.float32
            centre = bytes_of(images)[:, :, 16, 16].long()
            assert ((centre[:, 0] - 1 + 250 * (centre[:, 1] - 1)) * 3).tolist() == labels.tolist()
            seen += (labels // 3).tolist()
    assert len(seen) == passes * length * batch
    for start in range(0, len(seen), count):
        now = seen[start : start + count]
        assert len(set(now)) == len(now)
        assert len(now) < count or sorted(now) == list(range(count))


def test_order_and_augmentation_come_from_the_seed() -> None:
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)

    def stream(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(torch.seed() % 2**32)  # of no influence
        batches = Batches(images, torch.arange(20), 8, 5, seed)
        return [tensor for batch in (*batches, *batches) for tensor in batch]

    first, again, other = stream(1), stream(1), stream(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[1], first[5]), "the order repeats"


def test_flips_and_shifts() -> None:
    """Each image is one of 2 x 9 x 9 that loops make, and all of these come about equally often."""
    generator = np.random.default_rng(0)
    image = generator.integers(1, 256, (3, 32, 32), dtype=np.uint8)
    variants: dict[bytes, tuple[int, int, int]] = {}
    for flip in (0, 1):
        for down in range(-4, 5):
            for right in range(-4, 5):
                out = np.zeros_like(image)
                for row in range(32):
                    for column in range(32):
                        r, c = row - down, column - right
                        if 0 <= r < 32 and 0 <= c < 32:
                            out[:, row, column] = image[:, r, 31 - c if flip else c]
                variants[out.tobytes()] = (flip, down, right)
    assert len(variants) == 162
    batches = Batches(torch.from_numpy(image)[None], torch.zeros(1), 500, 4, 0)
    found = Counter(variants[x.numpy().tobytes()] for images, _ in batches for x in bytes_of(images))
    for axis, values in enumerate((2, 9, 9)):
        counted = Counter()
        for variant, times in found.items():
            counted[variant[axis]] += times
        expected = 2000 / values
        chi2 = sum((counted[v] - expected) ** 2 / expected for v in counted)
        assert len(counted) == values and chi2 < 30  # 0.02 % of fair draws of nine values are beyond it
    assert len(found) > 155


def test_normalized_as_the_models_see_it() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 4, 5)
    expected = torch.tensor([-1.0, -0.6, 1.0])[None, :, None, None].expand(2, 3, 4, 5)
    torch.testing.assert_close(normalize(images), expected)


# --- a training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes that differ in brightness: five images each to train on, two to test on, of other sizes too."""
    root = tmp_path_factory.mktemp("ten")
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for label in range(10):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                size = (32, 32) if i else (48, 40)
                pixels = rng.normal(20 + 24 * label, 3, (*size, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{i}.png")
    return root


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A size whose trainings take a moment."""
    shapes = {"ViP": (32, 1), "Mixer": (32, 1), "gMLP": (32, 1), "ResMLP": (32, 1), "EAMLP": (32, 1), "ViT": (32, 1)}
    monkeypatch.setitem(SIZES, "tiny", Size(shapes, 64, 8, 2, dict(lr=1e-3, cutmix=0.0)))
    return "tiny"


def test_images_in_memory(data: Path) -> None:
    images, labels = training.images_in_memory(str(data), "train", CPU)
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.uint8
    assert Counter(labels.tolist()) == {label: 5 for label in range(10)}
    brightness = images.float().mean((1, 2, 3))
    assert ((brightness - (20 + 24 * labels)).abs() < 3).all()
    again = sorted((data / "train").rglob("*.png"))[1]
    pixels = torch.from_numpy(np.array(Image.open(again))).permute(2, 0, 1)
    assert any(torch.equal(image, pixels) for image in images), "an image of the right size was changed"


def test_more_classes_than_the_models_have(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in range(11):
            (tmp_path / split / f"class{label:02}").mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / f"class{label:02}" / "0.png")
    with pytest.raises(UserError, match=f"{tmp_path} has 11 classes, expected the 10 of CIFAR-10"):
        training.images_in_memory(str(tmp_path), "train", CPU)


def test_a_result(data: Path, tiny: str) -> None:
    job = Job("Mixer", 0.4, 1)
    result = training.train(job, str(data), tiny, Runtime(CPU))
    assert json.loads(json.dumps(result)) == result
    own, baseline = training.counts("Mixer", tiny), training.counts(BASELINE, tiny)
    assert {name: result[name] for name in ("model", "fraction", "seed")} == vars(job)
    assert (result["params"], result["macs"], result["size"]) == (own.params, own.macs, tiny)
    assert (result["training_images"], result["count"]) == (20, 20)
    assert result["images_seen"] == result["curve"][-1]["images"] == 2 * result["curve"][0]["images"]
    assert result["images_seen"] * own.macs == pytest.approx(64 * baseline.macs, rel=0.2)  # of whole batches
    assert result["top1"] == result["curve"][-1]["top1"] and result["top1"] in [5.0 * i for i in range(21)]
    again = training.train(job, str(data), tiny, Runtime(CPU))
    other = training.train(Job("Mixer", 0.4, 2), str(data), tiny, Runtime(CPU))
    assert again["curve"] == result["curve"] != other["curve"]


def test_it_learns(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness is easy: what stays at chance level has lost its labels."""
    shapes = {name: (32, 1) for name in MODELS}
    monkeypatch.setitem(SIZES, "learning", Size(shapes, 2400, 24, 4, dict(lr=4e-3, cutmix=0.0)))
    result = training.train(Job("ViP", 1.0, 0), str(data), "learning", Runtime(CPU))
    assert result["top1"] >= 30
    assert result["curve"][-1]["train_loss"] < result["curve"][0]["train_loss"]


@pytest.mark.parametrize("size", ["small", "full"])
def test_all_models_train_for_the_same_operations(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ablations for the same number of images as the whole."""
    seen: dict[str, int] = {}

    def _train_and_test(state: Any, config: Any, runtime: Any, batches: Batches, tests: Any) -> list[dict]:
        seen[name] = config.epochs * len(batches) * batches.batch_size
        return [{"images": seen[name], "top1": 0.0}]

    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
    monkeypatch.setattr(training, "images_in_memory", lambda *args: images)
    monkeypatch.setattr(training, "_train_and_test", _train_and_test)
    monkeypatch.setattr(training, "_create_state", lambda *args: None)
    costs = {}
    for name in (*MODELS, *ABLATIONS):
        costs[name] = training.train(Job(name, 0.1, 0), "", size, Runtime(CPU))["macs"] * seen[name]
    for name in MODELS:
        assert costs[name] == pytest.approx(costs[BASELINE], rel=0.02), name
    for name in ABLATIONS:
        assert seen[name] == seen[BASELINE], name
    assert seen[BASELINE] == pytest.approx(SIZES[size].images, rel=0.02)


def test_attention_is_the_one_that_trains_faster() -> None:
    size = SIZES["small"]
    config = TrainConfig(**training.COMMON_RECIPE, **size.recipe)
    state = training._create_state(build("ViT", size), config, Runtime(CPU), 1)
    assert not any(block.attn.fused_attn for block in state.task.trainable_module.blocks)


# --- all trainings


class InProcess(Executor):
    """Runs jobs at once, in this process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as e:
            future.set_exception(e)
        return future


def made_up(job: Job) -> dict[str, Any]:
    top1 = 50.0 + job.seed + 10 * job.fraction
    return {
        **{"model": job.model, "fraction": job.fraction, "seed": job.seed, "size": "small", "params": 1, "macs": 2},
        **{"training_images": 3, "images_seen": 4, "top1": top1, "count": 5, "seconds": 0.1},
        "curve": [{"images": i, "train_loss": 1.0, "loss": 1.0, "top1": top1} for i in (2, 4)],
    }


def test_jobs() -> None:
    jobs = runs.jobs()
    assert len(set(jobs)) == len(jobs) == 3 * (6 * 3 + 5)
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(not set(job.name) & set(' /\\:*?"<>|') for job in jobs), "no name of a file"
    assert [job.seed for job in jobs if job.model == BASELINE] == sorted(3 * [0, 1, 2])


def test_finished_trainings_are_not_repeated(
    data: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job("ViT", 1.0, 0), Job("no re-weighting", 1.0, 0), Job("ViT", 0.4, 0)]
    trained: list[Job] = []

    def train(job: Job, *args: Any) -> dict[str, Any]:
        trained.append(job)
        if len(trained) == 3:
            raise UserError("interrupted")
        return training.train(job, *args)

    monkeypatch.setattr(runs, "jobs", lambda: jobs)
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", InProcess)
    output = tmp_path / "a" / "b"
    with pytest.raises(UserError, match="interrupted"):
        runs.run_missing(str(data), tiny, CPU, output, 1)
    finished = {path: path.read_bytes() for path in output.iterdir()}
    assert len(finished) == 2, "something half done was left"
    results = runs.run_missing(str(data), tiny, CPU, output, 1)
    assert trained == [*jobs, jobs[2]]
    assert [(r["model"], r["fraction"], r["seed"]) for r in results] == [(j.model, j.fraction, j.seed) for j in jobs]
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert runs.run_missing(str(data), tiny, CPU, output, 1) == results and len(trained) == 4


@pytest.mark.parametrize(
    "content, words",
    [
        (json.dumps({"size": "full"}), ["holds results of --size full, not small", "another --output"]),
        ('{"size": "sm', ["is damaged", "remove it"]),
        ("", ["is damaged", "remove it"]),
        *(pytest.param(text, ["remove it"]) for text in ("{}", "[]")),
    ],
)
def test_results_that_are_of_no_use_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: list[str]
) -> None:
    monkeypatch.setattr(runs, "train", lambda *args: pytest.fail("it trains"))
    monkeypatch.setattr(runs, "ProcessPoolExecutor", InProcess)
    file = tmp_path / f"{runs.jobs()[-1].name}.json"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        runs.run_missing("", "small", CPU, tmp_path, 1)
    assert str(tmp_path) in str(caught.value) and [word for word in words if word not in str(caught.value)] == []
    assert file.read_text() == content


@pytest.mark.parametrize("error", [UserError("out of luck"), KeyboardInterrupt()])
def test_an_error_or_an_interrupt_does_not_wait_for_the_other_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Those that have begun end, so that there may be one or two."""
    trained: list[Job] = []

    def train(job: Job, *args: Any) -> dict[str, Any]:
        if job == runs.jobs()[0]:
            raise error
        trained.append(job)
        time.sleep(0.02)
        return made_up(job)

    def executor(*args: Any, **kwargs: Any) -> Executor:
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", executor)
    with pytest.raises(type(error)):
        runs.run_missing("", "small", CPU, tmp_path, 1)
    assert len(trained) < 10


def run(*argv: object) -> None:
    command.main([str(a) for a in argv])


def test_the_command_with_all_results_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It needs no data any more, and no time."""
    for job in runs.jobs():
        (tmp_path / f"{job.name}.json").write_text(json.dumps(made_up(job)))
    run(tmp_path / "nowhere", "--output", tmp_path, "--device", "cpu")
    printed = capsys.readouterr()
    assert printed.out.startswith("Top-1 in percent, mean ± standard deviation of 3 seeds (size small).")
    names = ["results.csv", *(f"{name}.{e}" for name in ("curves", "shares", "ablations") for e in ("png", "svg"))]
    assert {path.name for path in tmp_path.iterdir()} - {f"{job.name}.json" for job in runs.jobs()} == set(names)
    assert all(str(tmp_path / name) in printed.err for name in names[1:])


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """Also those that a process of its own finds."""
    with pytest.raises(UserError) as caught:
        run(tmp_path / "nowhere", "--output", tmp_path / "out", "--device", "cpu")
    message = f"There is no data set at {tmp_path / 'nowhere'}"
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="'nosuch'"):
        run(tmp_path, "--output", tmp_path / "out", "--device", "nosuch")


@pytest.mark.parametrize("argv", [("--jobs", 0), ("--output", "/dev/null/x")])
def test_mistakes_that_are_found_at_once(tmp_path: Path, argv: tuple) -> None:
    with pytest.raises(UserError):
        run(tmp_path / "nowhere", "--device", "cpu", "--output", tmp_path / "out", *argv)
