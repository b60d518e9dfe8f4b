"""Augmentation: images that are changed at random each time they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .draws import OwnDraws


class EachImage:
    """Change each image of a batch by a function that draws from torch's stream.

    Parameters
    ----------
    change : callable
        One image -> one image, of shape (channels, height, width).
    seed : int
        Starts a stream of its own; the global one is left alone.
    """

    def __init__(self, change: Callable[[Tensor], Tensor], seed: int) -> None:
        self.change = change
        self.draws = OwnDraws(seed)

    def __call__(self, images: Tensor) -> Tensor:
        """Change each image of a batch by a draw of its own."""
        with self.draws:
            changed = torch.stack([self.change(image) for image in images])
        if changed.shape != images.shape:
            raise ValueError(
                f"augmentation turns images of shape {tuple(images.shape[1:])} "
                f"into {tuple(changed.shape[1:])}. It must keep the shape: resize "
                "images by image_size instead."
            )
        return changed.float().clamp(0, 1)


def paper_augmentation(size: tuple[int, int], seed: int) -> Callable[[Tensor], Tensor]:
    """Give what Ruff et al. (2020) do to batches of images of CIFAR-10.

    Colours changed by up to 1 %, mirrored half of the time, cropped at random after
    padding by an eighth of the size, and noise of standard deviation 0.001.
    """
    from torchvision.transforms.v2 import functional as tv

    # `EachImage` of torchvision's transforms does the same in twice the time
    own: Any = {"generator": torch.Generator().manual_seed(seed)}
    colours: list[Callable[[Tensor, float], Tensor]] = [
        tv.adjust_brightness,
        tv.adjust_contrast,
        tv.adjust_saturation,
        tv.adjust_hue,
    ]
    margins = [side // 8 for side in size]

    def change(image: Tensor) -> Tensor:
        order = torch.randperm(len(colours), **own).tolist()
        around = (1.0, 1.0, 1.0, 0.0)
        by = [float(torch.empty(1).uniform_(m - 0.01, m + 0.01, **own)) for m in around]
        for i in order:
            image = colours[i](image, by[i])
        if torch.rand(1, **own) < 0.5:
            image = tv.horizontal_flip(image)
        image = tv.pad(image, margins[::-1])
        top, left = (int(torch.randint(2 * m + 1, (), **own)) for m in margins)
        image = tv.crop(image, top, left, *size)
        return image + 0.001 * torch.randn(image.shape, **own)

    def augment(images: Tensor) -> Tensor:
        return torch.stack([change(image) for image in images]).clamp(0, 1)

    return augment


def contrastive_views(size: tuple[int, int], seed: int) -> Callable[[Tensor], Tensor]:
    """Give what Reiss and Hoshen (2023) do to images, twice, to have two views of each.

    A rectangle of 20 to 100 % of the image, enlarged to the whole; four times in five,
    brightness, contrast and saturation changed by up to 40 % and hue by a tenth, in
    random order; grey, one time in five; blurred by a Gaussian of 0.1 to 2 pixels, half
    of the time; mirrored, half of the time.
    """
    from torchvision.transforms import v2

    steps: list[Callable[[Tensor], Tensor]] = [
        v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        # a radius of three standard deviations
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
        v2.RandomHorizontalFlip(),
    ]
    return EachImage(v2.Compose(steps), seed)


class RotationAndScaling:
    """Turn and scale images at random: the paper's setting for few images.

    Parameters
    ----------
    rotation : float
        In degrees: the angle is drawn from [-rotation, rotation].
    scaling : (float, float)
        The factor is drawn from this range.
    seed : int
    """

    def __init__(self, rotation: float, scaling: tuple[float, float], seed: int):
        self.rotation = rotation
        self.scaling = scaling
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> Tensor:
        """Change each image of a batch by a draw of its own."""
        draws = torch.rand(2, len(images), generator=self.generator)
        angle = torch.deg2rad(self.rotation * (2 * draws[0] - 1))
        low, high = self.scaling
        factor = low + (high - low) * draws[1]
        cos, sin = angle.cos() / factor, angle.sin() / factor
        aspect = images.shape[2] / images.shape[3]
        rows = [cos, -sin * aspect, 0 * cos, sin / aspect, cos, 0 * cos]
        matrices = torch.stack(rows, dim=1).view(-1, 2, 3)
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
