"""
Large images in tiles
=====================

Resized to what a network takes, a scratch in a large photograph is gone. In tiles it
stays visible.
"""

import numpy as np
import skimage.data
from sklearn.utils import check_random_state

# %%
# Large photographs, one with scratches
# -------------------------------------
# Pieces of a photograph of gravel, of 512 x 256 pixels.

gravel = skimage.data.gravel()
good = [np.ascontiguousarray(gravel[:, i : i + 256]) for i in (0, 40, 80, 120, 160)]
scratched = np.ascontiguousarray(gravel[:, 256:])
rng = check_random_state(0)
mask = np.zeros(scratched.shape, dtype=bool)
for top, left in ((90, 60), (360, 150)):
    for step in range(40):
        y, x = top + step // 2 + rng.randint(2), left + step
        mask[y : y + 2, x : x + 2] = True
scratched[mask] = 230

# %%
# With and without tiles
# ----------------------

from skdeepad import PatchDetector

options = {
    "image_size": 128,
    "n_patches": 2_000,
    "random_state": 0,
    "contamination": 0.2,
}
whole = PatchDetector(**options).fit(good)
tiles = PatchDetector(tile_size=128, **options).fit(good)

# %%
# The maps
# --------

import matplotlib.pyplot as plt

fig, axes = plt.subplots(1, 3, figsize=(9, 6), layout="constrained")
axes[0].imshow(scratched, cmap="gray")
axes[0].set_title("two scratches")
for ax, name, detector in zip(
    axes[1:],
    ("resized to 128 x 128", "tiles of 128 x 128"),
    (whole, tiles),
    strict=True,
):
    ax.imshow(detector.anomaly_map([scratched])[0], cmap="inferno")
    ax.contour(mask, levels=[0.5], colors="cyan", linewidths=0.8)
    ax.set_title(name)
for ax in axes:
    ax.set_axis_off()
