"""Detectors in scikit-learn: a pipeline, a grid search, scorers, curves, a threshold.

python examples/scikit_learn_tour.py [--out DIR] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline

from skdeepad import (
    BackboneFeatures,
    KNNScorer,
    MahalanobisFeatureScorer,
    OneClassKFold,
)
from skdeepad.datasets import make_texture_defects
from skdeepad.inspection import AnomalyPrecisionRecallDisplay, AnomalyRocCurveDisplay
from skdeepad.metrics import anomaly_roc_auc, neg_anomaly_fpr95


def main() -> None:
    """Take images through what scikit-learn offers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="few images, for a test")
    args = parser.parse_args()
    n, size = (24, 32) if args.quick else (200, 96)
    data = make_texture_defects(
        "brick",
        n_train=n,
        n_test_good=n // 2,
        n_test_defective=n // 2,
        image_size=size,
        random_state=0,
    )

    # a detector is an outlier detector: +1 is good, -1 an anomaly
    detector = MahalanobisFeatureScorer(image_size=size).fit(data.X_train)
    good = data.y_test == 1
    flagged = detector.predict(data.X_test) == -1
    print(
        f"MahalanobisFeatureScorer: {flagged[~good].mean():.0%} of the defects found, "
        f"{flagged[good].mean():.0%} false alarms"
    )
    # another threshold, without another fit
    detector.recalibrate(contamination=0.2)
    flagged = detector.predict(data.X_test) == -1
    print(
        f"... contamination=0.2:    {flagged[~good].mean():.0%} of the defects found, "
        f"{flagged[good].mean():.0%} false alarms"
    )

    # features of a network, and behind them any estimator of scikit-learn's
    forest = make_pipeline(
        BackboneFeatures(image_size=size), PCA(10), IsolationForest(random_state=0)
    ).fit(data.X_train)

    # a grid search that trains on good images only; the cache sees each image once
    X = np.concatenate([data.X_train, data.X_test])
    y = np.concatenate([np.ones(len(data.X_train), dtype=int), data.y_test])
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(
            [
                ("features", BackboneFeatures(image_size=size, memory=folder)),
                ("scorer", KNNScorer()),
            ]
        )
        grid = {
            "scorer__metric": ["euclidean", "cosine", "mahalanobis"],
            "scorer__n_neighbors": [1, 2, 5],
        }
        folds = OneClassKFold(3, shuffle=True, random_state=0)
        search = GridSearchCV(pipeline, grid, scoring=anomaly_roc_auc, cv=folds)
        search.fit(X, y)
        print(f"grid search: {search.best_params_}, AUROC {search.best_score_:.3f}")

        # several scores of one cross-validation
        scoring = {"auroc": anomaly_roc_auc, "neg_fpr95": neg_anomaly_fpr95}
        found = cross_validate(search.best_estimator_, X, y, scoring=scoring, cv=folds)
        for name in scoring:
            print(f"cross-validated {name}: {found[f'test_{name}'].mean():.3f}")

    # curves in which the anomaly is what is looked for; a dot is the threshold
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    for name, model in {"Mahalanobis": detector, "forest": forest}.items():
        for display, ax in (
            (AnomalyRocCurveDisplay, left),
            (AnomalyPrecisionRecallDisplay, right),
        ):
            display.from_estimator(model, data.X_test, data.y_test, name=name, ax=ax)
    file = Path(args.out, "scikit_learn_tour.png")
    figure.savefig(file, dpi=110)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
