"""The reference page of the resource says all that its definition says."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from crd_reference import CRD, PAGE, written

from trunkline_operator.decisions.events import WARNINGS, News

TEXT = CRD.read_text()


def schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """This schema and all below."""
    yield schema
    for each in schema.get("properties", {}).values():
        yield from schemas(each)
    for below in ("items", "additionalProperties"):
        if below in schema:
            yield from schemas(schema[below])


(VERSION,) = yaml.safe_load(TEXT)["spec"]["versions"]
ALL = list(schemas(VERSION["schema"]["openAPIV3Schema"]))


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == written(TEXT), "run `python tests/crd_reference.py`"


def test_every_field_and_every_rule_is_there_once() -> None:
    page = written(TEXT)
    fields, _, _ = page.partition("\n## Events\n")
    rows = re.findall(r"^\| `(.+?)` \|", fields, re.MULTILINE)
    below_root = sum(len(schema.get("properties", {})) for schema in ALL) - len(("spec", "status"))
    assert len(rows) == len(set(rows)) == below_root
    rules = [
        rule["message"] for schema in ALL for rule in schema.get("x-kubernetes-validations", ())
    ]
    assert rules
    for sentence in rules:
        assert page.count(f"- {' '.join(sentence.split())}\n") == 1


def test_every_event_is_there() -> None:
    _, _, table = written(TEXT).partition("\n## Events\n")
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| .+? \|", table, re.MULTILINE)))
    assert sorted(named) == sorted([*News, *WARNINGS])


@pytest.mark.parametrize(
    "row",
    [
        "| `spec.warm.minPods` | integer | `1` | 0 … 1000 | Pods that are there without any call. |",
        '| `spec.policy.dataClass` | string | `"standard"` | `standard`, `phi` | phi, for ',
        '| `spec.burst.modal.gpu` | list of strings | `["L4"]` | at most 8 entries; each 1 … 64 ',
        "| `spec.engine.replies[].say` | string | required | 1 … 1024 characters | The reply. ",
        (
            "| `spec.warm.resources.limits` | map of integer or string | `{}` | at most 16 entries; each at "
            "most 32 characters; each a Kubernetes quantity | "
        ),
        (
            "| `spec.warm.bufferSlots` | integer or string | `1` | 0 … 10000; at most 3 characters; matches "
            "`^(0\\|[1-9]?[0-9])%$` | "
        ),
        "| `status.conditions[].lastTransitionTime` | time | required |  | When `status` last changed. |",
    ],
)
def test_a_row_tells_type_default_and_bounds(row: str) -> None:
    assert f"\n{row}" in written(TEXT)
