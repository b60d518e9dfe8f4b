"""Data sets to try image anomaly detectors on; none of them ships images itself."""

from ..runtime._files import list_images
from ._cifar import load_cifar
from ._fashion_mnist import load_fashion_mnist
from ._folders import load_image_folder
from ._pseudo_anomalies import make_pseudo_anomalies
from ._textures import make_texture_defects

__all__ = [
    "list_images",
    "load_cifar",
    "load_fashion_mnist",
    "load_image_folder",
    "make_pseudo_anomalies",
    "make_texture_defects",
]
