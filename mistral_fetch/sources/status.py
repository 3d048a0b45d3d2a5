"""What an HTTP status (and Hugging Face's error code beside it) means, as one of our errors. Pure.

Hugging Face answers 401 without and 403 with a token that lacks access to a gated repository
(``X-Error-Code: GatedRepo``), and 401 for repositories that do not exist too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import mktime_tz, parsedate_tz
from urllib.parse import urlsplit

from mistral_fetch.errors import AccessError, GatedRepository, MirrorStatus, NotAuthorised
from mistral_fetch.sources.urls import origin_of, redact

_REPOSITORY = re.compile(r"/(?:api/models/)?([\w.-]+/[\w.-]+)/(?:resolve|revision)/")
_MISSING_CODES = {"RepoNotFound", "RevisionNotFound", "EntryNotFound"}
_TRY_AGAIN = {408, 425, 429}
_NO_TORRENT_NEEDED = "or take a channel without a login: --via torrent where the model has one (mistral-fetch show)"


class PassingStatus(MirrorStatus):
    """A status that may pass: the mirror is busy, or a signed address behind a redirect has expired."""

    def __init__(self, what: str, *, detail: str, hint: str, status: int, retry_after_seconds: float | None) -> None:
        super().__init__(what, detail=detail, hint=hint, status=status)
        self.retry_after_seconds = retry_after_seconds

    @property
    def kind(self) -> str:
        """Return the same name as any other bad status: scripts need not tell them apart."""
        return "mirror-status"

    @property
    def is_permanent(self) -> bool:  # type: ignore[override]
        """Asking again may help."""
        return False


def explain_status(
    status: int, headers: Mapping[str, str], asked_url: str, answering_url: str, *, has_credentials: bool
) -> AccessError | MirrorStatus:
    """Return the error that a status of 300 and more (or an unusual 2xx) stands for.

    Args:
        status: The status.
        headers: The answer's headers, names in lower case.
        asked_url: The address the request began with; the only one that is shown.
        answering_url: The address that answered, after redirects.
        has_credentials: Whether a token or password was sent.
    """
    shown = redact(asked_url)
    code = headers.get("x-error-code", "")
    if code == "GatedRepo":
        return _gated(shown, asked_url, has_credentials=has_credentials)
    if code in _MISSING_CODES:
        return _missing(shown, code, status)
    was_redirected = origin_of(answering_url) != origin_of(asked_url)
    if status in {401, 403, 410} and was_redirected:
        return PassingStatus(
            f"{shown} redirected to an address that answers {status}",
            detail="expected the file, got a refusal behind a redirect; signed addresses expire",
            hint="run the same command again; if it stays, use another mirror or --via torrent",
            status=status,
            retry_after_seconds=None,
        )
    if status in {401, 403, 407}:
        return _refused(shown, status, has_credentials=has_credentials)
    if status in _TRY_AGAIN or status >= 500:
        return PassingStatus(
            f"{shown} answered {status}",
            detail=f"expected the file, got {_PHRASES.get(status, 'an error of the server')}",
            hint="wait a little and run the same command again, or use another mirror or --via torrent",
            status=status,
            retry_after_seconds=parse_retry_after(headers.get("retry-after", "")),
        )
    return MirrorStatus(
        f"{shown} answered {status}",
        detail=f"expected the file, got {_PHRASES.get(status, 'a status that is no use')}",
        hint="check the address, or use another mirror or --via torrent",
        status=status,
    )


_PHRASES = {
    404: "'not found'",
    410: "'gone'",
    416: "'range not satisfiable'",
    429: "'too many requests'",
    503: "'service unavailable'",
}


def parse_retry_after(value: str, now: float | None = None) -> float | None:
    """Return how many seconds a ``Retry-After`` asks to wait (RFC 9110, 10.2.3), or None."""
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    parsed = parsedate_tz(value) if value else None
    if parsed is None:
        return None
    try:
        moment = mktime_tz(parsed)
    except (OverflowError, ValueError):
        return None
    return max(0.0, moment - (time.time() if now is None else now))


def _gated(shown: str, url: str, *, has_credentials: bool) -> AccessError:
    match = _REPOSITORY.search(urlsplit(url).path)
    repository = match[1] if match else "the repository"
    page = f"https://huggingface.co/{repository}" if match else "its page at Hugging Face"
    if has_credentials:
        return GatedRepository(
            f"access to {repository} was not granted to this token: {shown}",
            detail="expected the file, got 'gated repository' although a token was sent",
            hint=f"ask for access in a browser at {page}, then run it again; {_NO_TORRENT_NEEDED}",
        )
    return NotAuthorised(
        f"{repository} is gated and no token was sent: {shown}",
        detail="expected the file, got 'gated repository'",
        hint=f"ask for access at {page}, then export HF_TOKEN=hf_…; {_NO_TORRENT_NEEDED}",
    )


def _missing(shown: str, code: str, status: int) -> MirrorStatus:
    thing = {"RepoNotFound": "repository", "RevisionNotFound": "revision", "EntryNotFound": "file"}[code]
    return MirrorStatus(
        f"{shown}: the server has no such {thing}",
        detail=f"expected the file, got {status} with {code}",
        hint="check the name; a private repository needs: export HF_TOKEN=hf_…",
        # 401 is what Hugging Face says for a repository that does not exist; 404 is what it means.
        status=404,
    )


def _refused(shown: str, status: int, *, has_credentials: bool) -> AccessError:
    if status == 407:
        return NotAuthorised(
            f"the proxy on the way to {shown} wants a login",
            detail="expected the file, got 407 from the proxy",
            hint="put user and password into HTTPS_PROXY, or use --via torrent",
        )
    sent = "the credentials sent were refused" if has_credentials else "no credentials were sent"
    return NotAuthorised(
        f"{shown} answered {status}",
        detail=f"expected the file, got a refusal; {sent}",
        hint="for Hugging Face: export HF_TOKEN=hf_… (huggingface.co/settings/tokens); else use another mirror "
        "or --via torrent",
    )
