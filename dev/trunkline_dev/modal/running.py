"""A local Modal in a process of its own, for code that has no event loop, or another."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

import httpx

from trunkline_dev.leash import leashed

TOKEN: Final = ("ak-local", "as-local")  # an API token that it takes, as it takes any
PROXY_TOKEN: Final = ("wk-local", "ws-local")  # starts sessions
STOP_SECONDS: Final = 10.0  # for its containers to die, then SIGKILL
ANSWER_SECONDS: Final = 10.0


class NotRunning(RuntimeError):
    """It did not start. The message has what it said."""


class Running:
    """Where it is, what there is in it, and what shall go wrong."""

    def __init__(self, server_url: str, local_url: str) -> None:
        self.server_url, self.local_url = server_url, local_url

    def __repr__(self) -> str:
        return f"<Running {self.server_url}>"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which the SDK and its command line find it, and read no file of the user's."""
        return {
            "MODAL_SERVER_URL": self.server_url,
            "MODAL_TOKEN_ID": TOKEN[0],
            "MODAL_TOKEN_SECRET": TOKEN[1],
            "MODAL_CONFIG_PATH": "/dev/null",
            "MODAL_MAX_THROTTLE_WAIT": "30",
        }

    @property
    def proxy_headers(self) -> dict[str, str]:
        """Headers with which a session is started by plain HTTP."""
        return {"Modal-Key": PROXY_TOKEN[0], "Modal-Secret": PROXY_TOKEN[1]}

    def containers(self) -> list[dict[str, Any]]:
        """Every container ever started, oldest first."""
        return list(self._get("containers"))

    def apps(self) -> list[dict[str, Any]]:
        return list(self._get("apps"))

    def calls(self) -> dict[str, Any]:
        """How often the SDK and the containers made each call, and which are not implemented."""
        return dict(self._get("calls"))

    def faults(self) -> dict[str, Any]:
        """What is set, and how often each rule has seen and struck something."""
        return dict(self._get("faults"))

    def inject(self, *rules: dict[str, Any], seed: int = 0) -> None:
        """From now on these faults and no others; without rules, none. Raises ValueError for a bad one."""
        answer = httpx.put(
            f"{self.local_url}/_local/faults",
            json={"seed": seed, "rules": rules},
            timeout=ANSWER_SECONDS,
            trust_env=False,
        )
        if answer.status_code == 400:
            raise ValueError(answer.text.strip())
        answer.raise_for_status()

    def _get(self, what: str) -> Any:
        address = f"{self.local_url}/_local/{what}"
        answer = httpx.get(address, timeout=ANSWER_SECONDS, trust_env=False)
        return answer.raise_for_status().json()


@contextlib.contextmanager
def running(arguments: Sequence[str] = ()) -> Iterator[Running]:
    """Starts one with these flags; when it is left, all its processes are dead. Raises NotRunning."""
    command = [sys.executable, "-m", "trunkline_dev.modal", "--proxy-token", ":".join(PROXY_TOKEN)]
    process = subprocess.Popen(
        leashed([*command, *arguments]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reader = threading.Thread(target=_drain, args=[process], daemon=True)
    try:
        ready = _ready(process)
        reader.start()
        yield ready
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if reader.ident:
            reader.join()
        if process.stdout:
            process.stdout.close()


def _ready(process: "subprocess.Popen[str]") -> Running:
    assert process.stdout
    said = process.stdout.readline()
    try:
        return Running(**json.loads(said))
    except (ValueError, TypeError):  # a sentence, after which it ends
        try:
            process.wait(STOP_SECONDS)
            rest = process.stdout.read()  # `communicate` passes over what `readline` has taken in
        except subprocess.TimeoutExpired:
            rest = "(it did not end)"
        raise NotRunning((said + rest).strip()) from None


def _drain(process: "subprocess.Popen[str]") -> None:
    """Its log has no reader here; a full pipe would stop it. `--logs` keeps what containers print."""
    assert process.stdout
    for _ in process.stdout:
        pass
