"""The rules that an agent's settings ask for. What cannot be used is a ValueError that names it.

Patterns are their authors' own and are looked for on the engine's thread, where a costly one would hold up all
calls. Python's own matcher takes exponential time for some, cannot be stopped, and holds every thread
meanwhile. So they are RE2's: their time grows with the length of the text and the size of the pattern alone,
and both are bounded here. RE2 knows no lookaround and no backreference, and its \\w, \\d and \\b are ASCII's.
(https://github.com/google/re2/wiki/Syntax)
"""

import functools
import re
from typing import Final, cast

import re2

from trunkline_runtime.contract import GuardRule, PolicySettings, ReplyRule, Settings
from trunkline_runtime.engine.moshi.policy import (
    Action,
    Guard,
    Hangup,
    Mute,
    NoPolicy,
    Policy,
    Rules,
    Say,
)

MAX_PROGRAM: Final = 1_500  # instructions of one pattern; "stop|cancel" has about 15
MAX_PROGRAMS: Final = (
    10_000  # of all patterns of a call; each word costs at most 512 times as many steps
)
# Of one pattern, also while it is looked for. RE2 refuses to compile what needs more.
MAX_PATTERN_BYTES: Final = 2**20


def rules_of(settings: Settings) -> Policy:
    """What is scripted is said, and what is ruled is kept; the rest is Moshi's.

    Raises ValueError for a pattern that cannot be used. `fallback` is not for an engine that always has
    an answer of its own.
    """
    policy = settings.get("policy", PolicySettings())
    rules = Rules(
        greeting=settings.get("greeting", ""),
        replies=tuple(
            Guard(pattern_of(rule["match"], f"replies[{number}].match"), (Say(rule["say"]),))
            for number, rule in enumerate(settings.get("replies", list[ReplyRule]()))
        ),
        guards=tuple(
            Guard(pattern_of(rule["match"], f"policy.guards[{number}].match"), (_action(rule),))
            for number, rule in enumerate(policy.get("guards", list[GuardRule]()))
        ),
        banned=tuple(policy.get("bannedWords", ())),
        hard_barge_in=policy.get("bargeIn", False),
    )
    if rules == Rules():
        return NoPolicy()
    size = sum(program_size(guard.pattern) for guard in (*rules.replies, *rules.guards))
    if size > MAX_PROGRAMS:
        raise ValueError(
            f"the patterns of replies and policy.guards need {size} steps for each letter heard, and"
            f" {MAX_PROGRAMS} are allowed: use fewer or simpler ones"
        )
    return rules


def pattern_of(match: str, where: str) -> re.Pattern[str]:
    """The pattern, upper or lower case. Raises ValueError for one that RE2 refuses or that is too costly."""
    pattern, why_not = _compiled(match)
    if pattern is None:
        raise ValueError(f"{where} cannot be used: {why_not}")
    return pattern


# What cannot be used is kept as well: RE2 may take 0.4 s to find that out, and an agent's calls all ask.
@functools.lru_cache(maxsize=512)
def _compiled(match: str) -> tuple[re.Pattern[str] | None, str]:
    """The pattern, which threads may share; or why there is none."""
    options = re2.Options()
    options.case_sensitive = False
    options.log_errors = False
    options.max_mem = MAX_PATTERN_BYTES
    try:
        pattern = cast("re.Pattern[str]", re2.compile(match, options))
    except re2.error as error:
        why = error.args[0].decode(errors="replace") if error.args else "no reason is given"
        return None, f"{why} (these are RE2's patterns, without lookaround and backreferences)"
    if (size := program_size(pattern)) > MAX_PROGRAM:
        return None, (
            f"it needs {size} steps for each letter heard, and {MAX_PROGRAM} are allowed: repeat less in it"
        )
    return pattern, ""


def program_size(pattern: re.Pattern[str]) -> int:
    """Instructions of a pattern: the most steps that it takes for one letter."""
    return int(pattern.programsize)  # type: ignore[attr-defined]  # it is RE2's, which has no stubs


def _action(rule: GuardRule) -> Action:
    match rule["do"]:
        case "say":
            return Say(rule["say"])
        case "mute":
            return Mute()
        case "hangUp":
            return Hangup("a guard of the agent's policy")
