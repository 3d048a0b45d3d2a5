"""Read the question and answer corpus, and derive phrasings from it.

Owns the small grammar of `corpus/*.txt`: a fact starts with `== name`, has one answer on a line `A: …`, and any number
of question patterns. In a pattern `(a|b|)` chooses one alternative, and `{name}` is replaced by a value from
`words.txt`. A fact marked `swap` also yields questions about other models (`{m}` becomes `{other}`), which belong to
the fact `scope`, the honest "I do not know". Knows nothing of tokens, tensors or training.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

CORPUS_DIRECTORY = Path(__file__).resolve().parent / "corpus"
PROBE_FILE = Path(__file__).resolve().parent / "probe.txt"
SCOPE = "scope"  # the fact that answers everything we were not asked to know

_OURS = re.compile(r"\{(m|it)\}")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Choice:
    """Exactly one of several alternatives, each a sequence of parts."""

    alternatives: tuple[tuple[Part, ...], ...]


Part: TypeAlias = str | Choice


@dataclass(frozen=True)
class Fact:
    """One answer and every pattern of questions that it answers."""

    name: str
    answer: str
    patterns: tuple[str, ...]
    swap: bool = False


@dataclass
class Corpus:
    """All facts, the shared words, and the parsed form of every pattern."""

    facts: dict[str, Fact]
    words: dict[str, tuple[str, ...]]
    _parsed: dict[str, tuple[Part, ...]] = field(default_factory=dict)

    def parse(self, pattern: str) -> tuple[Part, ...]:
        """Return the parsed pattern, with its slots filled by choices among words."""
        if pattern not in self._parsed:
            self._parsed[pattern] = _parse(_fill(pattern, self.words))
        return self._parsed[pattern]

    def owners(self) -> dict[str, str]:
        """Return which fact answers each phrasing that is not left to `scope`, by normal form."""
        return {
            normal_form(question): fact.name
            for fact in self.facts.values()
            if fact.name != SCOPE
            for pattern in fact.patterns
            for question in self.expand(pattern)
        }

    def swapped_patterns(self) -> list[str]:
        """Return the patterns about our model, turned into questions about somebody else's.

        Some of their phrasings name no model at all; those stay with their own fact, see `owners`.
        """
        swappable = [pattern for fact in self.facts.values() if fact.swap for pattern in fact.patterns]
        return [_OURS.sub("{other}", pattern) for pattern in swappable if _OURS.search(pattern)]

    def sample(self, pattern: str, rng: random.Random) -> str:
        """Return one phrasing of the pattern."""
        return _tidy("".join(_derive(self.parse(pattern), rng)))

    def expand(self, pattern: str) -> Iterator[str]:
        """Yield every phrasing of the pattern."""
        return map(_tidy, _expansions(self.parse(pattern)))


def load_corpus(directory: Path = CORPUS_DIRECTORY) -> Corpus:
    """Read all facts and words of the directory, in the order of file names."""
    words = _parse_words((directory / "words.txt").read_text(encoding="utf-8"))
    facts: dict[str, Fact] = {}
    for path in sorted(directory.glob("*.txt")):
        if path.name == "words.txt":
            continue
        for fact in parse_facts(path.read_text(encoding="utf-8")):
            if fact.name in facts:
                raise ValueError(f"{path.name}: the fact {fact.name!r} is defined twice")
            facts[fact.name] = fact
    return Corpus(facts, words)


def parse_facts(text: str) -> Iterator[Fact]:
    """Yield the facts written in one corpus file."""
    for block in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        head, answer, *rest = [line for line in block.splitlines() if line and not line.startswith("#")]
        name, *flags = head.split()
        if not answer.startswith("A: ") or not rest or set(flags) - {"swap"}:
            raise ValueError(f"the fact {name!r} needs a line 'A: …', then questions, and no flag but 'swap'")
        yield Fact(name, answer.removeprefix("A: "), tuple(rest), swap="swap" in flags)


def load_probes(path: Path = PROBE_FILE) -> list[tuple[str, str]]:
    """Return (fact name, question) pairs that were written apart from the corpus and are never trained on."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [(name.strip(), question.strip()) for name, question in (line.split(":", 1) for line in lines)]


def is_held_out(question: str) -> bool:
    """Say whether this phrasing is kept away from training (one in ten, by its own digest)."""
    return hashlib.sha256(normal_form(question).encode()).digest()[0] < 26


def normal_form(question: str) -> str:
    """Return the question without case, spacing and final marks: two phrasings with one form are the same."""
    return re.sub(r"[\s?!.]+$", "", " ".join(question.lower().split()))


