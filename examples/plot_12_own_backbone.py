"""
A network of your own
=====================

Any ``torch.nn.Module`` can be a backbone. Its children become the stages.
"""

from torch import nn

# %%
# The network
# -----------
# Your own would be trained; random weights do here.

network = nn.Sequential()
network.add_module("edges", nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU()))
network.add_module("shapes", nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()))
network.add_module("parts", nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()))

from skdeepad.backbones import to_backbone

backbone = to_backbone(network)
print(backbone.stage_names)

# %%
# Use it in any detector
# ----------------------

from skdeepad import MahalanobisFeatureScorer
from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "brick",
    n_train=100,
    n_test_good=50,
    n_test_defective=50,
    image_size=64,
    random_state=0,
)
from sklearn.metrics import roc_auc_score

own = MahalanobisFeatureScorer(backbone=network, stages=("edges", "shapes", "parts"))
own.fit(data.X_train)
pretrained = MahalanobisFeatureScorer(image_size=64).fit(data.X_train)
for name, detector in (("random", own), ("pretrained", pretrained)):
    auroc = roc_auc_score(data.y_test, detector.score_samples(data.X_test))
    print(f"{name:11} AUROC {auroc:.3f}")

# %%
# What the two make of the same patches
# -------------------------------------

import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(5, 4.5), layout="constrained")
x, y = (d.decision_function(data.X_test) for d in (own, pretrained))
for name, kind, colour in (("good", 1, "C0"), ("defective", -1, "C3")):
    rows = data.y_test == kind
    ax.scatter(x[rows], y[rows], s=16, color=colour, label=name)
ax.axhline(0, color="gray", lw=0.8)
ax.axvline(0, color="gray", lw=0.8)
ax.set(xlabel="random weights: decision", ylabel="pretrained: decision")
_ = ax.legend()
