"""
A few known anomalies, or none
==============================

``HSCClassifier`` learns from known anomalies. What are they worth, and what becomes of
anomalies of other kinds?
"""

from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

X, y = load_digits(return_X_y=True)
images = X.reshape(-1, 8, 8) / 16

# %%
# Zeros are normal. Sixes are the anomalies that we know; other digits come as a
# surprise.

import numpy as np

zeros, sixes = np.flatnonzero(y == 0), np.flatnonzero(y == 6)
test = np.r_[zeros[120:], sixes[60:], np.flatnonzero((y != 0) & (y != 6))[:300]]

# %%
# Without and with known anomalies
# --------------------------------

from skdeepad import HSCClassifier, MahalanobisFeatureScorer

scores = {}
without = MahalanobisFeatureScorer(image_size=32).fit(images[zeros[:120]])
scores["none known"] = without.score_samples(images[test])
for n_known in (2, 8, 32):
    rows = np.r_[zeros[:120], sixes[:n_known]]
    labels = np.where(y[rows] == 0, 1, -1)
    detector = HSCClassifier(image_size=32, max_steps=60, random_state=0)
    detector.fit(images[rows], labels)
    scores[f"{n_known} known"] = detector.score_samples(images[test])

# %%
# Sixes, and the digits that nobody had told us of
# ------------------------------------------------

import matplotlib.pyplot as plt


def auroc(found, kind):
    """AUROC of zeros against anomalies of one kind."""
    part = (y[test] == 0) | kind
    return 100 * roc_auc_score(y[test][part] == 0, found[part])


known = y[test] == 6
other = ~known & (y[test] != 0)
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for name, kind in (("sixes", known), ("other digits", other)):
    ax.plot(list(scores), [auroc(s, kind) for s in scores.values()], "o-", label=name)
ax.set(xlabel="known anomalies in training (sixes)", ylabel="AUROC, %")
_ = ax.legend()
