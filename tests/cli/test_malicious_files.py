"""Files that hold code, at every place that reads one: nothing runs, and one line says so."""

import builtins
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from label_maps import write_maps
from training_command import QUICK, Outcome

import studies.token_labels
import vip

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

DEVICE = ("--device", "cpu", "-j", "0")
STARTS = {
    "--resume": (),
    "--finetune": (),
    "--initial-checkpoint": (),
    "--transfer-model": ("--transfer-learning",),
    "--eval-checkpoint": (),
}


class Payload:
    """Leaves a mark when it is unpickled by a reader that runs code."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What all the code here would make; the test fails if it is there in the end."""
    path = tmp_path / "it ran"
    yield path
    assert not path.exists(), "code of a file was run"


def content(payload: Any) -> dict[str, Any]:
    """What a reader would take for a training state."""
    weights = timm.create_model("vip_nano4_32", num_classes=3).state_dict()
    start = {"state_dict": weights, "epoch": 0, "version": 2, "optimizer": {}, "arch": "vip_nano4_32", "metric": 1.0}
    return {**start, "args": {"opt": "adamw", "nested": [{"deep": payload}]}}


def write_tar(path: Path, payload: Any) -> None:
    """The layout of torch before 0.1.10, whose parts are pickles."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(payload, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_all(folder: Path, marker: Path) -> dict[str, Path]:
    """Every kind of file that torch or pickle reads, each with code in it."""
    folder.mkdir()
    makes, shell = Payload(os.mkdir, str(marker)), Payload(os.system, f"mkdir '{marker}'")
    source = Payload(builtins.exec, f"import os; os.mkdir({str(marker)!r})")
    paths = {kind: folder / f"{kind}.pth.tar" for kind in ("zip", "exec", "legacy", "tar")}
    torch.save(content(makes), paths["zip"])
    torch.save(content(source), paths["exec"])
    torch.save(content(shell), paths["legacy"], _use_new_zipfile_serialization=False)
    write_tar(paths["tar"], shell)
    for protocol in (2, 4):
        paths[f"pickle {protocol}"] = path = folder / f"pickle{protocol}.pth.tar"
        path.write_bytes(pickle.dumps({"epoch": 1, "optimizer": {}, "extra": shell}, protocol))
    paths["named safetensors"] = path = folder / "pickle.safetensors"
    path.write_bytes(pickle.dumps({"a": makes}))
    return paths


@pytest.fixture
def hostile(tmp_path: Path, marker: Path) -> dict[str, Path]:
    return write_all(tmp_path / "hostile", marker)


def refused(outcome: Outcome, program: str, path: Path | None = None) -> str:
    """The one line of a refusal, which names the file."""
    message = outcome.error(program)
    assert outcome.err.count(f"{program}: error:") == 1 and len(message) < 900
    assert path is None or str(path) in message
    return message


# --- checkpoints


def test_careless_readers_run_these(tmp_path: Path) -> None:
    """The files do what they are made for, so that the tests below are of something."""
    marker = tmp_path / "it ran"
    for kind, path in write_all(tmp_path / "hostile", marker).items():
        plain = kind.startswith(("pickle", "named"))
        try:
            pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
        except EOFError:
            assert kind == "tar"  # of which the parts are missing that hold no code
        assert marker.is_dir(), kind
        marker.rmdir()


@pytest.mark.parametrize("flag", STARTS)
def test_starts_of_a_training(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, hostile: dict[str, Path], flag: str
) -> None:
    for kind, path in hostile.items():
        argv = ("train", image_folder, *QUICK, "--output", tmp_path / "output", flag, path, *STARTS[flag])
        message = refused(command(*argv), "vip train", path)
        assert "damaged" in message if kind in ("tar", "pickle 4", "named safetensors") else "would run code" in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("folder", ["auto", "its name"])
def test_states_of_a_run(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, hostile: dict[str, Path], folder: str
) -> None:
    for kind, path in hostile.items():
        run = tmp_path / kind / "run"
        run.mkdir(parents=True)
        for name in ("recovery.pth.tar", "last.pth.tar", "checkpoint-0.pth.tar", "model_best.pth.tar"):
            shutil.copy(path, run / name)
        where = ("--output", run.parent, "--experiment", "run", "--resume", "auto")
        argv = where if folder == "auto" else ("--output", tmp_path / "output", "--resume", run)
        refused(command("train", image_folder, *QUICK, *argv), "vip train", run)


def test_a_state_beside_good_ones_is_passed_over(
    command: Callable[..., Outcome],
    trained_run: Path,
    image_folder: Path,
    tmp_path: Path,
    hostile: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "runs" / "run")
    shutil.copy(hostile["zip"], run / "recovery.pth.tar")
    where = ("--output", run.parent, "--experiment", "run", "--resume", "auto")
    assert command("train", image_folder, *QUICK, "--lr", "1e-3", *where).status == 0
    assert f"{run / 'recovery.pth.tar'} is refused" in caplog.text and "Nothing is left to train" in caplog.text


@pytest.mark.parametrize("program", ["validate", "generate-label"])
def test_checkpoints_of_a_model(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, hostile: dict[str, Path], program: str
) -> None:
    places = [image_folder] if program == "validate" else [image_folder / "train", tmp_path / "maps"]
    for path in hostile.values():
        refused(command(program, *places, "--checkpoint", path, *DEVICE), f"vip {program.split()[0]}", path)
    (tmp_path / "run").mkdir()
    best = shutil.copy(hostile["exec"], tmp_path / "run" / "model_best.pth.tar")
    refused(command(program, *places, "--checkpoint", tmp_path / "run", *DEVICE), f"vip {program}", best)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "program, argv", [("export", ("--format", "torchscript", "--out")), ("push-to-hub", ("me/model", "--dry-run"))]
)
def test_checkpoints_to_give_away(
    command: Callable[..., Outcome], tmp_path: Path, hostile: dict[str, Path], program: str, argv: tuple[str, ...]
) -> None:
    for path in hostile.values():
        refused(command(program, path, *argv, tmp_path / "out.pt"), f"vip {program.split()[0]}", path)
    assert not (tmp_path / "out.pt").exists()


def test_checkpoints_to_look_at(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, hostile: dict[str, Path]
) -> None:
    for path in hostile.values():
        argv = ("predict", image_folder, "--checkpoint", path, "--heatmap", tmp_path / "out", "--device", "cpu")
        refused(command(*argv), "vip predict", path)
        refused(command("show", "model", path, "--out", tmp_path / "out"), "vip show", path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", ["inspect", "verify", "average", "strip", "convert"])
def test_tools_for_checkpoints(
    command: Callable[..., Outcome], trained_run: Path, tmp_path: Path, hostile: dict[str, Path], action: str
) -> None:
    out = () if action in ("inspect", "verify") else ("--output", tmp_path / "out.pth")
    for path in hostile.values():
        outcome = command("checkpoint", action, path, *out)
        if action == "verify":
            assert (outcome.status, outcome.err) == (1, "") and outcome.out.startswith(f"bad: {path} is ")
            assert outcome.out.endswith("\n0 of 1 are whole.\n") and len(outcome.out.splitlines()) == 2
        else:
            refused(outcome, "vip checkpoint", path)
    if action == "average":
        refused(command("checkpoint", action, trained_run / "last.pth.tar", hostile["zip"], *out), "vip checkpoint")
        run = shutil.copytree(trained_run, tmp_path / "run")
        shutil.copy(hostile["legacy"], run / "checkpoint-0.pth.tar")
        refused(command("checkpoint", action, run, *out), "vip checkpoint", run / "checkpoint-0.pth.tar")
    assert not (tmp_path / "out.pth").exists()


def test_the_teacher_of_a_study(
    capfd: pytest.CaptureFixture, image_folder: Path, tmp_path: Path, hostile: dict[str, Path]
) -> None:
    argv = ["--recipe", "none.yaml", "--students", "vip_nano4_32", "--teacher", hostile["zip"], "--workers", 0]
    with pytest.raises(SystemExit) as e:
        studies.token_labels.main([str(a) for a in (image_folder, *argv, "--output", tmp_path / "study")])
    captured = capfd.readouterr()
    refused(Outcome(e.value.code, captured.out, captured.err), "vip generate-label", hostile["zip"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_in_a_folder(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, hostile: dict[str, Path], name: str
) -> None:
    """timm makes a model of any folder that says which it is."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "vip_nano4_32", "num_classes": 3}')
    for path in hostile.values():
        shutil.copy(path, folder / name)
        argv = ("--model", f"local-dir:{folder}", "--pretrained")
        outcome = command("train", image_folder, *QUICK, *argv, "--output", tmp_path / "output")
        refused(outcome, "vip train")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_pickle(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, marker: Path, protocol: int
) -> None:
    path = tmp_path / "payload.pth"
    path.write_bytes(pickle.dumps(Payload(os.mkdir, str(marker)), protocol))
    refused(command("validate", image_folder, "--checkpoint", path, *DEVICE), "vip validate", path)


