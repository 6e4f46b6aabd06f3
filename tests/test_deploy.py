"""Dockerfile, compose files and the KubeRay manifest: their commands are ones that plainsd and Ray take."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from plainsd.commands.parsing import parsed
from plainsd.commands.serve import Serve
from plainsd.server.api.security import PROBES
from plainsd.server.limits import Limits
from plainsd.server.service import LAST_STEP

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = ROOT / "compose.yaml"
CLUSTER, KUBERAY = ROOT / "deploy" / "compose.cluster.yaml", ROOT / "deploy" / "kuberay.yaml"
RAY_CLUSTER = {  # of ray.io/v1: KubeRay's reference, the part that is used here
    "spec": {"rayVersion", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template"},
    "group": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}
CONTAINER = {"name", "image", "command", "args", "env", "ports", "resources", "volumeMounts", "startupProbe",
             "livenessProbe", "readinessProbe"}  # fmt: skip


def documents(path):
    return [one for one in yaml.safe_load_all(path.read_text("utf-8")) if one]


def served_by(words):
    """The flags of `plainsd serve ...`, read by the command's own parser."""
    assert words[:2] == ["plainsd", "serve"], words
    return parsed(Serve, "serve", words[2:])


def ray_flags(words):
    """The flags of `ray start ...`, read by Ray's own parser."""
    scripts = pytest.importorskip("ray.scripts.scripts")
    assert words[:2] == ["ray", "start"], words
    return scripts.start.make_context("ray start", words[2:]).params


def shell_commands(line):
    """The commands of a line for sh, in turn: `a && exec b`."""
    return [shlex.split(part.strip().removeprefix("exec ")) for part in line.split("&&")]


def entrypoint():
    return yaml.safe_load(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[1])


def seconds(text):
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def test_the_image_serves():
    asked = served_by(entrypoint())
    assert (asked.host, str(asked.data)) == ("0.0.0.0", "/data") and "VOLUME /data" in DOCKERFILE
    assert f"EXPOSE {asked.port}" in DOCKERFILE and f"127.0.0.1:{asked.port}{PROBES[0]}" in DOCKERFILE
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists() and f"!{name}" in ignored, name


def test_the_compose_file_of_one_container():
    (service,) = documents(COMPOSE)[0]["services"].values()
    asked = served_by([*entrypoint(), *service["command"]])
    assert service["ports"] == [f"127.0.0.1:{asked.port}:{asked.port}"]
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert {str(asked.data), str(asked.loras)} <= mounted and "PLAINSD_TOKEN" in service["environment"]
    assert seconds(service["stop_grace_period"]) > asked.drain_seconds + LAST_STEP


def test_the_compose_file_of_a_cluster():
    (content,) = documents(CLUSTER)
    front, worker = (content["services"][name] for name in ("front", "worker"))
    assert front["image"] == worker["image"] == "plainsd-cluster" and len(content["services"]) == 2
    assert front["build"]["args"]["EXTRAS"] == "serve,cluster" and "ARG EXTRAS" in DOCKERFILE
    assert front["entrypoint"] == ["/bin/sh", "-c"]
    head, serve = shell_commands(front["command"][0])
    asked, started, joined = served_by(serve), ray_flags(head), ray_flags(worker["entrypoint"])
    assert started["head"] and started["num_cpus"] == 0 and not started["block"]
    assert joined["address"] == f"front:{started['port']}" and joined["block"] and not joined["head"]
    assert asked.ray.address == "auto" and asked.ray.workers == worker["deploy"]["replicas"] == 2
    assert asked.host == "0.0.0.0" and front["ports"] == [f"127.0.0.1:{asked.port}:{asked.port}"]
    assert seconds(front["stop_grace_period"]) > asked.drain_seconds + LAST_STEP
    shared = {volume for volume in front["volumes"] if not volume.startswith("data:")}
    assert shared == set(worker["volumes"]) and f"{asked.loras}" in " ".join(shared)
    assert set(front["networks"]) == set(worker["networks"]) == set(content["networks"])


