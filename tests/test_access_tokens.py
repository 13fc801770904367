"""JWTs: which stand for somebody, and the attacks that do not. Keys are real, and so is the library."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from access_rig import (
    AUDIENCE,
    EXPECTED,
    ISSUER,
    PRIVATE,
    STRANGER,
    claims,
    jwk,
    jwks,
    token,
)
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from trunkline_runtime.gateway.access.caller import Caller, Via, Why
from trunkline_runtime.gateway.access.jwks import MAX_JWKS_BYTES, JwksError, parse_jwks
from trunkline_runtime.gateway.access.tokens import (
    LEEWAY_SECONDS,
    MAX_TOKEN_CHARS,
    UnknownKey,
    Verifier,
    verified,
)

KEYS = parse_jwks(jwks())
NOW = int(time.time())


@pytest.mark.parametrize("algorithm", list(PRIVATE))
def test_a_good_token_names_its_tenant(algorithm: str) -> None:
    until = int(time.time()) + 200
    found = verified(token(algorithm, exp=until), KEYS, EXPECTED)
    assert found == Caller(
        tenant="acme", via=Via.JWT, root=EXPECTED.root, expires=until, subject="user-1"
    )


@pytest.mark.parametrize("algorithm", list(PRIVATE))
def test_a_token_without_kid_is_for_an_issuer_with_one_key_of_its_kind(algorithm: str) -> None:
    assert isinstance(verified(token(algorithm, kid=None), KEYS, EXPECTED), Caller)
    two = parse_jwks(jwks(jwk(algorithm, "a"), jwk(algorithm, "b")))
    assert verified(token(algorithm, kid=None), two, EXPECTED) == UnknownKey()


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({"aud": ["other", AUDIENCE]}, {}),
        ({}, {"exp": -LEEWAY_SECONDS + 10}),
        ({}, {"nbf": LEEWAY_SECONDS - 10}),
        ({}, {"iat": LEEWAY_SECONDS - 10}),
        ({"iat": None, "sub": None}, {}),
    ],
)
def test_what_a_good_token_may_say(changes: dict[str, Any], times: dict[str, int]) -> None:
    """`times` are seconds from now."""
    now = int(time.time())
    claims = changes | {name: now + seconds for name, seconds in times.items()}
    assert isinstance(verified(token(**claims), KEYS, EXPECTED), Caller)


def part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def forged(header: dict[str, Any], signature: bytes = b"", **changes: Any) -> str:
    return f"{part(header)}.{part(claims(**changes))}.{part(signature)}"


def signed_with_the_public_key(algorithm: str, encoded: bytes) -> str:
    """The classic: an HMAC whose secret is the public key, which everybody knows."""
    text = f"{part({'alg': algorithm, 'kid': 'RS256'})}.{part(claims())}"
    return f"{text}.{part(hmac.new(encoded, text.encode(), hashlib.sha256).digest())}"


PEM = PRIVATE["RS256"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
DER = PRIVATE["RS256"].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
GOOD = token()
OWN_KEY = {"jwk": jwk(key=STRANGER), "jku": "http://evil.example/keys"}

ATTACKS: dict[str, tuple[str, Why | UnknownKey]] = {
    "none": (forged({"alg": "none", "kid": "RS256"}), Why.ALGORITHM),
    "None": (forged({"alg": "None", "kid": "RS256"}), Why.ALGORITHM),
    "none without a key's name": (forged({"alg": "none"}), Why.ALGORITHM),
    "no algorithm": (forged({"kid": "RS256"}), Why.ALGORITHM),
    "algorithm is a list": (forged({"alg": ["RS256"], "kid": "RS256"}), Why.ALGORITHM),
    "HMAC with the public PEM": (signed_with_the_public_key("HS256", PEM), Why.ALGORITHM),
    "HMAC with the public DER": (signed_with_the_public_key("HS256", DER), Why.ALGORITHM),
    "HMAC that says RS256": (signed_with_the_public_key("RS256", PEM), Why.SIGNATURE),
    "RS512 with the right key": (
        jwt.encode(claims(), PRIVATE["RS256"], "RS512", {"kid": "RS256"}),
        Why.ALGORITHM,
    ),
    "PS256 with the right key": (
        jwt.encode(claims(), PRIVATE["RS256"], "PS256", {"kid": "RS256"}),
        Why.ALGORITHM,
    ),
    "ES256 for an RSA key": (token("ES256", kid="RS256"), Why.ALGORITHM),
    "RS256 for an EC key": (token("RS256", kid="ES256"), Why.ALGORITHM),
    "signed by a stranger": (token(key=STRANGER), Why.SIGNATURE),
    "brings its own key": (token(key=STRANGER, headers=OWN_KEY), Why.SIGNATURE),
    "unknown key": (token(kid="new"), UnknownKey()),
    "kid is a path": (token(kid="../../dev/null"), UnknownKey()),
    "kid is a number": (forged({"alg": "RS256", "kid": 7}), Why.MALFORMED),
    "kid is an object": (forged({"alg": "RS256", "kid": {}}), Why.MALFORMED),
    "no signature": (GOOD.rpartition(".")[0] + ".", Why.SIGNATURE),
    "claims exchanged": (
        ".".join((GOOD.split(".")[0], part(claims(org="other")), GOOD.split(".")[2])),
        Why.SIGNATURE,
    ),
    "expired": (token(exp=NOW - LEEWAY_SECONDS - 10), Why.EXPIRED),
    "not yet": (token(nbf=NOW + 86_400), Why.NOT_YET),
    "made in the future": (token(iat=NOW + 86_400), Why.NOT_YET),
    "no expiry": (token(exp=None), Why.CLAIMS),
    "expiry is a text": (token(exp="soon"), Why.MALFORMED),
    "expiry is infinite": (token(exp=float("inf")), Why.MALFORMED),
    "wrong audience": (token(aud="other"), Why.AUDIENCE),
    "audience is a beginning": (token(aud=AUDIENCE[:3]), Why.AUDIENCE),
    "no audience": (token(aud=None), Why.CLAIMS),
    "wrong issuer": (token(iss="https://evil.example"), Why.ISSUER),
    "issuer with a slash more": (token(iss=ISSUER + "/"), Why.ISSUER),
    "no issuer": (token(iss=None), Why.CLAIMS),
    "no tenant": (token(org=None), Why.CLAIMS),
    "empty tenant": (token(org=""), Why.CLAIMS),
    "tenant is a list": (token(org=["acme"]), Why.CLAIMS),
    "tenant too long": (token(org="x" * 129), Why.CLAIMS),
    "tenant breaks a line": (token(org="acme\nlevel: ERROR"), Why.CLAIMS),
    "critical header": (
        token(headers={"crit": ["exp"], "exp": 1}),
        Why.MALFORMED,
    ),
    "too long": (GOOD + "x" * MAX_TOKEN_CHARS, Why.TOO_LONG),
    "encrypted": ("eyJhbGciOiJSU0EtT0FFUCJ9.a.b.c.d", Why.MALFORMED),
    "two parts": ("eyJhbGciOiJSUzI1NiJ9.e30", Why.MALFORMED),
    "no base64": ("eyJ\xff.\xff.\xff", Why.MALFORMED),
    "header is a list": (f"{part([])}.{part({})}.", Why.MALFORMED),
    "deep header": (f"{part(b'[' * 5000)}.{part({})}.", Why.MALFORMED),
    "nothing": ("", Why.MALFORMED),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_open_nothing(attack: str) -> None:
    forgery, why = ATTACKS[attack]
    assert verified(forgery, KEYS, EXPECTED) == why


@given(st.integers(0, len(GOOD) - 1), st.characters(codec="latin-1"))
def test_no_character_of_a_token_may_be_another(place: int, other: str) -> None:
    changed = GOOD[:place] + other + GOOD[place + 1 :]
    if isinstance(verified(changed, KEYS, EXPECTED), Caller):
        # The last character of a part holds bits that Base64 drops.
        assert [decoded(each) for each in changed.split(".")] == [
            decoded(each) for each in GOOD.split(".")
        ]


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "==")


@given(st.text(st.characters(codec="latin-1"), max_size=200))
def test_nonsense_is_refused_in_words(nonsense: str) -> None:
    assert not isinstance(verified(nonsense, KEYS, EXPECTED), Caller)
    assert not isinstance(verified(f"eyJ{nonsense}.{nonsense}.", KEYS, EXPECTED), Caller)


# --- what is remembered ---------------------------------------------------------------------------------


def test_a_good_token_is_remembered_until_it_expires_or_the_keys_change() -> None:
    verifier, now = Verifier(EXPECTED), int(time.time())
    good = token(exp=now + 100)
    first = verifier.check(good, KEYS, now)
    assert isinstance(first, Caller)
    assert verifier.check(good, KEYS, now + 99) is first
    again = verifier.check(good, KEYS, now + 100)
    assert again == first  # within the leeway
    assert again is not first, "it was looked at anew"
    without = parse_jwks(jwks(jwk("ES256")))
    assert verifier.check(good, without, now) == UnknownKey()


def test_what_is_remembered_is_bounded_and_holds_no_token() -> None:
    verifier = Verifier(EXPECTED, remembered=2)
    tokens = [token("ES256", sub=f"user-{number}") for number in range(3)]
    found = [verifier.check(each, KEYS, NOW) for each in tokens[:2]]
    assert verifier.check(tokens[0], KEYS, NOW) is found[0]
    verifier.check(tokens[2], KEYS, NOW)
    assert len(verifier._good) == 2
    assert verifier.check(tokens[0], KEYS, NOW) is found[0], "the one used last stays"
    assert not any(each in repr(verifier._good) for each in tokens)


def test_a_bad_token_is_not_remembered() -> None:
    verifier = Verifier(EXPECTED)
    assert verifier.check(token(aud="other"), KEYS, NOW) == Why.AUDIENCE
    assert not verifier._good


# --- sets of keys ---------------------------------------------------------------------------------------


def test_only_strong_public_signing_keys_are_taken() -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    private = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(PRIVATE["RS256"]))
    others = [
        jwk(key=weak, kid="weak"),
        jwk(kid="encrypts", use="enc"),
        jwk(kid="other", alg="RS512"),
        {**private, "kid": "private"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric", "alg": "HS256"},
        {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA", "kid": "curve"},
        {"kty": "OKP", "crv": "Ed448", "x": "AA", "kid": "448"},
        {"kty": "RSA", "kid": "empty"},
        {"kty": "RSA", "n": 3, "e": [], "kid": "types"},
        {"kty": ["RSA"]},
        "text",
        jwk(kid="good"),
    ]
    found = parse_jwks(jwks(*others))
    assert list(found.keys) == [("good", "RS256")]
    assert found.skipped == len(others) - 1


def test_one_kid_may_stand_for_keys_of_several_kinds_but_the_first_of_a_kind_counts() -> None:
    found = parse_jwks(jwks(jwk("RS256", "k"), jwk("ES256", "k"), jwk("RS256", "k", STRANGER)))
    assert isinstance(verified(token("RS256", kid="k"), found, EXPECTED), Caller)
    assert isinstance(verified(token("ES256", kid="k"), found, EXPECTED), Caller)
    assert verified(token(kid="k", key=STRANGER), found, EXPECTED) == Why.SIGNATURE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        (b"\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no list `keys`"),
        ('{"keys": {}}', "no list `keys`"),
        ('{"keys": [' + ",".join(["{}"] * 101) + "]}", "no list `keys`"),
        ('{"keys": []}', "no public key"),
        (" " * (MAX_JWKS_BYTES + 1), "longer than"),
    ],
)
def test_what_is_no_set_of_keys_is_told_of(text: str | bytes, said: str) -> None:
    with pytest.raises(JwksError, match=said):
        parse_jwks(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["kty", "crv", "kid", "alg", "use", "n", "e", "x", "y", "d"]), inner
            )
        ),
    )
)
def test_any_json_in_a_set_is_skipped(value: Any) -> None:
    found = parse_jwks(json.dumps({"keys": [value, jwk()]}))
    assert ("RS256", "RS256") in found.keys
