"""Data sets to try image anomaly detectors on; none of them ships images itself."""

from skdeepad.datasets._cifar import load_cifar
from skdeepad.datasets._fashion_mnist import load_fashion_mnist
from skdeepad.datasets._folders import load_image_folder
from skdeepad.datasets._pseudo_anomalies import make_pseudo_anomalies
from skdeepad.datasets._textures import make_texture_defects
from skdeepad.runtime._files import list_images

__all__ = [
    "list_images",
    "load_cifar",
    "load_fashion_mnist",
    "load_image_folder",
    "make_pseudo_anomalies",
    "make_texture_defects",
]
