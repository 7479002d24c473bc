"""Checkpoints as repositories of the Hugging Face Hub, as timm writes and reads them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from vip.checkpoints.model_card import read_of, write_card
from vip.errors import UserError
from vip.training.config import EvaluationConfig
from vip.training.factory import resolve_data_config
from vip.training.preprocessing import describe
from vip.training.validation import load_model

CARD = "README.md"


class Publication:
    """A checkpoint that is to be published.

    Args:
        path: A checkpoint, or the folder of a run: its best, else its last.
        repo: Repository, as OWNER/NAME.
        model: Name of the model; empty: what the checkpoint holds.
        use_ema: Take the averaged weights; None: where there are any.
        license: Identifier of a license for the card; None: the card names none.

    Raises:
        UserError: If the checkpoint cannot be read, or the repository cannot be called so.
    """

    def __init__(
        self, path: str, repo: str, model: str = "", use_ema: bool | None = None, license: str | None = None
    ) -> None:
        try:
            validate_repo_id(repo)
        except HFValidationError as e:
            raise UserError(f"{repo!r} is no name of a repository, expected OWNER/NAME: {e}") from e
        config = EvaluationConfig(model=model, use_ema=use_ema, device="cpu")
        config, self.model, checkpoint, source = load_model(config, path, set())
        data_config = resolve_data_config(self.model, config)
        about = describe(self.model, data_config, checkpoint.get("class_to_idx"))
        run = read_of(checkpoint, Path(source), evaluated=use_ema is None)
        self.repo, self.card = repo, write_card(self.model, about, run, repo, license)
        self._said: dict[str, Any] = dict(
            safe_serialization=True,
            data_config=data_config,
            # the license and the tag of the architecture's configuration are not those of these weights
            model_config={
                "pretrained_cfg": {"license": license, "tag": None},
                **{name: about[name] for name in ("label_names",) if name in about},
            },
        )

    def write(self, folder: Path) -> list[Path]:
        """Write what would be uploaded into a folder that is yet to be, and return its files.

        Raises:
            UserError: If there is something in the folder, or it cannot be written.
        """
        if not folder.parent.is_dir() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
            raise UserError(f"{folder} holds something already, or is in no folder; name one that is yet to be.")
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                whole = Path(temporary, "whole")
                timm.models.save_for_hf(self.model, str(whole), **self._said)
                (whole / CARD).write_text(self.card, encoding="utf-8")
                for file in whole.iterdir():  # safetensors makes files that other users cannot read
                    file.chmod((whole / CARD).stat().st_mode)
                whole.rename(folder)
        except (OSError, RuntimeError, ValueError, SafetensorError) as e:  # the last three: weights that share memory
            raise UserError(f"Cannot write {folder} ({getattr(e, 'strerror', None) or e}).") from e
        return sorted(folder.iterdir())

    def push(self, private: bool) -> bool:
        """Upload to the Hugging Face Hub; the repository is made if it is not there.

        Args:
            private: Make a repository that only its owners see.

        Returns:
            Whether the card was written: one that is there is kept.

        Raises:
            UserError: If it cannot be uploaded.
        """
        with _uploading(self.repo):
            api = HfApi()
            repo = api.create_repo(self.repo, private=private, exist_ok=True).repo_id
            new = not api.file_exists(repo, CARD)
            if new:  # before timm comes, which would write one of its own
                api.upload_file(path_or_fileobj=self.card.encode(), path_in_repo=CARD, repo_id=repo)
            timm.models.push_to_hf_hub(self.model, repo, private=private, **self._said)
            return new


@contextmanager
def _uploading(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # each version of huggingface_hub has another library for HTTP, with errors of its own
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"Cannot upload to {repo} on the Hugging Face Hub: {reason}. Look at the connection, "
            "HF_HUB_OFFLINE and the token (hf auth login, or HF_TOKEN), or write a folder with --dry-run FOLDER."
        ) from e
