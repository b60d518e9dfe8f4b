"""What the tests share: real images, as arrays and as files, and no network."""

from __future__ import annotations

import os
import socket

# Threads that wait asleep leave a busy machine's processors to others: networks as
# small as those here then run tens of times faster. NumPy and torch read it on import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import skimage.data
from hypothesis import settings
from PIL import Image
from sklearn.utils import Bunch

from skdeepad.datasets import make_texture_defects

settings.register_profile("skdeepad", deadline=None)
settings.load_profile("skdeepad")


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Let sockets reach this machine only, as on one without network."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        here = self.family == getattr(socket, "AF_UNIX", None)
        if not here and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture(scope="session")
def textures():
    """Patches of a photograph of bricks, 32 x 32 grey pixels; nobody may write."""
    bunch = make_texture_defects(
        n_train=24, n_test_good=8, n_test_defective=8, image_size=32, random_state=0
    )
    for array in (bunch.X_train, bunch.X_test, bunch.y_test):
        array.setflags(write=False)
    return bunch


@pytest.fixture(scope="session")
def photos():
    """Pieces of a colour photograph, uint8 of shape (40, 32, 32, 3)."""
    photo = skimage.data.astronaut()[:160, 100:356]
    pieces = photo.reshape(5, 32, 8, 32, 3).swapaxes(1, 2).reshape(40, 32, 32, 3)
    pieces.setflags(write=False)
    return pieces


@pytest.fixture(scope="session")
def image_files(textures, photos, tmp_path_factory):
    """Paths of PNG files of `textures` and `photos`, and of JPEG files of `photos`."""
    folder = tmp_path_factory.mktemp("images")

    def save(images, name):
        paths = [folder / name.format(i) for i in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            Image.fromarray(np.asarray(image)).save(path)
        return paths

    return Bunch(
        train=save(textures.X_train, "train{}.png"),
        test=save(textures.X_test, "test{}.png"),
        photos=save(photos, "photo{}.png"),
        jpegs=save(photos[:4], "photo{}.jpg"),
    )
