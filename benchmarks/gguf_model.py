"""Write a snapshot's weights as GGUF files, so that llama.cpp can be measured on the very same model.

    python benchmarks/gguf_model.py SNAPSHOT OUT [--types BF16,Q8_0,Q4_0]

SNAPSHOT holds Mistral's own layout (``consolidated.*``, ``params.json``, ``tokenizer.model``). Its queries and keys are
in the order that llama.cpp's "llama" architecture expects, so nothing is permuted. Embeddings stay in BF16 or Q8_0,
norms in float32. Needs the package ``gguf``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.snapshot import find_tokenizer, find_weights, load_config
from mistral_runtime.weights import open_checkpoint

_BLOCK = 32
_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def bf16_bytes(weight: Tensor) -> Tensor:
    """Return the two bytes of every value."""
    return weight.to(torch.bfloat16).contiguous().view(torch.uint8)


def q8_0_bytes(weight: Tensor) -> Tensor:
    """Return blocks of 32: a float16 scale, then 32 signed bytes."""
    blocks = weight.float().view(weight.shape[0], -1, _BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    values = (blocks / scale.clamp_min(1e-12)).round().to(torch.int8)
    return torch.cat((scale.half().view(torch.uint8), values.view(torch.uint8)), -1).flatten(1)


def q4_0_bytes(weight: Tensor) -> Tensor:
    """Return blocks of 32: a float16 scale, then 16 bytes with value i low and value i + 16 high, both plus 8."""
    blocks = weight.float().view(weight.shape[0], -1, _BLOCK)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    values = (blocks * inverse + 8.5).floor().clamp(0, 15).to(torch.uint8)
    packed = values[..., :16] | (values[..., 16:] << 4)
    return torch.cat((scale.half().view(torch.uint8), packed), -1).flatten(1)


TYPES: dict[str, Callable[[Tensor], Tensor]] = {"BF16": bf16_bytes, "Q8_0": q8_0_bytes, "Q4_0": q4_0_bytes}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of one of Mistral's tensors."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, layer, rest = stem.split(".", 2)
        return f"blk.{layer}.{_NAMES[rest]}.weight"
    return f"{_NAMES[stem]}.weight"


def write_gguf(snapshot: Path, path: Path, type_name: str) -> None:
    """Write one file; the weights pass through one tensor at a time."""
    files = find_weights(snapshot)
    config = load_config(snapshot, files.layout)
    checkpoint = open_checkpoint(files, config)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    _describe(writer, config, type_name)
    _add_tokenizer(writer, find_tokenizer(snapshot))
    order = list(checkpoint.tensors)
    for name in order:
        shape = checkpoint.tensors[name].shape
        kind = "F32" if len(shape) == 1 else _stored_type(name, type_name)
        dtype = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[dtype]
        count = 1
        for extent in shape:
            count *= extent
        writer.add_tensor_info(gguf_name(name), shape, torch.empty(0).numpy().dtype, count * size // block, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in order:
        weight = checkpoint.read(checkpoint.tensors[name])
        if weight.dim() == 1:
            data = weight.float().view(torch.uint8)
        else:
            encode = TYPES[_stored_type(name, type_name)]
            data = torch.cat([encode(rows) for rows in weight.split(2048)])
        writer.write_tensor_data(data.numpy())
    writer.close()


def _stored_type(name: str, type_name: str) -> str:
    return "Q8_0" if type_name == "Q4_0" and name == "tok_embeddings.weight" else type_name


def _describe(writer: gguf.GGUFWriter, config: ModelConfig, type_name: str) -> None:
    writer.add_name("synthetic mistral 7B")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = {"BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[type_name]])


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    model = SentencePieceProcessor(model_file=str(path))
    kinds = []
    for token in range(model.vocab_size()):
        kind = gguf.TokenType.NORMAL
        if model.is_unknown(token):
            kind = gguf.TokenType.UNKNOWN
        elif model.is_control(token):
            kind = gguf.TokenType.CONTROL
        elif model.is_byte(token):
            kind = gguf.TokenType.BYTE
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(token).encode() for token in range(model.vocab_size())])
    writer.add_token_scores([model.get_score(token) for token in range(model.vocab_size())])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a snapshot's weights as GGUF files.")
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--types", default="BF16,Q8_0,Q4_0")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for type_name in arguments.types.split(","):
        path = arguments.out / f"model-{type_name}.gguf"
        write_gguf(arguments.snapshot, path, type_name)
        print(f"{path} {path.stat().st_size}", flush=True)


if __name__ == "__main__":
    main()
