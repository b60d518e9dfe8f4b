"""Features on disk, by the content of their samples, shared by processes."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .inputs import chunks

READ = 512  # rows that are read at a time
TROUBLE = (sqlite3.Error, OSError, UnicodeDecodeError)  # what a damaged table may raise
Result = TypeVar("Result")


class FeatureCache:
    """A table of features in a folder, one row per sample and pass.

    A sample is known by its content, so that any subset in any order finds its
    rows: each fold of a cross-validation, the training and the test side alike. Each
    row has a digest, and one that is damaged counts as missing. If the table cannot be
    read or written, a warning says so once, and nothing is found or kept any more.

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
        If there can be no such folder, or it holds a file of that name that is no
        such table.
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
        self.usable = True
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"memory={str(folder)[:200]!r} cannot be a folder ({error.strerror}). "
                "Choose a folder that exists or can be made."
            ) from error
        try:
            self._make_table()
        except sqlite3.OperationalError as error:  # locked, read-only, a full disk
            self._give_up(error)
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"memory={str(folder)!r}: {self.file.name} in it cannot be used "
                f"({error}). Remove that file, or choose another folder."
            ) from error

    def _make_table(self) -> None:
        with closing(self._connect()) as table, table:
            # 0.1.0 called it "features", and had no digests
            table.execute(
                "CREATE TABLE IF NOT EXISTS rows (pass TEXT, sample BLOB, "
                "digest BLOB, value BLOB, PRIMARY KEY (pass, sample))"
            )

    def _give_up(self, error: Exception) -> None:
        """Go on without the table."""
        self.usable = False
        warnings.warn(
            f"The cache in memory={str(self.file.parent)!r} cannot be used "
            f"({type(error).__name__}: {error}): features are computed without it. "
            f"Make the folder writable, or remove {self.file.name} from it.",
            UserWarning,
            stacklevel=2,
        )

    def _try(self, action: Callable[[], Result], otherwise: Result) -> Result:
        """Do something with the table, if it can be used."""
        if self.usable:
            try:
                return action()
            except TROUBLE as error:
                self._give_up(error)
        return otherwise

    def _digest(self, sample: bytes, value: bytes) -> bytes:
        content = b"".join([self.key.encode(), sample, value])
        return blake2b(content, digest_size=8).digest()

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
            found.update(row[0] for row in self._select("sample", wanted))
        return np.array([i for i in index if digests[i] not in found], dtype=np.intp)

    def _select(self, columns: str, wanted: Sequence[bytes]) -> list[tuple[Any, ...]]:
        marks = ",".join("?" * len(wanted))
        query = f"SELECT {columns} FROM rows WHERE pass = ? AND sample IN ({marks})"

        def read() -> list[tuple[Any, ...]]:
            with closing(self._connect()) as table:
                return table.execute(query, (self.key, *wanted)).fetchall()

        return self._try(read, [])

    def put(self, digests: Sequence[bytes], features: NDArray[Any]) -> None:
        """Put the features of some samples in, in the place of what there was."""
        values = [row.tobytes() for row in features]
        rows = [
            (self.key, sample, self._digest(sample, value), value)
            for sample, value in zip(digests, values, strict=True)
        ]

        def write() -> None:
            with closing(self._connect()) as table, table:
                table.executemany("REPLACE INTO rows VALUES (?, ?, ?, ?)", rows)

        self._try(write, None)

    def read(
        self, digests: Sequence[bytes]
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[Any]]]:
        """Give the positions and the features of the samples whose rows are whole."""
        for part in chunks(np.arange(len(digests)), READ):
            rows = self._select("sample, digest, value", [digests[i] for i in part])
            found = {
                sample: value
                for sample, digest, value in rows
                if isinstance(value, bytes) and digest == self._digest(sample, value)
            }
            index = np.array([i for i in part if digests[i] in found], dtype=np.intp)
            if len(index):
                values = bytearray().join(found[digests[i]] for i in index)
                block = np.frombuffer(values, self.dtype)
                yield index, block.reshape(len(index), *self.shape)
