"""
How many of tonight's alarms are false?
=======================================

With a threshold, the number of false alarms grows with the number of images. Selecting
by p-values limits the share of false alarms among all alarms instead.
"""

import numpy as np

from skdeepad import KNNScorer
from skdeepad.conformal import select_anomalies

# %%
# A night with 1,000 samples, 50 of them anomalies
# ------------------------------------------------
# Vectors stand in for the features of images here; every detector of this package has
# p-values.

rng = np.random.default_rng(0)
detector = KNNScorer().fit(rng.normal(size=(2_000, 8)))
night = rng.normal(size=(1_000, 8))
night[:50] += 1.4
is_anomaly = np.arange(1_000) < 50
p = detector.p_values(night)

# %%
# Threshold or selection
# ----------------------


def tell(name, selected):
    """Print what was selected."""
    false = selected & ~is_anomaly
    print(
        f"{name:22}{selected.sum():4} alarms, {false.sum():3} of them false; "
        f"{(selected & is_anomaly).sum()} of 50 anomalies found"
    )


tell("p <= 0.05", p <= 0.05)
for alpha in (0.05, 0.1, 0.2):
    tell(f"discovery rate {alpha}", select_anomalies(p, alpha=alpha))

# %%
# The picture
# -----------
# P-values in order, and the line that Benjamini and Hochberg draw for 10 %: all up to
# the last one below the line are selected.

import matplotlib.pyplot as plt

order = np.argsort(p)[:120]
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
ranks = np.arange(1, 121)
colours = np.where(is_anomaly[order], "C3", "C0")
ax.scatter(ranks, p[order], c=colours, s=14)
ax.plot(ranks, 0.1 * ranks / len(p), color="black", label="0.1 k / m")
ax.set(xlabel="rank k", ylabel="p-value (red: true anomalies)", ylim=(0, 0.06))
_ = ax.legend()
