"""The issuers' keys, fetched in the background and kept at hand, so that a call seldom waits for them.

Keys that were read stay in use while the issuer cannot be reached, for a day at most: who can cut a gateway off
must not be able to keep a key alive that was taken back. A token that names an unknown key has them fetched anew, at
most once in `REFETCH_SECONDS` an issuer, whoever asks how often.
"""

import asyncio
import logging
import random
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import httpx

from trunkline_runtime.gateway.access.jwks import MAX_JWKS_BYTES, JwksError, KeySet, parse_jwks

log = logging.getLogger("trunkline.access")

REFRESH_SECONDS: Final = 300.0  # issuers announce a key hours before they use it
RETRY_SECONDS: Final = (1.0, 60.0)
REFETCH_SECONDS: Final = 30.0
FIRST_SECONDS: Final = 1.0  # between two fetches for callers' sake while there are no keys at all
TRUST_SECONDS: Final = 86_400.0
FETCH_SECONDS: Final = 5.0  # a caller may wait for so long, within its answerSeconds
MAX_CONNECTIONS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """How often keys are fetched, in seconds."""

    refresh: float = REFRESH_SECONDS
    retry: tuple[float, float] = RETRY_SECONDS
    refetch: float = REFETCH_SECONDS
    first: float = FIRST_SECONDS
    trust: float = TRUST_SECONDS
    fetch: float = FETCH_SECONDS


class _Issuer:
    """One address of keys."""

    def __init__(self) -> None:
        self.keys: KeySet | None = None
        self.read_at = 0.0  # by the loop's clock, as the next
        self.asked_at = float("-inf")  # for a token's sake
        self.delay = 0.0  # until the next try after a failure
        self.fetching: asyncio.Task[None] | None = None
        self.keeping: asyncio.Task[None] | None = None

    def fetched(self, keys: KeySet, now: float) -> None:
        if self.keys is None or keys.keys.keys() != self.keys.keys.keys() or keys != self.keys:
            self.keys = keys  # else the same object: what was verified with it stays remembered
        self.read_at, self.delay = now, 0.0


class Issuers:
    """The keys of every issuer that the routes name."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._issuers: dict[str, _Issuer] = {}
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        known = sum(issuer.keys is not None for issuer in self._issuers.values())
        return f"<Issuers {known} of {len(self._issuers)}>"

    def follow(self, uris: Iterable[str]) -> None:
        """Keeps the keys of these addresses from now on, and of no others."""
        wanted = set(uris)
        for uri in self._issuers.keys() - wanted:
            for task in _tasks(self._issuers.pop(uri)):
                task.cancel()
        for uri in wanted - self._issuers.keys():
            issuer = self._issuers[uri] = _Issuer()
            issuer.keeping = asyncio.get_running_loop().create_task(self._keep(uri, issuer))

    def keys(self, uri: str) -> KeySet | None:
        """The keys that tokens are checked with; None where there are none that can be trusted."""
        issuer = self._issuers.get(uri)
        if issuer is None or issuer.keys is None or self._age(issuer) > self._pulse.trust:
            return None
        return issuer.keys

    def age(self, uri: str) -> float | None:
        """Seconds since the keys were read; None if they never were."""
        issuer = self._issuers.get(uri)
        return None if issuer is None or issuer.keys is None else self._age(issuer)

    async def look_again(self, uri: str) -> None:
        """Waits for fresh keys, unless they were asked for a moment ago."""
        issuer = self._issuers.get(uri)
        if issuer is None:
            return
        now = asyncio.get_running_loop().time()
        pause = self._pulse.first if self.keys(uri) is None else self._pulse.refetch
        if issuer.fetching is None and now - issuer.asked_at >= pause:
            issuer.asked_at = now
            self._begin(uri, issuer)
        if issuer.fetching is not None:
            await asyncio.wait([issuer.fetching], timeout=self._pulse.fetch)

    async def close(self) -> None:
        """Stops fetching."""
        tasks = [task for issuer in self._issuers.values() for task in _tasks(issuer)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._issuers.clear()
        if self._client is not None:
            await self._client.aclose()

    def _age(self, issuer: _Issuer) -> float:
        return asyncio.get_running_loop().time() - issuer.read_at

    async def _keep(self, uri: str, issuer: _Issuer) -> None:
        while True:
            await asyncio.wait([self._begin(uri, issuer)])
            # Spread, so that gateways do not ask as one.
            await asyncio.sleep((issuer.delay or self._pulse.refresh) * random.uniform(0.8, 1.2))

    def _begin(self, uri: str, issuer: _Issuer) -> asyncio.Task[None]:
        """One fetch at a time, whoever waits for it."""
        if issuer.fetching is None:
            issuer.fetching = asyncio.get_running_loop().create_task(self._fetch(uri, issuer))
        return issuer.fetching

    async def _fetch(self, uri: str, issuer: _Issuer) -> None:
        try:
            async with asyncio.timeout(self._pulse.fetch):
                text = await self._read(uri)
            issuer.fetched(parse_jwks(text), asyncio.get_running_loop().time())
        except (httpx.HTTPError, httpx.InvalidURL, JwksError, TimeoutError) as error:
            least, most = self._pulse.retry
            if not issuer.delay:  # told of once, until it works again
                why = str(error) or type(error).__name__
                log.warning("an issuer's keys cannot be read", extra={"jwks": uri, "why": why})
            issuer.delay = min(most, issuer.delay * 2 or least)
        finally:
            issuer.fetching = None

    async def _read(self, uri: str) -> bytes:
        """The document. Redirects are not followed: keys come from the address that was given."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                verify=ssl.create_default_context(),
                trust_env=False,
                limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
                timeout=self._pulse.fetch,
            )
        async with self._client.stream("GET", uri, headers={"Accept": "*/*"}) as response:
            if response.status_code != 200:
                raise JwksError(f"it answers HTTP {response.status_code}")
            text = b""
            async for chunk in response.aiter_bytes():
                text += chunk
                if len(text) > MAX_JWKS_BYTES:
                    raise JwksError(f"it is longer than {MAX_JWKS_BYTES} bytes")
        return text


def _tasks(issuer: _Issuer) -> list[asyncio.Task[None]]:
    return [task for task in (issuer.keeping, issuer.fetching) if task is not None]
