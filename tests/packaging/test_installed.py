"""The sdist and the wheel, installed into an environment of their own and used outside the checkout.

What the wheel declares to need is not downloaded into that environment, which would take gigabytes for torch. Links
lead to the copies that run these tests, for the declared distributions, for what they declare in turn, and for nothing
else: neither the checkout nor what only tests need is there. pip, without an index, then says whether that suffices.
"""

import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath

import pytest
from packaging.requirements import Requirement
from training_command import QUICK

from vip.cli import COMMANDS
from vip.version import __version__

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


def needs(package: Distribution, extras: Iterable[str]) -> dict[str, Distribution]:
    """The distributions that one needs, at any remove."""
    found: dict[str, Distribution] = {}
    waiting, seen = [(package, frozenset(extras))], set()
    while waiting:
        package, extras = waiting.pop()
        for requirement in map(Requirement, package.requires or []):
            wanted = (requirement.name.lower(), frozenset(requirement.extras))
            marker = requirement.marker
            if wanted not in seen and (not marker or any(marker.evaluate({"extra": e}) for e in {"", *extras})):
                seen.add(wanted)
                found[wanted[0]] = distribution(requirement.name)
                waiting.append((found[wanted[0]], wanted[1]))
    return found


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, the extra for the digits, and what both need."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    [packages], [wheel] = folder.glob("lib/python*/site-packages"), built.glob("*.whl")
    metadata = ZipPath(wheel, f"vision_permutator-{__version__}.dist-info/")
    for package in needs(PathDistribution(metadata), ["demo"]).values():
        for name in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / name).exists():
                (packages / name).symlink_to(package.locate_file(name))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--no-index", f"{wheel}[demo]", cwd=folder)
    run(*pip, "check", cwd=folder)
    return folder


def test_the_package_is_that_of_the_environment(environment: Path, tmp_path: Path) -> None:
    code = (
        "import timm, vip; print(vip.__file__); print(sum(p.numel() for p in timm.create_model('vip_s7').parameters()))"
    )
    file, parameters = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).resolve().is_relative_to(environment.resolve())
    assert parameters == "25114984"
    assert run(environment / "bin" / "vip", "--version", cwd=tmp_path) == f"vip {__version__}\n"


def test_every_command_explains_itself(environment: Path, tmp_path: Path) -> None:
    """In one process, as it is importing torch that takes time."""
    code = "\n".join(
        [
            "from contextlib import suppress",
            "from vip.cli import COMMANDS, main",
            "for command in COMMANDS:",
            "    with suppress(SystemExit):",
            "        main([command, '--help'])",
        ]
    )
    text = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert all(f"usage: vip {command} " in text for command in COMMANDS)


def test_digits_are_trained_on_and_validated(environment: Path, tmp_path: Path) -> None:
    vip = environment / "bin" / "vip"
    assert run(vip, "make-digits", "digits", cwd=tmp_path) == "1437 training and 360 validation images\n"
    run(vip, "train", "digits", *QUICK, "-b", "64", "--experiment", "run", cwd=tmp_path)
    assert (tmp_path / "output" / "train" / "run" / "model_best.pth.tar").exists()
    assert '"top1": ' in run(vip, "validate", "digits", "--checkpoint", "output/train/run", "-j", "0", cwd=tmp_path)


def test_the_sdist_holds_what_tests_and_documents_need(built: Path, tmp_path: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    tests = ("tests/test_readme.py", "tests/test_zoo.py::test_published_models_are_there", "tests/data/test_digits.py")
    assert " passed" in run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=source)
    for name in ("Makefile", ".ci/run", "constraints.txt", "mkdocs.yml", "Dockerfile", "scripts/slurm/train.sbatch"):
        assert (source / name).is_file(), name
