"""How each recipe is carried out: what a builder, cloud-init, Kubernetes or a runner would do with the file."""

from __future__ import annotations

import base64
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.recipes.sandbox import RECIPES, Sandbox

ROOT = RECIPES.parent
SOURCES = ("mistral_fetch", "runtime", "pyproject.toml", "README.md", "LICENSE", "docs/mistral-fetch.1")


def shell(sandbox: Sandbox, models: Path) -> list[str]:
    """Run the script."""
    prefix, script = sandbox.root / "opt/mistral-fetch", RECIPES / "shell/provision.sh"
    variables = {"PREFIX": str(prefix), "WHEEL": sandbox.wheel.as_uri(), "MISTRAL_FETCH_HOME": "/var/lib/mistral-fetch"}
    return [sandbox.run(["sh", str(script), str(models / "mistral-fetch.toml")], **variables)]


def docker_stages(text: str) -> list[tuple[str, str, str]]:
    """Give the instructions of a Dockerfile: stage, word, the rest as one line; comments and flags left out."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    stage, found = "", []
    for line in filter(None, joined.splitlines()):
        word, _, rest = line.partition(" ")
        stage = (rest.partition(" AS ")[2] or "final") if word == "FROM" else stage
        found.append((stage, word, re.sub(r"^--mount=\S+ ", "", rest.strip())))
    return found


def docker(sandbox: Sandbox, models: Path) -> list[str]:
    """Carry out COPY and RUN of every stage. Stages use different directories, so one file system stands for all.

    The second time only the weights are made anew: the other layers' inputs have not changed.
    """
    shutil.rmtree(sandbox.root / "models", ignore_errors=True)  # a layer begins with nothing
    is_first = not sandbox.path("/opt/fetch").exists()
    said = []
    for stage, word, rest in docker_stages((RECIPES / "docker/Dockerfile").read_text()):
        if stage != "weights" and not is_first:
            continue
        if word == "RUN":
            said.append(sandbox.run(f"mkdir -p /cache\n{rest}"))
        elif rest == ". /src":
            copy_sources(sandbox.path("/src"))
        elif word == "COPY" and rest.startswith("--from=models "):
            *names, target = rest.split()[1:]
            for name in names:
                shutil.copy(models / name, sandbox.path(f"{target}{name}"))
    return said


def copy_sources(target: Path) -> None:
    """Copy what a clone has and a wheel is made from."""
    target.mkdir(exist_ok=True)
    for name in SOURCES:
        source, place = ROOT / name, target / name
        place.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place)


def cloud_init(sandbox: Sandbox, models: Path) -> list[str]:
    """Write the files, then run the commands, in cloud-init's own order."""
    told = yaml.safe_load((RECIPES / "cloud-init/user-data.yaml").read_text())
    for file in told["write_files"]:
        is_encoded = file.get("encoding") == "b64"
        content = base64.b64decode(file["content"]).decode() if is_encoded else file["content"]
        if content == "LOCK":  # the placeholder, which its comment says to replace
            content = (models / "mistral-fetch.lock").read_text()
        sandbox.path(file["path"]).write_text(sandbox.translate(content))
    return [sandbox.run(command) for command in told["runcmd"]]


def ansible(sandbox: Sandbox, models: Path) -> list[str]:
    """Play the role on this machine."""
    variables = {
        "mistral_fetch_models": str(models),
        "mistral_fetch_wheel": sandbox.wheel.as_uri(),
        "mistral_fetch_prefix": "/opt/mistral-fetch",
        "mistral_fetch_etc": "/etc/mistral-fetch",
        "mistral_fetch_home": "/var/lib/mistral-fetch",
    }
    playbook = shutil.which("ansible-playbook", path=str(Path(sys.executable).parent)) or "ansible-playbook"
    command = [playbook, "-c", "local", "-i", "localhost,", str(RECIPES / "ansible/playbook.yml")]
    for name, value in variables.items():
        command += ["-e", f"{name}={value}"]
    return [sandbox.run(command, LC_ALL="C.UTF-8", ANSIBLE_NOCOLOR="1", ANSIBLE_HOME=str(sandbox.root / "ansible"))]


