"""The reference page of the resource, from its definition.

    python tests/crd_reference.py

writes it anew; a test fails when it is stale.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CRD = ROOT / "crds/voiceagents.yaml"
PAGE = ROOT / "docs/reference/voiceagent.md"

QUANTITY = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|"
    r"([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
"""The pattern of amounts such as 250m and 2Gi, which nobody wants to read in a table."""

Schema = dict[str, Any]

TAIL = """
## Events

`kubectl describe va` shows them below the status. The operator tells each once, not again within ten minutes, and of an
agent at most 25 at once and then one a minute.

| reason | when |
|---|---|
| `PodLost` | a pod ended or was taken away, and the operator did not ask for it |
| `PodFailing`, `PodUnready` | a pod does not run, or is not ready any more: image pull, crash loop, readiness |
| `PodUnlinked` | a pod is ready, and for half a minute no gateway has had it: it gets no call |
| `NodeNotReady` | a pod's node is silent, so the pod counts as none |
| `BudgetSpent` | burst reached its budget: no call goes there until calls end, or the hour or the day does |
| `BudgetTooSmall` | the budget is less than one call, or what stands by, may cost |
| `BillDiffers` | Modal bills more, or less, for a day than was reckoned |
| `PriceUnknown` | a budget is set and no price is known, so no call goes to burst |
| `PodUnschedulable` | no node has room |
| `VolumeMissing` | a volume of `warm.template` is not there, or cannot be mounted |
| `PodsRefused` | the Kubernetes API does not let a pod be made: a quota, a policy of the cluster |
| `TemplateRejected` | the Kubernetes API takes no such pod as `warm` asks for |
| `RolloutBlocked` | pods of an older template stay, because they have calls and there is no room for others |
| `DrainBegan`, `DrainCancelled`, `DrainEnded` | a pod takes no new call (with who wants it), takes calls again, is removed |
| `BurstDeployed`, `BurstStopped` | the app at Modal is there as it is asked for, or is there no more |
| `BurstFailing` | the app cannot be deployed, or gateways get no session there |
| `RegionDown` | gateways pass over a region of Modal that fails; calls go to the other regions |
| `LimitReached` | Modal refuses more containers than its workspace has; no more stand by for a while |
| `SnapshotFallback` | restores from snapshots fail, so containers start slower |
| `BurstLeftBehind` | the agent is gone, and its app could not be stopped |
| `CertificateIssued` | workers got a new certificate |
| `SpecInvalid` | an edit makes no sense; nothing is changed |
| `Shortfall`, `Infeasible` | what stands by, or all that there may be, is too little for `slo.callsAtOnce` |
| `KeysMissing`, `TokenMissing`, `CredentialsMissing` | a Secret is missing or lacks entries |

When a trouble that a condition told of is over, its next reason is told too, such as `PodsReady`.
"""

HEAD = """\
# VoiceAgent

`apiVersion: {api}`, `kind: {kind}`, short name `{short}`. {description}

This page is written from `crds/voiceagents.yaml` by `python tests/crd_reference.py`. `[]` behind a name is each entry of
a list, `.*` each entry of a map. A field without a default that is not required may be left out.

`kubectl get va` shows: {columns}.

What breaks a rule is refused when it is applied, with the sentence that stands here.

