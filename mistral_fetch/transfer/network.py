"""The settings of a user as the settings of an HTTP client: written once for everything that asks a server."""

from __future__ import annotations

from mistral_fetch.config import Settings
from mistral_fetch.sources.http_client import HttpSettings


def http_settings(settings: Settings) -> HttpSettings:
    """Return how to talk to servers; credentials are added by whoever knows whose they are."""
    return HttpSettings(
        connect_timeout_seconds=settings.connect_timeout,
        read_timeout_seconds=settings.read_timeout,
        is_offline=settings.offline,
        proxy=settings.proxy,
        ca_bundle=settings.ca_bundle,
    )
