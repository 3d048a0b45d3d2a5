"""What ``doctor`` found, and how it is told: nothing in it names a person, a password or a token."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_fetch.errors import MistralFetchError

OK, WARN, FAIL = "ok", "warn", "FAIL"
_TOKENS = re.compile(r"\b(hf_[A-Za-z0-9_]{3,}|(?:ghp|sk|gho)[-_][A-Za-z0-9_-]{10,})")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(https?://[^\s?]+)\?\S+")
_OTHERS_HOMES = re.compile(r"(?<![\w.~-])(/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s:;,]+")
_TOO_COMMON = {"root", "user", "users", "home", "admin", "runner", "python", "ubuntu", "debian"}


@dataclass(frozen=True)
class Finding:
    """One check: how it went, what there is, and what to type next where something is not right."""

    state: str
    detail: str
    hint: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def good(detail: str, **facts: Any) -> Finding:
    """Return a finding that needs nobody."""
    return Finding(OK, detail, facts=facts)


def warn(detail: str, hint: str, **facts: Any) -> Finding:
    """Return a finding that works, but not as it could."""
    return Finding(WARN, detail, hint, facts)


def fail(detail: str, hint: str, **facts: Any) -> Finding:
    """Return a finding that stops something from working."""
    return Finding(FAIL, detail, hint, facts)


def examine(check: Callable[[], Finding]) -> Finding:
    """Run a check; what it raises is a finding too."""
    try:
        return check()
    except MistralFetchError as error:
        return fail(f"{error.what}; {error.detail}", error.hint)
    except OSError as error:
        return fail(error.strerror or str(error), "look at the disk and its permissions, or choose another --home DIR")


class Redactor:
    """Takes out of a text what a stranger must not read: the user's name, passwords in addresses, tokens."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._home = str(Path.home()) if environment.get("HOME") or os.name == "nt" else ""
        names = {environment.get("USER", ""), environment.get("LOGNAME", ""), _account()} - {""}
        self._names = [name for name in sorted(names) if len(name) > 2 and name.lower() not in _TOO_COMMON]
        secret = ("TOKEN", "PASSWORD", "SECRET", "KEY")
        values = [value for name, value in environment.items() if any(word in name.upper() for word in secret)]
        self._secrets = sorted({value for value in values if len(value) >= 6 and "/" not in value}, key=len)[::-1]

    def __call__(self, text: str) -> str:
        """Return the text without them."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = _QUERY.sub(r"\1?***", _CREDENTIALS.sub("***@", _TOKENS.sub("***", text)))
        if self._home not in {"", "/"}:
            text = re.sub(rf"{re.escape(self._home)}(?![\w.-])", "~", text)
        text = _OTHERS_HOMES.sub(r"\1***", text)
        for name in self._names:
            text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", "***", text)
        return text

    def all(self, value: Any) -> Any:
        """Return a JSON value with every text in it redacted."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self(str(key)): self.all(item) for key, item in value.items()}
        return [self.all(item) for item in value] if isinstance(value, list | tuple) else value


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""  # an account that has no name


def as_text(findings: Mapping[str, Finding]) -> str:
    """Return the report for people: a line a check, and below it what to do."""
    width = max(map(len, findings))
    lines = []
    for name, found in findings.items():
        lines.append(f"{found.state.ljust(4)} {name.ljust(width)}  {found.detail}")
        if found.hint:
            lines.append(f"{' ' * (width + 7)}-> {found.hint}")
    return "\n".join(lines)


def as_fields(findings: Mapping[str, Finding]) -> dict[str, Any]:
    """Return the same for programs."""
    return {
        name: {
            "ok": found.state != FAIL,
            "state": found.state.lower(),
            "detail": found.detail,
            "hint": found.hint,
            **({"facts": dict(found.facts)} if found.facts else {}),
        }
        for name, found in findings.items()
    }
