"""What a gateway is made with: who it is, and on what terms it deals with callers, workers, Modal and the ledger."""

from dataclasses import dataclass, field

from trunkline_runtime.gateway.access.doorstep import Bounds
from trunkline_runtime.gateway.access.issuers import Pulse
from trunkline_runtime.gateway.access.pace import MOST_TIMES_REAL
from trunkline_runtime.gateway.access.proxies import Proxies
from trunkline_runtime.gateway.accounts.books import Keep
from trunkline_runtime.gateway.accounts.files import to_log
from trunkline_runtime.gateway.breaker import Terms as Breaking
from trunkline_runtime.gateway.ladder import Patience


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which gateway this is."""

    name: str
    default_namespace: str
    operator_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On what terms a gateway deals with others; the defaults are for a cluster."""

    patience: Patience = field(default_factory=Patience)
    breaker: Breaking = field(default_factory=Breaking)
    bounds: Bounds = field(default_factory=Bounds)
    proxies: Proxies = field(default_factory=Proxies)
    pulse: Pulse = field(default_factory=Pulse)
    audio_times_real: float = MOST_TIMES_REAL
    descriptors: int = 1024  # that the process may have open
    keep: Keep = to_log  # takes the ledger's records
