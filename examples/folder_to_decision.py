"""A folder of photographs of good parts -> a decision, a heatmap and a list of regions.

Writes a folder of 60 photographs to learn from and 24 to test (defects painted on
bricks), laid out as the MVTec AD data set is; with --root it takes yours instead.

    python examples/folder_to_decision.py [--root mvtec/bottle] [--out DIR] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from PIL import Image

from skdeepad import KDClonerEstimator
from skdeepad.datasets import load_image_folder, make_texture_defects
from skdeepad.inspection import AnomalyMapDisplay
from skdeepad.metrics import anomaly_roc_auc_score, aupro_score, pixel_roc_auc_score


def main() -> None:
    """Learn from the good photographs of a folder, and judge the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="a folder with train/good and test/<kind>")
    parser.add_argument("--out", default=".", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a few steps, for a test")
    args = parser.parse_args()
    early = ("stage1", "stage2", "stage3")  # where small defects show
    detector = KDClonerEstimator(
        image_size=96,
        stages=early,
        score_stages=early,
        discrepancy="mahalanobis",
        max_steps=5 if args.quick else 150,
        random_state=0,
        verbose=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        sizes = (24, 3) if args.quick else (60, 12)
        root = args.root or write_photographs(Path(folder), *sizes)

        # from a folder to decisions, maps, regions and metrics
        data = load_image_folder(root)
        detector.fit(data.paths_train)
        decisions = detector.decision_function(data.paths_test)  # negative: anomaly
        maps = detector.anomaly_map(data.paths_test)
        regions = detector.locate(data.paths_test)
        image_auroc = anomaly_roc_auc_score(data.y_test, decisions)
        pixel_auroc = pixel_roc_auc_score(data.masks_test, maps)
        overlap = aupro_score(data.masks_test, maps)
        _, first = np.unique(data.kinds_test, return_index=True)  # one of each kind
        display = AnomalyMapDisplay.from_estimator(
            detector, data.paths_test[first], masks=data.masks_test[first]
        )

        file = Path(args.out, "folder_to_decision.png")
        display.figure_.savefig(file, dpi=80)
        print(f"written: {file}")
    regions["file"] = ["/".join(Path(file).parts[-2:]) for file in regions["file"]]
    print(regions.head(10).to_string(index=False, float_format="%.2f"))
    good = data.y_test == 1
    print(
        f"found {(decisions[~good] < 0).sum()} of {(~good).sum()} defects, "
        f"{(decisions[good] < 0).sum()} false alarms on {good.sum()} good parts\n"
        f"AUROC of images {image_auroc:.3f}, of pixels {pixel_auroc:.3f}, "
        f"per-region overlap {overlap:.3f}"
    )


def write_photographs(root: Path, n_train: int, n_test: int) -> Path:
    """Write good and defective patches of a photograph, and masks of the defects."""
    data = make_texture_defects(
        "brick",
        n_train=n_train,
        n_test_good=n_test,
        n_test_defective=n_test,
        image_size=96,
        random_state=0,
    )
    for i, image in enumerate(data.X_train):
        save(image, root / "train" / "good" / f"{i:03}.png")
    for i, (image, mask, kind) in enumerate(
        zip(data.X_test, data.masks_test, data.kinds_test, strict=True)
    ):
        save(image, root / "test" / kind / f"{i:03}.png")
        if kind != "good":
            mask_file = root / "ground_truth" / kind / f"{i:03}_mask.png"
            save((255 * mask).astype("uint8"), mask_file)
    return root


def save(image, path: Path) -> None:
    """Write an image, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


if __name__ == "__main__":
    main()
