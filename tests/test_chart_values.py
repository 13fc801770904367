"""values.yaml, its schema, its table in README.md, and the alerts' metrics: none of them may drift apart."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from chart_readme import values, written
from chart_rig import CHART, SWITCHES, rendered
from helm_python import HelmValuesError
from prometheus_client import REGISTRY, CollectorRegistry

import trunkline_operator.metrics
from trunkline_runtime.gateway.ledger import Ledger
from trunkline_runtime.gateway.renewal import Renewal
from trunkline_runtime.worker.control import ControlLinks
from trunkline_runtime.worker.metrics import WorkerMetrics

TEXT = (CHART / "values.yaml").read_text()
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def test_the_readme_is_fresh() -> None:
    readme = (CHART / "README.md").read_text()
    assert readme == written(readme, TEXT), "run `python tests/chart_readme.py`"


def test_every_value_is_explained() -> None:
    assert [path for path, told, _ in values(TEXT) if not told.endswith(".")] == []


def test_the_schema_knows_the_values_and_no_others() -> None:
    defaults = yaml.safe_load(TEXT)
    in_schema = set(leaves(SCHEMA)) - {"global"}  # what parent charts share
    assert in_schema == set(paths(defaults))


def leaves(schema: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, each in schema["properties"].items():
        if "properties" in each:
            assert each["additionalProperties"] is False, name
            yield from leaves(each, f"{above}{name}.")
        else:
            yield above + name


def paths(section: dict[str, Any], above: str = "") -> Iterator[str]:
    """Down to where the schema does: `resources` and their like are open."""
    for name, each in section.items():
        schema = SCHEMA
        for part in f"{above}{name}".split("."):
            schema = schema["properties"][part]
        if "properties" in schema:
            yield from paths(each, f"{above}{name}.")
        else:
            yield above + name


def test_every_value_is_switched_somewhere() -> None:
    defaults = yaml.safe_load(TEXT)
    switched = {
        path
        for switch in SWITCHES.values()
        for path in paths(switch)
        if at(switch, path) is not ...
    }
    assert set(paths(defaults)) - switched == set()


def at(section: Any, path: str) -> Any:
    for part in path.split("."):
        section = section.get(part, ...)
    return section


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"gateway": {"replicas": 0}}, "minimum: got 0, want 1"),
        ({"gateway": {"replcas": 2}}, "additional properties 'replcas' not allowed"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"watchNamespaces": "sales"}, "/watchNamespaces"),
        ({"watchNamespaces": ["Sales"]}, "/watchNamespaces/0"),
        ({"operator": {"modalServerUrl": "modal.example"}}, "/operator/modalServerUrl"),
        ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "invalid propertyName 'app.kub"),
        ({"networkPolicy": {"callers": [{}]}}, "/networkPolicy/callers/0"),
        ({"networkPolicy": {"dns": {"ports": []}}}, "/networkPolicy/dns/ports"),
        ({"networkPolicy": {"modal": {"peers": []}}}, "/networkPolicy/modal/peers"),
        ({"uninstall": {"deadlineSeconds": 1}}, "/uninstall/deadlineSeconds"),
        ({"test": {"agent": "front-desk"}}, "/test/agent"),
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HelmValuesError, match=sentence):
        rendered(wrong)


def test_values_of_a_parent_chart_pass() -> None:
    assert rendered({"global": {"region": "eu"}})


# --- alerts ----------------------------------------------------------------------------------------------


def alerts() -> list[dict[str, Any]]:
    (group,) = rendered(SWITCHES["monitored"])["PrometheusRule", "trunkline"]["spec"]["groups"]
    rules = group["rules"]
    assert isinstance(rules, list)
    return rules


def test_alerts_say_what_to_do() -> None:
    assert len({rule["alert"] for rule in alerts()}) == len(alerts()) >= 5
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["description"]) > 40
        shown = str(rule["annotations"])
        for label in re.findall(r"\$labels\.(\w+)", shown):
            assert f"{label}" in rule["expr"], f"{rule['alert']} shows {label}, and has lost it"


def test_alerts_ask_for_metrics_that_exist() -> None:
    worker, registry = WorkerMetrics(), CollectorRegistry()
    worker.watch_links(ControlLinks.__new__(ControlLinks))
    Ledger(registry)
    Renewal(registry, None, None)
    assert trunkline_operator.metrics.LINKS
    known = {
        name for each in (registry, worker.registry, REGISTRY) for name in each._names_to_collectors
    }
    for rule in alerts():
        asked = set(re.findall(r"\btrunkline_\w+", rule["expr"]))
        assert asked, rule["alert"]
        assert asked <= known, rule["alert"]


def test_pod_monitors_find_the_pods() -> None:
    objects = rendered(SWITCHES["monitored"])
    for component in ("gateway", "operator"):
        monitor = objects["PodMonitor", f"trunkline-{component}"]
        assert monitor["metadata"]["labels"]["prometheus"] == "main"
        template = objects["Deployment", f"trunkline-{component}"]["spec"]["template"]
        wanted = monitor["spec"]["selector"]["matchLabels"]
        assert template["metadata"]["labels"].items() >= wanted.items()
        named = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in named
