"""What becomes of steps that cannot be captured: they are computed eagerly from then on, and it is said once."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

from mistral_runtime.gpu.graphs import EagerRunner, Runner


class FallbackRunner:
    """Runs through another runner until that fails once.

    A step may have run any number of times when its capture failed, which is harmless: it writes the same again.
    """

    def __init__(self, runner: Runner, *, report: Callable[[str], None]) -> None:
        self._runner = runner
        self._report = report

    @property
    def name(self) -> str:
        """That of the runner the next step goes through."""
        return self._runner.name

    def run(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returns; an error of its own is raised as without graphs."""
        if isinstance(self._runner, EagerRunner):
            return self._runner.run(key, compute)
        try:
            return self._runner.run(key, compute)
        except RuntimeError as error:  # of CUDA's, out of memory among them
            first_line = str(error).strip().partition("\n")[0][:200]
            self._report(f"graphs: steps are computed eagerly from here on ({first_line})")
            self._runner = EagerRunner()
            return self._runner.run(key, compute)
