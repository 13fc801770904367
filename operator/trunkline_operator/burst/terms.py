"""What is said of Modal: places, outcomes and failures. Without the SDK, which takes 19 MB and half a second."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class BurstReason(StrEnum):
    """Why something at Modal failed; the reasons of the BurstReady condition."""

    CREDENTIALS_REFUSED = "CredentialsRefused"
    MODAL_UNREACHABLE = "ModalUnreachable"
    LIMIT_REACHED = "LimitReached"
    REFUSED = "RefusedByModal"
    IMAGE_BUILD_FAILED = "ImageBuildFailed"
    DEPLOY_FAILED = "DeployFailed"
    WARM_UP_FAILED = "WarmUpFailed"
    STOP_FAILED = "StopFailed"
    STATS_FAILED = "StatsFailed"
    SCALING_FAILED = "ScalingFailed"
    SEARCH_FAILED = "SearchFailed"
    BILL_FAILED = "BillFailed"


class BurstError(Exception):
    """Something at Modal failed. The message is a sentence for people, and holds no token."""

    def __init__(self, reason: BurstReason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """An API token of a Modal workspace."""

    token_id: str
    token_secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An app of a workspace, and who may work on it."""

    app: str
    environment: str  # "" is the workspace's default
    credentials: Credentials = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    app_id: str
    urls: Mapping[str, str]  # region → where sessions are started


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An app that is deployed, whoever did so."""

    name: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """Containers that came up, and those that ended in an error, while starting or later."""

    good: int
    bad: int
    there: Mapping[str, int] = field(default_factory=dict)
    """By region, those that were there at any moment, those that were starting included."""

    @property
    def alive(self) -> int:
        """Of all regions."""
        return sum(self.there.values())
