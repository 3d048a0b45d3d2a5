"""What holds where nobody says otherwise. Imports nothing, so that --help is instant."""

from __future__ import annotations

PORT = 8000
MAX_BODY = 16 << 20
DRAIN_SECONDS = 30.0
MAX_QUEUE = 256
