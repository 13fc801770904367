"""Readers of single values of a spec: JSON in, a value of spec.py out, or a sentence that says what is wrong."""

import json
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final

from trunkline_operator.agent.spec import (
    Guard,
    GuardAction,
    Json,
    Percent,
    Reply,
    SpecError,
    WarmRegion,
)
from trunkline_operator.scaling.schedule import LONGEST_WINDOW_SECONDS, Window, trouble

# More than anybody's voice agent costs in a day; it catches an amount that was meant in cents.
MOST_DOLLARS: Final = 1_000_000

AUTO: Final = "auto"
MOST_LABELS: Final = 32
MOST_PODS: Final = 1000
# Room for any affinity that a person writes; a thousand agents with it still fit an operator's memory.
MOST_ENTRY_BYTES: Final = 16_384
# Not hostPath: who may write agents need not be one who may read a node's files.
VOLUMES: Final = ("persistentVolumeClaim", "emptyDir", "configMap", "secret", "csi", "ephemeral")

Reader = Callable[[Any, str], Any]
"""(value, its path) → the value to keep; raises SpecError."""


def number(low: int, high: int) -> Reader:
    """Of a whole number within bounds."""

    def read(value: Any, path: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise SpecError(f"{path} must be a whole number from {low} to {high}")
        return value

    return read


def dollars(value: Any, path: str) -> float:
    """An amount of US dollars."""
    if type(value) not in (int, float) or not 0 <= value <= MOST_DOLLARS:
        raise SpecError(f"{path} must be US dollars from 0 to {MOST_DOLLARS}")
    return float(value)


def text(longest: int) -> Reader:
    """Of a text of at most so many characters."""

    def read(value: Any, path: str) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise SpecError(f"{path} must be a text of at most {longest} characters")
        return value

    return read


def flag(value: Any, path: str) -> bool:
    """A yes or no."""
    if not isinstance(value, bool):
        raise SpecError(f"{path} must be true or false")
    return value


def one_of(words: type[StrEnum]) -> Reader:
    """Of one of a few words."""

    def read(value: Any, path: str) -> StrEnum:
        if value not in list(words):
            raise SpecError(f"{path} must be one of: {', '.join(words)}")
        return words(value)

    return read


def many(most: int, item: Reader, least: int = 0) -> Reader:
    """Of a list, entry by entry."""

    def read(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            bounds = f"{least} to {most}" if least else f"at most {most}"
            raise SpecError(f"{path} must be a list of {bounds} entries")
        return tuple(item(entry, f"{path}[{n}]") for n, entry in enumerate(value))

    return read


def region_name(value: Any, path: str) -> str:
    """A region, or how the names of some begin."""
    name: str = text(63)(value, path)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise SpecError(f"{path} must be a region or how its name begins, such as eu or eu-west")
    return name


def region_or_none(value: Any, path: str) -> str:
    """A region, or nothing where it is not known."""
    return region_name(value, path) if value else ""


def slots_or_percent(value: Any, path: str) -> int | Percent:
    """A number of slots, or a text such as 25%."""
    if type(value) is int and 0 <= value <= 10_000:
        return value
    if isinstance(value, str) and re.fullmatch(r"(0|[1-9]?[0-9])%", value):
        return Percent(int(value[:-1]))
    raise SpecError(f"{path} must be a whole number from 0 to 10000, or a percentage such as 25%")


def schedule_window(value: Any, path: str) -> Window:
    """A window whose cron expression and time zone are known."""
    if not isinstance(value, dict) or not {"start", "durationSeconds", "minPods"} <= value.keys():
        raise SpecError(f"{path} needs start, durationSeconds and minPods")
    window = Window(
        start=text(128)(value["start"], f"{path}.start"),
        duration_seconds=number(60, LONGEST_WINDOW_SECONDS)(
            value["durationSeconds"], f"{path}.durationSeconds"
        ),
        min_pods=number(0, MOST_PODS)(value["minPods"], f"{path}.minPods"),
        time_zone=text(64)(value.get("timeZone", "UTC"), f"{path}.timeZone"),
    )
    if why := trouble(window):
        raise SpecError(f"{path}.{why}")
    return window


def warm_region(value: Any, path: str) -> WarmRegion:
    """The pods of one region."""
    found = entry("name")(value, path)
    bounds = {"min_pods": found.get("minPods", 1), "max_pods": found.get("maxPods", 4)}
    read = {
        name: number(0, MOST_PODS)(pods, f"{path}.{name[:3]}Pods") for name, pods in bounds.items()
    }
    region = WarmRegion(name=region_name(found["name"], f"{path}.name"), **read)
    if region.max_pods < region.min_pods:
        raise SpecError(f"{path}: maxPods is below minPods: raise maxPods or lower minPods")
    return region


def slots_or_auto(value: Any, path: str) -> int | str:
    """A number of slots, or `AUTO`."""
    if value == AUTO or (type(value) is int and 1 <= value <= 256):
        found: int | str = value
        return found
    raise SpecError(f"{path} must be a whole number from 1 to 256, or auto")


def quantities(value: Any, path: str) -> dict[str, str]:
    """Amounts of resources by their names, as Kubernetes writes them."""
    if not isinstance(value, dict):
        raise SpecError(f"{path} must name resources and amounts, such as cpu: 2")
    return {str(name): str(amount) for name, amount in value.items()}


def label_value(value: Any, path: str) -> str:
    """The value of a label, which may be empty."""
    name: str = text(63)(value, path)
    if not re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?", name):
        raise SpecError(f"{path} must be the value of a label, such as NVIDIA-L4")
    return name


def labels(value: Any, path: str) -> dict[str, str]:
    """Labels of a node."""
    if not isinstance(value, dict) or len(value) > MOST_LABELS:
        raise SpecError(f"{path} must be at most {MOST_LABELS} labels and their values")
    return {name: text(63)(each, f"{path}.{name}") for name, each in value.items()}


def entry(*required: str) -> Reader:
    """Of an object that goes into a pod as it is, with these fields at least."""

    def read(value: Any, path: str) -> Json:
        if not isinstance(value, dict) or any(value.get(name) is None for name in required):
            needs = f"needs {' and '.join(required)}" if required else "must be an object"
            raise SpecError(f"{path} {needs}")
        if len(json.dumps(value)) > MOST_ENTRY_BYTES:
            raise SpecError(f"{path} is longer than {MOST_ENTRY_BYTES} bytes of JSON")
        return value

    return read


def volume(value: Any, path: str) -> Json:
    """A volume of one of the kinds that a pod of an agent may have."""
    found: Json = entry("name")(value, path)
    if len(found.keys() & set(VOLUMES)) != 1 or len(found) != len(("name", "source")):
        raise SpecError(f"{path} needs exactly one of {', '.join(VOLUMES[:-1])} and {VOLUMES[-1]}")
    return found


def reply_rule(value: Any, path: str) -> Reply:
    """A rule whose pattern compiles and whose answer names only groups that the pattern has."""
    if not isinstance(value, dict) or not {"match", "say"} <= value.keys():
        raise SpecError(f"{path} needs match and say")
    match = text(256)(value["match"], f"{path}.match")
    say = text(1024)(value["say"], f"{path}.say")
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise SpecError(f"{path}.match is not a regular expression: {error}") from error
    groups = {str(n) for n in range(pattern.groups + 1)} | pattern.groupindex.keys() | {"heard"}
    if strange := sorted(set(re.findall(r"\{(\w+)\}", say)) - groups):
        raise SpecError(
            f"{path}.say names {{{strange[0]}}}, but match has no such group: it has {pattern.groups}"
        )
    return Reply(match=match, say=say)


def guard_rule(value: Any, path: str) -> Guard:
    """A guard that has something to say where it is to say something."""
    if not isinstance(value, dict) or not {"match", "do"} <= value.keys():
        raise SpecError(f"{path} needs match and do")
    guard = Guard(
        match=text(256)(value["match"], f"{path}.match"),
        do=one_of(GuardAction)(value["do"], f"{path}.do"),
        say=text(1024)(value.get("say", ""), f"{path}.say"),
    )
    if bool(guard.say) != (guard.do is GuardAction.SAY):
        raise SpecError(f"{path}: say goes with do: say; set both or neither")
    return guard


def jwks_document(value: Any, path: str) -> str:
    """A JWKS document. Whether its keys can be used, the gateway knows; that it holds none that are private
    is said here, for whoever writes one into a resource has told it to all who may read that.
    """
    document: str = text(8192)(value, path)
    try:
        keys = json.loads(document)["keys"]
        usable = all(isinstance(key["kty"], str) for key in keys) and bool(keys)
        private = any("d" in key or key["kty"] == "oct" for key in keys)
    except (ValueError, TypeError, KeyError, RecursionError):
        usable = private = False
    if private:
        raise SpecError(f"{path} holds a private key: remove it, and take that key out of use")
    if not usable:
        raise SpecError(f'{path} must be a JWKS document: {{"keys": [{{"kty": …}}, …]}}')
    return document
