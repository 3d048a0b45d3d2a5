"""The safe copy of a pulled model as a form: the same tensors without their pickle, which could hold code."""

from __future__ import annotations

import re

from mistral_fetch.errors import UsageError
from mistral_fetch.manifest import Manifest
from mistral_fetch.transfer.derive import Form, Work

_PICKLE = re.compile(r"consolidated\.[0-9]{2}\.pth")


def _plan(name: str, manifest: Manifest) -> Work:
    paths = [entry.path for entry in manifest.files]
    pickles = [path for path in paths if _PICKLE.fullmatch(path)]
    # What it would be converted to may be there beside it.
    others = [path for path in paths if path.endswith(".safetensors")]
    if not pickles or others:
        found = ", ".join(others[:3]) or "no weights in that layout"
        raise UsageError(
            f"{name} has no weights that need converting",
            detail=f"expected consolidated.00.pth alone, got {found}",
            hint="leave --convert out: only pickles are converted",
        )
    return Work(pickles, sum(manifest.entry(path).size or 0 for path in pickles))


SAFETENSORS = Form(
    # The runtime writes this name into the file; a test holds the two together.
    key="safetensors-1",
    product="consolidated.safetensors",
    weight_format="consolidated-safetensors",
    verb="convert",
    noun="weights as safetensors",
    plan=_plan,
)
