"""The file: a zip archive of a manifest, arrays and tensors, with a digest at its end.

What is read costs what the file holds: the archive's directory is checked before any
member is touched, members are views of the file, and an array or a tensor is made only
where its bytes are there.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, TENSORS, ARRAYS = "manifest.json", "tensors.safetensors", "arrays/{}.npy"
DIGEST_SIZE = 64  # a SHA-256 digest in hexadecimal, as the archive's comment

# Far above what estimators need, and read in less than a second
MAX_DIRECTORY = 2**20  # bytes of the archive's list of members: some 15,000 arrays
MAX_MESSAGE = 2000  # characters of an error: names in a file may be long

MAGIC = (
    b"\x93NUMPY\x01\x00"  # NumPy's format: its header is read as text, not as Python
)
ARRAY_HEADER = re.compile(
    rb"\{'descr': '(.+)', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\), \}\s*"
)
PLAIN_KINDS = "biufcSUmM"  # of NumPy's dtypes: numbers, text and times
PLAIN_DTYPE = re.compile(rf"[<>|=]?[{PLAIN_KINDS}]\d+(\[\w+\])?", re.ASCII)

END = struct.Struct("<4s4H2LH")  # of a zip archive's directory
LARGE_END = struct.Struct("<4sQ2H2L4Q")  # the same in archives of 4 GiB and more
LARGE_LOCATOR = struct.Struct("<4sLQL")  # stands between these two
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # before each member


class LoadError(ValueError):
    """A file that is not what `save` wrote, or not one for this version.

    Parameters
    ----------
    message : str
        What is wrong. Long messages are cut, and characters that would act on a
        terminal are escaped.
    """

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__("".join(shown)[:MAX_MESSAGE])


LoadError.__module__ = "skdeepad.persistence"  # where it is public


def pack(
    manifest: Mapping[str, Any],
    arrays: Sequence[NDArray[Any]],
    tensors: dict[str, Tensor],
) -> bytes:
    """Make the file's content."""
    import safetensors.torch  # and torch, which a look at a file can do without

    archive = BytesIO()
    with ZipFile(archive, "w", ZIP_STORED) as members:
        # ZipInfo has no time: the same estimator, the same file
        members.writestr(ZipInfo(MANIFEST), json.dumps(manifest, allow_nan=False))
        members.writestr(ZipInfo(TENSORS), safetensors.torch.save(tensors))
        for i, array in enumerate(arrays):
            with members.open(ZipInfo(ARRAYS.format(i)), "w") as member:
                npy.write_array(member, array, allow_pickle=False)
        members.comment = bytes(DIGEST_SIZE)
    data = archive.getvalue()[:-DIGEST_SIZE]
    return data + sha256(data).hexdigest().encode()


def unpack(data: bytes) -> dict[str, memoryview]:
    """Check the digest and the archive's directory; give the members by name."""
    view = memoryview(data)
    if sha256(view[:-DIGEST_SIZE]).hexdigest().encode() != view[-DIGEST_SIZE:]:
        raise LoadError(
            "The file is damaged, or not one that save wrote: its digest is not that "
            "of its content. Copy it again, or save the estimator anew."
        )
    check_directory(view[:-DIGEST_SIZE])
    members: dict[str, memoryview] = {}
    for info in ZipFile(BytesIO(data)).infolist():
        name = info.filename
        if ".." in name or name.startswith(("/", "\\")):
            raise LoadError(f"The file has a member outside: {name!r}.")
        if name in members:
            raise LoadError(f"The file has two members named {name!r}.")
        if info.compress_type != ZIP_STORED or info.compress_size != info.file_size:
            raise LoadError(f"{name!r} in the file is compressed.")
        header = LOCAL_HEADER.unpack_from(data, info.header_offset)
        start = info.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
        members[name] = view[start : start + info.file_size]
    if sum(member.nbytes for member in members.values()) > len(data):
        raise LoadError("The file has members that lie in one another.")
    return members


def check_directory(content: memoryview) -> None:
    """See that the list of members is where it should be, and short."""
    start = len(content) - END.size
    signature, *_, size, _, comment_size = END.unpack_from(content, start)
    start -= LARGE_LOCATOR.size
    if content[start : start + 4] == b"PK\x06\x07":
        _, _, place, _ = LARGE_LOCATOR.unpack_from(content, start)
        start -= LARGE_END.size
        *_, size, _ = LARGE_END.unpack_from(content, start)
        if place != start:
            raise LoadError("The file's list of members is not where it should be.")
    if signature != b"PK\x05\x06" or comment_size != DIGEST_SIZE:
        raise LoadError("The file does not end as an archive does that save wrote.")
    if size > MAX_DIRECTORY:
        raise LoadError("The file has more members than an estimator can have.")


def read_manifest(members: dict[str, memoryview]) -> dict[str, Any]:
    """Read what the file says it holds."""
    data = members.pop(MANIFEST)
    if data.nbytes > max_text(members):
        raise LoadError("The file's manifest is larger than an estimator's can be.")
    manifest = json.loads(bytes(data), parse_constant=refuse_constant)
    if not isinstance(manifest, dict):
        raise LoadError("The file's manifest is not one that save wrote.")
    return manifest


def max_text(members: dict[str, memoryview]) -> int:
    """Bound the size of what is parsed, which takes many times its size in memory."""
    return 2**20 + sum(member.nbytes for member in members.values()) // 16


def refuse_constant(name: str) -> float:
    raise LoadError(f"The file's manifest holds {name}, which JSON has not.")


def read_tensors(members: dict[str, memoryview]) -> dict[str, Tensor]:
    """Read all tensors; the library checks that each has its bytes."""
    data = members.pop(TENSORS)
    if int.from_bytes(data[:8], "little") > max_text({TENSORS: data}):
        raise LoadError("The file lists more tensors than an estimator can have.")
    import safetensors.torch

    return safetensors.torch.load(bytes(data))


def read_arrays(members: dict[str, memoryview]) -> list[NDArray[Any]]:
    """Read the arrays, which are all the members that are left."""
    n = len(members)
    return [read_array(members.pop(ARRAYS.format(i))) for i in range(n)]


def read_array(data: memoryview) -> NDArray[Any]:
    """Read an array, once it is known that the file has as much as it says."""
    start = len(MAGIC) + 2 + int.from_bytes(data[len(MAGIC) :][:2], "little")
    header = ARRAY_HEADER.fullmatch(data[len(MAGIC) + 2 : start])
    if data[: len(MAGIC)] != MAGIC or header is None:
        raise LoadError("The file has an array that is not one that save wrote.")
    descr, fortran, shape = (part.decode() for part in header.groups())
    dtype, values = plain_dtype(descr), data[start:]
    sides = [int(side) for side in shape.split(",") if side.strip()]
    if dtype.itemsize == 0 or prod(sides) * dtype.itemsize != values.nbytes:
        raise LoadError(f"The file has not the {sides} array of {dtype} that it names.")
    flat = np.ndarray(prod(sides), dtype, bytearray(values))
    return flat.reshape(sides, order="F" if fortran == "True" else "C")


def plain_dtype(name: str) -> np.dtype[Any]:
    """Find a dtype of numbers, text or times; NumPy would read more from a name."""
    if not PLAIN_DTYPE.fullmatch(name):
        raise LoadError(f"The file has an array of {name!r}, which is no plain data.")
    return np.dtype(name)