def test_a_pickled_model_is_refused_with_the_way_out(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path
) -> None:
    torch.save(timm.create_model("vip_nano4_32"), tmp_path / "model.pth")
    message = refused(
        command("validate", image_folder, "--checkpoint", tmp_path / "model.pth", *DEVICE), "vip validate"
    )
    assert "refused" in message and "torch.save(model.state_dict(), ...)" in message


# --- label maps


def write_maps_with_code(images: Path, root: Path, source: Path) -> Path:
    """Maps of all images, the last of which is another file."""
    write_maps(images, root, (8, 8))
    shutil.copy(source, max(root.rglob("*.pt")))
    return root


@pytest.mark.parametrize("kind", ["zip", "legacy", "tar", "pickle 2", "pickle 4"])
def test_label_maps(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, hostile: dict[str, Path], kind: str
) -> None:
    images = image_folder / "train"
    good = write_maps(images, tmp_path / "good", (8, 8))
    bad = write_maps_with_code(images, tmp_path / "maps", hostile[kind])
    flags = ("--token-label", "--token-label-data", bad, "--output", tmp_path / "output")
    refused(command("train", image_folder, *QUICK, *flags), "vip train", bad)
    told = kind not in ("tar", "pickle 4")  # the others are no files of torch at all
    for action in (["check", bad], ["check", good, "--same-as", bad], ["check", bad, "--same-as", good]):
        outcome = command("label-maps", *action)
        if told:
            refused(outcome, "vip label-maps", bad)
        else:
            assert outcome.status == 1 and "This is not well." in outcome.out and outcome.err == ""
    refused(command("label-maps", "pack", bad, tmp_path / "packed"), "vip label-maps", bad)
    shutil.rmtree(bad)
    shutil.copytree(good, bad)
    for path in bad.rglob("*.pt"):
        shutil.copy(hostile[kind], path)
    refused(command("label-maps", "benchmark", bad, "--seconds", "0.05"), "vip label-maps", bad)
    argv = (images, bad, "--model", "vip_nano4_32", "--no-pretrained", "--num-classes", "3", *DEVICE)
    assert command("generate-label", *argv, "-b", "36").status in (0, 2)
    assert not (tmp_path / "packed").exists()


