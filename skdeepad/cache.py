"""What stages make of samples, kept by the samples' content."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .inputs import chunks

READ = 512  # rows that are read at a time
TROUBLE = (sqlite3.Error, OSError, UnicodeDecodeError)  # what a damaged table may raise
Arrays = list[NDArray[Any]]
Rows = dict[tuple[str, bytes], NDArray[Any]]  # by stage and sample
Result = TypeVar("Result")


class RowCache:
    """What stages make of samples: one row a sample and stage.

    A sample is known by its content, so that any subset in any order finds its rows:
    each fold of a cross-validation, the training and the test side alike.
    """

    def whole(self, front: Any, inputs: Any) -> Any:
        """Give the pass that takes all that is to be kept, where some is missing."""
        raise NotImplementedError

    def missing(
        self, keys: Sequence[str], digests: Sequence[bytes], batch_size: int
    ) -> Iterator[NDArray[np.intp]]:
        """Name the samples that lack a row, batch by batch; copies once.

        Parameters
        ----------
        keys : sequence of str
            The stages, each of one pass.
        digests : sequence of bytes
            Of the samples.
        batch_size : int
            How many are named at once.

        Yields
        ------
        ndarray of int
            Positions in `digests`.
        """
        first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
        unknown = self._unknown(keys, list(first.values()), digests)
        for part in self._in_order(list(chunks(unknown, batch_size))):
            index = self._unknown(keys, part.tolist(), digests)
            if len(index):
                yield index

    def read(
        self, keys: Sequence[str], digests: Sequence[bytes]
    ) -> Iterator[tuple[NDArray[np.intp], Arrays]]:
        """Give the positions of samples that have all rows, and these."""
        for part in chunks(np.arange(len(digests)), READ):
            rows = self._rows(keys, [digests[i] for i in part])
            whole = [i for i in part if all((key, digests[i]) in rows for key in keys)]
            if whole:
                yield (
                    np.array(whole, dtype=np.intp),
                    [np.stack([rows[key, digests[i]] for i in whole]) for key in keys],
                )

    def put(
        self, keys: Sequence[str], digests: Sequence[bytes], arrays: Arrays
    ) -> None:
        """Put what stages make of some samples in, in the place of what there was."""
        raise NotImplementedError

    def _unknown(
        self, keys: Sequence[str], index: list[int], digests: Sequence[bytes]
    ) -> NDArray[np.intp]:
        found = self._found(keys, [digests[i] for i in index])
        return np.array([i for i in index if digests[i] not in found], dtype=np.intp)

    def _found(self, keys: Sequence[str], digests: Sequence[bytes]) -> set[bytes]:
        raise NotImplementedError

    def _rows(self, keys: Sequence[str], digests: Sequence[bytes]) -> Rows:
        raise NotImplementedError

    def _in_order(self, batches: list[NDArray[np.intp]]) -> list[NDArray[np.intp]]:
        return batches


class MemoryCache(RowCache):
    """The rows in memory, for estimators that want other stages of one network.

    Parameters
    ----------
    fronts : iterable of FeaturePass
        What they want. Whoever passes a sample first does so for all.
    """

    def __init__(self, fronts: Iterable[Any]) -> None:
        self.rows: Rows = {}
        self.wanted: dict[Any, dict[Any, None]] = {}
        for front in fronts:
            taps = self.wanted.setdefault(replace(front, taps=()), {})
            taps.update(dict.fromkeys(front.taps))

    def whole(self, front: Any, inputs: Any) -> Any:
        """Give the pass that takes what all of the estimators want."""
        wanted = self.wanted.get(replace(front, taps=()), {})
        return replace(front, taps=tuple(dict.fromkeys((*front.taps, *wanted))))

    def cache(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Give the function as it is; estimators know a memory by this method."""
        return function

    def put(
        self, keys: Sequence[str], digests: Sequence[bytes], arrays: Arrays
    ) -> None:
        """Put what stages make of some samples in, in the place of what there was."""
        for key, array in zip(keys, arrays, strict=True):
            self.rows |= {(key, d): row for d, row in zip(digests, array, strict=True)}

    def _found(self, keys: Sequence[str], digests: Sequence[bytes]) -> set[bytes]:
        return {d for d in digests if all((key, d) in self.rows for key in keys)}

    def _rows(self, keys: Sequence[str], digests: Sequence[bytes]) -> Rows:
        return self.rows


