"""What users' Secrets say: callers' keys, and an account at Modal."""

from collections.abc import Mapping
from typing import Final

from trunkline_operator.agent.spec import Burst, VoiceAgent
from trunkline_operator.burst.client import Credentials
from trunkline_operator.burst.deployments import Account

HOOK_TOKEN: Final = "token"
"""The entry of a Secret that holds the bearer for a policy hook."""


def caller_keys_missing(agent: VoiceAgent, callers: Mapping[str, str] | None) -> str:
    """What keeps callers from being recognised, as a sentence; "" = nothing."""
    name = agent.access.api_keys_secret
    if not name:
        return ""
    if callers is None:
        return f"Secret {name} of access.apiKeysSecretRef does not exist: create it in {agent.namespace}"
    if not any(callers.values()):
        return f"Secret {name} of access.apiKeysSecretRef has no keys: each entry is one key"
    return ""


def hook_secret(agent: VoiceAgent) -> str:
    """The Secret with the bearer for the policy hook; "" = none."""
    policy = agent.engine.policy
    return policy.hook.token_secret if policy and policy.hook else ""


def credentials_missing(burst: Burst, account: Mapping[str, str] | None) -> str:
    """What keeps the operator from logging in at Modal, as a sentence; "" = nothing."""
    name = burst.credentials_secret
    if account is None:
        return f"Secret {name} of burst.modal.credentialsSecretRef does not exist: create it"
    lacking = [entry for entry in ("token-id", "token-secret") if not account.get(entry)]
    if lacking:
        return f"Secret {name} of burst.modal.credentialsSecretRef lacks {' and '.join(lacking)}"
    return ""


def account_of(burst: Burst, account: Mapping[str, str]) -> Account:
    credentials = Credentials(token_id=account["token-id"], token_secret=account["token-secret"])
    return Account(credentials=credentials, environment=burst.environment)


def proxy_token(account: Mapping[str, str]) -> str:
    """Modal's proxy token as gateways present it; "" where the Secret has none."""
    token, key = account.get("proxy-token-id", ""), account.get("proxy-token-secret", "")
    return f"{token}.{key}" if token and key else ""
