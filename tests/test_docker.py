"""The files in docker/: that what they name exists, and that what they say to lrq-server and vLLM is understood.

No Docker engine and no cluster runs here: tests/test_docker_scripts.py runs what the Dockerfiles call.
"""

import argparse
import json
import re
import shlex
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from lrq_server import bench_command, serve_command
from lrq_server.app import loading_app
from lrq_server.cli import main
from lrq_server.readiness import Readiness
from lrq_server.server_metrics import ClippingMetrics, ServerMetrics
from lrq_vllm.vllm_versions import supports
from tests.images import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
UID = 10001
# Keys of the Compose Specification (compose-spec.io) that are in use here: a misspelt one is not among them.
SERVICE_KEYS = {
    "build", "cap_drop", "command", "configs", "depends_on", "deploy", "environment", "extends", "healthcheck", "image",
    "networks", "ports", "profiles", "read_only", "security_opt", "shm_size", "stop_grace_period", "tmpfs", "volumes",
}  # fmt: skip


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction and its argument, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()]


def settings(dockerfile: Path) -> dict[str, str]:
    """What ENV sets."""
    return dict(pair.split("=", 1) for name, argument in instructions(dockerfile) if name == "ENV" for pair in argument.split())


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_starts_from_pinned_images_and_only_calls_our_scripts(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    (base,) = [argument.partition("=")[2] for name, argument in found if name == "ARG"]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-slim)?", base)
    if "vllm" in base:
        assert supports(base.rpartition(":v")[2])
    steps = re.findall(r"^  ([a-z-]+)\)$", (DOCKER / "install.sh").read_text(), re.MULTILINE)
    for argument in (argument for name, argument in found if name == "RUN"):
        command = json.loads(argument[argument.index("[") :])
        assert command[0].endswith("/docker/install.sh") and command[1] in steps
    (entrypoint,) = [json.loads(argument) for name, argument in found if name == "ENTRYPOINT"]
    assert entrypoint == ["/opt/lrq/docker/entrypoint.sh"]
    (healthcheck,) = [argument for name, argument in found if name == "HEALTHCHECK"]
    assert json.loads(healthcheck.partition("CMD ")[2]) == ["python3", "/opt/lrq/docker/healthcheck.py"]
    for name in ("install.sh", "entrypoint.sh", "healthcheck.py"):
        assert (DOCKER / name).exists()


def test_the_router_is_installed_by_our_script_and_runs_without_rights() -> None:
    found = instructions(DOCKER / "Dockerfile.router")
    assert [argument for name, argument in found if name == "RUN"] == ['["/opt/lrq/docker/install.sh", "router"]']
    assert ("USER", f"{UID}:{UID}") in found and ("ENTRYPOINT", '["vllm-router"]') in found
    pinned = re.search(r"vllm-router==([\d.]+)", (DOCKER / "install.sh").read_text())
    assert pinned is not None and pinned[1] == version("vllm-router")  # what tests/test_replaced_server.py tries


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_serves_offline_tested_and_without_rights(dockerfile: Path) -> None:
    environment = settings(dockerfile)
    assert (environment["HF_HUB_OFFLINE"], environment["LRQ_SELFTEST"], environment["LRQ_UID"]) == ("1", "1", str(UID))
    found = instructions(dockerfile)
    assert ("USER", f"{UID}:{UID}") in found
    after = [name for name, _ in found[found.index(("USER", f"{UID}:{UID}")) :]]
    assert "RUN" not in after and "COPY" not in after


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_into_an_image_is_in_the_build_context(dockerfile: Path) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_through)
    for argument in (argument for name, argument in instructions(dockerfile) if name == "COPY"):
        source = argument.split()[0]
        assert source == "." or source in let_through


