"""The templates in docs/deploy name things that exist; what can be checked without a container engine is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
INSTRUCTIONS = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as pairs of instruction and arguments, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_the_dockerfile_has_known_instructions_and_copies_what_exists() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    sources = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    assert {"flows", "tasks", "prefect.yaml"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_starts_a_worker_of_the_pool_that_the_deployments_use() -> None:
    command = json.loads(instructions()[-1][1])
    pools = {
        deployment["work_pool"]["name"]
        for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    }
    assert command[:3] == ["prefect", "worker", "start"]
    assert pools == {command[command.index("--pool") + 1]}


def test_services_of_the_compose_file_wait_for_services_that_are_there() -> None:
    services = compose()["services"]
    assert {"database", "server", "deployment", "worker"} == set(services)
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
    assert services["worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    for service in (services["deployment"], services["worker"]):
        assert service["environment"]["PREFECT_API_URL"] == "http://server:4200/api"
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()


def test_what_the_compose_file_builds_for_a_gpu_has_a_gpu_build_of_pytorch() -> None:
    arguments = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    for name in ("server", "deployment", "worker"):
        given = compose()["services"][name]["build"]["args"]
        assert set(given) == arguments
        assert re.search(r"/whl/cu\d+}", given["TORCH_INDEX"])


def test_the_container_may_write_its_folders_and_gets_the_settings_file() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert 'useradd --create-home --uid "$HOST_UID" tuneproof' in text
    readme = (DEPLOY / "README.md").read_text()
    for name in ("deployment", "worker"):
        mounts = {mount["target"]: mount for mount in compose()["services"][name]["volumes"]}
        assert set(mounts) == {"/app/models", "/app/runs", "/app/data", "/app/config.toml"}
        assert not any(mount["bind"]["create_host_path"] for mount in mounts.values())
        default = re.sub(r"\$\{\w+:-(.*)}", r"\1", mounts["/app/config.toml"]["source"])
        assert (DEPLOY / default).resolve() == ROOT / "examples" / "quickstart" / "config.toml"
    made = re.search(r"mkdir --parents (.*)", readme)
    assert made is not None and made[1].split() == ["models", "runs", "data"]


def test_a_browser_reaches_the_api_of_the_server_that_listens_on_every_address() -> None:
    server = compose()["services"]["server"]
    assert "--host 0.0.0.0" in server["command"]
    assert server["environment"]["PREFECT_UI_API_URL"] == "/api"
    published = server["ports"][0].rpartition(":")[0]
    for name in ("server", "deployment", "worker"):
        assert compose()["services"][name]["environment"]["PREFECT_UI_URL"] == f"http://{published}"


def test_the_compose_file_asks_for_what_its_example_names() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    named = set(re.findall(r"^(\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    assert asked == named


def test_every_placeholder_of_the_job_template_is_a_described_variable() -> None:
    template = json.loads((DEPLOY / "kubernetes-job-template.json").read_text())
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    variables = template["variables"]["properties"]
    assert used == set(variables)
    assert all(variable["description"] for variable in variables.values())
