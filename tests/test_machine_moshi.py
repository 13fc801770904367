"""An agent with the Moshi engine on a whole machine: stock clients of two protocols on the slots of one pod."""

from typing import Any

import pytest
from machine_rig import agent, running
from test_moshi_client import SoundCard, card, talking, until

from trunkline_dev.callers import Holder
from trunkline_dev.machine import Machine, MachineConfig
from trunkline_runtime.caller import Line

__all__ = ["card"]  # a fixture

# A pod's import of torch and its measurements take minutes where three such tests share two processors.
READY_SECONDS = 180
SECONDS = 300
HANDSHAKE = (
    "unknown message kind 0"  # so the client says of the byte with which its own server begins
)


@pytest.mark.timeout(SECONDS)
async def test_realtime_and_moshi_clients_side_by_side(card: SoundCard) -> None:
    warm: dict[str, Any] = {"slotsPerPod": 2, "maxPods": 1, "gpu": {"count": 0}}
    body = agent("duplex", engine={"type": "moshi", "model": "tiny"}, warm=warm)
    async with Machine(MachineConfig()) as machine, running(machine, body, READY_SECONDS) as name:
        host = machine.gateway_url().removeprefix("http://")
        line = Line(url=machine.gateway_url(), model=f"default/{name}")
        holder = await Holder(line).settled()
        assert holder.outcome.answered is not None, holder.outcome
        async with talking(f"ws://{host}/default/{name}") as printer:
            await until(lambda: card.loud() > 10, 60)
            before = holder.frames
            assert await holder.hears(before + 12), "the Realtime call goes on beside it"
            # Asked before it hangs up: then it complains of each block that its sound card still hands over.
            assert printer.complaints == [HANDSHAKE]
        await holder.hang_up()
        assert not holder.outcome.dropped
