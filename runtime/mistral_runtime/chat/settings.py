"""What `/set` can change: the sampling and the longest answer, by name, each checked before it counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mistral_runtime.errors import BadRequest, BadSampling
from mistral_runtime.sampling_params import SamplingParams

# What kind of number each is.
_READERS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
}


@dataclass(frozen=True)
class Settings:
    """What counts for the next answer."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None

    def changed(self, name: str, text: str) -> Settings:
        """Return these settings with one value read from text; `none` is the value that nobody chose.

        Raises:
            BadRequest: No such name, or no such value.
        """
        name = name.replace("-", "_")
        if name not in _READERS:
            raise BadRequest(
                f"there is no setting {name}",
                detail=f"expected one of {', '.join(_READERS)}",
                hint="/set alone lists them with their values",
            )
        value = None if text.lower() == "none" else _read(name, text)
        if name == "max_tokens":
            return replace(self, max_tokens=_require_positive(value))
        fresh: dict[str, Any] = {name: getattr(SamplingParams(), name) if value is None else value}
        try:
            return replace(self, sampling=replace(self.sampling, **fresh))
        except BadSampling as error:
            raise BadRequest(
                error.what, detail=error.detail, hint=f"/set {name} none brings its default back"
            ) from None

    def listing(self) -> str:
        """Return a line for each value."""
        values = {name: getattr(self.sampling, name) for name in _READERS if name != "max_tokens"}
        values["max_tokens"] = self.max_tokens
        width = max(map(len, values))
        return "\n".join(f"{name:<{width}}  {'none' if value is None else value}" for name, value in values.items())


def _read(name: str, text: str) -> float:
    kind = _READERS[name]
    try:
        return kind(text)
    except ValueError:
        raise BadRequest(
            f"{name} cannot be set to {text}",
            detail=f"expected {'a whole number' if kind is int else 'a number'} or none, found {text!r}",
            hint="/set alone lists the settings",
        ) from None


def _require_positive(value: float | None) -> int | None:
    if value is not None and value < 1:
        raise BadRequest(
            "max_tokens is out of range",
            detail=f"expected 1 or more, found {value}",
            hint="/set max_tokens none brings its default back",
        )
    return None if value is None else int(value)
