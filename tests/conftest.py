"""What every test starts from: a cache of its own, and nothing of the user's settings, tokens or proxies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_FOREIGN = ("MISTRAL_FETCH_", "HF_", "HUGGING_FACE_")
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return this test's cache directory, which does not exist yet; also that of processes it starts."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name.lower() in _PROXIES:
            monkeypatch.delenv(name)
    home = tmp_path / "cache"
    monkeypatch.setenv("MISTRAL_FETCH_HOME", str(home))
    monkeypatch.setenv("MISTRAL_FETCH_DISK_RESERVE", "0")
    # No configuration file, and no token of Hugging Face's, can be found in here.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    return home
