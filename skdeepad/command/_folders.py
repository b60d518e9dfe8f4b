"""Folders that commands read, and files that they write; torch is not needed."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import click

from ..runtime._files import SUFFIXES, list_images, printable


def listed(folder: Path, part: str) -> list[Path]:
    """List the images of a folder; of one laid out as MVTec AD, those of a part.

    Parameters
    ----------
    folder : Path
        The folder; sub-folders are looked into, too.
    part : {"train", "test", "bad"}
        In the layout of MVTec AD: train/good, all of test, or test without test/good.
        Of other folders, "bad" is nothing.
    """
    good, test = folder / "train" / "good", folder / "test"
    if not (good.is_dir() and test.is_dir()):
        return [] if part == "bad" else _some(folder)
    if part == "train":
        click.echo(f"{_name(folder)} has the layout of MVTec AD: train/good.", err=True)
        return _some(good)
    found = _some(test)
    return found if part == "test" else [p for p in found if kind(p, folder) != "good"]


def kind(path: Path, folder: Path) -> str:
    """Name the folder of test in which an image is."""
    return path.relative_to(folder / "test").parts[0]


def _some(folder: Path) -> list[Path]:
    found = list_images(folder)
    if not found:
        raise click.ClickException(
            f"There is no image in {_name(folder)}. Images are files that end in "
            f"{', '.join(sorted(SUFFIXES))}."
        )
    return found


def _name(path: Path) -> str:
    return f"'{printable(str(path))}'"


def check_target(path: Path, force: bool) -> None:
    """Refuse what is there already, and a place where nothing can be written."""
    if path.exists() and not force:
        raise click.UsageError(
            f"{_name(path)} is there already. Choose another name, or pass --force."
        )
    if path.is_dir():
        raise click.UsageError(f"{_name(path)} is a folder; name a file.")
    _check_folder(path.parent)


def check_target_folder(folder: Path, force: bool) -> None:
    """Refuse a folder that holds something, unless it may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"{_name(folder)} is a file; name a folder.")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise click.UsageError(
            f"{_name(folder)} is not empty. Choose another folder, or pass --force: "
            "files of the same names are replaced, others stay."
        )
    _check_folder(folder.parent)


def _check_folder(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.UsageError(
            f"Nothing can be written to {_name(folder)}: {error.strerror}."
        ) from error


def map_names(paths: list[Path], folder: Path) -> list[Path]:
    """Name the map of each image: as the image, in the same sub-folder."""
    inside = [path.relative_to(folder) for path in paths]
    names = [path.with_suffix(".png") for path in inside]
    times = Counter(names)
    return [
        name if times[name] == 1 else path.with_name(f"{path.name}.png")
        for name, path in zip(names, inside, strict=True)
    ]
