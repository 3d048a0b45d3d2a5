"""A model in Hugging Face's cache, as its own library reads it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_fetch.catalog import load_catalog
from mistral_fetch.errors import Conflict, UsageError
from mistral_fetch.export.directory import Exported
from mistral_fetch.export.hub_view import HubName, export_hub_view, hub_name
from mistral_fetch.export.model import Model
from tests.export.conftest import COMMIT, HUB_FILES, MISTRAL_FILES, PICKLED_FILES, placer

Loaded = Callable[..., Model]


def export(model: Model, hub: Path, *, repo: str | None = None, replaces_ref: bool = False) -> Exported:
    """Add a model to a hub's cache."""
    return export_hub_view(model, hub_name(model, load_catalog(), repo), hub, placer(), replaces_ref=replaces_ref)


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def test_the_layout_is_huggingface_hub_s(loaded: Loaded, tmp_path: Path) -> None:
    done = export(loaded(HUB_FILES), tmp_path / "hub")
    place = tmp_path / "hub" / "models--org--tiny"
    assert done.directory == place / "snapshots" / COMMIT
    assert {path: (done.directory / path).read_bytes() for path in HUB_FILES} == HUB_FILES
    assert (place / "refs" / "main").read_text() == COMMIT
    assert (done.directory / "config.json").readlink() == Path("../../blobs") / git_id(HUB_FILES["config.json"])
    weights = "model-00001-of-00002.safetensors"
    assert (done.directory / weights).readlink().name == hashlib.sha256(HUB_FILES[weights]).hexdigest()
    assert (done.directory / "tokenizer.model").readlink().name == hashlib.sha256(b"pieces").hexdigest()


def test_what_the_hub_called_a_file_is_what_it_is_called(loaded: Loaded, tmp_path: Path) -> None:
    told = f"gitsha1:{git_id(HUB_FILES['tokenizer.model'])}"
    papers = {"files": [{"path": "tokenizer.model", "assurance": "gitsha1", "promised": [told]}]}
    done = export(loaded(HUB_FILES, papers=papers), tmp_path / "hub")
    assert (done.directory / "tokenizer.model").readlink().name == told.partition(":")[2]


def test_the_library_finds_it_offline(loaded: Loaded, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    done = export(loaded(HUB_FILES), tmp_path / "hub")
    found = hub.snapshot_download("org/tiny", cache_dir=tmp_path / "hub", local_files_only=True)
    assert Path(found) == done.directory
    info = hub.scan_cache_dir(tmp_path / "hub")
    assert list(info.warnings) == []
    (repo,) = info.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, set(revision.refs)) == ("org/tiny", COMMIT, {"main"})
    assert {file.file_name for file in revision.files} == set(HUB_FILES)


def test_a_second_export_changes_nothing_and_a_broken_off_one_is_continued(loaded: Loaded, tmp_path: Path) -> None:
    model, hub = loaded(HUB_FILES), tmp_path / "hub"
    assert not export(model, hub).was_complete
    before = {path: path.lstat().st_mtime_ns for path in hub.rglob("*") if not path.is_dir()}
    assert export(model, hub).was_complete
    assert {path: path.lstat().st_mtime_ns for path in hub.rglob("*") if not path.is_dir()} == before
    place = hub / "models--org--tiny"
    (place / "refs" / "main").unlink()
    (place / "snapshots" / COMMIT / "config.json").unlink()
    (place / "blobs" / "x.0.mistral-fetch").write_bytes(b"left by a process that died")
    done = export(model, hub)
    assert not done.was_complete
    assert {path: (done.directory / path).read_bytes() for path in HUB_FILES} == HUB_FILES
    assert (place / "refs" / "main").read_text() == COMMIT
    assert list((place / "blobs").glob("*.mistral-fetch")) == []


def test_what_others_put_there_is_not_changed(loaded: Loaded, tmp_path: Path) -> None:
    model, place = loaded(HUB_FILES), tmp_path / "hub" / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("f" * 40)
    with pytest.raises(Conflict) as refused:
        export(model, tmp_path / "hub")
    assert "--replace" in refused.value.hint
    assert [path.name for path in place.iterdir()] == ["refs"]
    export(model, tmp_path / "hub", replaces_ref=True)
    assert (place / "refs" / "main").read_text() == COMMIT
    blob = place / "blobs" / git_id(HUB_FILES["config.json"])
    blob.unlink()
    blob.write_bytes(b"theirs")
    with pytest.raises(Conflict):
        export(model, tmp_path / "hub")
    assert blob.read_bytes() == b"theirs"


@pytest.mark.parametrize("files", [MISTRAL_FILES, PICKLED_FILES], ids=["safetensors", "pickle"])
def test_mistral_s_own_layout_is_refused_with_what_is_missing(
    files: dict[str, bytes], loaded: Loaded, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        export(loaded(files), tmp_path / "hub")
    assert "config.json" in refused.value.detail
    assert "Mistral's own layout" in refused.value.detail
    assert not (tmp_path / "hub").exists()


def test_names(loaded: Loaded) -> None:
    catalog = load_catalog()
    assert hub_name(loaded(HUB_FILES), catalog, None) == HubName("org/tiny", "main", COMMIT)
    branch = loaded(HUB_FILES, "hf:org/tiny@refs/pr/1")
    assert hub_name(branch, catalog, None).revision == "refs/pr/1"
    assert hub_name(loaded(HUB_FILES, f"hf:org/tiny@{COMMIT}"), catalog, None).revision == "main"
    known = hub_name(loaded(HUB_FILES, "mistral-7b@v0.1"), catalog, None)
    assert (known.repo, known.folder) == ("mistralai/Mistral-7B-v0.1", "models--mistralai--Mistral-7B-v0.1")
    own = loaded(HUB_FILES, "tiny.meta4#1", "manifest")
    assert hub_name(own, catalog, "me/mine") == HubName("me/mine", "main", own.content_digest[:40])
    for repo in (None, "../x", "a/b/c", "a", "a/..", "a--b/../c"):
        with pytest.raises(UsageError):
            hub_name(own, catalog, repo)


LOAD = """
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained("me/tiny")
model = transformers.AutoModelForCausalLM.from_pretrained("me/tiny")
with torch.inference_mode():
    print(float(model(torch.tensor([[1, 2, 3]])).logits.sum()), tokenizer.decode([2]))
"""


@pytest.mark.slow
@pytest.mark.interop
def test_transformers_loads_it_without_a_network(loaded: Loaded, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is what must load it")
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "made")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate("abcdefgh")}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    export(loaded(files, "tiny.meta4#1", "manifest"), tmp_path / "home" / "hub", repo="me/tiny")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = float(model(torch.tensor([[1, 2, 3]])).logits.sum())
    printed, word = done.stdout.split()
    assert float(printed) == pytest.approx(expected, abs=1e-5)
    assert word == "c"
