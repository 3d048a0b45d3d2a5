"""Keys that a request has to show: read from a file that nobody else can read, compared without telling by time."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

from mistral_runtime.errors import BadRequest
from mistral_runtime.serve.api_error import ApiError

MAX_FILE_BYTES = 1 << 20
_HINT = "one key a line, lines that begin with # are comments; chmod 600 FILE"


class ApiKeys:
    """A set of keys, kept as digests."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def require(self, authorization: str | None) -> None:
        """Accept `Bearer KEY` with a known key.

        Raises:
            ApiError: 401.
        """
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise ApiError(401, "expected the header Authorization: Bearer KEY, found none", code="missing_api_key")
        given = _digest(key.strip().encode("latin-1", "replace"))
        # All are compared, whether or not one fits: the time tells nothing.
        matches = sum(hmac.compare_digest(given, known) for known in self._digests)
        if not matches:
            raise ApiError(401, "the API key is not known here", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def load_api_keys(path: Path) -> ApiKeys:
    """Read the keys of a file.

    Raises:
        BadRequest: It cannot be read, others may read it, or it holds no key or a malformed one.
    """
    try:
        with path.open("rb") as stream:
            mode = stat.S_IMODE(path.stat().st_mode)
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadRequest(
            f"the key file {path} cannot be read", detail=f"expected a file, found: {error.strerror}", hint=_HINT
        ) from error
    if mode & 0o077:
        raise BadRequest(
            f"the key file {path} can be read by others",
            detail=f"expected mode 600 or stricter, found {mode:o}",
            hint=f"chmod 600 {path}",
        )
    keys = _parse(path, data)
    if not keys:
        raise BadRequest(f"the key file {path} holds no key", detail="expected at least one, found none", hint=_HINT)
    return ApiKeys(keys)


def _parse(path: Path, data: bytes) -> list[str]:
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(data) > MAX_FILE_BYTES or not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise BadRequest(
            f"the key file {path} is malformed",
            detail="expected keys of printable ASCII without spaces, found something else",
            hint=_HINT,
        )
    return keys
