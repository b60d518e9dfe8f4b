"""Features on disk, by the content of their samples, shared by processes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .inputs import chunks

READ = 512  # rows that are read at a time


class FeatureCache:
    """A table of features in a folder, one row per sample and pass.

    A sample is known by its content, so that any subset in any order finds its
    rows: each fold of a cross-validation, the training and the test side alike.

    Parameters
    ----------
    folder : str or path-like
        Where the table lies; made where there is none.
    key : str
        Names the pass of the backbone that makes the features.
    dtype, shape : dtype and tuple of int, default=float32, (-1,)
        Of one sample's features.

    Raises
    ------
    ValueError
        If the folder holds a file of that name that is no such table.
    """

    def __init__(
        self,
        folder: str | Path,
        key: str,
        dtype: Any = np.float32,
        shape: tuple[int, ...] = (-1,),
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.file = Path(folder) / "skdeepad-features.sqlite"
        self.key = key
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._connect()) as table, table:
                table.execute(
                    "CREATE TABLE IF NOT EXISTS features (pass TEXT, sample BLOB, "
                    "value BLOB, PRIMARY KEY (pass, sample))"
                )
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"memory={str(folder)!r}: {self.file.name} in it cannot be used "
                f"({error}). Remove that file, or choose another folder."
            ) from error

    def _connect(self) -> sqlite3.Connection:
        table = sqlite3.connect(self.file, timeout=60)
        # a cache may be lost with the machine; waiting for the disk is not worth it
        table.execute("PRAGMA synchronous = OFF")
        return table

    def missing(
        self, digests: Sequence[bytes], batch_size: int
    ) -> Iterator[NDArray[np.intp]]:
        """Name the samples that are not in the table, batch by batch.

        Processes that fill the table at the same time share the work without
        waiting: each takes the batches in a random order of its own, and looks
        again before each what others have put in since.
        """
        first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
        unknown = self._unknown(list(first.values()), digests)
        batches = list(chunks(unknown, batch_size))
        for k in np.random.default_rng().permutation(len(batches)):
            index = self._unknown(batches[k].tolist(), digests)
            if len(index):
                yield index

    def _unknown(self, index: list[int], digests: Sequence[bytes]) -> NDArray[np.intp]:
        found: set[bytes] = set()
        for part in range(0, len(index), READ):
            wanted = [digests[i] for i in index[part : part + READ]]
            found.update(self._select("sample", wanted))
        return np.array([i for i in index if digests[i] not in found], dtype=np.intp)

    def _select(self, columns: str, wanted: Sequence[bytes]) -> dict[bytes, Any]:
        marks = ",".join("?" * len(wanted))
        query = f"SELECT {columns} FROM features WHERE pass = ? AND sample IN ({marks})"
        with closing(self._connect()) as table:
            return {
                row[0]: row[-1] for row in table.execute(query, (self.key, *wanted))
            }

    def put(self, digests: Sequence[bytes], features: NDArray[Any]) -> None:
        """Put the features of some samples in."""
        rows = [
            (self.key, digest, row.tobytes())
            for digest, row in zip(digests, features, strict=True)
        ]
        with closing(self._connect()) as table, table:
            table.executemany("INSERT OR IGNORE INTO features VALUES (?, ?, ?)", rows)

    def read(
        self, digests: Sequence[bytes]
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[Any]]]:
        """Give the positions and the features of the samples that are in."""
        for part in chunks(np.arange(len(digests)), READ):
            found = self._select("sample, value", [digests[i] for i in part])
            index = np.array([i for i in part if digests[i] in found], dtype=np.intp)
            if len(index):
                values = bytearray().join(found[digests[i]] for i in index)
                rows = np.frombuffer(values, self.dtype)
                yield index, rows.reshape(len(index), *self.shape)
