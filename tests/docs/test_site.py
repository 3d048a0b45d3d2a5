"""The site: every page is in it, every link leads somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
is_missing = importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None


def test_every_page_is_in_the_navigation_once():
    pages = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(re.findall(r"[\w/.-]+\.md\b", NAVIGATION)) == pages


@pytest.mark.interop
@pytest.mark.skipif(is_missing, reason="the extra docs is not installed")
def test_the_site_builds_strictly_and_is_whole(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/search/search_index.json").stat().st_size > 100_000
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(https?:[^\" >]+)", page.read_text())
        loaded += re.findall(r"<link[^>]*rel=\"?stylesheet[^>]*href=\"?(https?:[^\" >]+)", page.read_text())
        assert loaded == [], page.name
