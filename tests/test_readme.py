"""What README shows is true: its resource is accepted, its files exist, its commands are there."""

import re
from pathlib import Path

import yaml

from trunkline_dev.kube import Api, is_true
from trunkline_dev.machine import AGENTS_PATH, CRDS_PATH
from trunkline_runtime import contract

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_first_screen() -> None:
    """The two commands, the picture, and a resource of at most 25 lines."""
    commands = blocks("console")[0]
    assert "$ make demo" in commands
    assert "$ make test" in commands
    targets = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", targets, re.MULTILINE)
    assert re.search(r"^test:", targets, re.MULTILINE)
    assert len(blocks("yaml")[0].splitlines()) <= 25


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


async def test_the_resource_is_accepted(api: Api, namespace: str) -> None:
    definition = yaml.safe_load((ROOT / "crds/voiceagents.yaml").read_text())
    crd = f"{CRDS_PATH}/{definition['metadata']['name']}"
    await api.apply(crd, definition)
    await api.wait_for_one(crd, lambda crd: is_true(crd, "Established"))
    body = yaml.safe_load(blocks("yaml")[0])
    path = f"{AGENTS_PATH}/namespaces/{namespace}/{contract.PLURAL}/{body['metadata']['name']}"
    made = await api.apply(path, body)
    assert made["spec"]["burst"]["modal"]["snapshot"] == "cpu"
    await api.delete(path)
