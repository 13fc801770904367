"""The table of values in the chart's README, from values.yaml and its comments.

    python tests/chart_readme.py

writes it anew; a test fails when it is stale.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).parents[1] / "charts/trunkline"
BEGIN, END = "<!-- values -->\n", "<!-- /values -->"


def values(text: str) -> Iterator[tuple[str, str, object]]:
    """(path, comment, default) of each value. A block mapping is a section; all else is a value."""
    lines = text.splitlines()

    def walk(section: yaml.MappingNode, above: str) -> Iterator[tuple[str, str, object]]:
        for key, value in section.value:
            path = f"{above}{key.value}"
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                yield from walk(value, f"{path}.")
            else:
                default = yaml.safe_load(text[value.start_mark.index : value.end_mark.index])
                yield path, comment(lines, key.start_mark.line), default

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    yield from walk(root, "")


def comment(lines: list[str], number: int) -> str:
    """The comment lines right above this line, as one."""
    found: list[str] = []
    while number > 0 and lines[number - 1].lstrip().startswith("#"):
        number -= 1
        found.insert(0, lines[number].lstrip().removeprefix("#").strip())
    return " ".join(found)


def table(text: str) -> str:
    rows = ["| value | default | |", "|---|---|---|"]
    for path, told, default in values(text):
        shown = json.dumps(default).replace("|", "\\|")
        escaped = re.sub(r"(?<!\\)\|", r"\\|", told)
        rows.append(f"| `{path}` | `{shown}` | {escaped} |")
    return "\n".join(rows) + "\n"


def written(readme: str, text: str) -> str:
    """The README with the table of these values."""
    head, _, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"README.md must hold {BEGIN.strip()} and {END}"
    return head + BEGIN + table(text) + END + tail


def main() -> None:
    readme = CHART / "README.md"
    readme.write_text(written(readme.read_text(), (CHART / "values.yaml").read_text()))


if __name__ == "__main__":
    main()
