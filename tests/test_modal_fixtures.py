"""What others get from the local Modal: fixtures, a process to talk to, and sentences when it cannot run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import httpx
import modal
import modal.exception
import modal_rig
import pytest

from trunkline_dev.modal.gate import WrongModal, refuse_version
from trunkline_dev.modal.running import NotRunning, Running, running

pytest_plugins = ["trunkline_dev.modal.fixtures"]
TESTS: Final = Path(__file__).parent


@pytest.fixture
def local_modal_flags() -> list[str]:
    return ["--capacity", "1"]


async def test_the_fixtures_bring_a_local_modal_and_a_client(
    local_modal: Running, modal_client: modal.Client
) -> None:
    url = await modal_rig.deploy(modal_client)
    async with httpx.AsyncClient(timeout=modal_rig.PATIENCE) as http:
        answer = await http.post(url + modal_rig.START, headers=local_modal.proxy_headers)
    assert answer.status_code == 200
    assert [container["kind"] for container in local_modal.containers()] == ["cold"]
    assert [app["name"] for app in local_modal.apps()] == ["echo"]
    assert local_modal.calls()["sdk"]["served"]["AppPublish"] == 1


def test_faults_are_injected_without_a_loop(
    local_modal: Running, modal_client: modal.Client
) -> None:
    local_modal.inject({"fault": "rpc-fails", "name": "ClientHello", "status": "NOT_FOUND"})
    with pytest.raises(modal.exception.NotFoundError):
        modal_client.hello()
    assert local_modal.faults()["counts"] == [{"seen": 1, "struck": 1}]
    local_modal.inject()
    modal_client.hello()
    with pytest.raises(ValueError, match="there is no fault 'fire'"):
        local_modal.inject({"fault": "fire"})


def test_a_test_of_somebody_else_runs_with_the_plugin(tmp_path: Path) -> None:
    """Alone, without this project's configuration: blocking calls, and the SDK's own client."""
    (tmp_path / "test_voice.py").write_text(
        "import modal\n"
        "import modal_echo\n"
        'pytest_plugins = ["trunkline_dev.modal.fixtures"]\n'
        "def test_voice(local_modal):\n"
        "    image = modal.Image.debian_slim().add_local_python_source('modal_echo')\n"
        "    app = modal.App('voice', image=image, include_source=False)\n"
        "    app.server(startup_timeout=30)(modal.sessioned()(modal_echo.Plain))\n"
        "    app.deploy()\n"
        "    server = modal.Server.from_name('voice', 'Plain')\n"
        "    session = server.sessions.start()\n"
        "    server.sessions.terminate(session.token)\n"
        "    assert local_modal.containers()[0]['ready_t']\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_one_that_cannot_start_says_why() -> None:
    with pytest.raises(NotRunning, match="as in L4=2"), running(["--gpus", "many"]):
        pass


def test_another_version_of_the_sdk_is_refused_with_a_sentence() -> None:
    refuse_version("1.6.0")
    refuse_version("1.6.27")
    for version in "1.5.4", "1.7.0", "1.60.0", "2.0":
        with pytest.raises(WrongModal) as refused:
            refuse_version(version)
        assert str(refused.value) == (
            f"the local Modal speaks to modal 1.6.*, and {version} is installed: "
            "pip install 'modal==1.6.*'"
        )


def test_a_client_of_another_version_is_told(local_modal: Running) -> None:
    script = (
        "import modal_version\n"
        "modal_version.__version__ = '1.7.0'\n"
        "import modal\n"
        "modal.Client.from_credentials('ak-1', 'as-1').hello()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "the local Modal speaks to modal 1.6.*, and this is 1.7.0" in result.stderr
    assert local_modal
