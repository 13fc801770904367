"""Agent → the route that gateways get. A route holds secrets: it is never logged."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from trunkline_operator.agent import spec
from trunkline_operator.agent.egress import allowed_hook
from trunkline_operator.agent.policy import allowed_burst, ladder, pinned
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.scaling.prices import Prices, Rate, container_rate, pod_rate
from trunkline_runtime.contract import (
    Access,
    BurstBudget,
    BurstRung,
    GuardRule,
    HookSettings,
    Jwt,
    PolicySettings,
    Price,
    ReplyRule,
    Route,
    Rung,
    Settings,
    TenantLimits,
    Tenants,
    UpstreamRung,
    WaitRung,
    WarmRung,
)

WSS: Final = "wss://"
WSS_PORT: Final = ":443"
UNPRICED: Final = Prices()


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Secrets of one agent, as text."""

    worker: str = field(repr=False)  # worker-key of its own Secret
    ticket: str = field(repr=False)  # ticket-key of its own Secret
    callers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """`access.apiKeysSecretRef`: name → key."""
    twilio: Mapping[str, str] = field(default_factory=dict, repr=False)
    """`access.twilio.authTokenSecretRef`: tenant → auth token of a Twilio account."""
    proxy_token: str = field(default="", repr=False)
    """ "wk-….ws-…" where the credentials Secret has one."""
    hook_token: str = field(default="", repr=False)
    """Of `engine.policy.hook`; "" where it takes none."""
    registry: tuple[str, str] = field(default=("", ""), repr=False)
    """Name and password of the registry that `burst.modal.image` is in; "" = none."""
    hub_token: str = field(default="", repr=False)
    """Of `engine.tokenSecretRef`; for containers at Modal, and in no route."""
    upstream_token: str = field(default="", repr=False)
    """Of `upstream`; "" where it takes none."""


def route(
    agent: VoiceAgent,
    keys: Keys,
    burst_urls: Mapping[str, str],
    draining: Iterable[str] = (),
    *,
    default_namespace: bool = False,
    worker_ca: str = "",
    slow_seconds: float = 0.0,
    prices: Prices = UNPRICED,
) -> Route:
    """The route of an agent; one that is being deleted has no rung, so that it takes no new call.

    `burst_urls` has those regions of burst that take calls; another has no rung. `worker_ca` is the PEM of the
    CA of workers' certificates, "" where their links are plain. `slow_seconds` is how long a container may take
    to be restored; 0 = nothing is restored.
    """
    content = Route(
        agent=agent.key,
        hash="",
        workerKey=keys.worker,
        access=_access(agent, keys),
        answerSeconds=agent.session.answer_seconds,
        maxSeconds=agent.session.max_seconds,
        admissionMs=agent.slo.admission_ms,
        settings=_settings(agent, keys),
        rungs=_rungs(agent, keys, burst_urls, prices, slow_seconds),
        draining=sorted(draining),
    )
    if agent.slo.first_audio_ms:
        content["firstAudioMs"] = agent.slo.first_audio_ms
    if agent.session.protocols:
        content["protocols"] = [each.value for each in agent.session.protocols]
    if default_namespace:
        content["defaultNamespace"] = True
    if (burst := allowed_burst(agent)) and burst.budget != spec.Budget():
        content["budget"] = _budget(burst.budget)
    if worker_ca:
        content["workerTls"] = worker_ca
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    # Gateways keep it beside keys, and anybody may see it in a log: it must not give a key away.
    content["hash"] = hashlib.sha256(text.encode()).hexdigest()[:32]
    return content


def _access(agent: VoiceAgent, keys: Keys) -> Access:
    """Gateways need only to recognise a key, so they get its digest. An empty key opens nothing."""
    named = {name: key for name, key in sorted(keys.callers.items()) if key}
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in named.items()}
    access = Access(
        public=agent.access.public,
        apiKeys={} if agent.access.public else digests,
        origins=list(agent.access.origins),
        mintKey=_mint_key(keys),
    )
    if agent.access.jwt:
        access["jwt"] = _jwt(agent.access.jwt)
    if agent.access.certificates:
        access["holders"] = list(agent.access.certificates.names)
    if agent.access.twilio:
        access["twilio"] = _twilio(agent.access.twilio, keys.twilio)
    if agent.access.tenants != spec.Tenants():
        access["tenants"] = _tenants(agent.access.tenants)
    return access


def _twilio(twilio: spec.Twilio, tokens: Mapping[str, str]) -> dict[str, list[str]]:
    """For each account the digests of what it may sign an upgrade with: the auth token stays here.

    Twilio signs the URL alone, for an upgrade has no parameters, so all its signatures are known beforehand. With
    its auth token somebody could do anything in the account; with these digests nobody can even call. Twilio's
    own libraries take a URL with and without its standard port, and so do we.
    Source: https://www.twilio.com/docs/usage/security#validating-requests
    """
    host, slash, rest = twilio.public_url.removeprefix(WSS).partition("/")
    bare = host.removesuffix(WSS_PORT)
    hosts = [host] if ":" in bare else [bare, bare + WSS_PORT]
    urls = [f"{WSS}{each}{slash}{rest}" for each in hosts]
    return {
        name: [hashlib.sha256(_signature(url, token)).hexdigest() for url in urls]
        for name, token in sorted(tokens.items())
        if token
    }


