"""The `vip` command: one short module a subcommand."""

import importlib
import os
import sys
import time
from collections.abc import Callable

from vip.errors import UserError
from vip.options import nearest

COMMANDS = {
    "train": "train a model",
    "validate": "validate checkpoints or models",
    "predict": "name what is in images",
    "generate-label": "write the label maps of training images, for token labeling",
    "benchmark": "time models side by side, and print the published comparison",
    "show": "draw a batch of training images, or what a model mixes",
    "export": "write a model for ONNX Runtime, AOTInductor, torch.export or TorchScript",
    "push-to-hub": "publish a checkpoint on the Hugging Face Hub",
    "report": "compare runs with each other and with a published one",
    "label-maps": "convert, check and time label maps",
    "checkpoint": "look into checkpoints, verify, average, strip and convert them",
    "prepare-imagenet": "make ImageNet's image folder from its archives",
    "check-data": "check the images of a data set before training on them",
    "make-digits": "write scikit-learn's handwritten digits as an image folder",
}


def run(program: str, command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a command; a `UserError` becomes one line on standard error and exit status 2."""
    try:
        status = command(sys.argv[1:] if argv is None else argv) or 0
        _flush()
        return status
    except UserError as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # most mistakes hit all ranks alike; the first one's report ends the others before theirs
        print(f"{program}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `vip ... | head`
        _discard_output()
        return 141


def _flush() -> None:
    """Write what has been printed: a failure at Python's own exit has neither our message nor our status."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as e:
        _discard_output()
        raise UserError(f"Cannot write the output ({e.strerror}); make room, or send it elsewhere.") from e


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Entry point of `vip`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:16} {text}" for name, text in COMMANDS.items())
        print(f"usage: vip COMMAND ...\n\n{lines}\n\nvip COMMAND --help tells what a command takes.")
        return 0
    if argv[0] == "--version":
        from vip.version import __version__

        print(f"vip {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"vip: error: no command {argv[0]!r}.{nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"vip.cli.{argv[0].replace('-', '_')}")
    return run(f"vip {argv[0]}", module.main, argv[1:])