# --- text


YAML = "!!python/object/apply:os.mkdir [{marker!r}]"


@pytest.mark.parametrize("program", ["train", "validate", "generate-label", "benchmark", "show batch"])
@pytest.mark.parametrize(
    "text",
    [YAML, f"lr: {YAML}", f"{YAML}: 1", "a: !!python/object/new:os.mkdir [{marker!r}]", "a: !!python/name:os.mkdir"],
)
def test_recipes(command: Callable[..., Outcome], tmp_path: Path, marker: Path, program: str, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format(marker=str(marker)))
    refused(command(*program.split(), "--config", path), f"vip {program.split()[0]}", path)


def test_a_report(command: Callable[..., Outcome], trained_run: Path, tmp_path: Path, hostile: dict[str, Path]) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.copy(hostile["pickle 2"], run / "summary.csv")
    refused(command("report", run), "vip report", run / "summary.csv")
    shutil.copy(trained_run / "summary.csv", run)
    (run / "args.yaml").write_text(YAML.format(marker=str(tmp_path / "it ran")))
    refused(command("report", run), "vip report", run / "args.yaml")
    refused(command("report", trained_run, "--against", run), "vip report", run / "args.yaml")


@pytest.mark.parametrize("suffix", [".txt", ".pkl", ".json"])
def test_lists_of_classes_and_labels(
    command: Callable[..., Outcome],
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    hostile: dict[str, Path],
    suffix: str,
) -> None:
    for kind in ("zip", "pickle 2", "pickle 4"):
        path = shutil.copy(hostile[kind], tmp_path / f"list{suffix}")
        for flag in ("--class-map", "--real-labels", "--valid-labels"):
            argv = (image_folder, "--checkpoint", trained_run, *DEVICE, flag, path)
            refused(command("validate", *argv), "vip validate", None if flag == "--class-map" else path)
        argv = ("--class-map", path, "--output", tmp_path / "output")
        refused(command("train", image_folder, *QUICK, *argv), "vip train")


