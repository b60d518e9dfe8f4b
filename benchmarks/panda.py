"""PANDA's own studies, on Fashion-MNIST with the embedded network.

    python benchmarks/panda.py adaptations
    python benchmarks/panda.py stages --seeds 0 1 2
    python benchmarks/panda.py one_class_svm

Each run is one of `one_vs_rest.py`, which writes its JSON; the table at the end has the
paper's figure for the same row, on another network (ResNet-152) and, for the studies of
its tables 5 and section 4.2.3, on other images (CIFAR-10).

adaptations    table 4: which one keeps the features from collapse
stages         table 5: how many of the last stages are trained
scorers        section 4.2.3: what scores the adapted features
linear         section 4.2.2: adapting the last stage, against whitening
budget         how long to train, and lambda: on training images alone
one_class_svm  table 1: the one-class SVM on pixels, its parameters chosen on the test
               images, as in the paper; of 1,000 training images
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import one_vs_rest
import skimage.data
import torch
from _common import environment, write_json
from joblib import Parallel, delayed
from sklearn.metrics import roc_auc_score
from sklearn.svm import OneClassSVM

from skdeepad import PANDAEstimator
from skdeepad.backbones import load_backbone
from skdeepad.datasets import load_fashion_mnist

# study -> row -> detector and settings of one_vs_rest, and the paper's figure
STUDIES: dict[str, dict[str, tuple[str, list[str], float | None]]] = {
    "adaptations": {
        "none": ("panda", ["adaptation=None"], 94.5),
        "none, not normalized": ("panda", ["adaptation=None", "normalize=False"], 94.5),
        "joint": ("panda-joint", [], 94.9),
        "early_stopping": ("panda", ["adaptation=early_stopping"], 95.4),
        "ses": (
            "panda",
            ["adaptation=ses", "max_steps=100", "n_checkpoints=5"],
            95.5,
        ),
        "ewc": ("panda", [], 95.6),
        "ewc, adapted features alone": ("panda", ["include_initial=False"], 95.6),
    },
    "stages": {
        "last": ("panda", ["trainable_stages=stage7,conv_head"], 94.8),
        "last two": ("panda", [], 96.2),
        "last three": (
            "panda",
            ["trainable_stages=stage5,stage6,stage7,conv_head"],
            95.9,
        ),
    },
    "scorers": {
        "knn": ("panda", [], 96.2),
        "kmeans": ("panda", ["scorer=kmeans"], 94.9),
        "centroid": ("panda", ["scorer=centroid"], 94.2),
    },
    "linear": {
        "whitening": ("whitened-knn", [], 94.6),
        "last stage": ("panda", ["trainable_stages=stage7,conv_head"], 94.8),
    },
    "budget": {
        "none": ("panda", ["adaptation=None"], None),
        "defaults": ("panda", [], None),
    }
    | {
        f"{steps} steps, lambda {strength}": (
            "panda",
            [f"max_steps={steps}", f"ewc_lambda={strength}", "include_initial=False"],
            None,
        )
        for steps, strength in [
            *product([15, 30, 50, 100], [0.0]),
            *product([30, 100], [0.3, 3.0, 30.0]),
        ]
    },
}
SVM_GRID = list(product(np.arange(1, 10) / 10, 2.0 ** np.arange(-7, 3)))  # nu, gamma


class JointPANDA(PANDAEstimator):
    """Joint optimization with photographs in place of ImageNet, which is not at hand.

    Crops of scikit-image's photographs, each of the class that the pretrained network
    itself gives it.
    """

    def fit(self, X: Any, y: Any = None) -> JointPANDA:
        """Fit to normal images and the photographs."""
        crops, classes = pretraining_images()
        return super().fit(X, y, X_pretrain=crops, y_pretrain=classes)


def pretraining_images(n: int = 512, size: int = 28) -> tuple[Any, Any]:
    """Cut crops out of photographs, and classify them."""
    rng = np.random.default_rng(0)
    names = ("astronaut", "coffee", "chelsea", "rocket")
    crops = []
    for i in range(n):
        photo = getattr(skimage.data, names[i % len(names)])()
        side = int(rng.integers(64, min(photo.shape[:2])))
        top = rng.integers(photo.shape[0] - side)
        left = rng.integers(photo.shape[1] - side)
        crop = photo[top : top + side, left : left + side].mean(axis=2)
        step = np.linspace(0, side - 1, size).astype(int)
        crops.append(crop[np.ix_(step, step)].astype(np.uint8))
    images = np.stack(crops)  # grey and as small as Fashion-MNIST's
    network = load_backbone("efficientnet_lite0")
    values = torch.from_numpy(images)[:, None] / 255
    with torch.inference_mode():
        larger = torch.nn.functional.interpolate(values, size=(112, 112))
        return images, network(larger).argmax(dim=1).numpy()


def svm_auroc(nu: float, gamma: float, X: Any, X_test: Any, y_test: Any) -> float:
    scores = OneClassSVM(nu=nu, gamma=gamma).fit(X).score_samples(X_test)
    return 100 * roc_auc_score(y_test, scores)


def run_one_class_svm(n_train: int = 1000, n_test: int = 2000) -> None:
    told = environment()
    train, test = (load_fashion_mnist(split) for split in ("train", "test"))
    flat, flat_test = (d.images.reshape(len(d.images), -1) / 255 for d in (train, test))
    rows = []
    for k, name in enumerate(train.target_names):
        X = flat[train.target == k][:n_train]
        y_test = np.where(test.target[:n_test] == k, 1, -1)
        found = Parallel(n_jobs=2)(
            delayed(svm_auroc)(nu, gamma, X, flat_test[:n_test], y_test)
            for nu, gamma in SVM_GRID
        )
        best = int(np.argmax(found))
        row = {"class": name, "auroc": round(found[best], 2)}
        row |= dict(zip(("nu", "gamma"), SVM_GRID[best], strict=True))
        print(f"{name:16}{row['auroc']:8.2f}  {row}", flush=True)
        rows.append(row)
    mean = round(float(np.mean([row["auroc"] for row in rows])), 2)
    print(f"{'mean':16}{mean:8.2f}    paper: 92.8")
    content = {"n_train": n_train, "n_test": n_test, "mean": mean, "classes": rows}
    write_json("panda-one_class_svm", {**content, "environment": told})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=[*STUDIES, "one_class_svm"])
    parser.add_argument("--rows", nargs="+", help="of the study; default: all")
    args, arguments = parser.parse_known_args()  # the others are one_vs_rest's
    if args.study == "one_class_svm":
        run_one_class_svm()
        return
    one_vs_rest.DETECTORS["panda-joint"] = partial(JointPANDA, adaptation="joint")
    with TemporaryDirectory() as folder:
        if "--memory" not in arguments:
            arguments += ["--memory", folder]
        arguments += ["--validate"] if args.study == "budget" else []
        rows = STUDIES[args.study]
        chosen = {name: rows[name] for name in rows if name in (args.rows or rows)}
        one_vs_rest.run_study(args.study, chosen, arguments)


if __name__ == "__main__":
    main()
