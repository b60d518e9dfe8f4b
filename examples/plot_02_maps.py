"""
See where the defect is
=======================

A map says how anomalous each pixel is, and a threshold on it gives regions.
"""

from skdeepad import PatchDetector
from skdeepad.datasets import make_texture_defects
from skdeepad.inspection import AnomalyMapDisplay
from skdeepad.metrics import aupro_score, pixel_roc_auc_score

data = make_texture_defects(
    "brick",
    n_train=100,
    n_test_good=20,
    n_test_defective=20,
    image_size=128,
    random_state=1,
)
detector = PatchDetector(image_size=128, random_state=0).fit(data.X_train)

# %%
# Maps
# ----
# The first column has the image, with the true defect in red; the second the map; the
# third what exceeds the threshold, which ``fit`` has learnt from good images.

import numpy as np

_, first = np.unique(data.kinds_test, return_index=True)  # one of each kind
display = AnomalyMapDisplay.from_estimator(
    detector, data.X_test[first], masks=data.masks_test[first]
)

# %%
# Regions
# -------
# As a table: a row for each region of an image that is flagged.

regions = detector.locate(data.X_test)
print(regions.head().to_string(index=False, float_format="%.2f"))

# %%
# How good are the maps?
# ----------------------

maps = detector.anomaly_map(data.X_test)
print(f"pixel AUROC {pixel_roc_auc_score(data.masks_test, maps):.3f}")
print(f"AUPRO {aupro_score(data.masks_test, maps):.3f}")
