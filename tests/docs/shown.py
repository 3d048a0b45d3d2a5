"""Reading the command lines that pages show, as a shell would cut them; nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
)
SHELLS = {"sh", "bash", "console"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROMPT = re.compile(r"^(?:[a-z]+)?\$ +")  # "$ ", "node$ "
_ENDS = {"|", "||", "&&", ";", "<", ">", ">>", "(", ")", "&"}


@dataclass(frozen=True)
class Shown:
    """A line of a page that is typed into a shell."""

    page: str
    line: str

    def commands(self) -> list[list[str]]:
        """Return the words after each ``mistral-fetch`` in the line, those in substitutions too."""
        inner = re.sub(r'"?\$\(|<\(', " ; ", self.line)
        lexer = shlex.shlex(inner.replace(')"', ")"), posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        found: list[list[str]] = []
        current: list[str] | None = None
        for word in lexer:
            if word == "mistral-fetch" and current is None:
                current = []
                found.append(current)
            elif set(word) <= set("|&;<>()"):
                current = None
            elif current is not None:
                current.append(word)
        return found


def shown_lines(page: Path) -> Iterator[Shown]:
    """Give what is typed in a page's ``sh``, ``bash`` and ``console`` blocks, continued lines joined."""
    for language, block in _FENCE.findall(page.read_text()):
        if language in SHELLS:
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                typed = _PROMPT.sub("", line)
                if language != "console" or typed != line:
                    yield Shown(page.name, typed)


def every_shown_line() -> list[Shown]:
    """Return those of all pages."""
    return [shown for page in PAGES for shown in shown_lines(page)]
