"""
What PANDA's adaptation does
============================

PANDA trains the last stages of a pretrained network to draw normal images together.
Anomalies stay behind: a projection to two dimensions shows it.
"""

from sklearn.datasets import load_digits

X, y = load_digits(return_X_y=True)
images = X.reshape(-1, 8, 8) / 16
normal, other = images[y == 3], images[y == 5][:80]

# %%
# Features before and after
# -------------------------
# ``transform`` gives the features of the adapted network.

from skdeepad import PANDAEstimator

features = {}
for adaptation in (None, "early_stopping"):
    panda = PANDAEstimator(
        adaptation=adaptation,
        image_size=64,
        max_steps=60,
        include_initial=False,
        random_state=0,
    )
    panda.fit(normal[:100])
    features[adaptation] = [panda.transform(part) for part in (normal[100:], other)]

# %%
# The projection
# --------------
# Both pictures have the same scale.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA

fig, axes = plt.subplots(
    1, 2, figsize=(9, 4.3), sharex=True, sharey=True, layout="constrained"
)
for ax, (adaptation, parts) in zip(axes, features.items(), strict=True):
    center = parts[0].mean(axis=0)
    flat = PCA(2).fit(np.concatenate(parts))
    for part, name in zip(parts, ("threes: normal", "fives: anomalies"), strict=True):
        ax.scatter(*flat.transform(part).T, s=14, label=name)
    radius = [np.linalg.norm(part - center, axis=1).mean() for part in parts]
    ax.set_title(
        f"{'after' if adaptation else 'before'}: mean distance to the centre\n"
        f"{radius[0]:.2f} of normal images, {radius[1]:.2f} of anomalies",
        fontsize=10,
    )
_ = axes[0].legend()
