"""The model with its rolling cache against the reference, and layouts against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request
from mistral_runtime.reference import reference_generate, reference_logits
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint, to_interleaved

WriteSnapshot = Callable[..., dict[str, Tensor]]


def _load(directory: Path, **options: object) -> Transformer:
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    return load_model(open_checkpoint(files, config), config, **options)  # type: ignore[arg-type]


def _tokens(count: int, config: ModelConfig) -> list[int]:
    drawn = torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(count))
    return [int(token) for token in drawn]


@torch.inference_mode()
def _chunked(model: Transformer, tokens: list[int], chunk: int, context: int | None = None) -> Tensor:
    cache = model.new_cache(context or len(tokens))
    parts = [model(torch.tensor([tokens[i : i + chunk]]), cache) for i in range(0, len(tokens), chunk)]
    return torch.cat(parts, dim=1)[0]  # (T, V)


@pytest.mark.parametrize("window", [None, 1, 8, 64])
@pytest.mark.parametrize("chunk", [1, 3, 8, 11, 33])
def test_logits_equal_the_reference_however_the_prompt_is_cut(
    window: int | None, chunk: int, tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    config = replace(tiny_config, sliding_window=window)
    weights = write_snapshot(tmp_path, config=config)
    tokens = _tokens(33, config)
    difference = _chunked(_load(tmp_path), tokens, chunk) - reference_logits(weights, config, tokens)
    assert float(difference.abs().max()) < 2e-5


def test_a_cache_far_beyond_the_window_stays_exact(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path)
    tokens = _tokens(83, tiny_config)  # ten windows and three
    model = _load(tmp_path)
    assert model.new_cache(len(tokens)).capacity == 8
    mixed = torch.cat([_chunked(model, tokens, 7)])
    difference = mixed - reference_logits(weights, tiny_config, tokens)
    assert float(difference.abs().max()) < 2e-5


def test_greedy_tokens_equal_the_reference(
    layout: str, tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path, layout)
    prompt = _tokens(20, tiny_config)
    engine = Engine(_load(tmp_path), prefill_chunk=6)
    assert list(engine.generate(Request(prompt, 12))) == reference_generate(weights, tiny_config, prompt, 12)


def test_all_layouts_give_bit_equal_logits_in_bfloat16(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    tokens = _tokens(24, tiny_config)
    results = []
    for layout in ("pth", "consolidated", "huggingface"):
        write_snapshot(tmp_path / layout, layout, dtype=torch.bfloat16)
        results.append(_chunked(_load(tmp_path / layout), tokens, 9))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bfloat16_stays_near_the_reference(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path, dtype=torch.bfloat16)
    tokens = _tokens(24, tiny_config)
    expected = reference_logits(weights, tiny_config, tokens)
    ours = _chunked(_load(tmp_path), tokens, 24)
    assert float((ours - expected).norm() / expected.norm()) < 0.03  # 8 bits of mantissa through two layers


def test_batch_rows_do_not_see_each_other(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path)
    model = _load(tmp_path)
    rows = [_tokens(12, tiny_config), _tokens(13, tiny_config)[:12]]
    with torch.inference_mode():
        together = model(torch.tensor(rows), model.new_cache(12, batch_size=2))
    for row, logits in zip(rows, together, strict=True):
        assert float((logits - _chunked(model, row, 12)).abs().max()) < 1e-5


def test_last_only_gives_the_last_row(tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    model = _load(tmp_path)
    tokens = torch.tensor([_tokens(9, tiny_config)])
    with torch.inference_mode():
        last = model(tokens, model.new_cache(9), last_only=True)
        every = model(tokens, model.new_cache(9))
    assert last.shape == (1, 1, tiny_config.vocab_size)
    assert torch.allclose(last[0, 0], every[0, -1], atol=1e-5)


def test_dtype_can_be_changed_while_loading(
    layout: str, tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path, layout, dtype=torch.bfloat16)
    model = _load(tmp_path, dtype=torch.float32)
    assert model.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].float()), name


def test_weights_are_the_mapped_file_and_not_a_copy(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    for layout in ("pth", "consolidated", "huggingface"):
        write_snapshot(tmp_path / layout, layout, dtype=torch.bfloat16)
        model = _load(tmp_path / layout)
        mapped = _file_mappings(tmp_path / layout)
        addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        copied = {name for name, address in addresses.items() if not any(a <= address < b for a, b in mapped)}
        expected = {name for name in addresses if name.endswith(("wq.weight", "wk.weight"))}
        assert copied == (expected if layout == "huggingface" else set())


def test_pages_of_tensors_that_were_copied_are_given_back(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    config = replace(tiny_config, dim=512, head_dim=128)
    write_snapshot(tmp_path, "huggingface", config=config)
    model = _load(tmp_path)
    copied = sum(t.nbytes for name, t in model.state_dict().items() if name.endswith(("wq.weight", "wk.weight")))
    # Kept, they alone would be all of `copied`. What is left are neighbours that the kernel maps along with them.
    assert _resident_bytes_of_files(tmp_path) < 0.75 * copied


def _resident_bytes_of_files(directory: Path) -> int:
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = str(directory) in line
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def _file_mappings(directory: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(directory) in line]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def test_unpermuting_restores_the_pairs() -> None:
    # One head of D = 6. Hugging Face keeps first halves, then second halves: rows 0 2 4 | 1 3 5.
    stored = torch.tensor([[0.0], [2.0], [4.0], [1.0], [3.0], [5.0]])
    assert to_interleaved(stored, 6).flatten().tolist() == [0, 1, 2, 3, 4, 5]
