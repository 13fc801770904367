"""How the demo tells what it does: a line a step with the time, promises as they are checked, a table at the end."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.table import Table

INDENT: Final = " " * 9  # under the text of a step


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that must hold, what was found, and whether it held."""

    text: str
    found: str
    kept: bool


class Story:
    """Writes to a console; a spinner where it is a terminal, plain lines where it is not."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.promises: list[Promise] = []
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def line(self, text: str, style: str = "") -> None:
        self.console.print(
            f"[dim]{self.elapsed:6.1f} s[/] {text}", style=style or None, soft_wrap=True
        )

    def note(self, text: str) -> None:
        """Output of another program, or a detail, indented under the step."""
        for row in text.rstrip().splitlines():
            self.console.print(f"{INDENT}{row}", style="dim", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A step that takes a while."""
        self.line(f"[bold]{text}[/]")
        began = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            yield
        self.line(f"  done in {time.monotonic() - began:.1f} s", "dim")

    def promise(self, text: str, found: object, kept: bool) -> bool:
        """Records and shows one promise."""
        self.promises.append(Promise(text, str(found), kept))
        self.line(f"  {'[green]kept[/]  ' if kept else '[red]BROKEN[/]'} {text}: {found}")
        return kept

    @property
    def kept(self) -> bool:
        """Whether there were promises, and all held."""
        return bool(self.promises) and all(promise.kept for promise in self.promises)

    def table(self) -> None:
        table = Table(title="Promises", title_justify="left", show_edge=False, pad_edge=False)
        for heading in ("promise", "found", ""):
            table.add_column(heading)
        for promise in self.promises:
            verdict = "[green]kept[/]" if promise.kept else "[red]BROKEN[/]"
            table.add_row(promise.text, promise.found, verdict)
        self.console.print(table)
