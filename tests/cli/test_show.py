"""``show``: everything a careful person asks before fetching 14.5 GB."""

from __future__ import annotations

import pytest

EXPECTED = {
    "the three channels": ["Hugging Face", "torrent", "tar archive"],
    "sizes in both units": ["14.48 GB (13.49 GiB)"],
    "how well each is vouched for": ["assurance  sha256", "assurance  btv1", "assurance  md5"],
    "the official info-hash": ["208b101a0f51514ecf285885a8b0f6fb1a1e4d7d"],
    "licence and credit line": [
        "Apache-2.0",
        "credit line  Mistral 7B v0.1 by Mistral AI, Apache-2.0, https://mistral.ai/news/announcing-mistral-7b/",
    ],
    "what is open": ["the weights, to use, change and pass on"],
    "what is not": ["Not open", "the training data", "the training method"],
    "links": [
        "https://github.com/mistralai/mistral-inference",
        "https://discord.com/invite/mistralai",
        "https://docs.mistral.ai",
        "https://arxiv.org/abs/2310.06825",
    ],
    "scores and where they come from": ["MMLU 60.1", "Jiang et al., Mistral 7B, arXiv 2310.06825"],
    "what this cache has": ["In this cache\n  nothing yet"],
}


@pytest.mark.parametrize("topic", EXPECTED)
def test_show_tells(program, topic):
    shown = program("show", "mistral-7b")
    assert (shown.code, shown.err) == (0, "")
    for text in EXPECTED[topic]:
        assert text in shown.out


def test_names_stand_for_versions(program):
    assert program("show", "mistral-7b").out == program("show", "mistral-7b@v0.1").out
    newest = program("show", "mistral-7b-instruct").out.splitlines()[0]
    assert newest == "Mistral 7B Instruct v0.3 (mistral-7b-instruct@v0.3)"


def test_show_of_a_pulled_file_tells_where_every_byte_came_from(program, pulled):
    shown = program("show", "tiny.meta4")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"In this cache\n  {pulled} (by manifest)\n    name: tiny\n")
    assert "\n    licence: Apache-2.0\n" in shown.out
    assert "weights.bin  281.6 kB  sha256  sha256:" in shown.out
    assert "from local files, verified 20" in shown.out


def test_show_of_what_is_neither_known_nor_here(program, manifest):
    shown = program("show", "tiny.meta4")
    assert (shown.code, shown.out) == (3, "")
    assert "fetch it with: mistral-fetch pull tiny.meta4" in shown.err


def test_show_is_for_the_offline(program):
    assert program("show", "mistral-7b", "--offline").code == 0
