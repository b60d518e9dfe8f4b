"""
Compare representations
=======================

Which network, and which of its stages, suits your images?
"""

from skdeepad.datasets import make_texture_defects
from skdeepad.inspection import RepresentationDisplay
from skdeepad.representation import compare_representations

data = make_texture_defects(
    "brick",
    n_train=120,
    n_test_good=1,
    n_test_defective=60,
    image_size=64,
    random_state=0,
)
X_anomalous = data.X_test[data.y_test == -1]

# %%
# Two networks, all stages
# ------------------------

table = compare_representations(
    ["efficientnet_lite0", "efficientnet_lite1"],
    data.X_train,
    X_anomalous,
    image_size=64,
    max_steps=40,
    random_state=0,
)
columns = ["backbone", "stage", "n_features", "mahalanobis_auroc", "kd_auroc"]
print(table[columns].to_string(index=False, float_format="%.3f"))

# %%
# What goes with good detection?
# ------------------------------
# Figures 3 to 5 of "Brittle Features May Help Anomaly Detection", for these images.

display = RepresentationDisplay(table=table).plot()
