"""The long-running halves of the recipes: a unit says READY, a pod's probe is content, and the model answers."""

from __future__ import annotations

import json
import os
import re

import pytest

from tests.recipes import appliers
from tests.recipes.services import ask, free_port, running, supervisor, wait_for_probe, wait_for_ready

QUESTION = {"prompt": "Q: What licence is Mistral 7B under?\nA:", "temperature": 0, "max_tokens": 12}
SYSTEMD = appliers.RECIPES / "systemd"


def unit(sandbox, name):
    """Return the command line of a unit, and set its variables."""
    text = (SYSTEMD / name).read_text()
    (command,) = appliers.unit_commands(text, appliers.unit_environment(text, sandbox))
    return command


def container(name):
    (found,) = appliers.pod_of(appliers.RECIPES / "kubernetes" / name)["containers"]
    return found


def with_port(command, old, new):
    return [re.sub(rf"\b{old}\b", str(new), word).replace("0.0.0.0", "127.0.0.1") for word in command]


@pytest.fixture
def notified():
    # An abstract name: the path of a socket is at most 107 bytes, and a test's directory may be longer.
    with supervisor(name := f"mistral-fetch-recipes-{os.getpid()}") as listening:
        yield listening, f"@{name}"


def test_the_seed_unit_is_ready_when_the_model_is_proved(prepared, models, notified):
    listening, address = notified
    appliers.systemd_sync(prepared, models)
    status = free_port()
    command = with_port(with_port(unit(prepared, "mistral-fetch-seed.service"), 6881, 0), 9881, status)
    with running(prepared, command, NOTIFY_SOCKET=address):
        wait_for_ready(listening)
        assert ask(f"http://127.0.0.1:{status}/ready")[0] == 200


def test_the_serve_unit_is_ready_when_the_model_answers(prepared, models, notified):
    listening, address = notified
    appliers.systemd_sync(prepared, models)
    port = free_port()
    command = with_port(unit(prepared, "mistral-fetch-serve.service"), 8000, port)
    with running(prepared, command, NOTIFY_SOCKET=address):
        wait_for_ready(listening)
        status, text = ask(f"http://127.0.0.1:{port}/v1/completions", QUESTION)
        assert (status, json.loads(text)["choices"][0]["text"].strip()[:33]) == (
            200,
            "Mistral 7B is released under the ",
        )


def test_the_pod_is_ready_by_its_own_probe_and_wants_the_key(prepared, models):
    appliers.kubernetes("serve.yaml")(prepared, models)
    told, port = container("serve.yaml"), free_port()
    with running(prepared, with_port(told["command"], 8000, port), **appliers.environment_of(told)):
        wait_for_probe(f"http://127.0.0.1:{port}{told['readinessProbe']['httpGet']['path']}")
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert (ask(url, QUESTION)[0], ask(url, QUESTION, key="key")[0]) == (401, 200)


def test_the_fleet_pod_is_ready_by_its_own_probe(prepared, models):
    appliers.kubernetes("fleet.yaml")(prepared, models)
    told, status = container("fleet.yaml"), free_port()
    command = with_port(with_port(told["command"], 6881, 0), 9881, status)
    with running(prepared, command, **appliers.environment_of(told)):
        wait_for_probe(f"http://127.0.0.1:{status}{told['readinessProbe']['httpGet']['path']}")
