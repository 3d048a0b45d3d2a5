"""``export gguf-source`` and ``export ollama``: one directory of links, with what its reader needs beside the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.errors import UsageError
from mistral_fetch.export.links import Placer, new_directory, write_text
from mistral_fetch.export.model import (
    Model,
    is_hugging_face_layout,
    require_hugging_face_layout,
    require_mistral_layout,
)
from mistral_fetch.store.durable import make_directory

MODELFILE = "Modelfile"
# Go templates, as ollama documents them; what a model was trained with is in docs/runtime.md. The text that begins
# a prompt (<s>) is added by the tokenizer.
_SYSTEM = "{{ if .System }}{{ .System }}\n\n{{ end }}"
_TEMPLATES = {
    "v1": (f"[INST] {_SYSTEM}{{{{ .Prompt }}}} [/INST] {{{{ .Response }}}}</s>", ("[INST]", "[/INST]")),
    "v3": (f"[INST] {_SYSTEM}{{{{ .Prompt }}}}[/INST] {{{{ .Response }}}}</s>", ("[INST]", "[/INST]")),
    "demo": ("Q: {{ .Prompt }}\nA: {{ .Response }}\n", ("\\n",)),
    "none": ("{{ .Prompt }}", ()),
}


@dataclass(frozen=True)
class Exported:
    """What was laid out; ``next_step`` is what to type there."""

    directory: Path
    was_complete: bool
    how: str
    next_step: str


def export_gguf_source(model: Model, target: Path, placer: Placer) -> Exported:
    """Lay a model out for llama.cpp's ``convert_hf_to_gguf.py``.

    Raises:
        UsageError: The converter could not read it.
        Conflict, StoreError: The target is something else, or the disk refused.
    """
    if is_hugging_face_layout(model):
        require_hugging_face_layout(model, "convert_hf_to_gguf.py")
        flag = ""
    else:
        require_mistral_layout(model, "convert_hf_to_gguf.py")
        flag = " --mistral-format"
    was_complete = _lay_out(model, target, placer, {})
    return Exported(target, was_complete, placer.told(), f"convert_hf_to_gguf.py {target} --outtype auto{flag}")


def export_ollama(model: Model, target: Path, placer: Placer) -> Exported:
    """Lay a model out for ``ollama create``, with a Modelfile.

    Raises:
        UsageError: ollama could not read it.
        Conflict, StoreError: The target is something else, or the disk refused.
    """
    require_hugging_face_layout(model, "ollama")
    was_complete = _lay_out(model, target, placer, {MODELFILE: modelfile(model)})
    return Exported(target, was_complete, placer.told(), f"ollama create {model.name} -f {target / MODELFILE}")


def modelfile(model: Model) -> str:
    """Return a Modelfile for a directory that it lies in; a model that says nothing of its turns gets no template."""
    lines = ["FROM .", *_template(model.info.chat_template), *_licence(model)]
    return "\n".join(lines) + "\n"


def _template(name: str) -> list[str]:
    if name not in _TEMPLATES:
        return []
    text, stops = _TEMPLATES[name]
    return [f'TEMPLATE """{text}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]


def _licence(model: Model) -> list[str]:
    text = model.licence_text()
    # Quoted text ends at three quotes, and what follows would be instructions of a stranger's.
    if '"""' in text or not text:
        text = model.info.licence if '"' not in model.info.licence else ""
    return [f'LICENSE """{text}"""'] if text else []


def _lay_out(model: Model, target: Path, placer: Placer, texts: dict[str, str]) -> bool:
    """Link a model's files into a directory, with small files beside them; return whether all was there."""
    sizes = {file.path: file.size for file in model.files}
    taken = {path.casefold() for path in sizes}
    clash = next((name for name in texts if name.casefold() in taken), None)
    if clash is not None:
        raise UsageError(
            f"{model.key} has a file called {clash} of its own",
            detail=f"expected none of that name, because {clash} is written for the reader",
            hint="copy the model's files by hand: mistral-fetch path REF",
        )
    licence = {"LICENSE": model.licence.stat().st_size} if model.licence else {}
    written = {name: len(text.encode()) for name, text in texts.items()}
    with new_directory(target, {**sizes, **written, **licence}) as draft:
        if draft is None:
            return True
        for file in model.files:
            make_directory((draft / file.path).parent)
            placer.place(file.location, draft / file.path)
        if model.licence is not None:
            write_text(draft / "LICENSE", model.licence.read_text("utf-8"))
        for name, text in texts.items():
            write_text(draft / name, text)
    return False
