"""Who may import whom, read from the source: arrows point down and never turn back.

    vocabulary  <-  store | bittorrent  <-  sources  <-  transfer | publish | launch  <-  bundle | export  <-  cli

The vocabulary is the flat files of ``mistral_fetch``. Names joined by ``|`` do not know each other. ``ALLOWED`` is
the whole truth: an import that no row allows is a defect, and so is a row that nothing needs any more.
Imports inside functions and under ``TYPE_CHECKING`` count like all others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"mistral_fetch": ROOT / "mistral_fetch", "mistral_runtime": ROOT / "runtime/mistral_runtime"}
FOLDERS = ("store", "bittorrent", "sources", "transfer", "publish", "launch", "bundle", "export", "cli", "simulators")


@dataclass(frozen=True)
class Allowed:
    """Modules matching ``importer`` may import modules matching ``imported``; exceptions say why."""

    importer: str
    imported: str
    reason: str = ""


# Names are written without the leading "mistral_fetch."; "vocabulary.x" is mistral_fetch/x.py.
ALLOWED = (
    Allowed("*", "vocabulary.*"),
    *(Allowed(f"{folder}.*", f"{folder}.*") for folder in FOLDERS),
    Allowed("sources.*", "store.partials", "a source fills the partial it is handed"),
    Allowed("sources.swarm*", "bittorrent.*", "the one source that is a swarm"),
    Allowed("sources.swarm*", "store.durable", "it keeps a magnet's metadata beside the partials"),
    Allowed("sources.archive", "store.durable", "it notes beside the partials which archive was proved"),
    Allowed("bittorrent.*", "store.durable", "fsync and rename are written once"),
    Allowed("transfer.*", "sources.*"),
    Allowed("transfer.*", "store.*"),
    Allowed("transfer.torrents", "bittorrent.*", "opens torrents for the swarm source"),
    Allowed("publish.*", "bittorrent.*", "builds torrents with the reader's own vocabulary"),
    Allowed("publish.*", "store.durable", "fsync and rename are written once"),
    Allowed("publish.check_address", "sources.*", "reads a mirror's own papers as a client would"),
    Allowed("publish.mirror_check", "sources.*", "asks a mirror as a client would"),
    Allowed("publish.piece_map", "sources.urls", "calls a mirror what its transfer calls it"),
    Allowed("bundle.*", "store.*"),
    Allowed("bundle.source", "sources.*", "a bundle is a source too"),
    Allowed("bundle.receive", "sources.base", "for StopSignal alone"),
    Allowed("bundle.*", "transfer.*", "a bundle is taken in as a pull takes what it fetches"),
    Allowed("bundle.pack", "publish.model", "a model's folder is called as its publication would be"),
    Allowed("export.*", "store.*"),
    Allowed("export.model", "transfer.*", "which model is meant, and where its safetensors copy lies"),
    Allowed("export.model", "publish.model", "a model's files and their blobs, as for publishing"),
    Allowed("cli.bundle", "bundle.*"),
    Allowed("cli.export", "export.*"),
    Allowed("cli.*", "transfer.*"),
    Allowed("cli.*", "publish.*"),
    Allowed("cli.*", "launch.*"),
    Allowed("cli.*", "store.*", "the cache commands look at the cache itself"),
    Allowed("cli.*", "bittorrent.*", "seed tells people of torrents"),
    Allowed("cli.*", "sources.base", "for StopSignal alone: Ctrl-C stops a transfer through it"),
    Allowed("cli.doctor_*", "sources.*", "asks the hub as a pull would, and names hosts as it does"),
    Allowed("cli.mirror_check", "sources.*", "opens the client that the check asks with"),
    Allowed("simulators.seeder", "bittorrent.*", "a real seeder, as a process of its own"),
    Allowed("simulators.publisher", "publish.*", "publishes what it is told to serve"),
    Allowed("vocabulary.api", "transfer.*", "the same functions as the command line, without one"),
    Allowed("vocabulary.api", "store.*", "it looks at the cache as `path` and `verify` do"),
    Allowed("vocabulary.api", "sources.base", "for StopSignal alone"),
    Allowed("vocabulary.__main__", "cli.app", "`python -m mistral_fetch` is the command line"),
)

# The vocabulary has an order of its own: these know nothing of ours, so that everything may know them.
LEAVES = ("errors", "events")

# Which modules may import an outside library: one owner each, as far as that goes.
OWNERS = {
    "httpx": {"mistral_fetch.sources.http_client", "mistral_fetch.sources.http_body"},
    "libtorrent": {"mistral_fetch.bittorrent.*"},
    "rich": {"mistral_fetch.cli.render"},
    "typer": {"mistral_fetch.cli.*"},
    "model_signing": {"mistral_fetch.signatures"},
    "starlette": {"mistral_fetch.publish.mirror", "mistral_runtime.serve.*"},
    "uvicorn": {
        "mistral_fetch.publish.mirror",
        "mistral_runtime.serve.connection",
        "mistral_runtime.serve.http_server",
    },
    "h11": {"mistral_runtime.serve.connection"},  # uvicorn's own parser, whose state tells what is waited for
    "prometheus_client": {"mistral_fetch.publish.status", "mistral_runtime.serve.metrics"},
    "platformdirs": {"mistral_fetch.config"},
    "tomli": {"mistral_fetch.strict_toml"},  # tomllib before Python 3.11
    "torchao": {"mistral_runtime.gpu.torchao_weights"},
    "torch": {
        f"mistral_runtime.{module}"
        for module in (
            "gpu.*",
            "__main__",  # only to import it apart from our own modules, so that --timings can tell it apart
            "adapter",
            "api",
            "attention",
            "batched_step",
            "bench",
            "compiled_step",
            "device",
            "digest",
            "engine",
            "inductor_decode",
            "kernels.attention",
            "kernels.build",
            "kernels.calling",
            "kernels.rows",
            "kernels.rowwise",
            "kernels.tiles",
            "kv_cache",
            "kv_int8",
            "layers",
            "linear_rows",
            "loading",
            "lora",
            "memory_speed",
            "mixture",
            "quantize",
            "quantized",
            "quantized_file",
            "reference",
            "rope",
            "sampling",
            "scoring",
            "step_attention",
            "serve.answer",
            "serve.choose",
            "serve.constraints",
            "serve.embedding",
            "serve.engine_process",
            "serve.row_groups",
            "serve.step_work",
            "serve.token_rows",
            "tensor_bytes",
            "tensor_parallel",
            "tp_launch",
            "tp_plan",
            "tp_worker",
            "transformer",
            "weights",
        )
    },
    "llguidance": {"mistral_runtime.serve.constraints"},
    "safetensors": {"mistral_runtime.weights", "mistral_runtime.quantized_file"},
    "sentencepiece": {"mistral_runtime.tokenizer"},
    "mistral_common": {"mistral_runtime.prompt", "mistral_runtime.serve.chat_prompt"},
    # mistral-common's own errors are pydantic's
    "pydantic": {"mistral_runtime.prompt", "mistral_runtime.serve.chat_prompt"},
}

# The standard library's ways to a network, and what each is used for.
NETWORK_MODULES = {
    "asyncio",
    "ftplib",
    "http",
    "imaplib",
    "poplib",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "urllib.request",
    "xmlrpc",
}
NETWORK_USERS = {
    "mistral_fetch.sources.http_client": {"http", "socket", "ssl"},
    "mistral_fetch.sources.http_body": {"socket", "ssl"},  # reads from the sockets that httpx opened
    "mistral_fetch.sources.mirror_errors": {"ssl", "socket"},  # tells their exceptions apart
    "mistral_fetch.bittorrent.peers": {"socket"},  # reads and writes addresses
    "mistral_fetch.bittorrent.listen": {"socket"},  # tries whether a port is free
    "mistral_fetch.store.lock": {"socket"},  # this machine's name, for a lock's owner
    "mistral_fetch.publish.listen": {"socket"},  # what seed, mirror and the status endpoint listen on
    "mistral_fetch.publish.notify": {"socket"},  # datagrams to systemd
    "mistral_fetch.publish.status": {"http"},  # the status endpoint
    "mistral_fetch.cli.doctor_network": {"ssl"},  # loads the certificates that would count
    "mistral_fetch.simulators.*": {"http", "socket", "socketserver", "ssl"},
    "mistral_runtime.serve.engine_child": {"asyncio", "socket"},  # a pair of sockets, to the engine's process
    "mistral_runtime.serve.engine_client": {"asyncio"},
    "mistral_runtime.serve.engine_link": {"socket"},  # the engine's end of the pair
    "mistral_runtime.serve.fake_engine": {"asyncio"},
    **{
        f"mistral_runtime.serve.{module}": {"asyncio"}
        for module in ("event_stream", "fan_out", "guard", "threads", "token_routes")
    },
    "mistral_runtime.serve.command": {"asyncio", "socket"},
    "mistral_runtime.serve.connection": {"asyncio"},
    "mistral_runtime.serve.http_server": {"asyncio", "socket"},
    "mistral_runtime.serve.listening": {"socket"},  # what the server listens on
    "mistral_runtime.serve.notify": {"socket"},  # datagrams to systemd
}

# Token ids in, token ids out: the model and its engine know neither text nor files nor terminals.
TEXT_FREE = ("attention", "engine", "kv_cache", "layers", "reference", "rope", "sampling", "scoring", "transformer")
KNOWS_TEXT = ("chat", "generate", "prompt", "session", "snapshot", "terminal", "text_stream", "tokenizer", "weights")


def read_modules() -> dict[str, Path]:
    """Return every module of both packages by its full name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = read_modules()