def test_the_commands_of_the_page_on_scale():
    """What docs/scale.md starts is read by the parser, by host names that its proxy passes on."""
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    (shown,) = re.findall(r"^```sh serve\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (proxy,) = re.findall(r"^```nginx\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    fronts = dict(re.findall(r"^    (\S+\.org) +127\.0\.0\.1:(\d+);$", proxy, re.MULTILINE))
    commands = [shlex.split(line) for line in shown.replace("\\\n", " ").splitlines()]
    asked = [served_by(words) for words in commands]
    assert {one.allow_host[0]: str(one.port) for one in asked} == fronts and len(fronts) == 2
    assert len({one.data for one in asked}) == 2
    assert f"client_max_body_size {Limits().upload // 2**20}m;" in proxy
    for script in re.findall(r"python (bench/\w+\.py)", text):
        assert (ROOT / script).exists()


@pytest.fixture(scope="module")
def manifest():
    return {one["kind"]: one for one in documents(KUBERAY)}


def containers(template):
    for container in template["spec"]["containers"]:
        assert set(container) <= CONTAINER, set(container) - CONTAINER
        yield container


def test_the_cluster_of_kuberay(manifest):
    cluster = manifest["RayCluster"]
    spec, (group,) = cluster["spec"], cluster["spec"]["workerGroupSpecs"]
    assert cluster["apiVersion"] == "ray.io/v1" and set(spec) == RAY_CLUSTER["spec"]
    assert set(spec["headGroupSpec"]) <= RAY_CLUSTER["head"] and set(group) <= RAY_CLUSTER["group"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for params in (spec["headGroupSpec"]["rayStartParams"], group["rayStartParams"]):
        assert all(isinstance(value, str) for value in params.values())  # the CRD takes texts alone
        ray_flags(["ray", "start", *(f"--{name}={value}" for name, value in params.items())])
    head, worker = ([*containers(one["template"])] for one in (spec["headGroupSpec"], group))
    images = {one["image"] for one in (*head, *worker, *containers(manifest["StatefulSet"]["spec"]["template"]))}
    assert len(images) == 1 and " wget" in DOCKERFILE  # versions must not differ; the operator's probes need it
    import ray

    assert spec["rayVersion"] == ray.__version__


def test_the_front_of_kuberay(manifest):
    cluster, front = manifest["RayCluster"], manifest["StatefulSet"]["spec"]
    (group,) = cluster["spec"]["workerGroupSpecs"]
    (container,), pod = [*containers(front["template"])], front["template"]["spec"]
    join, serve = shell_commands(container["args"][0])
    asked, joined = served_by(serve), ray_flags(join)
    (gcs,) = [port for one in containers(cluster["spec"]["headGroupSpec"]["template"]) for port in one["ports"]
              if port["name"] == "gcs-server"]  # fmt: skip
    service = f"{cluster['metadata']['name']}-head-svc"  # as KubeRay names it
    assert joined["address"] == f"{service}:{gcs['containerPort']}" and joined["num_cpus"] == 0 == joined["num_gpus"]
    (worker,) = containers(group["template"])
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert asked.ray.workers * asked.ray.gpus_per_worker == group["replicas"] * gpus and front["replicas"] == 1
    assert pod["terminationGracePeriodSeconds"] > asked.drain_seconds + LAST_STEP
    probes = {container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert probes == set(PROBES) and container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["ports"][0]["containerPort"] == asked.port == manifest["Service"]["spec"]["ports"][0]["port"]
    assert manifest["Service"]["spec"]["selector"] == front["template"]["metadata"]["labels"]
    assert front["selector"]["matchLabels"] == front["template"]["metadata"]["labels"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {one["name"] for one in pod["volumes"]} | {
        one["metadata"]["name"] for one in front["volumeClaimTemplates"]
    }
    assert set(mounts.values()) == volumes and str(asked.data) in mounts
    folders = [mount["mountPath"] for mount in worker["volumeMounts"]]
    assert all(str(Path(name).parent) in folders for name in asked.model)  # where the workers find it too
