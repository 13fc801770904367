"""Calls through a real worker: from the ticket to the close."""

import base64

from worker_rig import FRAME, FakeGateway, append, next_message, worker


async def test_a_caller_with_a_ticket_hears_the_echo() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = await gateway.reserve("call-1")
        assert ticket is not None
        async with running.dial(ticket) as caller:
            await next_message(caller, "session.created")
            await caller.send(append())
            audio = await next_message(caller, "response.output_audio.delta")
            assert base64.b64decode(audio["delta"]) == FRAME
            assert gateway.free == {"type": "free", "n": 1, "busy": 1, "draining": False}
        await gateway.until(lambda: gateway.free["busy"] == 0)
