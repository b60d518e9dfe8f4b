"""`PatchDetector`: patches of maps, their densities, and scores of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ..detectors import PatchDetector
from ..detectors._patch import has_memory
from ..detectors._patch_density import (
    N_REWEIGHTED,
    PatchGaussian,
    PatchMemory,
    on_first_raster,
)
from ..frozen import frozen_copy
from ..scorers._neighbors import nearest
from ._detectors import channels_of
from ._maps import Refinement
from ._parts import ExportError, Images, Part, Step, part_of, size_of_images
from ._scorers import Neighbors, constant


class Memory(Step):
    """`PatchMemory`."""

    def __init__(self, memory: PatchMemory, reweighted: bool) -> None:
        super().__init__()
        self.scale, self.widths = float(memory.scale), memory.widths
        self.is_cosine = memory.metric == "cosine"
        self.is_whitened = memory.metric == "mahalanobis"
        if self.is_whitened:
            self.sizes = [float(size) for size in memory.sizes()]
            for i, matrix in enumerate(memory.whitening):
                self.register_buffer(f"whitening{i}", constant(matrix))
        rows = memory._centred(memory.rows())
        self.register_buffer("origin", constant(memory.origin))
        self.neighbors = Neighbors(rows, 1)
        if reweighted:
            around, _ = nearest(rows, rows, N_REWEIGHTED)
            self.register_buffer("around", torch.from_numpy(around))

    def distance(self, squared: Tensor) -> Tensor:
        """Turn squared distances of centred rows into the metric's."""
        squared = squared * self.scale**2
        return squared / (2 * len(self.widths)) if self.is_cosine else squared.sqrt()

    def compared(self, patches: Tensor) -> Tensor:
        """Turn patches into what is compared by its Euclidean distance."""
        if not self.is_whitened:
            return patches
        stages = zip(patches.split(self.widths, dim=-1), self.sizes, strict=True)
        parts = []
        for i, (x, size) in enumerate(stages):
            short = x / (x.square().sum(dim=-1, keepdim=True) + size).sqrt()
            parts.append(short @ self.get_buffer(f"whitening{i}"))
        return torch.cat(parts, dim=-1)

    def nearest(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give distances to the nearest rows, their numbers, and centred patches."""
        compared = self.compared(patches.double())
        queries = ((compared - self.origin) / self.scale).float()
        squared, index = self.neighbors(queries.flatten(0, 1))
        apart = self.distance(squared)
        shape = queries.shape[:2]
        return apart.reshape(shape), index.reshape(shape), queries

    def forward(self, patches: Tensor) -> Tensor:
        """Score patches."""
        return self.nearest(patches)[0]

    def reweighted(self, patches: Tensor) -> Tensor:
        """Score images by Eq. 7 of PatchCore."""
        apart, index, queries = self.nearest(patches)
        worst = apart.argmax(dim=1, keepdim=True)
        apart = apart.gather(1, worst)[:, 0]
        winner = index.gather(1, worst)[:, 0]
        at = worst[:, :, None].expand(-1, -1, queries.shape[2])
        query = queries.gather(1, at).double()
        around = self.around[winner]
        rows = self.neighbors.rows[around.flatten()].double()
        rows = rows.reshape(*around.shape, -1)
        others = self.distance((query - rows).square().sum(dim=2))
        return (1 - (apart - others.logsumexp(dim=1)).exp()) * apart


class Gaussians(Step):
    """`PatchGaussian`."""

    def __init__(self, gaussian: PatchGaussian) -> None:
        super().__init__()
        self.shared = gaussian.shared
        origin = gaussian.origin[0]  # (1 or n_positions, n_features)
        self.register_buffer("origin", constant(origin, torch.float32))
        self.register_buffer("mean", constant(gaussian.mean, torch.float32))
        turned = gaussian.whitening.transpose(0, 2, 1)
        self.register_buffer("whitening", constant(turned, torch.float32))

    def forward(self, patches: Tensor) -> Tensor:
        """Score patches."""
        apart = patches - self.origin - self.mean.reshape(self.origin.shape)
        if self.shared:
            white = apart @ self.whitening[0]
            return white.double().square().sum(dim=2).sqrt()
        white = apart.transpose(0, 1) @ self.whitening
        return white.double().square().sum(dim=2).sqrt().transpose(0, 1)


class PatchPart(Part):
    """Patches of images, their scores, and maps."""

    def __init__(self, detector: PatchDetector) -> None:
        super().__init__()
        size = size_of_images(detector.image_size_)
        if detector.tile_size is not None:
            raise ExportError(
                "PatchDetector with tile_size cannot be exported: graphs do not cut "
                "images. Export a detector that is fitted to tiles as its images."
            )
        self.sizes, self.channels = (size,), channels_of(detector)
        self.front = detector._front()
        cpu = torch.device("cpu")
        self.network = frozen_copy(detector.backbone_, cpu, torch.float32)
        density = detector._density
        self.is_reweighted = detector.aggregation == "reweighted"
        if isinstance(density, PatchMemory):
            self.density: Any = Memory(density, self.is_reweighted)
        elif isinstance(density, PatchGaussian):
            self.density = Gaussians(density)
        else:
            raise ExportError(
                f"PatchDetector(scorer={detector.scorer!r}) cannot be exported: only "
                "scorer='memory' and scorer='gaussian' have a graph."
            )
        self.pooling = 1 if detector.backbone_.to_map else detector.pooling
        self.unit = has_memory(detector) and detector.metric == "cosine"
        cells = detector._cells
        self.register_buffer("cells", torch.from_numpy(np.flatnonzero(cells)))
        self.all_cells = bool(cells.all())
        self.register_buffer("wanted", torch.from_numpy(detector._channels))
        self.all_channels = len(detector._channels) == sum(detector._widths)
        self.register_buffer(
            "scale", constant(np.reciprocal(np.float64(detector._scale)))
        )
        n = int(cells.sum())
        top = detector.aggregation == "top"
        self.k = max(round(detector.share * n), 1) if top else 1
        self.raster = cells.shape
        at = np.cumsum(cells).reshape(cells.shape) - 1
        if not self.all_cells:
            rows, columns = distance_transform_edt(
                ~cells, return_distances=False, return_indices=True
            )
            at = at[rows, columns]
        self.register_buffer("nearest_cell", torch.from_numpy(at.ravel()))
        self.refine = Refinement(detector, cells.shape)

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Score images."""
        outputs = self.front._outputs(self.network, images[self.sizes[0]])
        maps = on_first_raster(outputs, self.pooling, self.unit)
        patches = maps.permute(0, 2, 3, 1).flatten(1, 2)
        if not self.all_cells:
            patches = patches[:, self.cells]
        if not self.all_channels:
            patches = patches[:, :, self.wanted]
        at_positions = self.density(patches) * self.scale
        if self.is_reweighted:
            score = self.density.reweighted(patches)
        else:
            score = at_positions.topk(self.k, dim=1).values.mean(dim=1)
        on_raster = at_positions[:, self.nearest_cell].reshape(-1, *self.raster)
        return {"score": -score, "map": self.refine(on_raster)}


@part_of.register
def _(detector: PatchDetector) -> Part:
    return PatchPart(detector)


def mask_of(detector: Any) -> Any:
    """Give the mask outside of which maps are 0, or None."""
    return getattr(detector, "_mask", None)
