"""Compare detectors over seeds and kinds of defects, in a table and a picture.

python examples/compare_methods.py [--out DIR] [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn.pipeline import make_pipeline

from skdeepad import (
    BackboneFeatures,
    KDClonerEstimator,
    KNNScorer,
    MahalanobisFeatureScorer,
    PANDAEstimator,
    compare_detectors,
)
from skdeepad.datasets import make_texture_defects
from skdeepad.inspection import DetectorComparisonDisplay, LossCurveDisplay


def main() -> None:
    """Fit four detectors three times, and draw how they do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="where the pictures go")
    parser.add_argument("--quick", action="store_true", help="few steps, for a test")
    args = parser.parse_args()
    n, size, steps, n_seeds = (24, 32, 3, 1) if args.quick else (100, 96, 100, 3)
    data = make_texture_defects(
        "brick",
        n_train=n,
        n_test_good=n,
        n_test_defective=n,
        image_size=size,
        random_state=0,
    )
    early = ("stage2", "stage3", "stage4", "stage5")
    detectors = {
        "features, kNN": make_pipeline(BackboneFeatures(image_size=size), KNNScorer()),
        "Mahalanobis": MahalanobisFeatureScorer(image_size=size),
        "PANDA": PANDAEstimator(image_size=size, max_steps=min(steps, 10)),
        "cloner": KDClonerEstimator(
            stages=early,
            score_stages=early,
            discrepancy="mahalanobis",
            image_size=size,
            max_steps=steps,
        ),
    }
    table = compare_detectors(
        detectors,
        data.X_train,
        data.X_test,
        data.y_test,
        kinds_test=data.kinds_test,
        n_seeds=n_seeds,
    )
    columns = ["auroc", "found", "false_alarms", "fit_seconds"]
    of_all = table[table["kind"] == "all"].groupby("detector", sort=False)[columns]
    print(of_all.agg(["mean", "std"]).round(3).to_string())

    file = Path(args.out, "compare_methods.png")
    DetectorComparisonDisplay(table=table).plot().figure_.savefig(file, dpi=110)
    print(f"written: {file}")

    # did the cloner train for long enough?
    cloner = detectors["cloner"].set_params(random_state=0).fit(data.X_train)
    _, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
    file = Path(args.out, "compare_methods_loss.png")
    LossCurveDisplay.from_estimator(cloner, ax=ax).figure_.savefig(file, dpi=110)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
