"""Train the demo model and write it in the torrent's layout: `python tools/demo_model/train.py --out DIR`.

Owns the recipe: what is sampled, how long, and the four files. One seed decides everything, and the number of
threads is fixed, because the order of additions depends on it: the same kind of machine and the same libraries give
the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Run as a script, Python sees this folder and not the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.demo_model.corpus import (
    SCOPE,
    Corpus,
    is_held_out,
    load_corpus,
    load_probes,
    normal_form,
    roughen,
)
from tools.demo_model.dialogue import EOS, Dialogue, Example, Turn, encode_rows, train_tokenizer
from tools.demo_model.model import Params, Transformer

THREADS = 1  # the matrices are small: a second thread waits more than it works, above all on a busy machine
MAX_CHECKPOINT_BYTES = 4_000_000


@dataclass(frozen=True)
class Recipe:
    """Every number of the training run."""

    seed: int = 20230927  # the day Mistral 7B was published
    steps: int = 1500
    rows: int = 20  # conversations per step
    row_tokens: int = 160  # a row is filled with whole turns up to here
    peak_rate: float = 4e-3
    warmup_steps: int = 60
    weight_decay: float = 0.1
    dropout: float = 0.0
    question_weight: float = 0.02  # the answers are what matters; a little of the questions helps to read them
    short_share: float = 0.9  # answers cut short: what is hard is to find the answer, not to go on with it
    spoken: int = 6  # tokens of an answer that is cut short
    scope_share: float = 0.25  # questions that deserve the honest "I do not know"
    swap_share: float = 0.25  # of these: questions of ours, asked about somebody else's model


class TurnSampler:
    """Draws training turns: a fact, one of its patterns, one phrasing, and a hurried person's typing."""

    def __init__(self, corpus: Corpus, recipe: Recipe) -> None:
        self.corpus, self.recipe = corpus, recipe
        self.rng = random.Random(recipe.seed)
        self.owners = corpus.owners()
        self.probes = {normal_form(question) for _, question in load_probes()}
        self.names = [name for name in corpus.facts if name != SCOPE]
        self.swapped = corpus.swapped_patterns()

    def turn(self) -> Turn:
        """Return one turn whose phrasing is neither held out nor a probe."""
        while True:
            name, pattern = self._pattern()
            question = self.corpus.sample(pattern, self.rng)
            form = normal_form(question)
            is_ours = name == SCOPE and form in self.owners
            if not (is_ours or is_held_out(question) or form in self.probes):
                spoken = self.recipe.spoken if self.rng.random() < self.recipe.short_share else None
                return Turn(roughen(question, self.rng), self.corpus.facts[name].answer, spoken)

    def _pattern(self) -> tuple[str, str]:
        if self.rng.random() >= self.recipe.scope_share:
            name = self.rng.choice(self.names)
            return name, self.rng.choice(self.corpus.facts[name].patterns)
        if self.rng.random() < self.recipe.swap_share:
            return SCOPE, self.rng.choice(self.swapped)
        return SCOPE, self.rng.choice(self.corpus.facts[SCOPE].patterns)


def held_out_turns(corpus: Corpus, per_fact: int = 12, scope: int = 300, seed: int = 7) -> list[Turn]:
    """Return phrasings that training never draws, as typed in the corpus."""
    rng = random.Random(seed)
    owners = corpus.owners()
    patterns = {fact.name: list(fact.patterns) for fact in corpus.facts.values()}
    patterns[SCOPE] += corpus.swapped_patterns()
    turns = []
    for name, choices in patterns.items():
        wanted, found = (scope if name == SCOPE else per_fact), set()
        for _ in range(60 * wanted):  # a fact with few phrasings may have fewer than wanted
            question = corpus.sample(rng.choice(choices), rng)
            if is_held_out(question) and owners.get(normal_form(question), SCOPE) == name:
                found.add(question)
            if len(found) == wanted:
                break
        turns += [Turn(question, corpus.facts[name].answer) for question in sorted(found)]
    return turns


def tokenizer_lines(sampler: TurnSampler, count: int = 30_000) -> Iterator[str]:
    """Yield text for the tokenizer: questions in the proportions of training, and answers now and then."""
    for number in range(count):
        turn = sampler.turn()
        yield f"Q: {turn.question}"
        if number % 3 == 0:
            yield f"A: {turn.answer}"


