"""Writing a model in a format that runs without this package, and reading it back."""

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vip import ops
from vip.errors import UserError
from vip.export.check import TOLERANCE, Run, largest_difference
from vip.files import replacing
from vip.models.inference import optimize_for_inference
from vip.training.preprocessing import describe

OPSET = 18  # of ONNX: the one that torch's exporter writes without a conversion
LARGEST_BATCH = 1024  # torch.export wants a bound
EXAMPLE_BATCH = 2  # torch.export takes 0 and 1 for sizes that are fixed
INPUT, OUTPUT, ENTRY = "images", "logits", "preprocessing.json"


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        endings: Of its files.
        needs: Packages beside torch that write and run it.
        write: Takes a model, an example batch, the text that describes the pre-processing, and the file to write.
        read: Gives what runs the file, and that text.
    """

    endings: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[nn.Module, torch.Tensor, str, Path], None]
    read: Callable[[Path], tuple[Run, str]]


class _Normalized(nn.Module):
    """A model of images from 0 to 1."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - self.mean) / self.std)


def export_model(
    model: nn.Module,
    path: str | Path,
    format: str,
    about: Mapping[str, Any] | None = None,
    normalize: bool = False,
    check: bool = True,
) -> float | None:
    """Write a model to a file that takes batches of any size, and check what the file computes.

    Args:
        model: A model of this package or of timm, in float32. It is not changed.
        path: The file, whose ending is one of the format's; replaced if it is there.
        format: One of `FORMATS`.
        about: What the file is to say of its pre-processing, as `vip.training.preprocessing.describe` gives it;
            None: what the model's configuration says.
        normalize: Let the file normalize images: it takes values from 0 to 1.
        check: Run the file and compare it with the model.

    Returns:
        The largest difference from the model's outputs over the largest of these, None without a check.

    Raises:
        UserError: If a library is missing, the model cannot be exported, the file cannot be written, or it computes
            something else than the model does: then there is no file.
    """
    path, chosen = Path(path), check_target(path, format)
    _check_packages(format, chosen)
    about = {**(about or describe(model)), "normalizes": normalize}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = torch.randn(EXAMPLE_BATCH, *about["input_size"], device=device)
    model, ready = copy.deepcopy(model).eval(), optimize_for_inference(model, torch.float32, channels_last=False)
    if normalize:
        model, ready = (_Normalized(m, about["mean"], about["std"]).to(device).eval() for m in (model, ready))
    try:
        with _quietly(), _without_kernels(), torch.no_grad(), replacing(path) as unfinished:
            chosen.write(ready, example, json.dumps(about), unfinished)
            if not check:
                return None
            difference = largest_difference(chosen.read(unfinished)[0], model, example)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"The {format} file differs from the model by {difference:.1e} of its largest output, expected at "
                    f"most {TOLERANCE:.0e}; it was not kept. Try another format."
                )
            return difference
    except UserError:
        raise
    except Exception as e:  # exporters and compilers raise nearly anything at a model that they cannot take
        if isinstance(e, OSError) and e.strerror:
            raise UserError(f"Cannot write {path} ({e.strerror}).") from e
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise UserError(f"{about['architecture']} cannot be exported as {format}: {reason} Try another format.") from e


def load_exported(path: str | Path, format: str) -> tuple[Run, dict[str, Any]]:
    """Read a file that `export_model` wrote. All formats but ONNX can run code: read files that you trust.

    Returns:
        What takes a batch of images `[B, C, H, W]` to logits `[B, classes]`, and what the file says of them.

    Raises:
        UserError: If it cannot be read.
    """
    path, chosen = Path(path), _format(format)
    _check_packages(format, chosen)
    try:
        with _quietly():
            run, text = chosen.read(path)
        return run, json.loads(text)
    except OSError as e:
        raise UserError(f"Cannot read {path} ({e.strerror or e}).") from e
    except Exception as e:  # readers of damaged files raise nearly anything
        raise UserError(f"{path} is no {format} file of vip export, or is damaged ({type(e).__name__}).") from e


def check_target(path: str | Path, format: str) -> Format:
    """The format of a file that is to be written.

    Raises:
        UserError: If there is no such format, or the file has the ending of another, or is in no folder.
    """
    path, chosen = Path(path), _format(format)
    if not path.name.endswith(chosen.endings):
        raise UserError(f"{path} does not end in {' or '.join(chosen.endings)}, as files of {format} do; rename it.")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'in no folder'}; name a file in a folder.")
    return chosen


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"There is no format {name!r}; choose {', '.join(FORMATS)}.")
    return FORMATS[name]


def _check_packages(name: str, format: Format) -> None:
    try:
        for package in format.needs:
            importlib.import_module(package)
    except ImportError as e:
        raise UserError(
            f"{name} needs {' and '.join(format.needs)} ({e}): pip install 'vision-permutator[export]'"
        ) from e


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what exporters say of their own affairs; what goes wrong they raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Let torch compute what other programs have no kernels for."""
    enabled = ops._enabled
    ops.set_kernels(False)
    try:
        yield
    finally:
        ops.set_kernels(enabled)


def _trace(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", max=LARGEST_BATCH)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def _write_torch_export(model: nn.Module, example: torch.Tensor, about: str, path: Path) -> None:
    buffer = io.BytesIO()  # as torch looks at the ending of a file
    torch.export.save(_trace(model, example), buffer, extra_files={ENTRY: about})
    path.write_bytes(buffer.getbuffer())


def _read_torch_export(path: Path) -> tuple[Run, str]:
    extra = {ENTRY: ""}
    with open(path, "rb") as file:
        return torch.export.load(file, extra_files=extra).module(), extra[ENTRY]


def _write_aotinductor(model: nn.Module, example: torch.Tensor, about: str, path: Path) -> None:
    buffer, program = io.BytesIO(), _trace(model, example)
    options = {"aot_inductor.metadata": {ENTRY: about}}
    torch._inductor.aoti_compile_and_package(program, package_path=buffer, inductor_configs=options)
    path.write_bytes(buffer.getbuffer())


def _read_aotinductor(path: Path) -> tuple[Run, str]:
    with open(path, "rb") as file:
        package: Any = torch._inductor.aoti_load_package(file)
    return package, package.get_metadata()[ENTRY]


def _write_torchscript(model: nn.Module, example: torch.Tensor, about: str, path: Path) -> None:
    torch.jit.save(torch.jit.script(model), path, _extra_files={ENTRY: about})


def _read_torchscript(path: Path) -> tuple[Run, str]:
    extra: dict[str, Any] = {ENTRY: ""}
    return torch.jit.load(path, _extra_files=extra), extra[ENTRY].decode()


def _write_onnx(model: nn.Module, example: torch.Tensor, about: str, path: Path) -> None:
    program: Any = torch.onnx.export(
        _trace(model, example),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: "batch"},),
        opset_version=OPSET,
        verbose=False,
        dynamo=True,
    )
    program.model.metadata_props[ENTRY] = about
    program.save(path)


def _read_onnx(path: Path) -> tuple[Run, str]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy(force=True)})[0])

    return run, session.get_modelmeta().custom_metadata_map[ENTRY]


FORMATS = {
    "onnx": Format((".onnx",), ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "torch-export": Format((".pt2",), (), _write_torch_export, _read_torch_export),
    "aotinductor": Format((".pt2",), (), _write_aotinductor, _read_aotinductor),
    "torchscript": Format((".pt", ".ts"), (), _write_torchscript, _read_torchscript),
}
