"""
Thresholds and p-values
=======================

A threshold that is asked for 5 % false alarms flags 5 % of new good images. Here is how
to set it, how to move it, and how far it may be off.
"""

from skdeepad import MahalanobisFeatureScorer
from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "gravel",
    n_train=200,
    n_test_good=300,
    n_test_defective=100,
    image_size=128,
    random_state=0,
)
detector = MahalanobisFeatureScorer(image_size=112, contamination=0.05)
detector.fit(data.X_train)

# %%
# Scores, and the threshold
# -------------------------

from skdeepad.inspection import ScoreHistogramDisplay

display = ScoreHistogramDisplay.from_estimator(detector, data.X_test, data.y_test)

# %%
# Does it hold?
# -------------
# The threshold was estimated from 200 images, so the share varies. The interval says by
# how much.

from skdeepad.conformal import false_alarm_interval

good = data.y_test == 1
decisions = detector.decision_function(data.X_test)
low, high = false_alarm_interval(detector)
print(f"flagged: {(decisions[good] < 0).mean():.1%} of 300 new good images")
print(f"expected: between {low:.1%} and {high:.1%}")

# %%
# Move it
# -------

detector.recalibrate(contamination=0.01)
decisions = detector.decision_function(data.X_test)
print(f"flagged: {(decisions[good] < 0).mean():.1%} of good images")
print(f"found: {(decisions[~good] < 0).mean():.1%} of defects")

# %%
# P-values
# --------
# The p-value of an image says how unusual it would be among good ones. Of good images,
# 10 % have a p-value of at most 0.1, and so on: their curve follows the diagonal.
# Defects lie above it.

import matplotlib.pyplot as plt
import numpy as np

p = detector.p_values(data.X_test)
t = np.linspace(0, 1, 101)
fig, ax = plt.subplots(figsize=(5, 4.5), layout="constrained")
for name, kind, colour in (("good", good, "C0"), ("defective", ~good, "C3")):
    ax.step(t, [(p[kind] <= x).mean() for x in t], color=colour, label=name)
ax.plot([0, 1], [0, 1], "--", color="gray", label="uniform")
ax.set(xlabel="p-value", ylabel="share of images with a smaller one")
_ = ax.legend()
