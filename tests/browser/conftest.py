"""A browser for the tests that need one, and their skip where none is installed."""

from __future__ import annotations

import pytest

from tests.browser.chromium import Chromium, find_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Give a headless Chromium for the whole session."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as running:
        yield running
