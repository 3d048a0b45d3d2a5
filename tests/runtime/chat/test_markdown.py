"""Markdown to a terminal's styles while the text is still coming."""

from __future__ import annotations

import re

import pytest

from mistral_runtime.chat.markdown import MarkdownStream
from mistral_runtime.chat.screen import StyledScreen

B, D, IT, C, R = "\x1b[1m", "\x1b[2m", "\x1b[3m", "\x1b[36m", "\x1b[0m"

CASES = {
    "plain words": "plain words",
    "some **bold** words": f"some {B}bold{R} words",
    "some *leaning* words": f"some {IT}leaning{R} words",
    "run `ls *.py` now": f"run {C}ls *.py{R} now",
    "2 * 3 * 4 and 2 ** 3": "2 * 3 * 4 and 2 ** 3",
    "a*b*c": "a*b*c",
    "never **closed\nnext": f"never {B}closed{R}\nnext",
    "# Title\ntext": f"{B}Title{R}\ntext",
    "#hashtag": "#hashtag",
    "- one\n  * two\n1. three": "• one\n  • two\n1. three",
    "> said": f"{D}│ said{R}",
    "**bold** first": f"{B}bold{R} first",
    "-5 degrees": "-5 degrees",
    "a\n\nb": "a\n\nb",
    "```py\nx = **1**\n```\nend": f"{D}```py{R}\n{C}x = **1**{R}\n{R}{D}```{R}\nend",
    "````\n```\n````\nend": f"{D}````{R}\n{C}```{R}\n{R}{D}````{R}\nend",
    "---\nx": f"{D}{'─' * 40}{R}\nx",
    "ends in *": "ends in *",
    "`": "`",
    "": "",
}


def shown(text, size):
    stream = MarkdownStream()
    pieces = [stream.feed(text[i : i + size]) for i in range(0, len(text), size)]
    return "".join(pieces) + stream.finish()


@pytest.mark.parametrize("text", CASES)
def test_each_mark_becomes_its_style(text):
    assert shown(text, 1000) == CASES[text]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_pieces_that_text_comes_in_make_no_difference(size):
    text = "\n".join(CASES)
    assert shown(text, size) == shown(text, 1000)


def test_every_style_ends_with_the_answer():
    for text in ("**open", "```\ncode", "# head", "> `x"):
        assert shown(text, 5).endswith(R)


def test_words_are_shown_before_their_line_ends():
    assert MarkdownStream().feed("A long paragraph ") == "A long paragraph "


def test_nothing_of_the_text_is_lost_but_its_marks():
    text = "\n".join(CASES)
    bare = re.sub("\x1b\\[[0-9;]*m", "", shown(text, 4))
    for word in re.findall(r"\w+", text):
        assert word in bare


def test_an_answer_cannot_send_sequences_of_its_own(capfd):
    screen = StyledScreen()
    screen.show("\x1b[2J **a** \x9b31m")
    screen.end()
    assert capfd.readouterr().out == f"\\u001b[2J {B}a{R} \\u009b31m\n"
