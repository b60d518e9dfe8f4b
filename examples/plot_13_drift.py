"""
Is it still the line that I trained on?
=======================================

The lamp above the line ages. ``DriftMonitor`` notices, long before somebody complains.
"""

import numpy as np
from sklearn.frozen import FrozenEstimator

from skdeepad import MahalanobisFeatureScorer
from skdeepad.conformal import DriftMonitor
from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "gravel",
    n_train=200,
    n_test_good=400,
    n_test_defective=1,
    image_size=96,
    random_state=0,
)
stream = data.X_test[data.y_test == 1]

# %%
# A monitor around a fitted detector
# ----------------------------------

detector = MahalanobisFeatureScorer(image_size=64).fit(data.X_train)
monitor = DriftMonitor(FrozenEstimator(detector), alpha=0.01, random_state=0)
monitor.fit(data.X_train)

# %%
# 200 images as before, then a lamp that loses 15 % of its light
# --------------------------------------------------------------

monitor.update(stream[:200])
print("alarm after 200 images:", monitor.alarm_)
monitor.update((0.85 * stream[200:]).astype(np.uint8))
print("alarm:", monitor.alarm_, "at image", monitor.alarm_at_)

# %%
# What has changed?
# -----------------
# Curves that rise say which signal has left the range of the training images.

ax = monitor.plot()
