"""A model spread over two processes: the same answers as one, and the end of one rank is the end of all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mistral_runtime
from mistral_runtime.config import ModelConfig
from mistral_runtime.device import Compute
from mistral_runtime.engine import Engine, Request, eager_step
from mistral_runtime.errors import BadRequest, DeviceUnavailable, NotEnoughMemory, RankLost
from mistral_runtime.reference import reference_logits
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.tensor_parallel import Shard, check_rank_devices, check_ranks, load_shard
from mistral_runtime.tp_launch import Ranks
from mistral_runtime.tp_plan import plan_ranks
from mistral_runtime.tp_protocol import RankReport, StepOrder
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import Checkpoint, load_model, open_checkpoint

WriteSnapshot = Callable[..., dict[str, Tensor]]
CPU = torch.device("cpu")
COMPUTE = Compute(CPU, "test", torch.float32, "test", 1, "test")
# Sums are taken in another order; in float32 that moves logits of size ten by some 1e-6.
TOLERANCE = 1e-4
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")

# --- slices, in one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [0, 3, 4, 16])
def test_ranks_that_would_cut_a_head_are_refused_with_those_that_work(ranks: int, tiny_config: ModelConfig) -> None:
    with pytest.raises(BadRequest) as caught:
        check_ranks(tiny_config, ranks)
    assert "2 key heads" in caught.value.detail
    assert caught.value.hint == "set --tp to one of: 1, 2"


def test_hidden_units_must_divide_as_well(tiny_config: ModelConfig) -> None:
    with pytest.raises(BadRequest, match="97 hidden"):
        check_ranks(replace(tiny_config, hidden_dim=97), 2)


def test_device_without_enough_of_its_kind_is_refused() -> None:
    check_rank_devices(CPU, 2)
    with pytest.raises(DeviceUnavailable):
        check_rank_devices(torch.device("mps"), 2)


def test_slices_put_together_are_the_weights(
    tiny_config: ModelConfig, make_weights: Callable[..., dict[str, Tensor]]
) -> None:
    config = replace(tiny_config, vocab_size=301)
    shards = [Shard(config, rank, 2) for rank in range(2)]
    counts = [0, 0]
    for name, whole in make_weights(config).items():
        parts = [shard.slice_weight(name, whole) for shard in shards]
        for rank, part in enumerate(parts):
            counts[rank] += part.numel()
        if name.endswith(("norm.weight", "tok_embeddings.weight")):
            assert all(torch.equal(part, whole) for part in parts)
        else:
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            assert torch.equal(torch.cat(parts, dim), whole)
    assert counts == [shard.parameter_count() for shard in shards]


@pytest.mark.parametrize(
    "layout_name, copied",
    [("pth", {"wo", "w2"}), ("huggingface", {"wo", "w2", "wq", "wk"})],
    ids=["pth", "huggingface"],
)
def test_copies_hold_the_slice_alone_and_the_rest_is_mapped(
    layout_name: str, copied: set[str], tmp_path: Path, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path, layout_name)
    checkpoint, config = _open(tmp_path)
    model = load_shard(checkpoint, Shard(config, 1, 2), device=CPU, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        if name.split(".")[-2] in copied:
            assert weight.untyped_storage().nbytes() == weight.nbytes, name
        elif layout_name == "pth":  # torch's tensors of one file share the mapping
            mapped = checkpoint.read(checkpoint.tensors[name])
            assert weight.untyped_storage().data_ptr() == mapped.untyped_storage().data_ptr(), name


def test_memory_of_all_ranks_has_to_fit_and_one_line_tells_of_each(tiny_config: ModelConfig) -> None:
    plan, line = plan_ranks(Shard(tiny_config, 0, 2), COMPUTE, context=64, prefill_chunk=16)
    assert plan.weights == 2 * Shard(tiny_config, 0, 2).parameter_count() * 4
    assert line.startswith("ranks: 2, each with weights ")
    with pytest.raises(NotEnoughMemory):
        replace(plan, available=plan.needed - 1).require_fit()


def test_orders_and_reports_survive_the_pipe() -> None:
    order = StepOrder([1, 2], None)
    assert StepOrder.from_line(order.to_line()) == order
    lost = RankReport.from_line(RankReport(error=RankLost("a", detail="b\n", hint="c")).to_line()).error
    assert isinstance(lost, RankLost)
    assert (lost.what, lost.hint) == ("a", "c")


# --- two ranks, this process being rank 0 -----------------------------------------------------------------------------


def _open(directory: Path) -> tuple[Checkpoint, ModelConfig]:
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    return open_checkpoint(files, config), config


@pytest.fixture(scope="module")
def odd_snapshot(tmp_path_factory: pytest.TempPathFactory, write_snapshot: WriteSnapshot) -> Path:
    directory = tmp_path_factory.mktemp("odd")
    write_snapshot(directory, "huggingface", vocab_size=301)
    return directory


@pytest.fixture(scope="module")
def two(odd_snapshot: Path) -> Iterator[tuple[Ranks, Transformer]]:
    """Two ranks of a model whose vocabulary does not divide, from the layout whose rows are reordered."""
    checkpoint, config = _open(odd_snapshot)
    with Ranks(checkpoint, Shard(config, 0, 2), COMPUTE) as ranks:
        yield ranks, ranks.load()


def test_logits_are_those_of_one_rank_and_of_the_reference(two: tuple[Ranks, Transformer], odd_snapshot: Path) -> None:
    ranks, model = two
    checkpoint, config = _open(odd_snapshot)
    whole = load_model(checkpoint, config)
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    sequence = list(range(3, 30))  # more than three windows
    ours, theirs = model.new_cache(40), whole.new_cache(40)
    seen: list[int] = []
    for ids in (sequence[:11], sequence[11:20], *([token] for token in sequence[20:])):
        seen += ids
        (logits,) = ranks.step(model, ids, ours)
        assert logits.shape == (301,)
        torch.testing.assert_close(logits, eager_step(whole, ids, theirs)[0], atol=TOLERANCE, rtol=TOLERANCE)
        expected = reference_logits(weights, config, torch.tensor(seen))[-1]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_greedy_ids_are_those_of_one_rank_answer_after_answer(
    two: tuple[Ranks, Transformer], odd_snapshot: Path
) -> None:
    ranks, model = two
    whole = load_model(*_open(odd_snapshot))
    for prompt in ([1, 17, 42, 5], [9], list(range(60))):
        spread = list(Engine(model, step=ranks.step, prefill_chunk=16).generate(Request(prompt, 24)))
        assert spread == list(Engine(whole, prefill_chunk=16).generate(Request(prompt, 24)))


@needs_proc
def test_nothing_listens_on_anything_but_loopback(two: tuple[Ranks, Transformer]) -> None:
    listening = [address for pid in (os.getpid(), *two[0].process_ids) for address in _listening(pid)]
    assert listening  # gloo's own, or this test would look in the wrong place
    assert set(listening) == {"127.0.0.1"}


def _listening(pid: int) -> Iterator[str]:
    inodes = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                yield socket.inet_ntop(family, packed)


# --- through the command line -----------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "mistral_runtime"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mistral_runtime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, write_snapshot: WriteSnapshot) -> Path:
    directory = tmp_path_factory.mktemp("tp") / "snapshot"
    write_snapshot(directory)
    return directory


@contextmanager
def _started(*arguments: object, stdin: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command as the leader of a group of its own, as a shell does."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_gone(pids: list[int], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while alive := [pid for pid in pids if _is_running(pid)]:
        assert time.monotonic() < end, f"still there: {alive}"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _answer(process: subprocess.Popen[bytes], question: str) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question.encode() + b"\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_json_of_two_ranks_has_the_text_of_one(snapshot: Path) -> None:
    results = []
    for ranks in (1, 2):
        command = [*COMMAND, "generate", str(snapshot), "the hill", "--max-tokens", "20", "--json", "--tp", str(ranks)]
        done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=60, check=True)
        results.append(json.loads(done.stdout))
    assert [result["ranks"] for result in results] == [1, 2]
    assert results[0]["text"] == results[1]["text"]
    lines = [line.partition(b":")[0] for line in done.stderr.splitlines()]
    assert lines == [b"compute", b"ranks", b"memory", b"done"]


def test_ranks_that_do_not_divide_are_a_usage_error(snapshot: Path) -> None:
    command = [*COMMAND, "generate", str(snapshot), "x", "--tp", "3"]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 2
    assert b"set --tp to one of: 1, 2" in done.stderr


CHAT = ("--tp", "2", "--chat-template", "v3", "--max-tokens", "5")


@needs_proc
@pytest.mark.parametrize("moment", ["between answers", "during an answer"])
def test_killed_rank_ends_a_chat_with_one_error(moment: str, snapshot: Path) -> None:
    length = "5" if moment == "between answers" else "100000"
    with _started("chat", snapshot, "--tp", "2", "--chat-template", "v3", "--max-tokens", length, "--quiet") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"the hill\n")
        process.stdin.flush()
        process.stdout.read(1)
        (rank,) = _children(process.pid)
        time.sleep(0.3)
        os.kill(rank, signal.SIGKILL)
        process.stdout.read()  # its end; standard input stays open, as a terminal does
        assert process.wait(15) == 40
        err = process.stderr.read()
    assert err.count(b"error: ") == 1
    assert b"rank 1 of the model ended" in err
    assert b"SIGKILL" in err
    assert b"Traceback" not in err


@needs_proc
def test_killed_leader_leaves_no_rank_behind(snapshot: Path) -> None:
    with _started("chat", snapshot, *CHAT, "--quiet") as process:
        _answer(process, "the hill")
        ranks = _children(process.pid)
        process.kill()
        process.wait()
        assert ranks
        _wait_until_gone(ranks, seconds=10)


@needs_proc
def test_ctrl_c_leaves_the_ranks_alone_while_a_chat_goes_on_and_ends_them_with_it(snapshot: Path) -> None:
    with _started("chat", snapshot, "--tp", "2", "--chat-template", "v3", "--max-tokens", "4000") as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert process.stdout is not None
        process.stdin.write(b"the hill\n")
        process.stdin.flush()
        process.stdout.read(1)  # the answer is under way
        ranks = _children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        said = b""
        while not said.endswith(b"(stopped)\n"):
            said += process.stderr.readline()
        process.stdin.write(b"the hill\n")
        process.stdin.flush()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=15)
        assert process.returncode == 130
        assert b"Traceback" not in err
        _wait_until_gone(ranks, seconds=5)
