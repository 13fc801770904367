"""Words that an agent may not say. Decisions only.

A word is a sequence of pieces, and its pieces are parts of harmless words, too; so only the last piece is kept
from being said, where those before it have just been said. PAD between pieces makes no difference.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from trunkline_runtime.engine.moshi.models import END_OF_PAD, PAD


class Bans:
    """The banned words of one call and what its agent has just said."""

    def __init__(self) -> None:
        self._words: set[tuple[int, ...]] = set()
        self._said: deque[int] = deque(maxlen=1)

    def __repr__(self) -> str:
        return f"<Bans {len(self._words)} words>"

    def add(self, word: Sequence[int]) -> None:
        """Bans a word, given as its pieces."""
        if word:
            self._words.add(tuple(word))
            longest = max(map(len, self._words))
            self._said = deque(self._said, maxlen=longest)

    def say(self, token: int) -> None:
        """Notes what the agent has drawn in a frame."""
        if token not in (PAD, END_OF_PAD):
            self._said.append(token)

    def next(self) -> Iterable[int]:
        """The pieces that would end a banned word now."""
        said = tuple(self._said)
        return sorted({w[-1] for w in self._words if said[len(said) - len(w) + 1 :] == w[:-1]})