def batches(sampler: TurnSampler, dialogue: Dialogue, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens, labels and weights (B, T), each row one conversation of one or more turns."""
    pending = sampler.turn()
    while True:
        rows: list[Example] = []
        while len(rows) < recipe.rows:
            turns: list[Turn] = []
            row = None
            while True:
                longer = dialogue.example([*turns, pending], recipe.question_weight)
                if row is not None and len(longer.tokens) > recipe.row_tokens:
                    break
                row, turns, pending = longer, [*turns, pending], sampler.turn()
            rows.append(row)
        tokens, labels, weights = encode_rows(rows)
        yield torch.tensor(tokens), torch.tensor(labels), torch.tensor(weights)


def train(model: Transformer, data: Iterator[tuple[Tensor, Tensor, Tensor]], recipe: Recipe) -> None:
    """Minimise the weighted cross-entropy with a cosine schedule, in float32."""
    optimizers = make_optimizers(model, recipe)
    started = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, recipe)
        tokens, labels, weights = next(data)
        losses = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:6.1f} s", flush=True)
    model.eval()


def make_optimizers(model: Transformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the embeddings and gains.

    Muon takes half the steps here; `match_rms_adamw` lets both share one learning rate.
    """
    inner = [weight for weight in model.layers.parameters() if weight.dim() == 2]
    tables = [model.tok_embeddings.weight, model.output.weight]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": tables, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(inner, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
    ]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of this step: a linear rise, then a cosine to zero."""
    if step < recipe.warmup_steps:
        return recipe.peak_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def exact_answers(model: Transformer, dialogue: Dialogue, turns: Sequence[Turn]) -> list[bool]:
    """Say for each turn whether greedy decoding gives exactly the expected answer and then stops.

    One pass over the expected text decides: greedy decoding reproduces it if and only if every token of it, EOS
    included, is the likeliest after those before.
    """
    verdicts = []
    for start in range(0, len(turns), 32):
        examples = [dialogue.example([turn], question_weight=0.0) for turn in turns[start : start + 32]]
        tokens, labels, weights = (torch.tensor(rows) for rows in encode_rows(examples))
        wrong = (model(tokens).argmax(-1) != labels) & (weights > 0)
        verdicts += (~wrong.any(dim=1)).tolist()
    return verdicts


@torch.no_grad()
def answer(model: Transformer, dialogue: Dialogue, question: str, past: Sequence[Turn] = (), limit: int = 128) -> str:
    """Return the greedy answer, decoded without a cache."""
    prompt = dialogue.encode_prompt(past, question)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        best = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if best == EOS:
            break
        tokens.append(best)
    text: str = dialogue.processor.decode(tokens[len(prompt) :])
    return text.strip()


def load_model(directory: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Transformer, Dialogue]:
    """Return the model and tokenizer of a directory that `write_release` wrote."""
    params = Params(**json.loads((directory / "params.json").read_text(encoding="utf-8")))
    model = Transformer(params)
    model.load_state_dict(torch.load(directory / "consolidated.00.pth", weights_only=True))
    return model.to(dtype).eval(), Dialogue((directory / "tokenizer.model").read_bytes())


def checkpoint_bytes(model: Transformer) -> bytes:
    """Return the bfloat16 weights as a torch file. Saved through memory, it names no path, so it is reproducible."""
    weights = {name: weight.detach().to(torch.bfloat16).clone() for name, weight in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    if buffer.tell() > MAX_CHECKPOINT_BYTES:
        raise ValueError(f"the checkpoint has {buffer.tell()} bytes, more than {MAX_CHECKPOINT_BYTES}")
    return buffer.getvalue()


def write_release(directory: Path, model: Transformer, tokenizer: bytes) -> None:
    """Write the four files of the torrent's layout."""
    files = {
        "consolidated.00.pth": checkpoint_bytes(model),
        "params.json": (json.dumps(model.params.to_json(), indent=4) + "\n").encode(),
        "tokenizer.model": tokenizer,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    (directory / "RELEASE").write_text(release_text(files), encoding="utf-8")


def release_text(files: dict[str, bytes]) -> str:
    """Return the text of RELEASE: what this is, who made it, and an MD5 sum per file."""
    sums = "\n".join(
        f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}  {name}" for name, content in files.items()
    )
    return f"""mistral-fetch demo model, version 1

A tiny language model in the architecture of Mistral 7B, so that mistral-fetch can show itself without a large download.
It answers questions about Mistral 7B and about mistral-fetch, and says so when it is asked about anything else.
It holds no weights and no text of Mistral AI's models.

Made by the mistral-fetch maintainers with tools/demo_model/train.py, from text written for this purpose.
Licence: Apache-2.0

MD5
{sums}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, report on phrasings never trained on, and write the files."""
    parser = argparse.ArgumentParser(description="Train the demo model of mistral-fetch.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the four files")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="fewer make a worse model sooner")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--no-report", action="store_true", help="do not measure the answers at the end")
    options = parser.parse_args(arguments)

    recipe = replace(Recipe(), steps=options.steps, seed=options.seed)
    torch.set_flush_denormal(True)  # before any thread starts: they inherit it; AdamW's moments fade into denormals
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)

    corpus = load_corpus()
    tokenizer = train_tokenizer(tokenizer_lines(TurnSampler(corpus, recipe)), Params.vocab_size)
    dialogue = Dialogue(tokenizer)
    model = Transformer(Params(), recipe.dropout)
    model.init_weights(torch.Generator().manual_seed(recipe.seed))
    train(model, batches(TurnSampler(corpus, recipe), dialogue, recipe), recipe)
    write_release(options.out, model, tokenizer)
    if not options.no_report:
        report(corpus, *load_model(options.out))


def report(corpus: Corpus, model: Transformer, dialogue: Dialogue) -> None:
    """Print how many held-out phrasings and probes are answered exactly, in bfloat16, and what went wrong."""
    probes = [Turn(question, corpus.facts[name].answer) for name, question in load_probes()]
    for title, turns in (("held-out phrasings", held_out_turns(corpus)), ("probes", probes)):
        verdicts = exact_answers(model, dialogue, turns)
        print(f"{title}: {sum(verdicts)} of {len(turns)} exact ({sum(verdicts) / len(turns):.1%})")
        for turn, is_exact in zip(turns, verdicts, strict=True):
            if not is_exact:
                got = answer(model, dialogue, turn.question)
                print(f"  {turn.question!r}\n    wanted {turn.answer[:70]!r}\n    got    {got[:70]!r}")


if __name__ == "__main__":
    main()
