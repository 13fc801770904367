"""The operator's own copy of what it takes to stop each agent's Modal app, in a Secret of its own namespace.

An app costs money until it is stopped, and the credentials for that stand in a Secret of the agent's namespace,
which a person may delete first: alone, or with the whole namespace. So before an app is deployed its entry is
written here, and it is dropped once the app is stopped. The Secret's uid names the installation in the apps' tags.
"""

import asyncio
import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from trunkline_operator.agent.spec import Json
from trunkline_operator.burst.deployments import Account
from trunkline_operator.burst.terms import Credentials
from trunkline_operator.cluster.client import Cluster, path

# A Secret holds 1 MiB, and an entry takes about 400 bytes: room for two thousand agents with burst.
WORDS: Final = ("agent", "app", "environment", "token-id", "token-secret")

log = logging.getLogger("trunkline.custody")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One agent's app, and who may stop it."""

    agent: str  # namespace/name
    app: str
    account: Account = field(repr=False)

    @property
    def namespace(self) -> str:
        return self.agent.partition("/")[0]

    @property
    def text(self) -> str:
        credentials = self.account.credentials
        values = (
            *(self.agent, self.app, self.account.environment),
            *(credentials.token_id, credentials.token_secret),
        )
        return json.dumps(dict(zip(WORDS, values, strict=True)))

    @classmethod
    def of(cls, text: str) -> Self:
        """Raises ValueError for what is no entry."""
        try:
            found = json.loads(text)
            agent, app, environment, token_id, token_secret = (str(found[word]) for word in WORDS)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no entry: {error!r}") from error
        credentials = Credentials(token_id=token_id, token_secret=token_secret)
        account = Account(credentials=credentials, environment=environment)
        return cls(agent=agent, app=app, account=account)


class Custody:
    """Entries by the uid of their agent. `where` None: they are not written, and end with this operator."""

    def __init__(self, cluster: Cluster, where: tuple[str, str] | None) -> None:
        self._cluster = cluster
        self._where = where
        self._entries: dict[str, Entry] = {}
        self.installation = ""
        """The Secret's uid, once it is opened; "" without one."""
        self.left = asyncio.Event()
        """Set when an agent has gone and its entry has not."""

    def __repr__(self) -> str:
        return f"<Custody {self._where} entries={len(self._entries)}>"

    async def open(self) -> None:
        """Makes the Secret unless it is there, and reads what an earlier operator left."""
        if self._where is None:
            return
        namespace, name = self._where
        body: Json = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name},
            "type": "Opaque",
        }
        secret = await self._cluster.find(path("Secret", namespace, name))
        if secret is None:
            await self._cluster.create(path("Secret", namespace), body)
            secret = await self._cluster.get(path("Secret", namespace, name))
        self.installation = secret["metadata"]["uid"]
        for uid, text in (secret.get("data") or {}).items():
            try:
                self._entries[uid] = Entry.of(base64.b64decode(text).decode())
            except ValueError as error:
                log.warning("Secret %s/%s: %s: %s", namespace, name, uid, error)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """As they are now."""
        return dict(self._entries)

    def account(self, uid: str) -> Account | None:
        entry = self._entries.get(uid)
        return entry.account if entry else None

    def app(self, uid: str) -> str:
        """Its app, which may have been deployed; "" = it has no entry."""
        entry = self._entries.get(uid)
        return entry.app if entry else ""

    def gone(self, uid: str) -> None:
        """The agent is no more."""
        if uid in self._entries:
            self.left.set()

    async def keep(self, uid: str, entry: Entry) -> None:
        """Returns once it is written. Raises ApiError."""
        if self._entries.get(uid) != entry:
            await self._write(uid, entry.text)
            self._entries[uid] = entry

    async def drop(self, uid: str) -> None:
        """Its app is stopped. Raises ApiError."""
        if uid in self._entries:
            await self._write(uid, None)
            self._entries.pop(uid, None)

    async def _write(self, uid: str, text: str | None) -> None:
        if self._where is not None:
            value = None if text is None else base64.b64encode(text.encode()).decode()
            await self._cluster.patch(path("Secret", *self._where), {"data": {uid: value}})
