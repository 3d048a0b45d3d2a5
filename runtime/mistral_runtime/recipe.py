"""How weights are quantised, and the name of the result. Imports no torch: names are asked for before every start."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mistral_runtime.errors import BadRequest

RECIPES = {"int8": 8, "int4": 4}
DEFAULT_GROUPS = {8: 128, 4: 64}
GROUPS = (64, 128)
_VERSION = 2  # of everything that decides the bytes
# From the most able on: the first whose flags a processor has names its kind.
_KINDS = (
    ("avx512bf16", {"avx512_bf16", "avx512_vnni"}),
    ("avx512vnni", {"avx512_vnni"}),
    ("avx512", {"avx512f", "avx512bw"}),
    ("avx2", {"avx2"}),
)


@dataclass(frozen=True)
class Recipe:
    """How matrices are quantised: "int8" or "int4", in groups of inputs."""

    kind: str
    group: int

    @classmethod
    def of(cls, kind: str, group: int | None = None) -> Recipe:
        """Return a recipe with the usual group."""
        return cls(kind, DEFAULT_GROUPS[RECIPES[kind]] if group is None else group)

    @property
    def name(self) -> str:
        """Stands for every byte of the result, given the weights."""
        return f"{self.kind}-g{self.group}-{_VERSION}"

    @property
    def key(self) -> str:
        """Stands for who may use the result as well: this torch on this kind of processor."""
        return f"{self.name}+torch{version('torch').partition('+')[0]}+{instruction_set()}"

    def bits_of(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Return how many bits a tensor of the checkpoint takes, or None where it stays as it is.

        The projection to the vocabulary is read whole for every token and decides it: it never takes fewer than eight.
        """
        if len(shape) != 2 or name == "tok_embeddings.weight" or name.endswith(".gate.weight"):
            return None
        return 8 if name == "output.weight" else RECIPES[self.kind]


def instruction_set(root: Path = Path("/")) -> str:
    """Return the kind of processor: what decides which instructions kernels are made of."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return next((kind for kind, needed in _KINDS if needed <= flags), platform.machine().lower())


def check_group(group: int) -> None:
    """Refuse group sizes that no kernel reads.

    Raises:
        BadRequest: Not 64 or 128.
    """
    if group not in GROUPS:
        raise BadRequest(
            f"groups of {group} are not supported",
            detail=f"expected one of {', '.join(map(str, GROUPS))}, found {group}",
            hint="leave --group out",
        )
