"""Image files of folders, names of files, and files that are whole; no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def list_images(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """List the image files of a folder.

    Parameters
    ----------
    folder : str or path-like
        The folder.
    recursive : bool, default=True
        Whether sub-folders are looked into, too.

    Returns
    -------
    list of Path
        Sorted, so that the order is the same on every machine: .bmp, .jpeg, .jpg,
        .png, .tif, .tiff and .webp, in lower or upper case. Hidden files and folders
        are left out. Empty where there is no image.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from skdeepad.datasets import list_images
    >>> with TemporaryDirectory() as folder:
    ...     for name in ["2.JPG", "1.png", "notes.txt", "night/3.tif"]:
    ...         path = Path(folder, name)
    ...         path.parent.mkdir(exist_ok=True)
    ...         path.touch()
    ...     [path.name for path in list_images(folder)]
    ['1.png', '2.JPG', '3.tif']
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {os.fspath(folder)!r}.")
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = shown if recursive else []
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".")
            and os.path.splitext(name)[1].lower() in SUFFIXES
            and os.path.isfile(os.path.join(parent, name))
        ]
    return sorted(found)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place once it is whole."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def printable(text: str, allowed: str = "") -> str:
    """Show what has no shape, such as a line break in a name, as an escape."""
    return "".join(
        c if c.isprintable() or c in allowed else repr(c)[1:-1] for c in text
    )