def imports_of(tree: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """Give what a module imports, by full name: a module of ours where there is one, else what was written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in modules or full in NETWORK_MODULES else base


IMPORTS = {name: sorted(set(imports_of(ast.parse(path.read_text()), MODULES))) for name, path in MODULES.items()}


def short(module: str) -> str:
    """Return ``mistral_fetch.cli.app`` as ``cli.app`` and ``mistral_fetch.errors`` as ``vocabulary.errors``."""
    name = module.removeprefix("mistral_fetch.")
    return name if name.partition(".")[0] in FOLDERS else f"vocabulary.{name}"


def own_edges() -> list[tuple[str, str]]:
    """Return who imports whom inside ``mistral_fetch``, in short names. The package itself holds the version only."""
    return [
        (short(importer), short(imported))
        for importer, names in IMPORTS.items()
        for imported in names
        if importer.startswith("mistral_fetch") and imported.startswith("mistral_fetch.")
    ]


def test_every_folder_has_a_place_in_the_order():
    folders = {path.parent.name for path in PACKAGES["mistral_fetch"].glob("*/__init__.py")}
    assert folders == set(FOLDERS)


def test_no_import_turns_back():
    forbidden = [
        f"{importer} imports {imported}"
        for importer, imported in own_edges()
        if not any(fnmatchcase(importer, row.importer) and fnmatchcase(imported, row.imported) for row in ALLOWED)
    ]
    assert forbidden == []


@pytest.mark.parametrize("row", ALLOWED, ids=lambda row: f"{row.importer}->{row.imported}")
def test_every_allowance_is_needed(row):
    assert any(fnmatchcase(a, row.importer) and fnmatchcase(b, row.imported) for a, b in own_edges())


def test_neighbours_do_not_know_each_other():
    """The table above must not quietly allow what the drawing forbids. How to write safely all who write may know."""
    for left, right in (
        ("store", "bittorrent"),
        ("transfer", "publish"),
        ("transfer", "launch"),
        ("publish", "launch"),
    ):
        for row in ALLOWED:
            sides = {row.importer.partition(".")[0], row.imported.partition(".")[0]}
            assert sides != {left, right} or row.imported == "store.durable", row


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_have_no_cycle(package):
    graph = {name: [i for i in names if i in MODULES] for name, names in IMPORTS.items() if name.startswith(package)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_nothing_of_ours(leaf):
    assert [name for name in IMPORTS[f"mistral_fetch.{leaf}"] if name.startswith("mistral_")] == []


def test_the_two_programs_do_not_know_each_other():
    for module, names in IMPORTS.items():
        other = "mistral_runtime" if module.startswith("mistral_fetch") else "mistral_fetch"
        assert [name for name in names if name.partition(".")[0] == other] == [], module


def test_every_outside_library_has_an_owner():
    outside = {
        (name.partition(".")[0], module)
        for module, names in IMPORTS.items()
        for name in names
        if name.partition(".")[0] not in {*sys.stdlib_module_names, *PACKAGES, "tomllib"}
    }
    wrong = [
        f"{module} imports {library}"
        for library, module in sorted(outside)
        if not any(fnmatchcase(module, owner) for owner in OWNERS.get(library, ()))
    ]
    assert wrong == []
    unused = [
        f"{owner} does not import {library}"
        for library, owners in OWNERS.items()
        for owner in owners
        if not any(library == used and fnmatchcase(module, owner) for used, module in outside)
    ]
    assert unused == []


def network_users() -> set[tuple[str, str]]:
    """Return which module uses which of the standard library's ways to a network."""
    found = set()
    for module, names in IMPORTS.items():
        for name in names:
            found |= {(way, module) for way in NETWORK_MODULES if name == way or name.startswith(f"{way}.")}
    return found


def test_the_runtime_has_no_network_code_but_for_serving():
    runtime = [pair for pair in network_users() if pair[1].startswith("mistral_runtime")]
    assert [pair for pair in runtime if not pair[1].startswith("mistral_runtime.serve.")] == []


def test_sockets_are_opened_in_few_places():
    wrong = [
        (module, way)
        for way, module in network_users()
        if not any(fnmatchcase(module, owner) and way in ways for owner, ways in NETWORK_USERS.items())
    ]
    assert wrong == []


def test_the_engine_knows_no_text():
    for module in TEXT_FREE:
        names = {name.removeprefix("mistral_runtime.") for name in IMPORTS[f"mistral_runtime.{module}"]}
        assert names.isdisjoint(KNOWS_TEXT), module


def test_no_module_imports_by_a_computed_name():
    """What these tests cannot read would be a back door."""
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        methods = {node.func.attr for node in calls if isinstance(node.func, ast.Attribute)}
        assert names.isdisjoint({"__import__", "import_module", "exec", "eval"}), name
        assert "import_module" not in methods, name


@pytest.mark.parametrize(
    "line, expected",
    [
        ("import mistral_fetch.cli.app", "mistral_fetch.cli.app"),
        ("from mistral_fetch.cli import app", "mistral_fetch.cli.app"),
        ("from mistral_fetch.cli.app import main", "mistral_fetch.cli.app"),
        ("def f():\n    import httpx", "httpx"),
        ("if TYPE_CHECKING:\n    import torch.nn as nn", "torch.nn"),
        ("from urllib import request", "urllib.request"),
        ("from . import sibling", "."),
        ("from ..store import blobs", "..store"),
    ],
)
def test_the_reader_sees_every_kind_of_import(line, expected):
    assert list(imports_of(ast.parse(line), MODULES)) == [expected]


def test_imports_are_absolute():
    assert [(module, name) for module, names in IMPORTS.items() for name in names if name.startswith(".")] == []
