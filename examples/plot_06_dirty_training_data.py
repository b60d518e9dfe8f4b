"""
Training data with defects in them
==================================

Some of the "good" images are not good. ``RobustDetector`` finds the suspects, and fits
in spite of them.
"""

import numpy as np

from skdeepad import MahalanobisFeatureScorer, RobustDetector
from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "brick",
    n_train=100,
    n_test_good=60,
    n_test_defective=70,
    image_size=64,
    random_state=0,
)
defects = np.flatnonzero(data.y_test == -1)
X_dirty = np.concatenate([data.X_train, data.X_test[defects[:10]]])
test = np.setdiff1d(np.arange(len(data.y_test)), defects[:10])

# %%
# Fit three times
# ---------------
# To clean images; to all; and to all with ``RobustDetector``.

plain = MahalanobisFeatureScorer(image_size=64)
robust = RobustDetector(plain, training_contamination=0.1, random_state=0)
for name, detector, X in (
    ("clean", plain, data.X_train),
    ("dirty", plain, X_dirty),
    ("dirty, robust", robust, X_dirty),
):
    decisions = detector.fit(X).decision_function(data.X_test[test])
    good = data.y_test[test] == 1
    print(
        f"{name:15} defects found {np.mean(decisions[~good] < 0):.0%}, "
        f"false alarms {np.mean(decisions[good] < 0):.0%}"
    )

# %%
# The suspects
# ------------
# The last 10 images are the defects. Look at the first suspects: an image that you have
# looked at is worth more than any algorithm.

import matplotlib.pyplot as plt

fig, axes = plt.subplots(2, 8, figsize=(10, 3), layout="constrained")
for ax, i in zip(axes.flat, robust.suspects_, strict=False):
    ax.imshow(X_dirty[i], cmap="gray")
    ax.set_title("defect" if i >= 100 else "good", fontsize=9)
for ax in axes.flat:
    ax.set_axis_off()
