from __future__ import annotations

import pytest

from mistral_fetch.errors import UnsupportedFormat
from mistral_fetch.sources.hub_choice import choose_files, weight_format

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BINS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    "weights, chosen, name",
    [
        ([*SHARDS, *BINS, "consolidated.safetensors"], SHARDS, "hf-safetensors"),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"], "hf-safetensors"),
        ([*SHARDS[:2], "consolidated.safetensors"], ["consolidated.safetensors"], "consolidated-safetensors"),
        (["consolidated.00.pth", *BINS], ["consolidated.00.pth"], "consolidated-pth"),
        (BINS, BINS, "hf-bin"),
        (["pytorch_model.bin"], ["pytorch_model.bin"], "hf-bin"),
    ],
)
def test_weights_are_chosen_in_one_format(weights: list[str], chosen: list[str], name: str) -> None:
    assert choose_files(weights) == sorted(chosen)
    assert weight_format(chosen) == name


def test_companions_come_along_and_papers_do_not() -> None:
    companions = ["LICENSE", "config.json", "params.json", "tekken.json", "tokenizer.json", "tokenizer.model.v3"]
    others = ["README.md", ".gitattributes", "image.png", "onnx/config.json", "original/tokenizer.model", "train.py"]
    assert choose_files([*SHARDS, *companions, *others]) == sorted([*SHARDS, *companions])


def test_patterns_replace_our_choice() -> None:
    files = [*SHARDS, *BINS, "config.json"]
    assert choose_files(files, include=["*.bin", "*.json"], exclude=["*.index.json"]) == ["config.json", *BINS[:2]]


def test_exclusion_narrows_our_choice() -> None:
    assert choose_files([*SHARDS, "config.json"], exclude=["model-*"]) == ["config.json", SHARDS[2]]


@pytest.mark.parametrize("files", [[], ["README.md"], ["model-00001-of-00002.safetensors"], ["model.fp16.safetensors"]])
def test_without_weights_there_is_nothing_to_run(files: list[str]) -> None:
    with pytest.raises(UnsupportedFormat):
        choose_files(files)


def test_patterns_that_leave_nothing_are_an_error() -> None:
    with pytest.raises(UnsupportedFormat, match="no file"):
        choose_files(SHARDS, include=["*.gguf"])
    with pytest.raises(UnsupportedFormat, match="no file"):
        choose_files(SHARDS, exclude=["*"])
