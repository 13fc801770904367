"""What one call costs, wherever it was. Pure: the time is an argument.

A call whose worker is lost before its first word is placed again, so it may have been at more than one place: at warm
slots, which are paid for while the call has them, and in sessions at Modal, which the cashier reckons.
"""

from dataclasses import dataclass

from trunkline_runtime.gateway.accounts.budget import Price


@dataclass(slots=True)
class Bill:
    """One call's, in dollars. Every `now` is seconds of one clock."""

    dollars: float = 0.0
    open: tuple[str, ...] = ()  # its sessions that are not over, by their keys
    _unpriced: bool = False  # one of its places has no known price
    _rate: float = 0.0  # dollars a second, of the warm slot that it has
    _since: float = 0.0  # when it got that

    @property
    def total(self) -> float | None:
        """None where nobody knows."""
        return None if self._unpriced else self.dollars

    def placed(self, price: Price | None, now: float, *, warm: bool) -> None:
        """The call is at a place with this price of a second."""
        self._unpriced = self._unpriced or price is None
        self._rate = price.call_second if price is not None and warm else 0.0
        self._since = now

    def left(self, now: float) -> None:
        """It is there no longer."""
        self.dollars += self._rate * (now - self._since)
        self._rate = 0.0