def interpolated(path: Path) -> dict[str, Any]:
    """A compose file as Compose reads it, with the variables that it insists on."""
    given = {"LRQ_MODELS": "/srv/models", "LRQ_MODEL": "tiny"}
    text = re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda found: given.get(found[1], found[2] or ""), path.read_text())
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def parsed_by_server(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[argparse.Namespace, list[str]]:
    """What the real parser makes of a container's arguments, and what it hands on to vLLM."""
    calls: list[tuple[argparse.Namespace, list[str]]] = []
    for command in (serve_command, bench_command):
        monkeypatch.setattr(command, "_run", lambda parsed, unknown: calls.append((parsed, unknown)) or 0)
    known = ("serve", "bench")
    assert main(arguments if arguments[0] in known else ["serve", *arguments]) == 0
    return calls[0]


def check_handed_on(options: list[str]) -> None:
    """vLLM's own parser takes them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm.engine.arg_utils import AsyncEngineArgs  # isort: skip

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    names = {name for action in parser._actions for name in action.option_strings}
    assert {option.partition("=")[0] for option in options if option.startswith("--")} <= names


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_every_service_of_a_compose_file_is_whole(path: Path) -> None:
    content = interpolated(path)
    assert set(content) <= {"name", "services", "volumes", "x-replica"}
    for name, service in content["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        if "build" in service:
            build = service["build"]
            assert (path.parent / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).exists()
        elif not service["image"].startswith("lrq"):
            assert re.search(r":v?\d+\.\d+(\.\d+)?[\w.-]*$", service["image"]), f"{name} is not pinned"
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (path.parent / source).exists(), source
            elif not source.startswith("/"):
                assert source in content["volumes"], source
        for other in service.get("depends_on", []):
            assert other in content["services"]


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_services_of_ours_run_what_lrq_server_understands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = interpolated(path)
    ours = {
        name: service
        for name, service in content["services"].items()
        if service["image"].startswith("lrq") and name != "router"
    }
    assert ours
    for service in ours.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        parsed, handed_on = parsed_by_server(shlex.split(service["command"]), monkeypatch)
        if parsed.run is bench_command._run:
            server = parsed.url.removeprefix("http://").partition(":")[0]
            assert server in content["services"]
        else:
            check_serving(parsed, handed_on, grace_s=int(service["stop_grace_period"].removesuffix("s")))
            assert str(parsed.model).startswith("/models/")


def check_serving(parsed: argparse.Namespace, handed_on: list[str], grace_s: int) -> None:
    """Requests have their time to end before the container is killed; the rest is vLLM's."""
    assert 0 < parsed.drain_seconds < grace_s
    check_handed_on(handed_on)


@pytest.fixture
def manifests() -> dict[str, Any]:
    """By kind."""
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())}


def test_kubernetes_takes_every_manifest(manifests: dict[str, Any]) -> None:
    assert set(manifests) == {"PersistentVolumeClaim", "Service", "Deployment"}
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_pod_runs_what_lrq_server_understands_and_asks_for_routes_that_exist(
    manifests: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/lrq/ready", "readiness": "/lrq/ready", "liveness": "/lrq/live",
    }  # fmt: skip
    routes = {route.path for route in loading_app(Readiness()).routes}
    assert {probe["path"] for probe in probes.values()} <= routes
    (port,) = container["ports"]
    assert {probe["port"] for probe in probes.values()} == {port["name"]} and port["containerPort"] == 8000
    parsed, handed_on = parsed_by_server(container["args"], monkeypatch)
    stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    check_serving(parsed, handed_on, grace_s=pod["terminationGracePeriodSeconds"] - stop)


def test_the_pod_has_no_rights_and_finds_its_folders(manifests: dict[str, Any]) -> None:
    spec = manifests["Deployment"]["spec"]
    pod, (container,) = spec["template"]["spec"], spec["template"]["spec"]["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == UID
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["home"] == settings(DOCKER / "Dockerfile")["HOME"]
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [manifests["PersistentVolumeClaim"]["metadata"]["name"]]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == manifests["Service"]["spec"]["selector"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_prometheus_asks_a_server_that_compose_starts() -> None:
    services = interpolated(DOCKER / "compose.yaml")["services"]
    (job,) = yaml.safe_load((DOCKER / "monitoring" / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    for target in job["static_configs"][0]["targets"]:
        name, _, port = target.partition(":")
        assert name in services and port == "8000"


def test_every_metric_on_the_dashboard_is_one_that_a_server_has() -> None:
    dashboard = json.loads((DOCKER / "monitoring" / "lrq.json").read_text())
    (source,) = yaml.safe_load((DOCKER / "monitoring" / "datasource.yaml").read_text())["datasources"]
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries.append(dashboard["templating"]["list"][0]["query"]["query"])
    used = {name for query in queries for name in re.findall(r"\b(?:vllm:|lrq_)\w+", query)}
    assert len(used) > 10
    ours = our_metrics()
    assert used <= metrics_of_vllm() | ours
    assert {"lrq_ready", "lrq_info", "lrq_layers", "lrq_requests_rejected_total", "lrq_clipped_share"} <= used & ours
    assert {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]} == {source["uid"]}


def our_metrics() -> set[str]:
    """As a server of ours registers them."""
    registry = CollectorRegistry()
    ServerMetrics(registry).rejected("draining")
    ClippingMetrics(registry).show([])
    return {name for metric in registry.collect() for name in (metric.name, f"{metric.name}_total")}


def metrics_of_vllm() -> set[str]:
    """As Prometheus shows them: counters end in _total, histograms have buckets."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    names = set(re.findall(r'name="(vllm:\w+)"', source))
    return names | {f"{name}_{ending}" for name in names for ending in ("total", "bucket")}
