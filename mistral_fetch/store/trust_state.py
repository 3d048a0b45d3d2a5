"""What :mod:`mistral_fetch.trust` has to remember of each catalog's address, across runs and power cuts.

    trust/<quoted address>/
      seen.json       the highest version each key was seen to sign, and which document was accepted last
      <sha256>        a copy of that document, where it came from a server
      <sha256>.sig    its signature, where one was asked for

A copy is durable before ``seen.json`` names it, and ``seen.json`` is replaced as a whole, so that a crash leaves either
the old catalog or the new one in force. A record that cannot be read is an error: without it a rolled-back catalog
would be believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mistral_fetch.errors import StoreError
from mistral_fetch.store.durable import disk_errors, write_durably
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.strict_json import Fields, UnexpectedJson, decode, integer, matching, table
from mistral_fetch.trust import Seen, SeenVersion

SCHEMA = 1
_MAX_BYTES = 64 * 1024
_LOCK_SECONDS = 10.0
_sha256 = matching(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")
_sha256_or_none = matching(r"(?:[0-9a-f]{64})?", "64 lower-case hexadecimal digits, or nothing")


@dataclass(frozen=True)
class TrustRecord:
    """What is remembered of one address.

    ``accepted`` is the sha256 of the last document that was accepted, ``fingerprint`` the key that vouched for it;
    both are empty where there was none.
    """

    seen: Seen = field(default_factory=dict)
    accepted: str = ""
    fingerprint: str = ""


def load_record(layout: Layout, address: str) -> TrustRecord:
    """Return what is remembered of an address; nothing at first.

    Raises:
        StoreError: There is a record, but it cannot be read.
    """
    path = layout.trust(address) / "seen.json"
    try:
        return _parse_record(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return TrustRecord()
    except (OSError, UnexpectedJson) as error:
        raise StoreError(
            f"the record of the catalogs seen at {address} cannot be read",
            detail=f"expected {path} as this program wrote it, got: {error}",
            hint="if you know why, remove that file: versions are then remembered anew",
        ) from error


def change_record(layout: Layout, address: str, change: Callable[[TrustRecord], TrustRecord]) -> TrustRecord:
    """Replace the record by what ``change`` makes of it, one process at a time; equal records are not written.

    Raises:
        StoreError: It cannot be read or written, or another process keeps it locked.
    """
    with locked(layout.lock(f"trust {address}"), f"trust {address}", _LOCK_SECONDS, lambda _owner: None, lambda: None):
        before = load_record(layout, address)
        after = change(before)
        if after != before:
            with disk_errors("recording which catalog was accepted", layout.trust(address)):
                write_durably(layout.trust(address) / "seen.json", _serialise_record(address, after))
        return after


def keep_copy(layout: Layout, address: str, document: bytes, bundle: bytes | None) -> None:
    """Write a copy of a document that is about to be accepted; no record names it yet.

    Raises:
        StoreError: The disk refused.
    """
    folder, name = layout.trust(address), hashlib.sha256(document).hexdigest()
    with disk_errors("keeping a copy of the catalog", folder):
        if bundle is not None:
            write_durably(folder / f"{name}.sig", bundle)
        write_durably(folder / name, document)


def load_copy(layout: Layout, address: str, record: TrustRecord) -> tuple[bytes, bytes | None] | None:
    """Return the document that was accepted last and its signature, or None where no (whole) copy is here."""
    folder = layout.trust(address)
    try:
        document = (folder / record.accepted).read_bytes() if record.accepted else b""
    except OSError:
        return None
    if hashlib.sha256(document).hexdigest() != record.accepted:
        return None
    return document, _read_if_there(folder / f"{record.accepted}.sig")


def forget_other_copies(layout: Layout, address: str, record: TrustRecord) -> None:
    """Remove the copies that the record no longer names."""
    with disk_errors("removing copies of older catalogs", layout.trust(address)):
        for path in layout.trust(address).iterdir():
            if path.name not in {"seen.json", record.accepted, f"{record.accepted}.sig"}:
                path.unlink(missing_ok=True)


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _parse_record(data: bytes) -> TrustRecord:
    fields = Fields(decode(data, _MAX_BYTES), "the record")
    fields.required("schema", integer(SCHEMA, SCHEMA))
    fields.required("address", lambda value, _where: value)  # for people
    seen = fields.required("seen", table(_read_seen, _sha256))
    record = TrustRecord(
        seen, fields.required("accepted", _sha256_or_none), fields.required("fingerprint", _sha256_or_none)
    )
    fields.done()
    return record


def _read_seen(value: object, where: str) -> SeenVersion:
    fields = Fields(value, where)
    entry = SeenVersion(fields.required("version", integer(1, 1 << 53)), fields.required("sha256", _sha256))
    fields.done()
    return entry


def _serialise_record(address: str, record: TrustRecord) -> bytes:
    fields = {
        "schema": SCHEMA,
        "address": address,
        "seen": {
            fingerprint: {"version": entry.version, "sha256": entry.sha256}
            for fingerprint, entry in sorted(record.seen.items())
        },
        "accepted": record.accepted,
        "fingerprint": record.fingerprint,
    }
    return (json.dumps(fields, indent=1) + "\n").encode()
