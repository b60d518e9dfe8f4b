"""
Choose without anomalies
========================

A grid search needs a score, and a score needs anomalies. Where there are none,
``PseudoAnomalyScorer`` makes them from held-out normal images.
"""

from skdeepad.datasets import make_pseudo_anomalies, make_texture_defects

data = make_texture_defects(
    "grass",
    n_train=90,
    n_test_good=60,
    n_test_defective=60,
    image_size=96,
    random_state=0,
)

# %%
# What they look like
# -------------------

import matplotlib.pyplot as plt

spoilt = make_pseudo_anomalies(data.X_train[:3])
fig, axes = plt.subplots(3, 6, figsize=(9, 4.6), layout="constrained")
for column, (name, images) in zip(
    axes.T, {"good": data.X_train[:3], **spoilt}.items(), strict=True
):
    column[0].set_title(name, fontsize=9)
    for ax, image in zip(column, images, strict=True):
        ax.imshow(image, cmap="gray")
        ax.set_axis_off()

# %%
# A search
# --------
# With ``memory=`` each image passes through the network once for all candidates.

import tempfile

import pandas as pd
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import Pipeline

from skdeepad import BackboneFeatures, GaussianScorer, KNNScorer, PseudoAnomalyScorer

folder = tempfile.TemporaryDirectory()
pipeline = Pipeline(
    [
        ("features", BackboneFeatures(image_size=64, memory=folder.name)),
        ("scorer", KNNScorer()),
    ]
)
grid = {
    "features__stages": ["stage3", "stage5", "stage7"],
    "scorer": [KNNScorer(), KNNScorer(metric="cosine"), GaussianScorer()],
}
folds = KFold(3, shuffle=True, random_state=0)
search = GridSearchCV(pipeline, grid, scoring=PseudoAnomalyScorer(), cv=folds)
search.fit(data.X_train)

# %%
# Did it choose well?
# -------------------
# Here we know the defects, and can compare the criterion with the truth.

table = pd.DataFrame(search.cv_results_)
table["true AUROC"] = [
    roc_auc_score(
        data.y_test,
        pipeline.set_params(**params).fit(data.X_train).score_samples(data.X_test),
    )
    for params in table["params"]
]
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
for stage, rows in table.groupby("param_features__stages"):
    ax.scatter(rows["mean_test_score"], rows["true AUROC"], label=stage)
best = table.loc[search.best_index_]
ax.scatter(best["mean_test_score"], best["true AUROC"], s=160, fc="none", ec="black")
ax.set(xlabel="AUROC on pseudo-anomalies", ylabel="AUROC on true defects")
ax.legend(title="circle: chosen", fontsize=8)
folder.cleanup()
