"""
A grid search over a pipeline, with a cache
===========================================

Detectors are scikit-learn estimators, so ``GridSearchCV`` tunes them. ``memory=`` makes
the network see each image once for the whole search.
"""

import tempfile

import numpy as np
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from skdeepad import BackboneFeatures, KNNScorer, OneClassKFold
from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "brick",
    n_train=120,
    n_test_good=30,
    n_test_defective=60,
    image_size=96,
    random_state=0,
)
X = np.concatenate([data.X_train, data.X_test])
y = np.concatenate([np.ones(120, dtype=int), data.y_test])

# %%
# The search
# ----------
# ``OneClassKFold`` trains on normal images only, and tests on both kinds.

folder = tempfile.TemporaryDirectory()
pipeline = Pipeline(
    [
        ("features", BackboneFeatures(image_size=64, memory=folder.name)),
        ("pca", PCA(random_state=0)),
        ("scorer", KNNScorer()),
    ]
)
grid = {
    "features__stages": ["stage3", "stage5"],
    "pca__n_components": [5, 20],
    "scorer__n_neighbors": [1, 2, 5, 10],
}
search = GridSearchCV(pipeline, grid, scoring="roc_auc", cv=OneClassKFold(3))
search.fit(X, y)
print(f"{search.best_score_:.3f}", search.best_params_)

# %%
# Time
# ----
# The first candidate of each stage pays for the network; all others find its outputs.

import matplotlib.pyplot as plt
import pandas as pd

table = pd.DataFrame(search.cv_results_)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (stage, n), rows in table.groupby(
    ["param_features__stages", "param_pca__n_components"]
):
    left.plot(
        rows["param_scorer__n_neighbors"].astype(int),
        rows["mean_test_score"],
        "o-",
        label=f"{stage}, {n} components",
    )
left.set(xlabel="neighbours", ylabel="AUROC", xscale="log")
left.legend(fontsize=8)
right.bar(table.index, table["mean_fit_time"] + table["mean_score_time"])
right.set(xlabel="candidate, in the order of the search", ylabel="seconds a fold")
folder.cleanup()
