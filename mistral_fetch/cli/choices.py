"""The words that options accept where only some make sense."""

from __future__ import annotations

from enum import Enum


class ProgressMode(str, Enum):
    """How progress is shown on standard error."""

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    JSON = "json"
    NONE = "none"


class Via(str, Enum):
    """Which sources a transfer may use."""

    AUTO = "auto"
    HTTP = "http"
    TORRENT = "torrent"


class ConvertTo(str, Enum):
    """What weights can be converted to."""

    SAFETENSORS = "safetensors"


class QuantizeTo(str, Enum):
    """How few bits weights can be stored in."""

    INT8 = "int8"
    INT4 = "int4"
