"""The parallel engine at the size of a test: small pieces, runs and batches, so that a few MB need many of each."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mistral_fetch.simulators.publisher import SMALL_PIECE_LENGTH
from mistral_fetch.sources import http, http_body, http_engine, mirror_state, schedule
from mistral_fetch.sources.retry import RetryPolicy
from mistral_fetch.store import blobs, follower, partials
from mistral_fetch.units import KIB, MIB

PIECE = SMALL_PIECE_LENGTH
BATCH = 8 * PIECE
CONNECTIONS = 3
LONGEST_RUN = 6 * PIECE
# Of each answer; slow enough that several are under way at once.
RATE = 24 * MIB
# What the simulator may have handed to the network when a connection ends, and nobody ever reads.
SEND_BUFFER = 64 * KIB

_SMALL: tuple[tuple[Any, str, Any], ...] = (
    (schedule, "FIRST_RUN_BYTES", 3 * PIECE),
    (schedule, "LONGEST_RUN_BYTES", LONGEST_RUN),
    # Steals and races after moments, as a whole transfer takes no more.
    (schedule, "SETTLE_SECONDS", 0.1),
    (schedule, "REQUEST_SECONDS", 0.05),
    # Answers above this are read straight from their socket; both ways are to be used.
    (http_body, "DIRECT_BYTES", 2 * PIECE),
    (http, "FIRST_CONNECTIONS", CONNECTIONS),
    (http, "RetryPolicy", partial(RetryPolicy, attempts=3, first_delay_seconds=0.01)),
    (http_engine, "BATCH_BYTES", BATCH),
    (mirror_state, "REFUSED_SECONDS", 0.05),
    (partials, "BATCH_BYTES", BATCH),
    # Files without piece hashes are cut into as many pieces as those with them.
    (partials, "DEFAULT_PIECE_LENGTH", PIECE),
    (blobs, "DEFAULT_PIECE_LENGTH", PIECE),
    (follower, "_WAIT_SECONDS", 0.02),
)


def shrink(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make everything small; with ``monkeypatch.setattr`` only for one test."""
    for module, name, value in _SMALL:
        assert hasattr(module, name), name
        set_attribute(module, name, value)


def write_one_certificate(path: Path) -> None:
    """Write a file for ``SSL_CERT_FILE``: reading all of the web's authorities costs more than a pull of some MB."""
    path.write_text(ssl.DER_cert_to_PEM_cert(ssl.create_default_context().get_ca_certs(binary_form=True)[0]))
