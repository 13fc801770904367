"""The traps of this repository's layout, each of which once bit."""

import json
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import yaml

import trunkline_runtime
from trunkline_runtime import contract

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_import_roots_are_not_packages() -> None:
    """An operator/__init__.py would hide the standard library's operator from python started here."""
    for folder in ("operator", "runtime", "dev", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    assert run(sys.executable, "-c", "import operator; operator.add").returncode == 0


def test_one_version() -> None:
    assert version("trunkline") == trunkline_runtime.__version__
    chart = yaml.safe_load((ROOT / "charts/trunkline/Chart.yaml").read_text())
    assert chart["appVersion"] == trunkline_runtime.__version__


def test_one_crd_text() -> None:
    link = ROOT / "charts/trunkline/files/crds"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "crds"
    crd = yaml.safe_load((ROOT / "crds/voiceagents.yaml").read_text())
    names = crd["spec"]["names"]
    assert (crd["spec"]["group"], names["plural"], names["kind"]) == (
        contract.GROUP,
        contract.PLURAL,
        contract.KIND,
    )


def test_gateway_needs_a_handful_of_packages() -> None:
    plain = [text for text in requires("trunkline") or [] if "extra ==" not in text]
    assert len(plain) <= 8, plain


def test_gateway_imports_no_engine_kubernetes_or_modal() -> None:
    script = (
        "import sys, trunkline_runtime.gateway.process; "
        "heavy = {'torch', 'modal', 'kopf', 'kubernetes', 'numpy', 'ctranslate2'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    found = run(sys.executable, "-c", script)
    assert found.returncode == 0, found.stderr


def test_worker_on_loopback_imports_no_model_library() -> None:
    script = (
        "import sys, trunkline_runtime.worker.host; "
        "heavy = {'torch', 'modal', 'kopf', 'kubernetes', 'ctranslate2', 'onnxruntime'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    found = run(sys.executable, "-c", script)
    assert found.returncode == 0, found.stderr


def test_moshi_models_import_beside_a_newer_aiohttp() -> None:
    """The override in pyproject.toml is sound as long as moshi's models need no aiohttp of their own."""
    script = (
        "import json, aiohttp, kopf, moshi.models, torch; "
        "print(json.dumps([aiohttp.__version__, torch.__version__, moshi.models.LMGen.__name__]))"
    )
    found = run(sys.executable, "-W", "ignore", "-c", script)
    assert found.returncode == 0, found.stderr
    newer, torch, model = json.loads(found.stdout.splitlines()[-1])
    assert tuple(map(int, newer.split(".")[:2])) >= (3, 14)
    assert torch.startswith("2.9.1")
    assert model == "LMGen"


def test_pins_name_no_host() -> None:
    for pins in (ROOT / "requirements").glob("*.txt"):
        assert "://" not in pins.read_text(), pins.name
    assert not list(ROOT.glob("*.lock"))


def test_help_of_every_command() -> None:
    trunkline = str(Path(sys.executable).with_name("trunkline"))
    for command in ([], ["gateway"], ["worker"], ["call"], ["probe"], ["dev"], ["demo"]):
        shown = run(trunkline, *command, "--help")
        assert shown.returncode == 0, shown.stderr
        assert "Usage" in shown.stdout
        assert not command or "Example" in shown.stdout, command
