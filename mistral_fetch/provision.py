"""``mistral-fetch.toml``: which models a machine is to have, and under which rules. Values and their reader, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import AmbiguousRef, ConfigError, UsageError
from mistral_fetch.ref import CatalogRef, DirectoryRef, ManifestRef, Ref, TorrentRef, parse_ref
from mistral_fetch.strict_json import Fields, UnexpectedJson, listed, one_of, refuse, text
from mistral_fetch.strict_toml import decode_toml, explain

PROVISION_NAME = "mistral-fetch.toml"
MAX_PROVISION_BYTES = 1024 * 1024
CHANNELS = ("hub", "torrent", "archive", "manifest")


@dataclass(frozen=True)
class WantedModel:
    """One model: its reference, and what the machine is to have of it. An empty ``channel`` means the best one."""

    ref: str
    channel: str = ""
    min_assurance: Assurance | None = None
    convert: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """Rules for all models. Paths are as written: relative ones begin at the file's own directory."""

    min_assurance: Assurance | None = None
    adopt_from: tuple[str, ...] = ()
    trust_keys: tuple[str, ...] = ()
    prune: bool = False


@dataclass(frozen=True)
class Provision:
    """What a machine is to have."""

    models: tuple[WantedModel, ...]
    policy: Policy = field(default_factory=Policy)


def parse_provision(data: bytes, name: str) -> Provision:
    """Return what a ``mistral-fetch.toml`` asks for.

    Raises:
        ConfigError: It is not such a file; the line is named.
    """
    try:
        fields = Fields(decode_toml(data, MAX_PROVISION_BYTES), "")
        policy = fields.optional("policy", _read_policy, Policy())
        models = fields.required("model", listed(_read_model))
        fields.done()
        _refuse_repeats(models)
    except UnexpectedJson as error:
        raise ConfigError(
            f"{name} cannot be used", detail=explain(data, error), hint="docs/provisioning.md lists every key"
        ) from None
    return Provision(models, policy)


def located(ref_text: str, base: Path) -> Ref:
    """Return a reference, a local file's path taken from ``base``.

    Raises:
        UsageError: It is no reference.
    """
    ref = parse_ref(ref_text)
    if isinstance(ref, ManifestRef | TorrentRef) and not ref.is_url and not ref.location.startswith("~"):
        return type(ref)(str(base / ref.location))
    return ref


def read_ref(value: Any, where: str) -> str:
    """Read a reference to something that can be fetched."""
    written = text(value, where)
    try:
        ref = parse_ref(written)
    except (UsageError, AmbiguousRef) as error:
        raise UnexpectedJson(where, "a reference", f"{written[:80]!r}: {error.what}") from None
    if isinstance(ref, DirectoryRef):
        refuse(where, "something that can be fetched, not a directory", value)
    return written


def _read_model(value: Any, where: str) -> WantedModel:
    fields = Fields(value, where)
    model = WantedModel(
        fields.required("ref", read_ref),
        fields.optional("channel", one_of(*CHANNELS), ""),
        fields.maybe("min-assurance", read_assurance),
        fields.entries("convert", one_of("safetensors")),
        fields.entries("quantize", one_of("int8", "int4")),
    )
    fields.done()
    return model


def _read_policy(value: Any, where: str) -> Policy:
    fields = Fields(value, where)
    policy = Policy(
        fields.maybe("min-assurance", read_assurance),
        fields.entries("from", text),
        fields.entries("trust-keys", text),
        fields.optional("prune", _boolean, False),
    )
    fields.done()
    return policy


def read_assurance(value: Any, where: str) -> Assurance:
    """Read a level of assurance by its label."""
    return Assurance.parse(one_of(*(level.label for level in Assurance))(value, where))


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        refuse(where, "true or false", value)
    return value


def _refuse_repeats(models: tuple[WantedModel, ...]) -> None:
    seen: dict[str, int] = {}
    for index, model in enumerate(models):
        ref = parse_ref(model.ref)
        # The catalog's default version may be another model's own one; that is found out when it is resolved.
        key = ref.key if not isinstance(ref, DirectoryRef | CatalogRef) else model.ref.lower()
        if key in seen:
            raise UnexpectedJson(f".model[{index}].ref", "every model once", f"{model.ref!r} again")
        seen[key] = index
