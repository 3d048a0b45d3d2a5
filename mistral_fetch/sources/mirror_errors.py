"""What can go wrong with a mirror besides its status, as our errors with their three lines. Pure."""

from __future__ import annotations

from mistral_fetch.errors import MirrorTimeout, MirrorUnreachable, NotAModelFile
from mistral_fetch.sources.urls import redact

OTHER_WAYS = "check the network (mistral-fetch doctor), or use another mirror or --via torrent"


def unreachable(shown: str, reason: str) -> MirrorUnreachable:
    """Return the error for: no connection could be made; it may be possible later."""
    return MirrorUnreachable(f"cannot reach {shown}", detail=f"expected a connection, got: {reason}", hint=OTHER_WAYS)


def silent(shown: str) -> MirrorTimeout:
    """Return the error for: no byte came in time."""
    return MirrorTimeout(
        f"{shown} stopped answering",
        detail="expected bytes, got none within the time limit",
        hint="run the same command again to go on; MISTRAL_FETCH_READ_TIMEOUT raises the limit",
    )


def broken(shown: str, reason: str) -> MirrorUnreachable:
    """Return the error for: the connection ended in the middle."""
    return MirrorUnreachable(
        f"the connection to {shown} broke",
        detail=f"expected the whole answer, got: {reason}",
        hint="run the same command again to go on",
    )


def untrusted(shown: str, reason: str) -> MirrorUnreachable:
    """Return the error for: a certificate that no known authority signed."""
    return permanent(
        MirrorUnreachable(
            f"{shown} shows a certificate that is not trusted",
            detail=f"expected one that a known authority signed, got: {reason}",
            hint="behind a company proxy, set SSL_CERT_FILE to its CA bundle; else do not use this mirror",
        )
    )


def permanent(error: MirrorUnreachable) -> MirrorUnreachable:
    """Return the error marked as one that asking again cannot cure."""
    error.is_permanent = True
    return error


def too_large(url: str, limit_bytes: int) -> NotAModelFile:
    """Return the error for: a small document is not small."""
    return NotAModelFile(
        f"{redact(url)} is too large to be what it should be",
        detail=f"expected at most {limit_bytes} bytes, got more",
        hint="check the address",
    )


def too_slow(url: str, seconds: float) -> MirrorTimeout:
    """Return the error for: a small document takes for ever; its server is not waited for a second time."""
    error = MirrorTimeout(
        f"{redact(url)} answers too slowly",
        detail=f"expected the whole answer within {seconds:.0f} seconds",
        hint="run the same command again, or use another mirror",
    )
    error.is_permanent = True
    return error


def circling(shown: str, redirects: int) -> MirrorUnreachable:
    """Return the error for: one redirect too many."""
    return permanent(
        MirrorUnreachable(
            f"{shown} redirects in circles",
            detail=f"expected an answer within {redirects} redirects, got one more",
            hint="use another mirror",
        )
    )


def compressed(shown: str, encoding: str) -> NotAModelFile:
    """Return the error for: a compressed body although identity was asked for."""
    return NotAModelFile(
        f"{shown} sends a compressed body",
        detail=f"expected the bytes as they are (Accept-Encoding: identity), got {encoding[:40]!r}",
        hint="use another mirror; tell the operator of this one",
    )