# --- data sets


def test_the_list_beside_a_tar_file(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, hostile: dict[str, Path]
) -> None:
    """timm keeps a pickled list of what a folder of tar files holds."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        with tarfile.open(data / f"{split}.tar", "w") as tar:
            tar.add(image_folder / split, ".")
    whole = {path.name for path in data.iterdir()}
    for source in (hostile["pickle 2"], hostile["pickle 4"]):
        for name in ("train_tarinfos.pickle", "val_tarinfos.pickle", "data_tarinfos.pickle", "_tarinfos.pickle"):
            shutil.copy(source, data / name)
        outcome = command("train", data, *QUICK, "--output", tmp_path / "output", "--experiment", source.stem)
        assert outcome.status == 0 or refused(outcome, "vip train")
    assert whole < {path.name for path in data.iterdir()}


def test_batches_of_cifar10(
    command: Callable[..., Outcome], tmp_path: Path, hostile: dict[str, Path], trained_run: Path
) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        shutil.copy(hostile["pickle 2"], folder / name)
    argv = (tmp_path / "data", "--dataset", "torch/cifar10")
    refused(command("train", *argv, *QUICK, "--output", tmp_path / "output"), "vip train")
    refused(command("validate", *argv, "--checkpoint", trained_run, *DEVICE), "vip validate")


def test_code_in_place_of_images(
    command: Callable[..., Outcome], image_folder: Path, trained_run: Path, tmp_path: Path, hostile: dict[str, Path]
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    for path in [*data.rglob("*.jpg"), *data.rglob("*.png")]:
        shutil.copy(hostile["pickle 2"], path)
    refused(command("train", data, *QUICK, "--output", tmp_path / "output"), "vip train")
    refused(command("validate", data, "--checkpoint", trained_run, *DEVICE), "vip validate")
    assert command("check-data", data, "-j", "1").status == 1


def test_every_command_is_thought_of() -> None:
    """A command that is new has to be added here, if it reads files."""
    tried = {"train", "validate", "generate-label", "benchmark", "report", "label-maps", "checkpoint", "check-data"}
    tried |= {"export", "push-to-hub", "predict", "show"}
    assert set(vip.cli.COMMANDS) - tried == {"make-digits", "prepare-imagenet"}  # which reads archives of images
