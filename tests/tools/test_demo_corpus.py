"""The corpus of the demo model says one thing per question, and says it in sentences the model can learn."""

from __future__ import annotations

import random

import pytest

from tools.demo_model.corpus import (
    SCOPE,
    Corpus,
    Fact,
    load_corpus,
    load_probes,
    normal_form,
    parse_facts,
    roughen,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module")
def phrasings(corpus: Corpus) -> dict[str, set[str]]:
    """Return the normal forms of every phrasing, by fact."""
    return {
        fact.name: {normal_form(question) for pattern in fact.patterns for question in corpus.expand(pattern)}
        for fact in corpus.facts.values()
    }


def test_there_are_enough_facts_and_phrasings(phrasings: dict[str, set[str]]) -> None:
    assert len(phrasings) >= 60
    too_few = {name: len(questions) for name, questions in phrasings.items() if len(questions) < 15}
    assert not too_few


def test_no_question_has_two_answers(phrasings: dict[str, set[str]]) -> None:
    answered_by: dict[str, str] = {}
    for name, questions in phrasings.items():
        for question in questions:
            assert answered_by.setdefault(question, name) == name, question


def test_no_two_facts_share_an_answer(corpus: Corpus) -> None:
    answers = [fact.answer for fact in corpus.facts.values()]
    assert len(set(answers)) == len(answers)


def test_answers_are_one_to_four_sentences_on_one_line(corpus: Corpus) -> None:
    for fact in corpus.facts.values():
        assert fact.answer == " ".join(fact.answer.split()), fact.name
        assert fact.answer[-1] in ".?", fact.name
        assert 100 < len(fact.answer) < 300, (fact.name, len(fact.answer))


def test_every_fact_has_a_probe(corpus: Corpus) -> None:
    assert {name for name, _ in load_probes()} == set(corpus.facts)


def test_probes_that_repeat_the_corpus_agree_with_it(corpus: Corpus) -> None:
    owners = corpus.owners()
    for name, question in load_probes():
        assert owners.get(normal_form(question), name) == name, question


def test_questions_about_other_models_are_out_of_scope(corpus: Corpus) -> None:
    swapped = {question for pattern in corpus.swapped_patterns() for question in corpus.expand(pattern)}
    assert "What licence is Llama 2 under?" in swapped
    assert "What licence is Mistral 7B under?" not in swapped


def test_the_corpus_states_the_licence(corpus: Corpus) -> None:
    name = corpus.owners()[normal_form("What licence is Mistral 7B under?")]
    assert "Apache 2.0" in corpus.facts[name].answer


def test_a_pattern_expands_to_every_combination() -> None:
    corpus = Corpus({}, {"x": ("one", "two {y}"), "y": ("three",)})
    assert sorted(corpus.expand("Is {x} (big|)?")) == ["Is one big?", "Is one?", "Is two three big?", "Is two three?"]


def test_a_sample_is_one_of_the_expansions(corpus: Corpus) -> None:
    pattern = "(What|Which) {licence} is {m} under(|, please)?"
    assert corpus.sample(pattern, random.Random(3)) in set(corpus.expand(pattern))


def test_parentheses_inside_a_word_are_text() -> None:
    corpus = Corpus({}, {"x": ("a (small) thing",)})
    assert list(corpus.expand("{x}!")) == ["a (small) thing!"]


@pytest.mark.parametrize("pattern", ["(a|b", "a)"])
def test_unbalanced_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="unbalanced"):
        list(Corpus({}, {}).expand(pattern))


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(KeyError):
        list(Corpus({}, {}).expand("{nothing}"))


@pytest.mark.parametrize("text", ["== a\nA: yes.\n", "== a\nno answer\nq?\n", "== a shiny\nA: yes.\nq?\n"])
def test_malformed_facts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the fact 'a'"):
        list(parse_facts(text))


def test_comments_and_flags_are_read() -> None:
    text = "# intro\n\n== a swap\nA: Yes.\n# why\nIs it?\nIs {m}?\n"
    assert list(parse_facts(text)) == [Fact("a", "Yes.", ("Is it?", "Is {m}?"), swap=True)]


def test_roughening_is_reproducible_and_varied() -> None:
    question = "What licence is Mistral 7B under?"
    first, second = ([roughen(question, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == second
    assert "what licence is mistral 7b under?" in first
    assert any("license" in text.lower() for text in first)
    assert len(set(first)) > 40


def test_scope_is_a_fact(corpus: Corpus) -> None:
    assert "only" in corpus.facts[SCOPE].answer
