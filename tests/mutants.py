"""Heads of HTTP messages that are almost right, for readers that are held against `websockets`."""

import random
from collections.abc import Iterator, Sequence
from typing import Final

TAILS: Final = [b",", b", x", b" x", b"\t", b";", b"=", b"\r", b"\n"]


def mutants(draw: random.Random, good: bytes, others: Sequence[bytes]) -> Iterator[bytes]:
    """Twenty heads with a line of it changed, doubled, cut out or broken, or with one of the others put in."""
    whole = good.removesuffix(b"\r\n\r\n").split(b"\r\n")
    for _ in range(20):
        lines = list(whole)
        at = draw.randrange(len(lines))
        match draw.randrange(7):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[at])
            case 2:
                line = bytearray(lines[at])
                line[draw.randrange(len(line))] = draw.randrange(256)
                lines[at] = bytes(line)
            case 3:
                lines[at] = lines[at].swapcase()
            case 4:
                name, _, value = lines[at].partition(b":")
                lines[at] = name + b":  " + value + b"\t "
            case 5:
                lines[at] += draw.choice(TAILS)
            case 6:
                lines.insert(at, draw.choice(others))
        yield b"\r\n".join(lines) + b"\r\n\r\n"
