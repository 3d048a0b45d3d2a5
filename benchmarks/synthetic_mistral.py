"""Write a full-size synthetic Mistral 7B: random bf16 weights of the real shapes, in both published layouts.

    python benchmarks/synthetic_mistral.py OUT [--layers 32] [--seed 0]

``OUT/torrent/`` has the torrent's files (``consolidated.00.pth``, ``params.json``, ``tokenizer.model``, ``RELEASE``),
``OUT/hub/`` the same weights as two Hugging Face shards, with queries and keys permuted as published. The tokenizer is
the real v1 one, from the mistral-common package. At full size each layout takes 14.5 GB of disk; memory stays small,
because both are written through mmap. What it is for: measuring at full size where the real weights cannot be had.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch

PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
# As Mistral 7B v0.1 is split on the hub: the first shard ends within layer 22.
FIRST_SHARD_BYTES = 9_942_981_696
HUB_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, by Mistral's names."""
    dim, hidden, vocab = PARAMS["dim"], PARAMS["hidden_dim"], PARAMS["vocab_size"]
    query, key = PARAMS["n_heads"] * PARAMS["head_dim"], PARAMS["n_kv_heads"] * PARAMS["head_dim"]
    found: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for layer in range(layers):
        prefix = f"layers.{layer}."
        found |= {
            f"{prefix}attention.wq.weight": (query, dim),
            f"{prefix}attention.wk.weight": (key, dim),
            f"{prefix}attention.wv.weight": (key, dim),
            f"{prefix}attention.wo.weight": (dim, query),
            f"{prefix}feed_forward.w1.weight": (hidden, dim),
            f"{prefix}feed_forward.w2.weight": (dim, hidden),
            f"{prefix}feed_forward.w3.weight": (hidden, dim),
            f"{prefix}attention_norm.weight": (dim,),
            f"{prefix}ffn_norm.weight": (dim,),
        }
    return found | {"norm.weight": (dim,), "output.weight": (vocab, dim)}


def write_torrent_layout(directory: Path, layers: int, seed: int) -> Path:
    """Write the torrent's files; return the checkpoint's path."""
    directory.mkdir(parents=True)
    path = directory / "consolidated.00.pth"
    # The file with room for every tensor, then each tensor filled in place through a shared mapping.
    empty = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes(layers).items()}
    with torch.serialization.skip_data():
        torch.save(empty, path)
    del empty
    generator = torch.Generator().manual_seed(seed)
    with torch.serialization.set_default_mmap_options(_map_shared()):
        tensors = torch.load(path, mmap=True, weights_only=True)
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.02, generator=generator)
        del tensors
    (directory / "params.json").write_text(json.dumps(PARAMS | {"n_layers": layers}, indent=4))
    (directory / "RELEASE").write_text("Synthetic weights of Mistral 7B's shapes; random numbers, no model.\n")
    _copy_tokenizer(directory)
    return path


def _map_shared() -> int:
    import mmap

    return mmap.MAP_SHARED


def _copy_tokenizer(directory: Path) -> None:
    source = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    with resources.as_file(source) as path:
        shutil.copyfile(path, directory / "tokenizer.model")


def write_hub_layout(checkpoint: Path, directory: Path, layers: int) -> None:
    """Write the same weights as Hugging Face shards with an index."""
    directory.mkdir(parents=True)
    tensors = torch.load(checkpoint, mmap=True, weights_only=True)
    shards = _split(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(directory / file, tensors, names)
        weight_map |= {hub_name(name): file for name in names}
    total = sum(tensor.numel() * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(_hub_config(layers), indent=2))
    _copy_tokenizer(directory)


def _split(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    first, rest, filled = [], [], 0
    for name, tensor in tensors.items():
        filled += tensor.numel() * 2
        (first if filled <= FIRST_SHARD_BYTES else rest).append(name)
    return [first, rest] if rest else [first]


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor], names: list[str]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        end = position + tensors[name].numel() * 2
        header[hub_name(name)] = {
            "dtype": "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            for chunk in _hub_rows(name, tensors[name]):
                file.write(chunk.contiguous().view(torch.uint8).numpy().data)


def _hub_rows(name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if ".wq." in name or ".wk." in name:
        heads = tensor.shape[0] // PARAMS["head_dim"]
        # Interleaved rotary pairs to half-split ones, as the published conversion does.
        paired = tensor.view(heads, PARAMS["head_dim"] // 2, 2, tensor.shape[1])
        yield paired.transpose(1, 2).reshape(tensor.shape)
    else:
        yield from tensor.split(4096) if tensor.dim() > 1 else [tensor]


def hub_name(name: str) -> str:
    """Return the Hugging Face name of one of Mistral's tensors."""
    fixed = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in fixed:
        return fixed[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{HUB_NAMES[rest.removesuffix('.weight')]}.weight"


def _hub_config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": PARAMS["dim"],
        "initializer_range": 0.02,
        "intermediate_size": PARAMS["hidden_dim"],
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": PARAMS["n_heads"],
        "num_hidden_layers": layers,
        "num_key_value_heads": PARAMS["n_kv_heads"],
        "rms_norm_eps": PARAMS["norm_eps"],
        "rope_theta": 10000.0,
        "sliding_window": PARAMS["sliding_window"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": PARAMS["vocab_size"],
    }


def main() -> None:
    """Parse the command line and write both layouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--layers", type=int, default=PARAMS["n_layers"], help="fewer for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["torrent"], help="leave the hub layout out, for half the disk")
    given = parser.parse_args()
    started = time.monotonic()
    checkpoint = write_torrent_layout(given.out / "torrent", given.layers, given.seed)
    middle = time.monotonic()
    if given.only is None:
        write_hub_layout(checkpoint, given.out / "hub", given.layers)
    result = {
        "checkpoint_bytes": checkpoint.stat().st_size,
        "torrent_layout_seconds": round(middle - started, 1),
        "hub_layout_seconds": round(time.monotonic() - middle, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
