"""Draw which room of the package imports which, for docs/architecture.md.

``python docs/draw_imports.py`` puts the drawing into the page; a test compares them.
An arrow that follows from others (a -> b -> c, and a -> c) is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "skdeepad"
START, END = "```mermaid\n", "```"


def rooms() -> Iterator[tuple[str, Path]]:
    """Give the files of the package, each with the name of its room."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imported_rooms(path: Path) -> Iterator[str]:
    """Name the rooms of the package that a file imports from, anywhere in it."""
    package = ["skdeepad", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            # "from . import room" names rooms, too
            modules = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            top, _, rest = module.partition(".")
            room = rest.partition(".")[0]
            # names that the package itself offers are of no room
            if top == "skdeepad" and room in dict(rooms()):
                yield room


def imports() -> dict[str, set[str]]:
    """Give the rooms that each room imports from."""
    found: dict[str, set[str]] = {}
    for room, path in rooms():
        found.setdefault(room, set()).update(set(imported_rooms(path)) - {room})
    return found


def reachable(room: str, found: dict[str, set[str]]) -> set[str]:
    """Give all rooms that a room stands on, directly or through others."""
    below = found.get(room, set())
    return below.union(*(reachable(other, found) for other in below))


def drawing() -> str:
    """Give the arrows between rooms, as a mermaid flowchart."""
    found = imports()
    lines = ["flowchart TD"]
    for room, below in sorted(found.items()):
        implied = set().union(*(reachable(other, found) for other in below))
        lines += [f"  {room} --> {other}" for other in sorted(below - implied)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Put the drawing into the page."""
    page = HERE / "architecture.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    page.write_text(before + START + drawing() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