def _signature(url: str, token: str) -> bytes:
    """What Twilio puts into X-Twilio-Signature of an upgrade to a URL."""
    return base64.b64encode(hmac.digest(token.encode(), url.encode(), "sha1"))


def _mint_key(keys: Keys) -> str:
    """What gateways sign client secrets and tickets with: the same at all, and known to no worker.

    Pods have the worker key alone and Modal containers the ticket key alone; this needs both. Nothing more is
    stored, and it is renewed with them.
    """
    text = f"trunkline mint {keys.ticket}"
    return hmac.new(keys.worker.encode(), text.encode(), hashlib.sha256).hexdigest()


def _jwt(jwt: spec.Jwt) -> Jwt:
    made = Jwt(issuer=jwt.issuer, audience=jwt.audience)
    if jwt.jwks:
        made["jwks"] = jwt.jwks
    if jwt.jwks_uri:
        made["jwksUri"] = jwt.jwks_uri
    return made


def _tenants(tenants: spec.Tenants) -> Tenants:
    own = {each.tenant: _limits(tenants.of(each)) for each in tenants.overrides}
    return Tenants(claim=tenants.claim, limits=_limits(tenants.limits), overrides=own)


def _limits(limits: spec.Limits) -> TenantLimits:
    return TenantLimits(
        concurrentCalls=limits.concurrent_calls,
        startsPerMinute=limits.starts_per_minute,
        minutesPerDay=limits.minutes_per_day,
        guaranteedSlots=limits.guaranteed_slots,
        burstShare=limits.burst_share,
    )


def _settings(agent: VoiceAgent, keys: Keys) -> Settings:
    engine = agent.engine
    settings = Settings(
        greeting=engine.greeting,
        replies=[ReplyRule(match=reply.match, say=reply.say) for reply in engine.replies],
        fallback=engine.fallback,
        idleSeconds=agent.session.idle_seconds,
    )
    if agent.policy.transcripts is spec.Transcripts.NONE:
        settings["transcripts"] = False
    if engine.policy:
        settings["policy"] = _policy(engine.policy, allowed_hook(agent), keys)
    return settings


def _policy(policy: spec.CallPolicy, hook: spec.Hook | None, keys: Keys) -> PolicySettings:
    made = PolicySettings(
        bannedWords=list(policy.banned_words),
        bargeIn=policy.barge_in,
        guards=[GuardRule(match=g.match, do=g.do.value, say=g.say) for g in policy.guards],
    )
    if hook is not None:
        made["hook"] = HookSettings(
            url=hook.url,
            token=keys.hook_token,
            deadlineSeconds=hook.deadline_milliseconds / 1000,
            onFailure=hook.on_failure.value,
        )
    return made


def _budget(budget: spec.Budget) -> BurstBudget:
    made = BurstBudget()
    if budget.per_hour is not None:
        made["perHour"] = budget.per_hour
    if budget.per_day is not None:
        made["perDay"] = budget.per_day
    return made


def _price(rate: Rate, slots: int) -> Price:
    return Price(callSecond=rate.second / slots, basis=rate.basis)


def _rungs(
    agent: VoiceAgent,
    keys: Keys,
    burst_urls: Mapping[str, str],
    prices: Prices,
    slow_seconds: float,
) -> list[Rung]:
    allowed = ladder(agent)
    rungs: list[Rung] = []
    if allowed.warm:
        warm = WarmRung(kind="warm")
        if pod := pod_rate(agent.warm, agent.burst, prices):
            warm["price"] = _price(pod, agent.warm.slots_per_pod)
        rungs.append(warm)
    if burst := allowed.burst:
        for region in (region for region in burst.regions if region in burst_urls):
            rung = BurstRung(
                kind="burst",
                name=region.value,
                url=burst_urls[region],
                proxyToken=keys.proxy_token,
                ticketKey=keys.ticket,
                deadlineSeconds=burst.start_deadline_seconds,
            )
            if slow_seconds:
                rung["slowSeconds"] = slow_seconds
            place = pinned(region.value, agent.policy.residency)
            if rate := container_rate(burst, prices, place):
                rung["price"] = _price(rate, burst.slots_per_container)
            rungs.append(rung)
    # Without the token that it asks for, it would refuse every call.
    if (upstream := allowed.upstream) and (keys.upstream_token or not upstream.token_secret):
        rungs.append(
            UpstreamRung(
                kind="upstream",
                url=upstream.url,
                model=upstream.model or agent.key,
                token=keys.upstream_token if upstream.token_secret else "",
                deadlineSeconds=upstream.deadline_seconds,
            )
        )
    if allowed.waiting:
        rungs.append(WaitRung(kind="wait", most=allowed.waiting))
    return rungs
