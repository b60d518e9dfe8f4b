"""Checks of numbers that scorers and detectors share; torch is not needed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import validate_data


def shorten(text: str, length: int = 200) -> str:
    """Cut out the middle of a long text."""
    half = length // 2 - 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def check_rows(estimator: Any, X: Any, **options: Any) -> NDArray[Any]:
    """Check a matrix of numbers by scikit-learn's `validate_data`.

    Tensors may need a gradient or be bfloat16; errors name X, and are short.
    """
    X = plain(X)
    with errors_name_x():
        # scikit-learn leaves lists of objects, such as dates, as they are
        X = np.asarray(X) if isinstance(X, list | tuple) else X
        refuse_dates(X)
        rows: NDArray[Any] = validate_data(estimator, X, **options)
    # scikit-learn leaves the byte order of tables, which torch cannot read
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def check_magnitude(rows: NDArray[Any], limit: float) -> NDArray[Any]:
    """Refuse numbers that would overflow in what is computed of them."""
    if max(float(rows.max()), -float(rows.min())) > limit:
        raise ValueError(
            f"X has numbers beyond {limit:g} in magnitude, which overflow. Scale "
            "X, for example with sklearn.preprocessing.MaxAbsScaler."
        )
    return rows


@contextmanager
def errors_name_x() -> Iterator[None]:
    """Name X in the errors of scikit-learn and numpy, and cut long ones short."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        message = shorten(str(error), 400)
        if not re.search(r"\bX\b", message):
            message = f"X cannot be used: {message}"
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(message) from error


def plain(X: Any) -> Any:
    """Give a tensor as an array; refuse masked entries and bytes."""
    if is_tensor(X):
        return to_array(X)
    items = list(X) if isinstance(X, list | tuple) else []
    if any(np.ma.is_masked(x) for x in (X, *items)):
        raise ValueError(
            "X has masked entries, which have no value. Fill them "
            "(X.filled(value)), or leave those samples out."
        )
    if isinstance(X, np.ndarray) and X.ndim == 1 and X.dtype.kind in "OS":
        items = list(X)
    encoded = (isinstance(x, bytes | bytearray | memoryview) for x in items)
    if (i := next((i for i, x in enumerate(encoded) if x), None)) is not None:
        raise ValueError(
            f"X holds bytes (X[{i}]), which are neither paths nor pixels. Turn paths "
            "into str (os.fsdecode); open images (PIL.Image.open(io.BytesIO(data))), "
            "and pass them as arrays."
        )
    return X


def refuse_dates(X: Any) -> None:
    """Refuse an array or a table with dates or durations."""
    dtypes: Any = X.dtypes if hasattr(X, "iloc") else getattr(X, "dtype", None)
    if any(getattr(dtype, "kind", "") in ("m", "M") for dtype in np.atleast_1d(dtypes)):
        raise ValueError(
            "X holds dates or durations. Convert them to numbers first, for "
            "example to days: (X - start) / np.timedelta64(1, 'D')."
        )


def is_tensor(X: Any) -> bool:
    """Tell a tensor, without an import of torch, which scorers do without."""
    return "torch" in sys.modules and isinstance(X, sys.modules["torch"].Tensor)


def to_array(tensor: Any) -> NDArray[Any]:
    """Give a tensor as an array; numpy has no bfloat16."""
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    array: NDArray[Any] = tensor.numpy()
    return array
