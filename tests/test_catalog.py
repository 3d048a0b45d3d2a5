"""The shipped catalog: every pin is the recorded one, nothing weak is a check, and strangers' catalogs are refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.catalog import MAX_CATALOG_BYTES, Catalog, HubChannel, TorrentChannel, load_catalog, parse_catalog
from mistral_fetch.catalog_show import catalog_rows, show_fields, show_sections, show_text
from mistral_fetch.catalog_values import ArchiveChannel, Claim, Confidence, Release
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import ExitCode, MalformedManifest, ManifestError, UnknownModel, UnsafePath

PINS = Path(__file__).with_name("catalog_pins.txt").read_text()
FILE_PINS = {
    tuple("" if field == "-" else field for field in line.split())
    for line in PINS.splitlines()
    if line and not line.startswith("#")
}
REVISIONS = {
    "mistral-7b@v0.1": "27d67f1b5f57dc0953326b2601d68371d40ea8da",
    "mistral-7b@v0.3": "caa1feb0e54d415e2df31207e5f4e273e33509b1",
    "mistral-7b-instruct@v0.1": "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca",
    "mistral-7b-instruct@v0.2": "63a8b081895390a26e140280378bc85ec8bce07a",
    "mistral-7b-instruct@v0.3": "c170c708c41dac9275d15a8fff4eca08d52bab71",
    "mixtral-8x7b@v0.1": "fc7ac94680e38d7348cfa806e51218e6273104b0",
    "mixtral-8x7b-instruct@v0.1": "?eba92302a2861cdc0098cc54bc9f17cb2c47eb61",
}
REPOSITORIES = {
    "mistral-7b@v0.1": "mistralai/Mistral-7B-v0.1",
    "mistral-7b@v0.3": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct@v0.1": "mistralai/Mistral-7B-Instruct-v0.1",
    "mistral-7b-instruct@v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "mistral-7b-instruct@v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "mixtral-8x7b@v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b-instruct@v0.1": "mistralai/Mixtral-8x7B-Instruct-v0.1",
}
TORRENTS = {
    "mistral-7b@v0.1": (
        "208b101a0f51514ecf285885a8b0f6fb1a1e4d7d",
        "mistral-7B-v0.1",
        ["udp://tracker.opentrackr.org:1337/announce"],
        {},
    ),
    "mixtral-8x7b@v0.1": (
        "5546272da9065eddeb6fcd7ffddeef5b75be79a7",
        "mixtral-8x7b-32kseqlen",
        ["udp://opentracker.i2p.rocks:6969/announce", "http://tracker.openbittorrent.com:80/announce"],
        {
            "consolidated.00.pth": "?1faa9bc9b20fcfe81fcd4eb7166a79e6",
            "tokenizer.model": "37974873eb68a7ab30c4912fc36264ae",
        },
    ),
}
CDN = "https://models.mistralcdn.com/"
ARCHIVES = {
    "mistral-7b@v0.1": ("mistral-7b-v0-1/mistral-7B-v0.1.tar", "37dab53973db2d56b2da0a033a15307f"),
    "mistral-7b@v0.2": ("mistral-7b-v0-2/mistral-7B-v0.2.tar", ""),
    "mistral-7b@v0.3": ("mistral-7b-v0-3/mistral-7B-v0.3.tar", "0663b293810d7571dad25dae2f2a5806"),
    "mistral-7b-instruct@v0.2": ("mistral-7b-v0-2/Mistral-7B-v0.2-Instruct.tar", "fbae55bc038f12f010b4251326e73d39"),
    "mistral-7b-instruct@v0.3": ("mistral-7b-v0-3/mistral-7B-Instruct-v0.3.tar", "80b71fcb6416085bcb4efad86dfb4d52"),
    "mixtral-8x7b-instruct@v0.1": (
        "mixtral-8x7b-v0-1/Mixtral-8x7B-v0.1-Instruct.tar",
        "8e2d3930145dc43d3084396f49d38a3f",
    ),
}
TENSOR_BYTES = {"v0.1": 14_483_464_192, "v0.2": 14_483_464_192, "v0.3": 14_496_047_104, "mixtral": 93_405_585_408}
PARAMETERS = {"v0.1": 7_241_732_096, "v0.2": 7_241_732_096, "v0.3": 7_248_023_552, "mixtral": 46_702_792_704}


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    data = pkgutil.get_data("mistral_fetch", "data/catalog.json")
    assert data is not None
    decoded: dict[str, Any] = json.loads(data)
    return decoded


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def hub(release: Release) -> HubChannel:
    channel = release.channel("hub")
    assert isinstance(channel, HubChannel)
    return channel


def marked(claim: Claim[Any] | None, text: str) -> str:
    if claim is None:
        return ""
    return ("" if claim.is_usable else "?") + text


def by_ref(catalog: Catalog, ref: str) -> Release:
    return catalog.find(*ref.split("@"))


# Every value is the recorded one.


def test_every_file_pin_of_the_catalog_is_in_the_table_and_every_row_in_the_catalog(catalog: Catalog) -> None:
    found = set()
    for release in catalog.releases:
        for channel in release.channels:
            for pin in getattr(channel, "files", ()):
                digests = {claim.value.algorithm: marked(claim, claim.value.value) for claim in pin.digests}
                size = marked(pin.size, str(pin.size.value)) if pin.size else ""
                if channel.kind == "torrent" and not pin.size:
                    continue  # its digest is in TORRENTS
                found.add((release.ref, pin.path, size, digests.get("sha256", ""), digests.get("gitsha1", "")))
    assert len(FILE_PINS) == 42
    assert found == FILE_PINS


def test_every_repository_and_revision_is_the_recorded_one(catalog: Catalog) -> None:
    hubs = {release.ref: hub(release) for release in catalog.releases if release.channel("hub")}
    assert {ref: channel.repo for ref, channel in hubs.items()} == REPOSITORIES
    claims = {ref: channel.claimed_revision for ref, channel in hubs.items()}
    assert {ref: marked(claim, claim.value) for ref, claim in claims.items() if claim} == REVISIONS


def test_a_revision_that_only_one_source_named_is_not_asked_for(catalog: Catalog) -> None:
    asked = {release.ref: hub(release).revision for release in catalog.releases if release.channel("hub")}
    assert asked == {ref: "main" if value.startswith("?") else value for ref, value in REVISIONS.items()}


def test_every_torrent_is_the_recorded_one(catalog: Catalog) -> None:
    found = {}
    for release in catalog.releases:
        channel = release.channel("torrent")
        if isinstance(channel, TorrentChannel):
            md5 = {pin.path: marked(pin.digests[0], pin.digests[0].value.value) for pin in channel.files}
            trackers = [claim.value for claim in channel.trackers]
            found[release.ref] = (channel.info_hash.value, channel.name.value, trackers, md5)
    assert found == TORRENTS


def test_every_archive_is_the_recorded_one(catalog: Catalog) -> None:
    found = {}
    for release in catalog.releases:
        channel = release.channel("archive")
        if isinstance(channel, ArchiveChannel):
            found[release.ref] = (channel.url.value.removeprefix(CDN), marked(channel.md5, str(channel.digest or "")))
    assert found == {ref: (path, md5 and f"md5:{md5}") for ref, (path, md5) in ARCHIVES.items()}


@pytest.mark.parametrize(
    "ref,kind",
    [
        ("mistral-7b@v0.1", "v0.1"),
        ("mistral-7b@v0.2", "v0.2"),
        ("mistral-7b@v0.3", "v0.3"),
        ("mistral-7b-instruct@v0.1", "v0.1"),
        ("mistral-7b-instruct@v0.2", "v0.2"),
        ("mistral-7b-instruct@v0.3", "v0.3"),
        ("mixtral-8x7b@v0.1", "mixtral"),
        ("mixtral-8x7b-instruct@v0.1", "mixtral"),
    ],
)
def test_parameters_and_tensor_bytes_follow_from_the_shapes(catalog: Catalog, ref: str, kind: str) -> None:
    release = by_ref(catalog, ref)
    vocabulary = 32_768 if kind == "v0.3" else 32_000
    experts, gate = (8, 8 * 4096) if kind == "mixtral" else (1, 0)
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + experts * 3 * 14_336 * 4096 + gate + 2 * 4096
    parameters = 2 * vocabulary * 4096 + 32 * layer + 4096
    assert parameters == PARAMETERS[kind]
    assert release.parameters is not None
    assert release.parameters.value == parameters
    assert release.tensor_bytes is not None
    assert release.tensor_bytes.value == 2 * parameters == TENSOR_BYTES[kind]


@pytest.mark.parametrize(
    "ref", ["mistral-7b@v0.1", "mistral-7b@v0.3", "mistral-7b-instruct@v0.2", "mistral-7b-instruct@v0.3"]
)
def test_shards_are_the_tensors_and_small_headers(catalog: Catalog, ref: str) -> None:
    release = by_ref(catalog, ref)
    sizes = [pin.size.value for pin in hub(release).files if pin.path.endswith(".safetensors") and pin.size]
    assert release.tensor_bytes is not None
    assert len(sizes) in {2, 3}
    assert 0 < sum(sizes) - release.tensor_bytes.value < 50_000


def test_scores_are_those_of_the_paper(catalog: Catalog) -> None:
    [scores] = catalog.find("mistral-7b").scores
    assert scores.value == {
        "MMLU": 60.1,
        "HellaSwag": 81.3,
        "WinoGrande": 75.3,
        "PIQA": 83.0,
        "ARC-e": 80.0,
        "ARC-c": 55.5,
        "NQ": 28.8,
        "TriviaQA": 69.9,
        "HumanEval": 30.5,
        "MBPP": 47.5,
        "MATH": 13.1,
        "GSM8K": 52.2,
    }
    assert scores.sources[0] == "paper"


# What the catalog calls computed can be computed again.


def config_json(version: str) -> bytes:
    fields: dict[str, Any] = {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0 if version == "v0.1" else 1000000.0,
        "sliding_window": 4096 if version == "v0.1" else None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": {"v0.1": "4.34.0.dev0", "v0.2": "4.36.0", "v0.3": "4.42.0.dev0"}[version],
        "use_cache": True,
        "vocab_size": 32768 if version == "v0.3" else 32000,
    }
    if version == "v0.1":
        del fields["attention_dropout"]
    return (json.dumps(fields, indent=2) + "\n").encode()


def generation_config_json(version: str) -> bytes:
    fields = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "transformers_version": {"v0.2": "4.36.0", "v0.3": "4.42.0.dev0"}[version],
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def special_tokens_map_json(_version: str) -> bytes:
    def token(text: str) -> dict[str, Any]:
        return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    fields = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>")}
    return (json.dumps(fields, indent=2) + "\n").encode()


def index_json(version: str) -> bytes:
    """The index of shards, filled in order up to a limit, as the tools that wrote them did."""
    vocabulary = 32768 if version == "v0.3" else 32000
    tensors = [("model.embed_tokens.weight", vocabulary * 4096)]
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        tensors += [(f"{prefix}self_attn.{name}_proj.weight", rows * 4096) for name, rows in ATTENTION]
        tensors += [(f"{prefix}mlp.{name}_proj.weight", 14336 * 4096) for name in ("gate", "up", "down")]
        tensors += [(f"{prefix}{name}_layernorm.weight", 4096) for name in ("input", "post_attention")]
    tensors += [("model.norm.weight", 4096), ("lm_head.weight", vocabulary * 4096)]
    limit = 10**10 if version == "v0.1" else 5 * 10**9
    shards: list[list[str]] = [[]]
    held = 0
    for name, elements in tensors:
        if held + 2 * elements > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * elements
    files = {
        name: f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at, shard in enumerate(shards, 1) for name in shard
    }
    index = {
        "metadata": {"total_size": 2 * sum(elements for _, elements in tensors)},
        "weight_map": dict(sorted(files.items())),
    }
    # The older two were written by the hub's conversion service, the newest by transformers.
    return (json.dumps(index, indent=2) + "\n" if version == "v0.3" else json.dumps(index, indent=4)).encode()


ATTENTION = [("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)]
REBUILT = [
    (f"{name}@{version}", path, build(version))
    for path, build, refs in [
        ("config.json", config_json, ["7b@v0.1", "7b-instruct@v0.2", "7b@v0.3", "7b-instruct@v0.3"]),
        ("generation_config.json", generation_config_json, ["7b-instruct@v0.2", "7b@v0.3", "7b-instruct@v0.3"]),
        ("special_tokens_map.json", special_tokens_map_json, ["7b@v0.1", "7b-instruct@v0.2", "7b-instruct@v0.3"]),
        ("model.safetensors.index.json", index_json, ["7b@v0.1", "7b-instruct@v0.2", "7b@v0.3", "7b-instruct@v0.3"]),
    ]
    for name, version in (("mistral-" + ref).split("@") for ref in refs)
]


@pytest.mark.parametrize("ref,path,content", REBUILT, ids=[f"{ref}-{path}" for ref, path, _ in REBUILT])
def test_rebuilt_text_has_the_pinned_digests(catalog: Catalog, ref: str, path: str, content: bytes) -> None:
    pin = hub(by_ref(catalog, ref)).pin(path)
    computed = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "gitsha1": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }
    assert pin.size is not None
    assert pin.size.value == len(content)
    assert pin.digests
    for claim in pin.digests:
        assert claim.value.value == computed[claim.value.algorithm]
        assert "rebuilt" in claim.sources


@pytest.mark.parametrize(
    "ref,bundled",
    [("mistral-7b@v0.1", "tokenizer.model.v1"), ("mistral-7b@v0.3", "mistral_instruct_tokenizer_240216.model.v2")],
)
def test_hashed_tokenizers_are_those_of_mistral_common(catalog: Catalog, ref: str, bundled: str) -> None:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common, which ships these tokenizers, is an extra and not installed")
    content = (Path(spec.origin).parent / "data" / bundled).read_bytes()
    pin = hub(by_ref(catalog, ref)).pin("tokenizer.model")
    assert pin.entry().sha256 == hashlib.sha256(content).hexdigest()
    assert pin.entry().size == len(content)


# Nothing without a source; nothing weak is a check.


def claims_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "value" in value:
            yield value
        for item in value.values():
            yield from claims_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from claims_in(item)


def test_every_claim_names_its_sources_and_every_source_is_used(raw: dict[str, Any]) -> None:
    claims = list(claims_in(raw))
    assert len(claims) > 150
    used = {source for claim in claims for source in claim["sources"]}
    assert all(claim["sources"] and claim["confidence"] for claim in claims)
    assert used == set(raw["sources"])


@pytest.mark.parametrize("key", ["confidence", "sources"])
def test_a_claim_without_confidence_or_source_is_refused_wherever_it_stands(raw: dict[str, Any], key: str) -> None:
    count = len(list(claims_in(raw)))
    for index in range(0, count, 5):
        broken = copy.deepcopy(raw)
        del list(claims_in(broken))[index][key]
        with pytest.raises(MalformedManifest, match="the catalog cannot be used") as caught:
            parse_catalog(json.dumps(broken).encode())
        assert key in caught.value.detail


def test_only_names_addresses_and_titles_of_a_release_stand_without_a_claim(raw: dict[str, Any]) -> None:
    plain = {"name", "version", "title", "publisher", "variant", "credit", "source_url", "not_runnable_because"}
    claimed = {"licence", "date", "parameters", "tensor_bytes", "chat_template"}
    for release in raw["releases"]:
        for key, value in release.items():
            if isinstance(value, str | int | float | bool):
                assert key in plain, key
        for key in claimed & set(release):
            assert release[key]["sources"]


def test_manifests_hold_usable_pins_alone(catalog: Catalog) -> None:
    for release in catalog.releases:
        channel = release.channel("hub")
        if not isinstance(channel, HubChannel) or channel.needs_listing:
            continue
        for entry in channel.manifest().files:
            pin = channel.pin(entry.path)
            weak = {claim.value for claim in pin.unconfirmed}
            assert entry.size not in weak
            assert not weak & set(entry.digests)
            assert set(entry.digests) == {claim.value for claim in pin.digests if claim.is_usable}


def test_with_single_sources_alone_nothing_is_pinned(raw: dict[str, Any]) -> None:
    doubtful = copy.deepcopy(raw)
    for claim in claims_in(doubtful):
        claim["confidence"] = "single"
        claim.pop("count", None)
    catalog = parse_catalog(json.dumps(doubtful).encode())
    release = catalog.find("mistral-7b")
    assert hub(release).revision == "main"
    assert hub(release).size_floor is None
    assert all(entry.size is None and not entry.digests for entry in hub(release).manifest().files)
    torrent, archive = release.channel("torrent"), release.channel("archive")
    assert torrent is not None
    assert archive is not None
    assert torrent.assurance is archive.assurance is Assurance.SIZE
    assert isinstance(archive, ArchiveChannel)
    assert archive.digest is None


def test_nothing_unconfirmed_from_memory_or_about_our_tools_is_in_the_file(raw: dict[str, Any]) -> None:
    text = json.dumps(raw).lower()
    for word in ("ab979f50d7d406ab8d0b07d09806c72c", "index text", "/work", "memory", "1520.jp", "wstracker", "t.co/"):
        assert word not in text


# Channels.


def test_assurance_of_every_channel(catalog: Catalog) -> None:
    found = {
        release.ref: {channel.kind: (channel.weights_assurance, channel.assurance) for channel in release.channels}
        for release in catalog.releases
    }
    strong, mixed = (Assurance.SHA256, Assurance.SHA256), (Assurance.SHA256, Assurance.GITSHA1)
    torrent, md5, size = ((level, level) for level in (Assurance.BTV1, Assurance.MD5, Assurance.SIZE))
    assert found == {
        "mistral-7b@v0.1": {"hub": strong, "torrent": torrent, "archive": md5},
        "mistral-7b@v0.2": {"archive": size},
        "mistral-7b@v0.3": {"hub": mixed, "archive": md5},
        "mistral-7b-instruct@v0.1": {"hub": mixed},
        "mistral-7b-instruct@v0.2": {"hub": mixed, "archive": md5},
        "mistral-7b-instruct@v0.3": {"hub": strong, "archive": md5},
        "mixtral-8x7b@v0.1": {"hub": mixed, "torrent": torrent},
        "mixtral-8x7b-instruct@v0.1": {"hub": mixed, "archive": md5},
    }


def test_manifest_carries_names_licence_and_addresses_of_the_endpoint(catalog: Catalog) -> None:
    channel = hub(catalog.find("mistral-7b"))
    manifest = channel.manifest("https://hf-mirror.com/")
    assert manifest.info.name == "mistral-7b"
    assert manifest.info.version == "v0.1"
    assert manifest.info.licence == "Apache-2.0"
    assert manifest.info.weight_format == "hf-safetensors"
    assert manifest.info.chat_template == "none"
    assert manifest.entry("config.json").mirrors[0].url == (
        "https://hf-mirror.com/mistralai/Mistral-7B-v0.1/resolve/27d67f1b5f57dc0953326b2601d68371d40ea8da/config.json"
    )
    assert channel.url("config.json").startswith("https://huggingface.co/mistralai/")
    assert manifest.entry("model-00001-of-00002.safetensors").size == 9_942_981_696


def test_sizes_are_exact_only_when_every_file_is_known(catalog: Catalog) -> None:
    channel = hub(catalog.find("mistral-7b"))
    assert channel.size is None
    known = channel.size_at_least
    assert known is not None
    assert 14_483_498_040 < known < 14_490_000_000
    torrent = catalog.find("mistral-7b").channel("torrent")
    assert torrent is not None
    assert (torrent.size, torrent.size_at_least) == (None, 14_483_464_192)


def test_weights_that_lie_twice_in_a_repository_are_wanted_once(catalog: Catalog) -> None:
    for ref in ("mistral-7b@v0.3", "mistral-7b-instruct@v0.3", "mistral-7b-instruct@v0.1", "mixtral-8x7b@v0.1"):
        channel = hub(by_ref(catalog, ref))
        assert not channel.wants("consolidated.safetensors")
        assert not channel.wants("pytorch_model-00001-of-00002.bin")
        assert channel.wants("config.json")
        assert channel.wants("tokenizer.model")
        assert not channel.wants("original/tokenizer.model")


def test_a_channel_without_all_names_has_no_manifest_yet(catalog: Catalog) -> None:
    channel = hub(catalog.find("mistral-7b-instruct", "v0.1"))
    assert channel.needs_listing
    assert channel.wants("model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="not all named"):
        channel.manifest()


def test_magnet_is_built_from_clean_parts(catalog: Catalog) -> None:
    torrent = catalog.find("mistral-7b").channel("torrent")
    assert isinstance(torrent, TorrentChannel)
    assert torrent.magnet == (
        "magnet:?xt=urn:btih:208b101a0f51514ecf285885a8b0f6fb1a1e4d7d&dn=mistral-7B-v0.1"
        "&tr=udp%3A%2F%2Ftracker.opentrackr.org%3A1337%2Fannounce"
    )


# The page about the catalog is about this catalog.


def test_the_page_names_every_key_confidence_and_release(raw: dict[str, Any], catalog: Catalog) -> None:
    page = (Path(__file__).parents[1] / "docs" / "catalog.md").read_text()
    keys = {key for release in raw["releases"] for key in release}
    keys |= {key for release in raw["releases"] for channel in release["channels"] for key in channel}
    words = [*raw, *keys, *(level.value for level in Confidence), *(release.ref for release in catalog.releases)]
    assert len(words) > 40
    assert [word for word in words if f"`{word}`" not in page] == []


# Names.


@pytest.mark.parametrize(
    "name,version,ref",
    [
        ("mistral-7b", None, "mistral-7b@v0.1"),
        ("Mistral-7B", None, "mistral-7b@v0.1"),
        ("mistral-7b-base", "0.3", "mistral-7b@v0.3"),
        ("mistral-7b", "0.1", "mistral-7b@v0.1"),
        ("mistral-7b", "V0.2", "mistral-7b@v0.2"),
        ("mistral-7b-instruct", None, "mistral-7b-instruct@v0.3"),
        ("mistral-7b-instruct", "v0.1", "mistral-7b-instruct@v0.1"),
        ("Mistral-7B-Instruct-v0.2", None, "mistral-7b-instruct@v0.2"),
        ("mistral-7b-v0.3", None, "mistral-7b@v0.3"),
        ("mixtral-8x7b", None, "mixtral-8x7b@v0.1"),
        ("mixtral-instruct", None, "mixtral-8x7b-instruct@v0.1"),
    ],
)
def test_find(catalog: Catalog, name: str, version: str | None, ref: str) -> None:
    assert catalog.find(name, version).ref == ref


@pytest.mark.parametrize(
    "name,version,expected",
    [
        ("mistral-7", None, "mistral-7b"),
        ("mistrall-7b", None, "mistral-7b"),
        ("mistral-7b-instuct", None, "mistral-7b-instruct"),
        ("mixtral", None, "mixtral-8x7b"),
        ("mistral-7b", "v9", "mistral-7b"),
        ("mistral-7b-v0.9", None, "mistral-7b"),
    ],
)
def test_unknown_names_suggest_the_nearest(catalog: Catalog, name: str, version: str | None, expected: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        catalog.find(name, version)
    assert expected in caught.value.hint
    assert caught.value.exit_code is ExitCode.NOT_FOUND
    assert all(caught.value.lines())


def test_a_name_like_no_other_lists_them_all(catalog: Catalog) -> None:
    with pytest.raises(UnknownModel) as caught:
        catalog.find("zzzzzz")
    assert "did you mean" not in caught.value.hint
    assert "mixtral-8x7b-instruct" in caught.value.detail


def test_every_release_can_be_found_by_its_ref(catalog: Catalog) -> None:
    for release in catalog.releases:
        assert by_ref(catalog, release.ref) is release
    defaults = [release.name for release in catalog.releases if release.is_default]
    assert sorted(defaults) == sorted({release.name for release in catalog.releases})


def test_loading_and_finding_takes_less_than_ten_milliseconds() -> None:
    def once() -> float:
        begin = time.perf_counter()
        load_catalog().find("mistral-7b")
        return time.perf_counter() - begin

    assert min(once() for _ in range(20)) < 0.010


def test_the_catalog_imports_nothing_heavy() -> None:
    code = (
        "import sys, mistral_fetch.catalog as c, mistral_fetch.catalog_show; c.load_catalog()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mistral_fetch" in loaded
    assert not {"httpx", "rich", "typer", "libtorrent", "torch", "difflib", "tempfile", "asyncio"} & set(loaded)


# Strangers' catalogs.


def edited(raw: dict[str, Any], *path: str | int, value: Any = None, remove: bool = False) -> bytes:
    broken = copy.deepcopy(raw)
    place: Any = broken
    for step in path[:-1]:
        place = place[step]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(broken).encode()


HUB = ("releases", 0, "channels", 0)
TORRENT = ("releases", 0, "channels", 1)
ARCHIVE = ("releases", 0, "channels", 2)
HOSTILE = {
    "another schema": (("schema",), 2, "version 1"),
    "a boolean schema": (("schema",), True, "whole number"),
    "an unknown key on top": (("surprise",), 1, "'surprise'"),
    "an unknown key in a release": (("releases", 0, "run_this"), "sh", "'run_this'"),
    "an unknown key in a channel": ((*HUB, "token"), "x", "'token'"),
    "an unknown key in a file": ((*HUB, "files", 0, "mode"), 511, "'mode'"),
    "an unknown key in a claim": (("releases", 0, "licence", "trust"), 1, "'trust'"),
    "an unknown channel": ((*HUB, "kind"), "ftp", "'archive', 'hub', 'torrent'"),
    "an unknown confidence": (("releases", 0, "licence", "confidence"), "certain", "'confirmed'"),
    "an unknown source": (("releases", 0, "licence", "sources"), ["my-cousin"], "'my-cousin'"),
    "no source": (("releases", 0, "licence", "sources"), [], "at least one source"),
    "a source twice": (("releases", 0, "licence", "sources"), ["docs", "docs"], "each once"),
    "confirmed by one": (("releases", 0, "parameters", "count"), 1, "from 2 to"),
    "a count without confirmation": (("releases", 0, "licence", "count"), 3, "count of 2 or more"),
    "an unknown statement": (("releases", 0, "traps"), ["made-up"], "'made-up'"),
    "an unknown link": (("releases", 0, "links"), ["made-up"], "'made-up'"),
    "an unknown template": (("releases", 0, "chat_template", "value"), "v9", "'v3'"),
    "a release of an unlisted name": (("releases", 0, "name"), "other", "'other'"),
    "a version in capitals": (("releases", 0, "version"), "V0.1", "a version"),
    "a default that is no release": (("names", "mistral-7b", "default"), "v9", "a default that is a release"),
    "an alias that is a name": (("names", "mistral-7b", "aliases"), ["mixtral-8x7b"], "every name once"),
    "a name with a slash": (("names", "a/b"), {"default": "v1"}, "a lower-case model name"),
    "an escape sequence in a title": (("releases", 0, "title"), "\x1b[2J", "printable"),
    "a line break in a credit line": (("releases", 0, "credit"), "a\nb", "printable"),
    "an endless title": (("releases", 0, "title"), "a" * 5000, "1 to 1000"),
    "a javascript address": (("releases", 0, "source_url"), "javascript:alert(1)", "http or https"),
    "a file address": ((*ARCHIVE, "url", "value"), "file:///etc/passwd", "http or https"),
    "an address with credentials": ((*ARCHIVE, "url", "value"), "https://u:p@host/x.tar", "no credentials"),
    "an address without a host": ((*ARCHIVE, "url", "value"), "https:///x.tar", "a host"),
    "an address with a space": ((*ARCHIVE, "url", "value"), "https://host/a b", "an address"),
    "an address with a bad port": ((*ARCHIVE, "url", "value"), "https://host:99999/", "an address"),
    "an odd tracker": ((*TORRENT, "trackers", 0, "value"), "wss://host/announce", "udp or http or https"),
    "a short info-hash": ((*TORRENT, "info_hash", "value"), "208b", "40 lower-case"),
    "a torrent name that climbs": ((*TORRENT, "name", "value"), "..", "leaves its directory"),
    "a torrent file that climbs": ((*TORRENT, "listing", "value"), ["../x"], "leaves its directory"),
    "a short md5": ((*ARCHIVE, "md5", "value"), "37dab5", "hexadecimal md5"),
    "an md5 in capitals": ((*ARCHIVE, "md5", "value"), "37DAB53973DB2D56B2DA0A033A15307F", "lower-case"),
    "a numeric digest": ((*ARCHIVE, "md5", "value"), 5, "hexadecimal md5"),
    "a repository that climbs": ((*HUB, "repo"), "a/..", "org/repo"),
    "a repository with a query": ((*HUB, "repo"), "a/b?x", "org/repo"),
    "a revision that climbs": ((*HUB, "revision", "value"), "../../api", "a branch"),
    "a pattern that is a shell's": ((*HUB, "include"), ["$(id)"], "a file name or pattern"),
    "no pattern": ((*HUB, "include"), [], "1 to 200"),
    "the same pattern twice": ((*HUB, "include"), ["config.json", "config.json"], "every name once"),
    "a pin of an unwanted file": ((*HUB, "include"), ["config.json"], "'include' names"),
    "an included name that climbs": ((*HUB, "include"), ["../config.json"], "leaves its directory"),
    "a pinned name that is absolute": ((*HUB, "files", 0, "path"), "/etc/passwd", "leaves its directory"),
    "a pinned name that is ours": ((*HUB, "files", 0, "path"), ".complete", "the snapshot keeps"),
    "a negative size": ((*HUB, "files", 0, "size", "value"), -1, "whole number from 0"),
    "an enormous size": ((*HUB, "files", 0, "size", "value"), 1 << 60, "whole number from 0"),
    "a size that is no number": ((*HUB, "files", 0, "size", "value"), "12", "whole number"),
    "a list that is a table": (("releases",), {}, "a list"),
    "a table that is a list": (("sources",), [], "a table"),
    "a release that is a text": (("releases", 0), "mistral", "a table"),
    "a thousand and one releases": (("releases",), [{}] * 1001, "at most 1000"),
    "null": (("names",), None, "a table"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_catalogs_are_refused_with_the_reason(raw: dict[str, Any], name: str) -> None:
    path, value, expected = HOSTILE[name]
    with pytest.raises(ManifestError) as caught:
        parse_catalog(edited(raw, *path, value=value))
    assert expected in " ".join(caught.value.lines())
    assert isinstance(caught.value, MalformedManifest | UnsafePath)
    assert all(line.isprintable() for line in caught.value.lines())


@pytest.mark.parametrize("key", ["schema", "as_of", "names", "sources", "links", "statements", "releases"])
def test_every_table_must_be_there(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(MalformedManifest, match="the catalog cannot be used") as caught:
        parse_catalog(edited(raw, key, remove=True))
    assert repr(key) in caught.value.detail


@pytest.mark.parametrize(
    "data,expected",
    [
        (b"", "JSON in UTF-8"),
        (b"\xff\xfe{}", "JSON in UTF-8"),
        (b"[]", "a table"),
        (b'{"schema": 1, "schema": 1}', "every key once"),
        (b'{"schema": NaN}', "finite numbers"),
        (b'{"schema": 1e999}', "a whole number"),
        (b"[" * 100_000, "JSON in UTF-8"),
        (b'{"schema": ' + b"9" * 10_000 + b"}", "the file"),
        (b" " * (MAX_CATALOG_BYTES + 1), "at most"),
    ],
    ids=["empty", "utf-16", "list", "twice", "nan", "infinite", "deep", "digits", "large"],
)
def test_what_is_no_catalog_at_all_is_refused(data: bytes, expected: str) -> None:
    with pytest.raises(MalformedManifest) as caught:
        parse_catalog(data)
    assert expected in " ".join(caught.value.lines()) or expected == "the file"


def test_a_release_given_twice_is_refused(raw: dict[str, Any]) -> None:
    broken = copy.deepcopy(raw)
    broken["releases"].append(copy.deepcopy(broken["releases"][0]))
    with pytest.raises(MalformedManifest, match="the releases"):
        parse_catalog(json.dumps(broken).encode())


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.just([]),
    st.just({}),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@given(data=st.data(), junk=JUNK)
def test_any_value_replaced_by_junk_is_read_or_refused_but_never_crashes(
    raw: dict[str, Any], data: st.DataObject, junk: Any
) -> None:
    release = raw["releases"][data.draw(st.sampled_from([0, 6]))]
    name = release["name"]
    small = copy.deepcopy({**raw, "names": {name: raw["names"][name]}, "releases": [release]})
    place: Any = small
    key: Any = data.draw(st.sampled_from(["releases", "names", "as_of", "schema"]))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 5)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = junk
    try:
        said = [parse_catalog(json.dumps(small).encode()).as_of]
    except ManifestError as error:
        said = list(error.lines())
    assert all(line.isprintable() for line in said)


# What is shown.


def test_show_tells_what_the_licence_and_the_user_ask_for(catalog: Catalog) -> None:
    text = show_text(catalog, catalog.find("mistral-7b"))
    for part in (
        "14.48 GB (13.49 GiB)",
        "sha256",
        "btv1",
        "md5:37dab53973db2d56b2da0a033a15307f",
        "Mistral 7B v0.1 by Mistral AI, Apache-2.0, https://mistral.ai/news/announcing-mistral-7b/",
        "https://github.com/mistralai/mistral-inference",
        "https://discord.com/invite/mistralai",
        "https://docs.mistral.ai",
        "https://arxiv.org/abs/2310.06825",
        "MMLU 60.1",
        "the training data",
        "the training method",
        "the weights",
        "[confirmed by 3]",
        "[one source only]",
        "GiB, cut off",
    ):
        assert part in text, part


def test_show_says_that_a_mixture_of_experts_runs(catalog: Catalog) -> None:
    text = show_text(catalog, catalog.find("mixtral-8x7b"))
    assert "runs here   yes" in text
    assert "93.41 GB (86.99 GiB)" in text


def test_show_says_why_a_model_does_not_run(catalog: Catalog) -> None:
    release = dataclasses.replace(catalog.find("mixtral-8x7b"), not_runnable_because="it hears instead of reading")
    assert "runs here   no: it hears instead of reading" in show_text(catalog, release)


@pytest.mark.parametrize("details", [False, True])
def test_no_claim_is_shown_without_its_confidence(catalog: Catalog, details: bool) -> None:
    labels = {"", "computed", "stated by its publisher", "one source only"}
    for release in catalog.releases:
        sections = show_sections(catalog, release, details=details)
        rows = [row for section in sections for row in section.rows]
        assert {row.confidence for row in rows if not row.confidence.startswith("confirmed by ")} <= labels
        assert all(bool(row.sources) == (details and bool(row.confidence)) for row in rows)
        for claim in (release.licence, release.parameters, release.tensor_bytes):
            assert claim is not None
            assert any(row.confidence == claim.label for row in rows)


def test_details_mark_the_digests_that_are_no_checks_and_number_all_sources(catalog: Catalog) -> None:
    release = catalog.find("mistral-7b-instruct", "v0.2")
    sections = show_sections(catalog, release, details=True)
    rows = {row.text: row for section in sections for row in section.rows}
    weak = "sha256:63654d601820b88b1fa8b4a98df5714f700fbc5b3df2cc4ecbabdced35096d31"
    assert rows[f"{weak}, not used as a check"].confidence == "one source only"
    assert sections[-1].title == "Sources, as of 2026-09"
    highest = max(number for section in sections for row in section.rows for number in row.sources)
    assert [row.label for row in sections[-1].rows] == [str(number) for number in range(1, highest + 1)]


def test_json_holds_every_claim_with_confidence_and_resolvable_sources(catalog: Catalog) -> None:
    for release in catalog.releases:
        fields = json.loads(json.dumps(show_fields(catalog, release)))
        claims = list(claims_in(fields))
        assert len(claims) > 10
        for claim in claims:
            assert claim["confidence"] in {level.value for level in Confidence}
            assert claim["used_as_check"] is (claim["confidence"] != "single")
            assert set(claim["sources"]) <= set(fields["sources"])


def test_list_has_a_row_for_every_release(catalog: Catalog) -> None:
    headings, rows, fields = catalog_rows(catalog)
    assert [row[0] for row in rows] == [release.ref for release in catalog.releases]
    assert all(len(row) == len(headings) for row in rows)
    assert rows[0][1:] == [
        "7.24 B",
        "14.48 GB (13.49 GiB)",
        "Apache-2.0",
        "hub (sha256), torrent (btv1), archive (md5)",
        "mistral-7b means this one",
    ]
    assert json.loads(json.dumps(fields))["models"][0]["tensor_bytes"] == 14_483_464_192
