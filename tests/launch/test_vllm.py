"""What vLLM is started with, held to the argument."""

from __future__ import annotations

import json

import pytest

from mistral_fetch.errors import RuntimeFailed, RuntimeMissing, UsageError
from mistral_fetch.launch.vllm import VllmOptions, find_vllm, read_key, vllm_arguments

OPTIONS = VllmOptions("127.0.0.1", 8000, ("mistral-7b",))


def mistral_layout(folder, params, tokenizer="tokenizer.model.v3"):
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / tokenizer).write_bytes(b"")
    return folder


def hf_layout(folder, config, tokenizer="tokenizer.model"):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / tokenizer).write_bytes(b"")
    return folder


def overrides(arguments):
    (text,) = [argument.partition("=")[2] for argument in arguments if argument.startswith("--hf-overrides=")]
    return json.loads(text)


def test_mistrals_own_layout(tmp_path):
    arguments = vllm_arguments(mistral_layout(tmp_path, {"dim": 8}), OPTIONS)
    assert arguments == [
        "serve",
        str(tmp_path),
        "--host=127.0.0.1",
        "--port=8000",
        "--served-model-name",
        "mistral-7b",
        "--tokenizer-mode=mistral",
        "--config-format=mistral",
        "--load-format=mistral",
        '--hf-overrides={"rope_theta": 1000000.0, "sliding_window": null}',
    ]


@pytest.mark.parametrize(
    "params, theta, window",
    [
        ({"sliding_window": 4096}, 1e4, 4096),
        ({"sliding_window": None}, 1e6, None),
        ({"rope_theta": 5e5, "sliding_window": 16}, 5e5, 16),
    ],
)
def test_theta_and_window_are_written_out(tmp_path, params, theta, window):
    found = overrides(vllm_arguments(mistral_layout(tmp_path, params), OPTIONS))
    assert found == {"rope_theta": theta, "sliding_window": window}


@pytest.mark.parametrize(
    "config, theta, window",
    [
        ({"model_type": "mistral"}, 1e4, 4096),
        ({"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6}, 1e6, None),
        ({"model_type": "mixtral", "rope_parameters": {"rope_theta": 2e6}}, 2e6, None),
    ],
)
def test_the_hugging_face_layout(tmp_path, config, theta, window):
    arguments = vllm_arguments(hf_layout(tmp_path, config), OPTIONS)
    assert {"--tokenizer-mode=auto", "--config-format=hf", "--load-format=safetensors"} <= set(arguments)
    assert overrides(arguments) == {"rope_theta": theta, "sliding_window": window}


def test_more_arguments_come_last(tmp_path):
    options = VllmOptions("::1", 1, (), None, 4096, "bfloat16", 2, ("--pipeline-parallel-size=2",))
    arguments = vllm_arguments(mistral_layout(tmp_path, {}), options)
    assert arguments[-4:] == [
        "--max-model-len=4096",
        "--dtype=bfloat16",
        "--tensor-parallel-size=2",
        "--pipeline-parallel-size=2",
    ]
    assert "--served-model-name" not in arguments


def test_a_pickle_is_refused_with_what_to_type(tmp_path):
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(UsageError, match="does not read the weights") as refused:
        vllm_arguments(tmp_path, OPTIONS)
    assert "--convert safetensors" in str(refused.value.lines()[2])


@pytest.mark.parametrize(
    "params", [{"rope_theta": "x"}, {"rope_theta": -1}, {"sliding_window": 1.5}, {"sliding_window": True}]
)
def test_nonsense_is_refused(tmp_path, params):
    with pytest.raises(RuntimeFailed):
        vllm_arguments(mistral_layout(tmp_path, params), OPTIONS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', '{"rope_theta": NaN}'])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    mistral_layout(tmp_path, {})
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(RuntimeFailed):
        vllm_arguments(tmp_path, OPTIONS)


def test_one_private_key_is_read(tmp_path):
    path = tmp_path / "key"
    path.write_text("# mine\nsecret\n")
    path.chmod(0o600)
    assert read_key(path) == "secret"
    path.write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="cannot be used"):
        read_key(path)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="can be read by others"):
        read_key(path)
    with pytest.raises(UsageError):
        read_key(tmp_path / "none")


def test_a_missing_vllm_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeMissing, match="vLLM is not installed"):
        find_vllm()
