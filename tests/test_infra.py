"""The files that bring the project up elsewhere, held to their tools' schemas, to each other, and to no secrets."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

KUBERNETES = ROOT / "infra/kubernetes"
KUBERAY = ROOT.parent / "shared/schemas"  # KubeRay's published schemas (operator 1.7.0)
SECRET = re.compile("PASSWORD|SECRET|TOKEN")
published = pytest.mark.skipif(not KUBERAY.exists(), reason=f"{KUBERAY} is missing: it holds KubeRay's schemas")
FILES = [ROOT / "ray_cluster.yaml", *sorted((ROOT / "infra").rglob("*.yaml"))]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def every(node: Any, where: str = "") -> list[tuple[str, Any]]:
    """Every value of a document with the keys that lead to it."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [(where, node)] + [found for key, child in children for found in every(child, f"{where}/{key}")]


def strict(schema: Any) -> Any:
    """The schema, refusing fields that it does not know: Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    known = {key: strict(value) for key, value in schema.items()}
    return known | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else known


def kuberay(kind: str) -> Any:
    """What holds a manifest to KubeRay's published schema."""
    schema = json.loads((KUBERAY / f"{kind}s.ray.io_v1.schema.json").read_text())
    return jsonschema.Draft202012Validator(strict(schema))


def test_the_cluster_on_aws_is_one_that_ray_up_takes() -> None:
    config = load(ROOT / "ray_cluster.yaml")
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(load(ROOT / "ray_cluster.yaml") | {"max_worker": 1}))
    types = config["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] and types["gpu"]["max_workers"] > types["gpu"]["min_workers"] == 0
    for name, machine in types.items():  # the head must stay; all others may be taken back at any time
        assert ("InstanceMarketOptions" in machine["node_config"]) == (name != config["head_node_type"])
        assert "IamInstanceProfile" in machine["node_config"]
    assert [rule["FromPort"] for rule in config["provider"]["security_group"]["IpPermissions"]] == [22]
    head, worker = (config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head and "--address=$RAY_HEAD_IP:6379" in worker
    for command in (head, worker):
        (script,) = re.findall(r"/home/ray/cae/(\S+\.py)", command)
        assert (ROOT / script).exists()


@published
@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_the_manifests_are_what_kuberay_publishes(kind: str) -> None:
    validator, text = kuberay(kind), (KUBERNETES / f"{kind}.yaml").read_text()
    validator.validate(yaml.safe_load(text))
    misspelt = yaml.safe_load(text.replace("rayStartParams", "rayStartParms"))
    assert any("rayStartParms" in error.message for error in validator.iter_errors(misspelt))


@published
def test_the_pods_of_mlflow_are_pods() -> None:
    """KubeRay's schema has that of Kubernetes' pods in it."""
    validator = kuberay("raycluster")
    for part in ("spec", "headGroupSpec", "template"):
        validator = validator.evolve(schema=validator.schema["properties"][part])
    manifests = yaml.safe_load_all((KUBERNETES / "mlflow.yaml").read_text())
    pods = {manifest["metadata"]["name"]: manifest["spec"].get("template") for manifest in manifests}
    for name in ("mlflow", "postgres"):
        validator.validate(pods[name])


def test_a_job_brings_the_cluster_that_stands_alone_too() -> None:
    cluster, job = load(KUBERNETES / "raycluster.yaml"), load(KUBERNETES / "rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["activeDeadlineSeconds"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"} and cluster["spec"]["enableInTreeAutoscaling"]
    images = [value for where, value in every(cluster) if where.endswith("/image")]
    assert images == ["REGISTRY/cae:cpu", "REGISTRY/cae:cpu", "REGISTRY/cae:gpu"]


def test_the_compose_file_is_one_and_keeps_to_loopback() -> None:
    vendored = Path(check_jsonschema.__file__).parent / "builtin_schemas/vendor"
    schema = json.loads((vendored / "compose-spec.json").read_text())
    for name in ("compose.yaml", "compose.gpu.yaml"):
        jsonschema.validate(load(ROOT / "infra" / name), schema)
    services = load(ROOT / "infra/compose.yaml")["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert sorted(published) == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265", "127.0.0.1:8333:8333"]
    assert services["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert all(service.get("network_mode") is None for service in services.values())


def test_no_file_holds_a_secret() -> None:
    """A secret is asked of the environment, of Kubernetes, or of AWS; never written down, and never an argument."""
    for path in FILES:
        for where, value in every(list(yaml.safe_load_all(path.read_text()))):
            what = f"{path}: {where}"
            if isinstance(value, str):
                assert not re.search(r"://[^/\s]+:[^/\s]+@", value), what
                assert not re.search(r"(PASSWORD|SECRET|TOKEN)\w*=(?!\"\$\()", value), what
                if SECRET.search(where.rsplit("/", 1)[-1]):
                    assert re.fullmatch(r"\$\{\w+(:\?export it first)?\}", value), what
            if isinstance(value, dict) and SECRET.search(str(value.get("name", ""))):
                assert set(value) == {"name", "valueFrom"} and "secretKeyRef" in value["valueFrom"], what


def test_ray_is_the_same_release_everywhere_and_one_that_we_ask_for() -> None:
    release = load(KUBERNETES / "raycluster.yaml")["spec"]["rayVersion"]
    assert set(re.findall(r"rayproject/ray:([\d.]+)-", (ROOT / "ray_cluster.yaml").read_text())) == {release}
    (wanted,) = (Requirement(line) for line in metadata.requires("cae-explain") or [] if line.startswith("ray["))
    assert wanted.specifier.contains(release)


def test_the_images_copy_what_is_there() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for folder, context in (("infra", ROOT), ("infra/mlflow", ROOT / "infra/mlflow")):
        text = (ROOT / folder / "Dockerfile").read_text()
        copied = [name for line in re.findall("^COPY (.*)$", text, re.M) for name in line.split()[:-1]]
        assert copied and all((context / name).exists() for name in copied)
        assert context != ROOT or set(copied) <= kept
        assert "\nUSER " in text  # nothing runs as root
