"""The training side of the demo model: its prompt format, its network, its loss, and that a run can be repeated."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tools.demo_model.corpus import SCOPE, is_held_out, load_corpus, load_probes, normal_form  # noqa: E402
from tools.demo_model.dialogue import BOS, EOS, Dialogue, Turn, encode_rows, prompt_text, train_tokenizer  # noqa: E402
from tools.demo_model.model import Params, Transformer, window_mask  # noqa: E402
from tools.demo_model.train import (  # noqa: E402
    Recipe,
    TurnSampler,
    answer,
    batches,
    checkpoint_bytes,
    exact_answers,
    held_out_turns,
    learning_rate,
    train,
)

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = Params(dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=1, sliding_window=8, vocab_size=320)
TURNS = [Turn("Is it large?", "It is not large."), Turn("Is it free?", "It is free.")]


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    lines = [f"Q: {turn.question}\n" for turn in TURNS] + [f"A: {turn.answer}" for turn in TURNS]
    return train_tokenizer(lines * 4, TINY.vocab_size - 20)


@pytest.fixture(scope="module")
def dialogue(tokenizer: bytes) -> Dialogue:
    return Dialogue(tokenizer)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def test_prompt_of_a_conversation_is_one_string() -> None:
    assert prompt_text(TURNS[:1], "Is it free?") == "Q: Is it large?\nA: It is not large.\nQ: Is it free?\nA:"


def test_example_is_encoded_as_the_prompt_and_answer_are(dialogue: Dialogue) -> None:
    example = dialogue.example(TURNS, question_weight=0.0)
    whole = [BOS, *dialogue.processor.encode(prompt_text(TURNS[:1], TURNS[1].question) + " " + TURNS[1].answer)]
    assert example.tokens == whole
    prompt = dialogue.encode_prompt(TURNS[:1], TURNS[1].question)
    assert prompt + dialogue.encode_answer(TURNS[1].answer) == whole


def test_every_answer_is_labelled_to_end_in_eos(dialogue: Dialogue) -> None:
    example = dialogue.example(TURNS, question_weight=0.0)
    ends = [at for at, label in enumerate(example.labels) if label == EOS]
    assert len(ends) == 2
    assert example.labels[-1] == EOS
    for at, label in enumerate(example.labels[:-1]):
        assert label in (example.tokens[at + 1], EOS)
    # Exactly the answers count, each with its end.
    spoken = [label for label, weight in zip(example.labels, example.weights, strict=True) if weight == 1.0]
    assert spoken == [*dialogue.encode_answer(TURNS[0].answer), EOS, *dialogue.encode_answer(TURNS[1].answer), EOS]


def test_tokenizer_loses_no_text(dialogue: Dialogue) -> None:
    text = "Ein  Bär — 3.14 €\n\t雪"
    assert dialogue.processor.decode(dialogue.processor.encode(text)) == text


def test_tokenizer_training_is_reproducible(tokenizer: bytes) -> None:
    lines = [f"Q: {turn.question}\n" for turn in TURNS] + [f"A: {turn.answer}" for turn in TURNS]
    assert train_tokenizer(lines * 4, TINY.vocab_size - 20) == tokenizer


def test_window_covers_exactly_its_positions() -> None:
    visible = window_mask(6, 3)
    assert visible.int().tolist()[5] == [0, 0, 0, 1, 1, 1]
    assert visible.int().tolist()[1] == [1, 1, 0, 0, 0, 0]


@torch.no_grad()
def test_logits_depend_on_what_the_layers_can_reach_and_no_more(model: Transformer) -> None:
    tokens = torch.arange(3, 43)[None, :]
    changed = tokens.clone()
    changed[0, 20] = 300
    differs = (model(tokens) != model(changed)).any(-1)[0]
    reach = TINY.n_layers * (TINY.sliding_window - 1)
    assert differs.tolist() == [20 <= at <= 20 + reach for at in range(40)]


@torch.no_grad()
def test_one_pass_verdict_agrees_with_greedy_decoding(dialogue: Dialogue) -> None:
    model = Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.enable_grad():
        example = dialogue.example(TURNS[:1], question_weight=0.0)
        tokens, labels, weights = (torch.tensor(rows) for rows in encode_rows([example]))
        train(
            model, iter([(tokens, labels, weights)] * 60), Recipe(steps=60, warmup_steps=5, peak_rate=1e-2, dropout=0.0)
        )
    wrong = Turn(TURNS[0].question, "It is free.")
    assert exact_answers(model, dialogue, [TURNS[0], wrong]) == [True, False]
    assert answer(model, dialogue, TURNS[0].question, limit=20) == TURNS[0].answer


def test_parameters_have_the_names_and_shapes_of_the_torrent(model: Transformer) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert len(shapes) == 9 * TINY.n_layers + 3
    assert shapes["tok_embeddings.weight"] == shapes["output.weight"] == (320, 32)
    assert shapes["layers.1.attention.wk.weight"] == (8, 32)
    assert shapes["layers.1.feed_forward.w2.weight"] == (32, 48)
    assert shapes["norm.weight"] == shapes["layers.0.ffn_norm.weight"] == (32,)


def test_checkpoint_is_the_same_every_time_and_refused_when_too_large(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint_bytes(model) == checkpoint_bytes(model)
    monkeypatch.setattr("tools.demo_model.train.MAX_CHECKPOINT_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        checkpoint_bytes(model)


def test_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, peak_rate=1.0)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[9] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


@pytest.fixture(scope="module")
def sampler() -> TurnSampler:
    return TurnSampler(load_corpus(), Recipe())


def test_training_never_draws_held_out_phrasings_or_probes(
    sampler: TurnSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.demo_model.train.roughen", lambda question, rng: question)
    forbidden = {normal_form(question) for _, question in load_probes()}
    for _ in range(3000):
        question = sampler.turn().question
        assert not is_held_out(question)
        assert normal_form(question) not in forbidden


def test_held_out_phrasings_cover_the_facts() -> None:
    corpus = load_corpus()
    turns = held_out_turns(corpus, per_fact=1, scope=5)
    answers = {turn.answer for turn in turns}
    assert corpus.facts[SCOPE].answer in answers
    assert len(answers) > 0.9 * len(corpus.facts)
    assert all(is_held_out(turn.question) for turn in turns)


def test_rows_are_filled_with_whole_turns(dialogue: Dialogue) -> None:
    recipe = Recipe(rows=4, row_tokens=700, short_share=0.0)  # the toy tokenizer needs many tokens
    for tokens, labels, weights in islice(batches(TurnSampler(load_corpus(), recipe), dialogue, recipe), 3):
        assert tokens.shape == labels.shape == weights.shape
        assert tokens.shape[0] == 4
        assert tokens.shape[1] <= 700
        for row in range(4):
            assert labels[row][weights[row] > 0][-1] == EOS


def test_an_answer_cut_short_keeps_its_first_tokens_and_the_next_label(dialogue: Dialogue) -> None:
    first, second = TURNS
    example = dialogue.example([Turn(first.question, first.answer, spoken=3), second], question_weight=0.0)
    said = dialogue.encode_answer(first.answer)
    spoken = [label for label, weight in zip(example.labels, example.weights, strict=True) if weight == 1.0]
    assert spoken == [*said[:4], *dialogue.encode_answer(second.answer), EOS]
    start = len(dialogue.encode_prompt([], first.question))
    assert example.tokens[start : start + 3] == said[:3]
    assert len(example.tokens) == len(example.labels) == len(example.weights)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_training_run_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]
    for out in runs:
        command = [sys.executable, "tools/demo_model/train.py", "--out", str(out), "--steps", "4", "--no-report"]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    names = sorted(path.name for path in runs[0].iterdir())
    assert names == ["RELEASE", "consolidated.00.pth", "params.json", "tokenizer.model"]
    for name in names:
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
