"""What the command line of `chat` asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.session import ComputeOptions
from mistral_runtime.startup import StartClock


@dataclass(frozen=True)
class ChatOptions:
    """Every flag, as checked as the parser checks it."""

    directory: Path
    sampling: SamplingParams
    compute: ComputeOptions
    max_tokens: int | None = None
    context: int | None = None
    chat_template: str = "auto"
    system: str | None = None
    stops: tuple[str, ...] = field(default_factory=tuple)
    quiet: bool = False
    plain: bool = False
    keeps_history: bool = True
    timings: bool = False
    clock: StartClock = field(default_factory=StartClock)

    @property
    def wants_footer(self) -> bool:
        """Whether numbers follow each answer: a person reads it, and did not ask for quiet."""
        return not self.quiet and sys.stderr.isatty()
