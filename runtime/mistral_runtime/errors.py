"""Every error the runtime raises on purpose, as one tree.

    MistralRuntimeError                what, detail, hint; exit_code
      CheckpointError                  the snapshot directory is not what it claims to be
        MissingFile · MalformedConfig · UnknownConfigKey · UnsupportedModel
        MalformedCheckpoint · UnsafePickle · MissingShard
        MissingTensor · UnexpectedTensor · ShapeMismatch · DtypeMismatch
        MalformedTokenizer · NonFiniteLogits
      DeviceError                      this machine cannot do what was asked
        DeviceUnavailable · NotEnoughMemory · MissingDependency · DiskFull · WriteFailed · RankLost
      RequestError                     the question itself cannot be served
        PromptTooLong · EmptyPrompt · NoChatTemplate · BadSampling · BadRequest

Groups end in Error, causes state the fact. This module imports nothing of ours and nothing heavy, so that
an error can always be raised and shown.
"""

from __future__ import annotations

_MAX_LINE_CHARACTERS = 600


def _one_line(text: str) -> str:
    """Return `text` as a single printable line: names from hostile files must not draw on the terminal."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(printable) > _MAX_LINE_CHARACTERS:
        return printable[: _MAX_LINE_CHARACTERS - 1] + "…"
    return printable


class MistralRuntimeError(Exception):
    """Stop with three lines: what failed and where, expected and actual, what to do next.

    Args:
        what: The failure and the file or setting it concerns.
        detail: What was expected and what was found.
        hint: What to type or change next.
    """

    exit_code = 40

    def __init__(self, what: str, *, detail: str, hint: str) -> None:
        self.what = _one_line(what)
        self.detail = _one_line(detail)
        self.hint = _one_line(hint)
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.what}\n{self.detail}\n{self.hint}"


class CheckpointError(MistralRuntimeError):
    """The snapshot directory is incomplete, damaged, hostile or of another architecture."""


class MissingFile(CheckpointError):
    """A file that every snapshot needs is not there."""


class MalformedConfig(CheckpointError):
    """`params.json` or `config.json` does not parse, or a value is out of range."""


class UnknownConfigKey(CheckpointError):
    """The configuration has a key whose meaning is not known here, so its effect would be lost."""


class UnsupportedModel(CheckpointError):
    """The configuration is well-formed but describes a model this runtime does not compute."""


class MalformedCheckpoint(CheckpointError):
    """A weight file is cut short, inconsistent or not in the format its name promises."""


class UnsafePickle(CheckpointError):
    """A `.pth` file asks for something other than tensors; loading it could run code."""


class MissingShard(CheckpointError):
    """The index names a weight file that is not in the directory."""


class MissingTensor(CheckpointError):
    """The configuration calls for a tensor that no weight file holds."""


class UnexpectedTensor(CheckpointError):
    """A weight file holds a tensor that the model has no place for."""


class ShapeMismatch(CheckpointError):
    """A tensor's shape differs from the one the configuration implies."""


class DtypeMismatch(CheckpointError):
    """A tensor is neither bfloat16, float16 nor float32, or differs from its siblings."""


class MalformedTokenizer(CheckpointError):
    """The tokenizer file does not load, or its vocabulary is not the model's."""


class NonFiniteLogits(CheckpointError):
    """The model computed NaN or infinity, so no next token can be told."""


class NonFiniteWeights(CheckpointError):
    """A weight is NaN or infinite, so no integer stands for it."""


class StaleWeights(CheckpointError):
    """Quantised weights that another version, another torch or another machine made."""


class DeviceError(MistralRuntimeError):
    """The machine lacks something."""


class DeviceUnavailable(DeviceError):
    """The device or the number type asked for does not work here."""


class NotEnoughMemory(DeviceError):
    """The memory plan does not fit, found before loading."""


class MissingDependency(DeviceError):
    """A library that the runtime stands on is not installed for this interpreter."""


class DiskFull(DeviceError):
    """There is no room for a file that is to be written."""


class WriteFailed(DeviceError):
    """The disk refused to take a file for another reason."""


class RankLost(DeviceError):
    """One of the processes that a model is spread over ended, so the others cannot go on."""


class RequestError(MistralRuntimeError):
    """The request cannot be served as it was typed."""

    exit_code = 2


class PromptTooLong(RequestError):
    """Prompt and answer together exceed the context; nothing is truncated unasked."""


class EmptyPrompt(RequestError):
    """There is no token to continue from."""


class NoChatTemplate(RequestError):
    """The model is a base model: it completes text and has no notion of turns."""


class BadSampling(RequestError):
    """A sampling setting is outside its range."""


class BadRequest(RequestError):
    """Any other argument that cannot be used."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end: no failure, so not in the tree and past every `except Exception`."""

    exit_code = 130

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