def roughen(question: str, rng: random.Random) -> str:
    """Return the question as a hurried person might type it: case, spelling, greetings, missing marks."""
    if rng.random() < 0.5:
        question = _swap_spelling(question)
    if rng.random() < 0.12:
        question = rng.choice(_OPENINGS) + _lower_first(question)
    if rng.random() < 0.06:
        question = question.rstrip("?.! ") + rng.choice(_ENDINGS)
    if rng.random() < 0.1:
        question = _mistype(question, rng)
    if rng.random() < 0.35:
        question = question.rstrip("?.!")
    draw = rng.random()
    if draw < 0.35:
        return question.lower()
    if draw < 0.38:
        return question.upper()
    return question[:1].upper() + question[1:] if draw < 0.7 else question


_OPENINGS = (
    *("Hi, ", "Hello, ", "Hey, ", "Hi! ", "Hello! ", "Good morning, ", "Excuse me, ", "Sorry, ", "Please, "),
    *("Please tell me: ", "Can you tell me: ", "Quick question: ", "One more question: ", "Tell me, ", "I wonder, "),
    *("So, ", "And ", "Ok, ", "But ", "Now "),
)
_ENDINGS = (
    " please",
    ", please?",
    " thanks",
    "? Thanks.",
    " please?",
    "??",
    "?!",
    "...",
    ", do you know?",
    " then?",
    " exactly?",
    "!",
)


def _swap_spelling(text: str) -> str:
    pairs = {"licence": "license", "license": "licence", "Licence": "License", "License": "Licence"}
    return re.sub(r"[Ll]icen[cs]e", lambda match: pairs[match.group()], text)


def _lower_first(text: str) -> str:
    """Lower the first letter, unless the first word is a name such as `Mistral` or `SHA-256`."""
    first = text.split(" ", 1)[0]
    is_common_word = first.istitle() and not first.startswith("Mistral")
    return text[:1].lower() + text[1:] if is_common_word else text


def _mistype(text: str, rng: random.Random) -> str:
    """Drop, double, swap or replace one letter inside a longer word."""
    places = [match.start() + 1 for match in re.finditer(r"(?<=\w)\w\w(?=\w)", text)]
    if not places:
        return text
    at = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at] + text[at:]
    if kind == 2:
        return text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]
    return text[:at] + rng.choice("abcdefghijklmnoprstuvwy") + text[at + 1 :]


def _parse_words(text: str) -> dict[str, tuple[str, ...]]:
    words = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, values = line.split("=", 1)
            words[name.strip()] = tuple(value.strip() for value in values.split("|"))
    return words


def _fill(pattern: str, words: dict[str, tuple[str, ...]]) -> str:
    """Replace `{name}` by `(value|value)` until no slot is left; an unknown name is an error."""
    while _SLOT.search(pattern):
        pattern = _SLOT.sub(lambda match: "(" + "|".join(map(_escape, words[match.group(1)])) + ")", pattern)
    return pattern


def _escape(value: str) -> str:
    return value.replace("(", "\\(").replace(")", "\\)")


def _parse(pattern: str) -> tuple[Part, ...]:
    """Parse text with nested `(a|b)`; a backslash makes the next character ordinary."""
    parts, rest = _parse_sequence(pattern, 0)
    if rest != len(pattern):
        raise ValueError(f"unbalanced parentheses in {pattern!r}")
    return parts


def _parse_sequence(text: str, at: int) -> tuple[tuple[Part, ...], int]:
    parts: list[Part] = []
    while at < len(text) and text[at] not in "|)":
        if text[at] == "(":
            choice, at = _parse_choice(text, at + 1)
            parts.append(choice)
        else:
            at += text[at] == "\\"
            parts.append(text[at])
            at += 1
    return tuple(parts), at


def _parse_choice(text: str, at: int) -> tuple[Choice, int]:
    alternatives = []
    while True:
        sequence, at = _parse_sequence(text, at)
        alternatives.append(sequence)
        if at >= len(text):
            raise ValueError(f"unbalanced parentheses in {text!r}")
        at += 1
        if text[at - 1] == ")":
            return Choice(tuple(alternatives)), at


def _derive(parts: tuple[Part, ...], rng: random.Random) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Choice):
            yield from _derive(rng.choice(part.alternatives), rng)
        else:
            yield part


def _expansions(parts: tuple[Part, ...]) -> Iterator[str]:
    options = [
        list(itertools.chain.from_iterable(map(_expansions, part.alternatives))) if isinstance(part, Choice) else [part]
        for part in parts
    ]
    return map("".join, itertools.product(*options))


def _tidy(text: str) -> str:
    """Collapse spaces, and drop those that an empty alternative left before a mark or at an end."""
    return re.sub(r"\s+(?=[?!,]|\.(?:\s|$))", "", " ".join(text.split()))
