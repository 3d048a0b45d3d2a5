"""What rank 0 and the other ranks say to each other beside the tensors: one JSON object a line, over pipes.

Rank 0 writes to a rank's standard input: steps, and by closing it the end. A rank writes to its standard
output: that it has come so far, or the error that ends it. Over pipes and not over the group's collectives because a
rank may wait an hour for the next question without a timeout or a spinning GPU, and because a pipe ends when the
process at its other end does, however that ended.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from mistral_runtime import errors
from mistral_runtime.errors import MistralRuntimeError


@dataclass(frozen=True)
class RankOptions:
    """What a rank is told when it starts, as one argument; the types are names, so that torch need not be there yet."""

    directory: str
    meeting_file: str
    rank: int
    ranks: int
    device: str
    dtype: str
    threads: int

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankOptions:
        """Return the options that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class StepOrder:
    """Append `ids` to the sequence; with `context`, first begin a new one with room for so many positions."""

    ids: list[int]
    context: int | None

    def to_line(self) -> bytes:
        """Return one line."""
        return json.dumps([self.ids, self.context]).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> StepOrder:
        """Return the order that `to_line` wrote."""
        ids, context = json.loads(line)
        return cls(ids, context)


Stage = Literal["started", "ready"]
"""`started`: the weights were found good and the group can be met. `ready`: the slices are loaded."""


@dataclass(frozen=True)
class RankReport:
    """How far a rank has come, or why it cannot go on."""

    stage: Stage | None = None
    error: MistralRuntimeError | None = None

    def to_line(self) -> bytes:
        """Return one line."""
        if self.error is None:
            return json.dumps({"stage": self.stage}).encode() + b"\n"
        fields = {"kind": type(self.error).__name__, "what": self.error.what}
        return json.dumps(fields | {"detail": self.error.detail, "hint": self.error.hint}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> RankReport:
        """Return the report that `to_line` wrote, its error of the same kind."""
        fields = json.loads(line)
        if "stage" in fields:
            return cls(stage=fields["stage"])
        kind: type[MistralRuntimeError] = getattr(errors, fields["kind"])
        return cls(error=kind(fields["what"], detail=fields["detail"], hint=fields["hint"]))
