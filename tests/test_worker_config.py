"""A worker's environment: what is read from it, and in which words it is refused."""

import pytest
from worker_rig import TICKET_KEY

from trunkline_runtime.contract import (
    ENV_AGENT,
    ENV_ENGINE,
    ENV_GATEWAYS,
    ENV_HEALTH_PORT,
    ENV_HOST,
    ENV_MAX_SECONDS,
    ENV_MODEL,
    ENV_PORT,
    ENV_SLOTS,
    ENV_TICKET_KEY,
    ENV_WORKER,
    ENV_WORKER_KEY,
)
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.worker.control import Endpoint
from trunkline_runtime.worker.host import ConfigError, WorkerConfig, make_engine

POD = {
    ENV_AGENT: "default/echo",
    ENV_WORKER: "echo-0",
    ENV_ENGINE: "loopback",
    ENV_SLOTS: "4",
    ENV_HOST: "127.0.0.9",
    ENV_PORT: "8000",
    ENV_HEALTH_PORT: "9090",
    ENV_GATEWAYS: "gateway-0.gateways:8081, 10.0.0.7:8081,[fd00::7]:8081,",
    ENV_WORKER_KEY: "key",
    ENV_MAX_SECONDS: "600",
}
MODAL = {
    ENV_AGENT: "default/echo",
    ENV_ENGINE: "loopback",
    ENV_SLOTS: "16",
    ENV_TICKET_KEY: TICKET_KEY,
}


def test_a_pod() -> None:
    config = WorkerConfig.from_environment(POD)
    assert config == WorkerConfig(
        agent="default/echo",
        worker="echo-0",
        engine="loopback",
        slots=4,
        host="127.0.0.9",
        port=8000,
        health_port=9090,
        gateways=(
            Endpoint("gateway-0.gateways", 8081),
            Endpoint("10.0.0.7", 8081),
            Endpoint("fd00::7", 8081),
        ),
        worker_key="key",
        ticket_key="",
        max_seconds=600,
    )
    assert [str(gateway) for gateway in config.gateways][-1] == "[fd00::7]:8081"


def test_a_modal_container_has_defaults_for_the_rest() -> None:
    config = WorkerConfig.from_environment(MODAL)
    assert (config.host, config.port, config.health_port) == ("0.0.0.0", 8000, 9090)
    assert (config.gateways, config.max_seconds) == ((), 1800)
    assert config.worker
    engine = make_engine(config)
    assert isinstance(engine, LoopbackEngine)
    assert engine.slots == 16


@pytest.mark.parametrize(
    ("base", "name", "value", "words"),
    [
        (POD, ENV_AGENT, "", "set TRUNKLINE_AGENT to namespace/name"),
        (POD, ENV_AGENT, "echo", "namespace/name; it is 'echo'"),
        (POD, ENV_ENGINE, "gpt", "loopback or speech or moshi; it is 'gpt'"),
        (POD, ENV_SLOTS, "", "set TRUNKLINE_SLOTS to a whole number from 1 to 256"),
        (POD, ENV_SLOTS, "0", "from 1 to 256; it is '0'"),
        (POD, ENV_SLOTS, "257", "from 1 to 256"),
        (POD, ENV_SLOTS, "auto", "only the Moshi engine measures"),
        (POD, ENV_SLOTS, "1.5", "a whole number"),
        (POD, ENV_PORT, "65536", "from 0 to 65535"),
        (POD, ENV_MAX_SECONDS, "0", "from 1 to 86400"),
        (POD, ENV_GATEWAYS, "", "set TRUNKLINE_GATEWAYS"),
        (POD, ENV_GATEWAYS, "gateway", "'gateway' is not one"),
        (POD, ENV_GATEWAYS, "a:1,b:99999", "'b:99999' is not one"),
        (POD, ENV_GATEWAYS, "fd00::7:8081", "is not one"),
        (POD, ENV_WORKER_KEY, "", "set TRUNKLINE_WORKER_KEY"),
        (POD, ENV_TICKET_KEY, TICKET_KEY, "not both"),
        (MODAL, ENV_TICKET_KEY, "short", "must have 32 characters"),
    ],
)
def test_what_is_refused(base: dict[str, str], name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        WorkerConfig.from_environment({**base, name: value})
    assert TICKET_KEY not in str(refused.value)


def test_a_moshi_worker_may_find_its_slots_itself() -> None:
    config = WorkerConfig.from_environment(
        POD | {ENV_ENGINE: "moshi", ENV_MODEL: "tiny", ENV_SLOTS: "auto"}
    )
    assert (config.slots, config.auto_slots) == (96, True)
    assert not WorkerConfig.from_environment(POD).auto_slots
