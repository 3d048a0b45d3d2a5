"""Which files of a repository a runtime needs: the weights once, and what goes with them. Pure.

Repositories hold the same weights in several formats; one is enough. The order of preference is what loads
fastest and safest: safetensors in shards or whole, Mistral's own consolidated safetensors, then pickles.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from mistral_fetch.errors import UnsupportedFormat

# Name for ModelInfo.weight_format, the weights, and the index without which they are useless ('' for none).
_FORMATS = (
    ("hf-safetensors", re.compile(r"model-\d{5}-of-\d{5}\.safetensors"), "model.safetensors.index.json"),
    ("hf-safetensors", re.compile(r"model\.safetensors"), ""),
    ("consolidated-safetensors", re.compile(r"consolidated(\.\d\d)?\.safetensors"), ""),
    ("consolidated-pth", re.compile(r"consolidated\.\d\d\.pth"), ""),
    ("hf-bin", re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"), "pytorch_model.bin.index.json"),
    ("hf-bin", re.compile(r"pytorch_model\.bin"), ""),
)
_COMPANIONS = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def choose_files(paths: Collection[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Return the paths to fetch, sorted.

    Args:
        paths: Everything the repository holds.
        include: Shell patterns; if any, they replace our own choice.
        exclude: Shell patterns of paths to leave out in any case.

    Raises:
        UnsupportedFormat: Nothing is left, or there are no weights and no pattern asked for anything else.
    """
    if include:
        chosen = [path for path in paths if _matches(path, include)]
    else:
        chosen = [*_weights(paths), *(path for path in paths if _matches(path, _COMPANIONS) and "/" not in path)]
    kept = sorted({path for path in chosen if not _matches(path, exclude)})
    if not kept:
        raise UnsupportedFormat(
            "no file is left to fetch",
            detail=f"expected a match for {', '.join(include) or 'the usual files'} among {len(paths)} files, got none",
            hint="change --include and --exclude",
        )
    return kept


def weight_format(paths: Collection[str]) -> str:
    """Return the name of the weights' format among chosen files, or '' if there are no weights."""
    for name, pattern, _ in _FORMATS:
        if any(pattern.fullmatch(path) for path in paths):
            return name
    return ""


def _weights(paths: Collection[str]) -> list[str]:
    for _, pattern, index in _FORMATS:
        weights = [path for path in paths if pattern.fullmatch(path)]
        if weights and (not index or index in paths):
            return [*weights, index] if index else weights
    raise UnsupportedFormat(
        "the repository holds no weights this program knows",
        detail="expected safetensors, consolidated or PyTorch weights at the top of the repository, got none",
        hint="name the files yourself with --include 'PATTERN'",
    )


def _matches(path: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
