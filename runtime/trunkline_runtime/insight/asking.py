"""Asks gateways for their state."""

import asyncio
from collections.abc import Sequence
from typing import Final, cast

import httpx

from trunkline_runtime.contract import STATE_PATH, State

ANSWER_SECONDS: Final = 3.0
MOST_BYTES: Final = 16 * 2**20  # 1,000 agents with 20 pods each are 3 MiB
KEYS: Final = ("gateway", "boot", "epoch", "unready", "agents")


async def states(urls: Sequence[str]) -> dict[str, State | str]:
    """By URL of a health port, the gateway's state or a sentence that says why there is none."""
    async with httpx.AsyncClient(trust_env=False, timeout=ANSWER_SECONDS) as client:
        answers = await asyncio.gather(*(_state(client, url) for url in urls))
    return dict(zip(urls, answers, strict=True))


async def _state(client: httpx.AsyncClient, url: str) -> State | str:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            async with client.stream("GET", url.rstrip("/") + STATE_PATH) as response:
                if response.status_code != 200:
                    return f"answered {response.status_code}: is it the health port of a gateway?"
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        return "sent more than a state may have"
        found = httpx.Response(200, content=bytes(body)).json()
    except httpx.InvalidURL:
        return "is no URL: give http://HOST:PORT"
    except TimeoutError:
        return f"gave no answer within {ANSWER_SECONDS:g} s"
    except httpx.HTTPError as error:
        return f"cannot be reached: {error or type(error).__name__}"
    except ValueError:
        return "sent no JSON: is it the health port of a gateway?"
    if not isinstance(found, dict) or any(key not in found for key in KEYS):
        return "sent no state: is it older than this command?"
    return cast(State, found)