def kubernetes(name: str) -> Any:
    """Return a function that runs the init containers of a manifest, after the tool's image was made."""

    def apply(sandbox: Sandbox, models: Path) -> list[str]:
        install(sandbox)
        for file in ("mistral-fetch.toml", "mistral-fetch.lock"):
            shutil.copy(models / file, sandbox.path(f"/etc/mistral-fetch/{file}"))
        sandbox.path("/secret/keys").write_text("key\n")
        sandbox.path("/key/keys")
        said = []
        for container in pod_of(RECIPES / "kubernetes" / name)["initContainers"]:
            command = [loopback(word) for word in [*container["command"], *container.get("args", [])]]
            said.append(sandbox.run(command, **environment_of(container)))
        return said

    return apply


def pod_of(path: Path) -> dict[str, Any]:
    """Return the pod that a manifest's workload makes."""
    documents = list(yaml.safe_load_all(path.read_text()))
    (workload,) = (one for one in documents if one["kind"] in {"Deployment", "DaemonSet"})
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    """Return a container's variables."""
    return {one["name"]: one["value"] for one in container.get("env", [])}


def loopback(text: str) -> str:
    """Return a command that stays on this machine: its names are not known here, and its ports may be taken."""
    return re.sub(r"0\.0\.0\.0:\d+", "127.0.0.1:0", text).replace(" --peer model-fleet:6881", "")


def build_tool(sandbox: Sandbox) -> Path:
    """Make what the Dockerfile's stage ``tool`` makes, and return its environment."""
    shutil.copy(sandbox.wheel, sandbox.path(f"/wheels/{sandbox.wheel.name}"))
    for stage, word, rest in docker_stages((RECIPES / "docker/Dockerfile").read_text()):
        if (stage, word) == ("tool", "RUN"):
            sandbox.run(rest)
    return sandbox.path("/opt/mistral-fetch")


def install(sandbox: Sandbox) -> None:
    """Start from the image that :func:`build_tool` made."""
    place = sandbox.path("/opt/mistral-fetch")
    if not place.is_symlink():
        place.symlink_to(sandbox.tool)
        sandbox.use("/opt/mistral-fetch")


def systemd_sync(sandbox: Sandbox, models: Path) -> list[str]:
    """Run the commands of the unit that fetches, with its variables."""
    install(sandbox)
    unit = (RECIPES / "systemd/mistral-fetch-sync.service").read_text()
    variables = unit_environment(unit, sandbox)
    return [sandbox.run(command) for command in unit_commands(unit, variables)]


def unit_environment(unit: str, sandbox: Sandbox) -> dict[str, str]:
    """Set a unit's variables in the sandbox, and return those that its command lines may name."""
    words = re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^Environment=(.*)", unit, re.MULTILINE)))
    for name, value in words:
        sandbox.environment[name] = sandbox.translate(value.replace("%S", "/var/lib").replace("%C", "/var/lib/cache"))
    return dict(line.split("=", 1) for line in sandbox.path("/etc/mistral-fetch/model.env").read_text().splitlines())


def unit_commands(unit: str, variables: dict[str, str]) -> list[list[str]]:
    """Return the command lines of a unit as lists."""
    lines = re.findall(r"^ExecStart=(.*)", unit, re.MULTILINE)
    return [[re.sub(r"\$\{(\w+)\}", lambda name: variables[name[1]], word) for word in line.split()] for line in lines]


def workflow(sandbox: Sandbox, models: Path) -> list[str]:
    """Run the steps of the job that are commands; the checkout is a copy of the two files."""
    job = yaml.safe_load((RECIPES / "github-actions/models.yml").read_text())["jobs"]["test"]
    workspace, paths = sandbox.path("/workspace/x").parent, sandbox.path("/github-path")
    for file in ("mistral-fetch.toml", "mistral-fetch.lock"):
        shutil.copy(models / file, workspace)
    for name, value in job["env"].items():
        sandbox.environment[name] = value.replace("${{ github.workspace }}", str(workspace))
    sandbox.environment["GITHUB_PATH"] = str(paths)
    said = []
    for step in job["steps"]:
        if "run" in step:
            said.append(sandbox.run(f"cd '{workspace}'\n{step['run']}"))
            added = paths.read_text().splitlines()[-1:] if paths.exists() else []
            sandbox.environment["PATH"] = ":".join([*added, sandbox.environment["PATH"]])
    return said