class StageCache(RowCache):
    """A table of what stages make of samples in a folder, shared by processes.

    Each row has a digest, and one that is damaged counts as missing. If the table
    cannot be read or written, a warning says so once, and nothing is found or kept any
    more. Processes that fill the table at the same time share the work without waiting:
    each takes the batches in a random order of its own, and looks again before each
    what others have put in since.

    Parameters
    ----------
    folder : str or path-like
        Where the table lies; made where there is none.

    Raises
    ------
    ValueError
        If there can be no such folder, or it holds a file of that name that is no
        such table.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / "skdeepad-features.sqlite"
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

    def whole(self, front: Any, inputs: Any) -> Any:
        """Give the pass that takes all stages, as others may want other ones."""
        return front.with_all_stages(inputs)

    def _connect(self) -> sqlite3.Connection:
        table = sqlite3.connect(self.file, timeout=60)
        # a cache may be lost with the machine; waiting for the disk is not worth it
        table.execute("PRAGMA synchronous = OFF")
        return table

    def _in_order(self, batches: list[NDArray[np.intp]]) -> list[NDArray[np.intp]]:
        order = np.random.default_rng().permutation(len(batches))
        return [batches[k] for k in order]

    def _found(self, keys: Sequence[str], digests: Sequence[bytes]) -> set[bytes]:
        found: set[bytes] | None = None
        for key in keys:
            rows = self._select("sample", key, digests)
            having = {row[0] for row in rows}
            found = having if found is None else found & having
        return found or set()

    def _select(
        self, columns: str, key: str, digests: Sequence[bytes]
    ) -> list[tuple[Any, ...]]:
        def read() -> list[tuple[Any, ...]]:
            rows: list[tuple[Any, ...]] = []
            with closing(self._connect()) as table:
                for i in range(0, len(digests), READ):
                    wanted = digests[i : i + READ]
                    marks = ",".join("?" * len(wanted))
                    rows += table.execute(
                        f"SELECT {columns} FROM rows "
                        f"WHERE pass = ? AND sample IN ({marks})",
                        (key, *wanted),
                    ).fetchall()
            return rows

        return self._try(read, [])

    def put(
        self, keys: Sequence[str], digests: Sequence[bytes], arrays: Arrays
    ) -> None:
        """Put what stages make of some samples in, in the place of what there was."""
        rows = []
        for key, array in zip(keys, arrays, strict=True):
            for sample, value in zip(digests, map(to_bytes, array), strict=True):
                rows.append((key, sample, row_digest(key, sample, value), value))

        def write() -> None:
            with closing(self._connect()) as table, table:
                table.executemany("REPLACE INTO rows VALUES (?, ?, ?, ?)", rows)

        self._try(write, None)

    def _rows(self, keys: Sequence[str], digests: Sequence[bytes]) -> Rows:
        return {
            (key, sample): from_bytes(value)
            for key in keys
            for sample, digest, value in self._select(
                "sample, digest, value", key, digests
            )
            if isinstance(value, bytes) and digest == row_digest(key, sample, value)
        }


def row_digest(key: str, sample: bytes, value: bytes) -> bytes:
    """Digest a row of the table, so that damage shows."""
    return blake2b(b"".join([key.encode(), sample, value]), digest_size=8).digest()


def to_bytes(row: NDArray[Any]) -> bytes:
    """Give an array with its type and shape."""
    return f"{row.dtype.str} {' '.join(map(str, row.shape))}\n".encode() + row.tobytes()


def from_bytes(value: bytes) -> NDArray[Any]:
    """Undo `to_bytes`."""
    head, _, content = value.partition(b"\n")
    dtype, *shape = head.decode().split(" ")
    sides = [int(side) for side in shape if side]
    return np.frombuffer(bytearray(content), dtype).reshape(sides)
