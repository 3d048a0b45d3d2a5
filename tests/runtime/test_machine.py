"""What the machine grants, read from a file system made for the test; and the choices that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistral_runtime.config import ModelConfig
from mistral_runtime.device import Compute, MemoryPlan, choose_device, choose_dtype, choose_threads, plan_memory
from mistral_runtime.errors import DeviceUnavailable, NotEnoughMemory
from mistral_runtime.machine import available_memory, peak_resident_bytes, usable_cores

GIB = 1 << 30


def _machine(root: Path, files: dict[str, str]) -> Path:
    base = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n"}
    for name, content in (base | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = {"proc/self/cgroup": "0::/user/app\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/app\n4:memory:/app\n0::/\n"}


def test_free_memory_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert available_memory(_machine(tmp_path, {})) == 8 * GIB


def test_version_2_group_caps_it_and_file_pages_count_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user/app/"
    files = {
        group + "memory.max": f"{4 * GIB}\n",
        group + "memory.current": f"{3 * GIB}\n",
        group + "memory.stat": f"anon 5\nactive_file {GIB}\ninactive_file {GIB // 2}\n",
    }
    assert available_memory(_machine(tmp_path, V2 | files)) == 2 * GIB + GIB // 2


def test_a_parent_group_binds_too(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/user/app/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/user/app/memory.current": "0\n",
        "sys/fs/cgroup/user/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/user/memory.current": "0\n",
    }
    assert available_memory(_machine(tmp_path, V2 | files)) == GIB


def test_version_1_group_caps_it(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/app/"
    files = {
        group + "memory.limit_in_bytes": f"{2 * GIB}\n",
        group + "memory.usage_in_bytes": f"{GIB}\n",
        group + "memory.stat": "total_active_file 0\ntotal_inactive_file 4096\n",
    }
    assert available_memory(_machine(tmp_path, V1 | files)) == GIB + 4096


def test_container_that_sees_only_the_inside_of_its_group(tmp_path: Path) -> None:
    # The path is the host's; inside the container its limit is at the top of the mount.
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
    }
    assert available_memory(_machine(tmp_path, files)) == GIB


def test_absence_of_a_limit_is_no_limit(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/app/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/app/memory.usage_in_bytes": "0\n",
    }
    assert available_memory(_machine(tmp_path, V1 | files)) == 8 * GIB


def test_peak_memory_is_this_program_s_own(tmp_path: Path) -> None:
    assert (
        peak_resident_bytes(_machine(tmp_path, {"proc/self/status": "VmPeak: 9 kB\nVmHWM:\t  1234 kB\n"}))
        == 1234 * 1024
    )
    assert 10**7 < peak_resident_bytes(tmp_path / "nothing") < 10**12


def test_memory_is_unknown_where_nothing_tells(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 4),
        (V2 | {"sys/fs/cgroup/user/app/cpu.max": "max 100000\n"}, 4),
        (V2 | {"sys/fs/cgroup/user/app/cpu.max": "150000 100000\n"}, 2),
        (V2 | {"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
    ids=["no-group", "v2-max", "v2-one-and-a-half", "v2-root", "v1-three", "v1-none"],
)
def test_cores_are_affinity_capped_by_quota(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    assert usable_cores(_machine(tmp_path, files)) == cores


# --- choices ----------------------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "stored, native, device, chosen",
    [
        (torch.bfloat16, True, CPU, torch.bfloat16),
        (torch.bfloat16, False, CPU, torch.float32),
        (torch.float16, True, CPU, torch.float32),
        (torch.float16, True, CUDA, torch.float16),
        (torch.float32, True, CPU, torch.float32),
        (torch.bfloat16, True, CUDA, torch.bfloat16),
    ],
    ids=str,
)
def test_number_type_follows_the_file_and_the_machine(
    stored: torch.dtype, native: bool, device: torch.device, chosen: torch.dtype
) -> None:
    dtype, reason = choose_dtype("auto", stored=stored, native_bf16=native, device=device)
    assert dtype == chosen
    assert reason
    assert choose_dtype("float32", stored=stored, native_bf16=native, device=device) == (torch.float32, "as asked")


def test_auto_takes_the_first_device_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, is_there in (("cuda", False), ("xpu", False)):
        monkeypatch.setattr(f"torch.{name}.is_available", lambda found=is_there: found)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert choose_device("auto")[0] == CPU
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert choose_device("auto")[0] == torch.device("mps")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device("auto")[0] == CUDA


def test_device_that_is_not_there_is_told_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="cpu") as caught:
        choose_device("cuda")
    assert caught.value.exit_code == 40


def test_threads_are_as_asked_then_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(7) == (7, "as asked")
    assert choose_threads(None)[1] == "OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_threads(None)[0] == usable_cores()


def _compute(dtype: torch.dtype) -> Compute:
    return Compute(CPU, "as asked", dtype, "as asked", 1, "as asked")


def test_plan_of_mistral_7b_is_its_weights_and_under_one_gigabyte_more(tiny_config: ModelConfig) -> None:
    config = replace(
        tiny_config,
        dim=4096,
        n_layers=32,
        head_dim=128,
        hidden_dim=14336,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=32000,
        sliding_window=4096,
    )
    plan = plan_memory(config, _compute(torch.bfloat16), context=64, prefill_chunk=512)
    assert plan.weights == 14_483_464_192
    assert plan.needed - plan.weights < 10**9
    # A full window: 4096 positions of 128 KiB.
    assert plan_memory(config, _compute(torch.bfloat16), context=10**6, prefill_chunk=512).cache == 4096 * 131072
    assert plan_memory(config, _compute(torch.float32), context=64, prefill_chunk=512).weights == 2 * plan.weights


def test_plan_that_does_not_fit_is_refused_with_numbers() -> None:
    plan = MemoryPlan(weights=14 * GIB, cache=GIB // 2, workspace=GIB // 2, available=8 * GIB, device="cpu")
    with pytest.raises(NotEnoughMemory) as caught:
        plan.require_fit()
    assert "15.00 GiB" in caught.value.detail
    assert "8.00 GiB" in caught.value.detail
    assert "--ignore-memory-plan" in caught.value.hint
    replace(plan, available=15 * GIB).require_fit()
    replace(plan, available=None).require_fit()
