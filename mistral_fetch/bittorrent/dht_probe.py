"""Whether the DHT can be joined from here: asked for by ``doctor --network`` alone."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import libtorrent as lt

from mistral_fetch.bittorrent.alerts import ALERT_MASK
from mistral_fetch.bittorrent.settings import SwarmSettings, session_settings

_POLL_MILLISECONDS = 200


def count_dht_nodes(settings: SwarmSettings, timeout_seconds: float) -> int:
    """Return how many nodes of the DHT answered; as soon as one has, or 0 after ``timeout_seconds``."""
    chosen = replace(settings, dht=True, lsd=False, port_mapping=False, proxy="")
    pack: Any = {**session_settings(chosen, incoming=True), "alert_mask": ALERT_MASK}
    session = lt.session(pack)
    deadline = time.monotonic() + timeout_seconds
    try:
        while time.monotonic() < deadline:
            session.post_dht_stats()
            session.wait_for_alert(_POLL_MILLISECONDS)
            known = [alert for alert in session.pop_alerts() if isinstance(alert, lt.dht_stats_alert)]
            nodes = sum(bucket["num_nodes"] for alert in known[-1:] for bucket in alert.routing_table)
            if nodes:
                return nodes
            time.sleep(_POLL_MILLISECONDS / 1000)
        return 0
    finally:
        session.pause()