"""


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(written(CRD.read_text()))


def written(text: str) -> str:
    """The page of this definition."""
    spec = yaml.safe_load(text)["spec"]
    (version,) = spec["versions"]
    root: Schema = version["schema"]["openAPIV3Schema"]
    columns = (column["name"] for column in version["additionalPrinterColumns"])
    head = HEAD.format(
        api=f"{spec['group']}/{version['name']}",
        kind=spec["names"]["kind"],
        short=spec["names"]["shortNames"][0],
        description=root["description"],
        columns=", ".join(columns),
    )
    rules = [f"- {cell(rule['message'])}" for rule in root.get("x-kubernetes-validations", ())]
    return head + "\n".join(rules) + "\n" + "".join(sections(root)) + TAIL


def sections(root: Schema) -> Iterator[str]:
    """The fields of `spec` by their first name, then those of `status`."""
    spec, status = root["properties"]["spec"], root["properties"]["status"]
    yield section("spec", spec, {name: stub(each) for name, each in spec["properties"].items()})
    for name, each in spec["properties"].items():
        yield section(f"spec.{name}", each, each["properties"])
    yield section("status", status, status["properties"])


def stub(schema: Schema) -> Schema:
    """A field without those below it, and without their rules: it has a section of its own."""
    hidden = ("properties", "x-kubernetes-validations")
    return {key: value for key, value in schema.items() if key not in hidden}


def section(path: str, schema: Schema, below: dict[str, Schema]) -> str:
    rows = [
        f"| `{each}` | {kind(field)} | {default(field, needed)} | {bounds(field)} "
        f"| {cell(field.get('description', ''))} |"
        for each, field, needed in fields(path, below, schema.get("required", ()))
    ]
    head = ["| field | type | default | bounds | |", "|---|---|---|---|---|"]
    shown = schema | {"properties": below}
    rules = [f"- {cell(sentence)}" for sentence in sentences(shown)]
    told = ["", "Rules:", "", *rules] if rules else []
    return "\n".join(["", f"## {path}", "", schema["description"], "", *head, *rows, *told]) + "\n"


def fields(
    path: str, below: dict[str, Schema], required: "list[str] | tuple[str, ...]"
) -> Iterator[tuple[str, Schema, bool]]:
    """(path, field, whether it is required) of each field below, depth first, as they stand."""
    for name, field in below.items():
        here = f"{path}.{name}"
        yield here, field, name in required
        inner, mark = insides(field)
        yield from fields(here + mark, inner.get("properties", {}), inner.get("required", ()))


def insides(field: Schema) -> tuple[Schema, str]:
    """What holds the fields below this one, and how a path says so."""
    if "items" in field:
        return field["items"], "[]"
    if "additionalProperties" in field:
        return field["additionalProperties"], ".*"
    return field, ""


def sentences(schema: Schema) -> Iterator[str]:
    """The rules of a field and of all below."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield rule["message"]
    inner, mark = insides(schema)
    if mark:
        yield from sentences(inner)
    for each in schema.get("properties", {}).values():
        yield from sentences(each)


def kind(field: Schema) -> str:
    """In a word or two."""
    if field.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "items" in field:
        return f"list of {kind(field['items'])}s"
    if "additionalProperties" in field:
        return f"map of {kind(field['additionalProperties'])}"
    return "time" if field.get("format") == "date-time" else str(field["type"])


def default(field: Schema, needed: bool) -> str:
    if needed:
        return "required"
    return code(json.dumps(field["default"], ensure_ascii=False)) if "default" in field else ""


def bounds(field: Schema) -> str:
    """What a value must keep to, in words."""
    inner, mark = insides(field)
    told = list(limits(field))
    if mark:
        told += [f"each {limit}" for limit in limits(inner)]
    return "; ".join(told)


def limits(field: Schema) -> Iterator[str]:
    if "enum" in field:
        yield ", ".join(code(str(value)) for value in field["enum"])
    yield from between(field.get("minimum"), field.get("maximum"), "")
    yield from between(field.get("minLength"), field.get("maxLength"), " characters")
    yield from between(field.get("minItems"), field.get("maxItems"), " entries")
    yield from between(field.get("minProperties"), field.get("maxProperties"), " entries")
    if (pattern := field.get("pattern")) is not None:
        yield "a Kubernetes quantity" if pattern == QUANTITY else f"matches {code(pattern)}"


def between(least: int | None, most: int | None, unit: str) -> Iterator[str]:
    if least is not None and most is not None:
        yield f"{least} … {most}{unit}"
    elif most is not None:
        yield f"at most {most}{unit}"
    elif least is not None:
        yield f"at least {least}{unit}"


def code(text: str) -> str:
    """As code in a cell of a table, where a bar would end the cell."""
    return f"`{cell(text)}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
