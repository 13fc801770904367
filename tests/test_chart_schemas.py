"""Every object of the chart, for every switch, against the schemas of Kubernetes itself."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from chart_rig import CHART, SWITCHES, manifests, rendered
from referencing import Registry, Resource

# The oldest minor that the chart takes, one between, and the newest whose schemas there are.
MINORS = ("1.32", "1.35", "1.37")
# Their schemas are those of their own projects.
FOREIGN = {"cert-manager.io/v1", "gateway.networking.k8s.io/v1", "monitoring.coreos.com/v1"}


def folder(minor: str) -> Path:
    package = Path(kubernetes_validate.__file__).parent
    return package / f"kubernetes-json-schema/v{minor}.0-local-strict"


@cache
def definitions(minor: str) -> Resource[Any]:
    """The package reads these 3 MB anew for each object, and so would need minutes."""
    return Resource.from_contents(json.loads((folder(minor) / "_definitions.json").read_text()))


@cache
def checker(kind: str, version: str, minor: str) -> jsonschema.Draft202012Validator:
    group = re.sub(r"^([^./]*)[^/]*/", r"\1-", version)
    text = (folder(minor) / f"{kind.lower()}-{group}.json").read_text()
    registry: Registry[Any] = definitions(minor) @ Registry()
    return jsonschema.Draft202012Validator(json.loads(text), registry=registry)


@cache
def check(text: str, minor: str) -> None:
    """Cached, for most objects are the same with every switch."""
    body = json.loads(text)
    checker(body["kind"], body["apiVersion"], minor).validate(body)


@pytest.mark.parametrize("switch", SWITCHES)
def test_objects_are_what_kubernetes_knows(switch: str) -> None:
    checked = 0
    for body in manifests(SWITCHES[switch]):
        # The schema of definitions is recursive; the API server itself takes them in tests/test_crd.py.
        if body["apiVersion"] not in FOREIGN and body["kind"] != "CustomResourceDefinition":
            for minor in MINORS:
                check(json.dumps(body), minor)
            checked += 1
    assert checked >= 10


def test_a_wrong_object_would_be_found() -> None:
    body = rendered({})["Deployment", "trunkline-gateway"]
    body["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    for minor in MINORS:
        with pytest.raises(jsonschema.ValidationError, match="readinessProb"):
            check(json.dumps(body), minor)


def test_the_oldest_minor_is_the_one_that_the_chart_asks_for() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={MINORS[0]}.0-0"
