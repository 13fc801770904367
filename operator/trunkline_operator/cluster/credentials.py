"""What users' Secrets say: callers' keys, an account at Modal, tokens of a policy hook and of the Hub."""

import re
from collections.abc import Mapping
from typing import Final

from trunkline_operator.agent.spec import Burst, VoiceAgent
from trunkline_operator.burst.deployments import Account
from trunkline_operator.burst.terms import Credentials

TOKEN: Final = "token"
"""The entry of a Secret that holds a bearer: for a policy hook, an upstream, or the Hugging Face Hub."""
# RFC 6750 section 2.1; anything else would break the header that it goes into.
_BEARER: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")


def caller_keys_missing(
    agent: VoiceAgent,
    callers: Mapping[str, str] | None,
    twilio: Mapping[str, str] | None = None,
) -> str:
    """What keeps callers from being recognised, as a sentence; "" = nothing."""
    keys = (agent.access.api_keys_secret, "access.apiKeysSecretRef", "keys", "key")
    tokens = (twilio_secret(agent), "access.twilio.authTokenSecretRef", "auth tokens", "token")
    found = []
    for (name, where, those, one), entries in ((keys, callers), (tokens, twilio)):
        if name and entries is None:
            found.append(f"Secret {name} of {where} does not exist: create it in {agent.namespace}")
        elif name and entries is not None and not any(entries.values()):
            found.append(f"Secret {name} of {where} has no {those}: each entry is one {one}")
    return "; ".join(found)


def twilio_secret(agent: VoiceAgent) -> str:
    """The Secret with the auth tokens of Twilio accounts; "" = none."""
    return agent.access.twilio.auth_token_secret if agent.access.twilio else ""


def hook_secret(agent: VoiceAgent) -> str:
    """The Secret with the bearer for the policy hook; "" = none."""
    policy = agent.engine.policy
    return policy.hook.token_secret if policy and policy.hook else ""


def hook_token_missing(agent: VoiceAgent, hook: Mapping[str, str] | None) -> str:
    """What keeps workers from presenting themselves to the policy hook, as a sentence; "" = nothing."""
    wrong = _token_wrong(hook_secret(agent), "engine.policy.hook.tokenSecretRef", hook)
    return f"{wrong}; until then the hook is asked without a bearer" if wrong else ""


def hub_token_missing(agent: VoiceAgent, hub: Mapping[str, str] | None) -> str:
    """What keeps workers from private weights, as a sentence; "" = nothing."""
    return _token_wrong(agent.engine.token_secret, "engine.tokenSecretRef", hub)


def upstream_token_missing(agent: VoiceAgent, upstream: Mapping[str, str] | None) -> str:
    """What keeps gateways from presenting themselves to the upstream, as a sentence; "" = nothing."""
    wrong = _token_wrong(upstream_secret(agent), "upstream.tokenSecretRef", upstream)
    return f"{wrong}; until then no call goes there" if wrong else ""


def token_of(entries: Mapping[str, str] | None) -> str:
    """The bearer in a Secret; "" where there is none that could be sent."""
    token = (entries or {}).get(TOKEN, "")
    return token if _BEARER.fullmatch(token) else ""


def _token_wrong(name: str, where: str, entries: Mapping[str, str] | None) -> str:
    if not name or token_of(entries):
        return ""
    if entries is None:
        return f"Secret {name} of {where} does not exist: create it with an entry {TOKEN}"
    if not entries.get(TOKEN):
        return f"Secret {name} of {where} has no text as its entry {TOKEN}"
    return f"entry {TOKEN} of Secret {name} of {where} is no bearer token: it has other characters than A-Z a-z 0-9 - . _ ~ + / ="


def upstream_secret(agent: VoiceAgent) -> str:
    """The Secret with the bearer for the upstream; "" = none."""
    return agent.upstream.token_secret if agent.upstream else ""


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


def registry_login(account: Mapping[str, str]) -> tuple[str, str]:
    """Name and password with which Modal pulls `burst.modal.image`; "" where the Secret has none."""
    return account.get("registry-username", ""), account.get("registry-password", "")
