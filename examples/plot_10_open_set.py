"""
Classify, and reject what belongs to no class
=============================================

A classifier of known classes meets something it has never seen. ``OpenSetClassifier``
says so.
"""

import numpy as np
from sklearn.datasets import load_digits

X, y = load_digits(return_X_y=True)
images = X.reshape(-1, 8, 8) / 16
rng = np.random.default_rng(0)
order = rng.permutation(len(y))
known = order[y[order] < 7]  # 7, 8 and 9 are not known
train, test = known[:900], np.r_[known[900:], order[y[order] >= 7]]

# %%
# Train on the known classes
# --------------------------

from skdeepad import OpenSetClassifier

classifier = OpenSetClassifier(image_size=64, max_steps=150, random_state=0)
classifier.fit(images[train], y[train])

# %%
# Known or not?
# -------------
# ``predict`` gives each image a class; ``predict_known`` says whether to believe it.

is_known = y[test] < 7
believed = classifier.predict_known(images[test]) == 1
right = classifier.predict(images[test]) == y[test]
print(f"known digits classified correctly: {right[is_known].mean():.1%}")
print(f"known digits rejected: {(~believed[is_known]).mean():.1%}")
print(f"unknown digits rejected: {(~believed[~is_known]).mean():.1%}")

# %%
# The most and the least familiar
# -------------------------------

import matplotlib.pyplot as plt

scores = classifier.score_samples(images[test])
places = np.argsort(scores)[np.r_[0:10, len(test) - 10 : len(test)]]
fig, axes = plt.subplots(2, 10, figsize=(10, 2.7), layout="constrained")
for ax, i in zip(axes.flat, places, strict=True):
    ax.imshow(images[test[i]], cmap="gray_r")
    ax.set_title(y[test[i]], color="C0" if is_known[i] else "C3")
    ax.set_axis_off()
fig.suptitle("first row: least like a known class (red: unknown); second row: most")
