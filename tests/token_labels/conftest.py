"""What the tests of token labels share."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every label map is written to disk before it is renamed; a busy disk would make the tests take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
