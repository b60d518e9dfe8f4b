"""
Maps of five detectors side by side
===================================

Every detector of images has maps. Those that compare positions find small defects;
those that look at whole images show what made the score of an image.
"""

from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "grass",
    n_train=80,
    n_test_good=1,
    n_test_defective=10,
    image_size=96,
    random_state=3,
)

# %%
# Five detectors
# --------------

from skdeepad import (
    KDClonerEstimator,
    MahalanobisFeatureScorer,
    PANDAEstimator,
    PatchDetector,
)

options = {"image_size": 96, "random_state": 0}
early = ("stage1", "stage2", "stage3")
detectors = {
    "patches": PatchDetector(**options),
    "patches, Gaussian": PatchDetector(
        scorer="gaussian", positions="shared", **options
    ),
    "cloner": KDClonerEstimator(
        stages=early,
        score_stages=early,
        discrepancy="mahalanobis",
        max_steps=60,
        **options,
    ),
    "Mahalanobis": MahalanobisFeatureScorer(**options),
    "PANDA": PANDAEstimator(max_steps=15, **options),
}
defects = data.y_test == -1
kinds, rows = {}, []
for i, kind in enumerate(data.kinds_test):  # one of each kind
    if defects[i] and kind not in kinds:
        kinds[kind] = i
        rows.append(i)
images, masks = data.X_test[rows], data.masks_test[rows]
maps = {
    name: detector.fit(data.X_train).anomaly_map(images)
    for name, detector in detectors.items()
}

# %%
# The maps
# --------
# Each column of maps has a scale of its own. The outline is the true defect.

import matplotlib.pyplot as plt

fig, axes = plt.subplots(
    len(rows), 6, figsize=(10, 1.7 * len(rows)), layout="constrained"
)
for row, image, mask, kind, i in zip(
    axes, images, masks, kinds, range(len(rows)), strict=True
):
    row[0].imshow(image, cmap="gray")
    row[0].set_ylabel(kind)
    for ax, found in zip(row[1:], maps.values(), strict=True):
        ax.imshow(found[i], cmap="inferno", vmin=found.min(), vmax=found.max())
    for ax in row:
        ax.contour(mask, levels=[0.5], colors="cyan", linewidths=0.8)
        ax.set(xticks=[], yticks=[])
for ax, name in zip(axes[0], ["image", *maps], strict=True):
    ax.set_title(name, fontsize=9)
