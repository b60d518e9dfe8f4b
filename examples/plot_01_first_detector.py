"""
Find defects on textures
========================

A detector learns what good bricks look like, and finds bricks with defects that it has
never seen.
"""

# %%
# Images
# ------
# Patches of a photograph, some of them with painted defects. The detector is fitted to
# good patches only.

from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "brick",
    n_train=100,
    n_test_good=50,
    n_test_defective=50,
    image_size=96,
    random_state=0,
)
print(data.X_train.shape, data.X_test.shape)

# %%
# Fit and score
# -------------
# ``contamination`` is the share of new good patches that may be flagged.

from skdeepad import PatchDetector

detector = PatchDetector(image_size=96, contamination=0.05, random_state=0)
detector.fit(data.X_train)
decisions = detector.decision_function(data.X_test)  # below 0: an anomaly

# %%
# How good is it?
# ---------------

from sklearn.metrics import roc_auc_score

good = data.y_test == 1
print(f"AUROC {roc_auc_score(data.y_test, decisions):.3f}")
print(f"good patches flagged: {(decisions[good] < 0).sum()} of {good.sum()}")
print(f"defects found: {(decisions[~good] < 0).sum()} of {(~good).sum()}")

# %%
# In the order of their scores
# ----------------------------
# The most anomalous patches come first. Red frames mark true defects.

import matplotlib.pyplot as plt
import numpy as np

order = np.argsort(decisions)[np.linspace(0, len(decisions) - 1, 24).astype(int)]
fig, axes = plt.subplots(3, 8, figsize=(10, 4.2), layout="constrained")
for ax, i in zip(axes.flat, order, strict=True):
    ax.imshow(data.X_test[i], cmap="gray")
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{decisions[i]:+.2f}", fontsize=8)
    for spine in ax.spines.values():
        spine.set(color="C2" if good[i] else "C3", linewidth=3)
