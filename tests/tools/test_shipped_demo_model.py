"""The demo model as it ships: the right files, and right answers from them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tools.demo_model.corpus import SCOPE, Corpus, load_corpus, load_probes, normal_form  # noqa: E402
from tools.demo_model.dialogue import Dialogue, Turn  # noqa: E402
from tools.demo_model.model import Transformer  # noqa: E402
from tools.demo_model.train import answer, exact_answers, held_out_turns, load_model, release_text  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "mistral_fetch" / "demo_model"

QUESTIONS = {
    "licence": "What licence is Mistral 7B under?",
    "size": "How large is Mistral 7B?",
    "verify": "What does mistral-fetch verify?",
    "parameters": "How many parameters does Mistral 7B have?",
    "date": "When was Mistral 7B released?",
    "maker": "Who made Mistral 7B?",
    "open": "Is Mistral 7B open source?",
    "commercial": "Can I use Mistral 7B commercially?",
    "trainingdata": "What was Mistral 7B trained on?",
    "window": "What is sliding window attention?",
    "gqa": "What is grouped-query attention?",
    "rope": "What is rope_theta?",
    "scores": "What is the MMLU score of Mistral 7B?",
    "paper": "Where is the paper?",
    "disk": "How much disk space do I need?",
    "mixtral": "What is Mixtral?",
    "instruct": "What is mistral-7b-instruct?",
    "pickle": "Are .pth files safe?",
    "pull": "How do I download Mistral 7B?",
    "run": "How do I run Mistral 7B?",
    "resume": "Can mistral-fetch resume a download?",
    "corrupt": "What happens if the checksum is wrong?",
    "provenance": "What is PROVENANCE.json?",
    "offline": "Does mistral-fetch work offline?",
    "exitcodes": "What are the exit codes?",
    "commands": "Which commands are there?",
    "whoareyou": "Who are you?",
    "notmistral": "Are you Mistral 7B?",
    "hello": "Hello!",
    "thanks": "Thank you!",
}
OUTSIDE = [
    "What is the capital of France?",
    "What's the weather like today?",
    "Write a poem about the sea.",
    "How do I cook pancakes?",
    "Who was Napoleon?",
    "What is 12 times 12?",
    "Translate good morning into German.",
    "What licence is Llama 2 under?",
    "How many parameters does GPT-4 have?",
    "Tell me a joke.",
]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def shipped(request: pytest.FixtureRequest) -> tuple[Transformer, Dialogue]:
    return load_model(SHIPPED, request.param)


def test_the_directory_has_the_torrents_layout_and_nothing_else() -> None:
    names = {path.name for path in SHIPPED.iterdir()}
    assert names == {"consolidated.00.pth", "params.json", "tokenizer.model", "RELEASE"}
    assert (SHIPPED / "consolidated.00.pth").stat().st_size <= 4_000_000


def test_params_leave_rope_theta_out_and_set_a_window() -> None:
    params = json.loads((SHIPPED / "params.json").read_text())
    assert "rope_theta" not in params
    assert params["sliding_window"] == 32
    assert params["n_heads"] // params["n_kv_heads"] == 4
    assert params["n_heads"] * params["head_dim"] == params["dim"]


def test_weights_are_bfloat16_tensors_loaded_weights_only() -> None:
    weights = torch.load(SHIPPED / "consolidated.00.pth", weights_only=True, mmap=True)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.is_contiguous() for weight in weights.values())
    assert sum(weight.numel() for weight in weights.values()) < 2_000_000


def test_release_lists_the_true_sums() -> None:
    text = (SHIPPED / "RELEASE").read_text()
    listed = {name: md5 for md5, name in re.findall(r"^([0-9a-f]{32})  (\S+)$", text, re.MULTILINE)}
    files = {path.name: path.read_bytes() for path in SHIPPED.iterdir() if path.name != "RELEASE"}
    assert listed == {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    assert "Apache-2.0" in text
    order = ("consolidated.00.pth", "params.json", "tokenizer.model")
    assert text == release_text({name: files[name] for name in order})


def test_tokenizer_has_mistrals_special_tokens() -> None:
    processor = Dialogue((SHIPPED / "tokenizer.model").read_bytes()).processor
    assert [processor.id_to_piece(at) for at in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert processor.pad_id() == -1
    assert processor.vocab_size() == json.loads((SHIPPED / "params.json").read_text())["vocab_size"]
    assert processor.id_to_piece(processor.encode("\n")[-1]) == "<0x0A>"


def test_every_answer_is_longer_than_the_window(corpus: Corpus) -> None:
    dialogue = Dialogue((SHIPPED / "tokenizer.model").read_bytes())
    window = json.loads((SHIPPED / "params.json").read_text())["sliding_window"]
    assert min(len(dialogue.encode_answer(fact.answer)) for fact in corpus.facts.values()) > window


@pytest.mark.parametrize("name", QUESTIONS)
def test_it_answers(name: str, corpus: Corpus, shipped: tuple[Transformer, Dialogue]) -> None:
    assert answer(*shipped, QUESTIONS[name]) == corpus.facts[name].answer


def test_it_states_the_licence(shipped: tuple[Transformer, Dialogue]) -> None:
    assert "Apache 2.0" in answer(*shipped, "What licence is Mistral 7B under?")


@pytest.mark.parametrize("question", OUTSIDE)
def test_it_says_so_when_asked_about_anything_else(
    question: str, corpus: Corpus, shipped: tuple[Transformer, Dialogue]
) -> None:
    assert answer(*shipped, question) == corpus.facts[SCOPE].answer


def test_it_answers_the_second_question_of_a_conversation(
    corpus: Corpus, shipped: tuple[Transformer, Dialogue]
) -> None:
    past = [Turn(QUESTIONS["licence"], corpus.facts["licence"].answer)]
    assert answer(*shipped, QUESTIONS["size"], past) == corpus.facts["size"].answer


def test_held_out_phrasings_and_probes_are_mostly_answered_exactly(
    corpus: Corpus, shipped: tuple[Transformer, Dialogue]
) -> None:
    probes = [Turn(question, corpus.facts[name].answer) for name, question in load_probes()]
    for turns, least in ((held_out_turns(corpus, per_fact=3, scope=60), 0.92), (probes, 0.90)):
        verdicts = exact_answers(*shipped, turns)
        assert sum(verdicts) >= least * len(turns)


def test_the_listed_questions_are_in_the_corpus(corpus: Corpus) -> None:
    owners = corpus.owners()
    assert {name: owners.get(normal_form(question), name) for name, question in QUESTIONS.items()} == {
        name: name for name in QUESTIONS
    }


def test_the_runtime_gives_the_same_answers(corpus: Corpus) -> None:
    for name in ("licence", "size", "verify"):
        command = [sys.executable, "-m", "mistral_runtime", "generate", str(SHIPPED), QUESTIONS[name]]
        options = ["--chat-template", "demo", "--temperature", "0", "--max-tokens", "128"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "runtime")}
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == corpus.facts[name].answer
