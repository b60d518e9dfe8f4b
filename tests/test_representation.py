"""What a representation is worth: each measure against an independent one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from torch import nn

from skdeepad import BackboneFeatures
from skdeepad.backbones import Backbone
from skdeepad.detectors._source_and_cloner import SourceAndCloner
from skdeepad.inspection import RepresentationDisplay
from skdeepad.representation import (
    brittleness,
    compare_representations,
    gradient_norms,
    oracle,
    separability,
)

OPTIONS = {"image_size": 32, "random_state": 0}


class Scaled(nn.Module):
    """A representation of another scale."""

    def __init__(self, factor):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(1, 6, 3, stride=2, bias=False)
        self.conv.weight.data = torch.randn(6, 1, 3, 3, generator=generator)
        self.factor = factor

    def forward(self, x):
        return self.factor * self.conv(x).relu()


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X = X.reshape(-1, 8, 8) / 16
    return X[y == 0][:60], X[y == 1][:40]


def test_gradient_norms_by_hand():
    rng = np.random.default_rng(0)
    W, V = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    mean, scale = rng.normal(size=4), rng.uniform(1, 3, size=4)
    source = Backbone({"a": nn.Linear(3, 4, bias=False)}, in_channels=3, vectors=True)
    source.stages["a"].weight.data = torch.from_numpy(W)
    linear = nn.Linear(3, 4, bias=False)
    linear.weight.data = torch.from_numpy(V)

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return [self.linear(x)]

    network = SourceAndCloner(
        source,
        Student(),
        ("a",),
        [torch.from_numpy(mean)],
        [torch.from_numpy(scale)],
    ).frozen()
    X = rng.normal(size=(5, 3))
    found = gradient_norms(network, torch.from_numpy(X))
    # L = ||W x - mean - scale V x||^2
    matrix = W - scale[:, None] * V
    gradients = 2 * (X @ matrix.T - mean) @ matrix
    assert_allclose(found[:, 0], np.linalg.norm(gradients, axis=1), rtol=1e-5)


def test_brittleness_does_not_depend_on_scale(digits):
    X, _ = digits
    small, large = (
        brittleness(X, lambda f=factor: Scaled(f), max_steps=5, **OPTIONS)["features"]
        for factor in (1, 50)
    )
    assert small > 0
    assert_allclose(large, small, rtol=1e-2)


def test_separability_of_what_is_the_same_and_what_is_not(digits):
    X, other = digits
    halves = separability(X[:30], X[30:], stages="stage3", **OPTIONS)["stage3"]
    apart = separability(X, other, stages="stage3", **OPTIONS)["stage3"]
    assert halves["auroc"] < 0.75
    assert apart["auroc"] > 0.99
    assert apart["accuracy"] > 0.95


def test_oracle_is_a_forest_on_the_features(digits):
    X, other = digits
    known, new = np.concatenate([X[:30], other[:20]]), np.concatenate([X[30:], X[:5]])
    y, y_new = np.repeat([1, -1], [30, 20]), np.repeat([1, -1], [30, 5])
    found = oracle(known, y, new, y_new, stages="stage2", n_estimators=20, **OPTIONS)
    features = BackboneFeatures(stages="stage2", **OPTIONS)
    Z = features.fit_transform(known)
    scores = [
        RandomForestClassifier(20, random_state=seed)
        .fit(Z, y)
        .predict_proba(features.transform(new))[:, 1]
        for seed in range(5)
    ]
    expected = [roc_auc_score(y_new, score) for score in scores]
    assert min(expected) - 0.1 < found["stage2"] < max(expected) + 0.1
    again = oracle(known, y, new, y_new, stages="stage2", n_estimators=20, **OPTIONS)
    assert again == found
    with pytest.raises(ValueError, match=r"\(\+1\) and anomalies \(-1\)"):
        oracle(known, np.ones(50), new, y_new)


@pytest.fixture(scope="module")
def table(digits):
    backbones = [("lite", "efficientnet_lite0"), ("conv", lambda: Scaled(1))]
    return compare_representations(
        backbones, *digits, max_steps=5, verbose=False, **OPTIONS
    )


def test_table(table, digits):
    X, other = digits
    assert list(table.backbone.unique()) == ["lite", "conv"]
    stages = [f"stage{i}" for i in range(1, 8)]
    assert table.stage.tolist() == ["stem", *stages, "features"]
    assert_array_equal(table["rank"], table.brittleness.rank(ascending=False))
    assert (table.images_per_second > 0).all()
    shares = ["separability", "separability_auroc", "kd_auroc", "mahalanobis_auroc"]
    assert table[[*shares, "knn_auroc"]].stack().between(0, 1).all()
    alone = separability(X, other, stages="stage3", **OPTIONS)["stage3"]
    row = table[table.stage == "stage3"].iloc[0]
    assert row.separability_auroc == pytest.approx(alone["auroc"], abs=0.01)


def test_table_without_anomalies(digits):
    table = compare_representations(
        ["mnist_lenet"], digits[0], max_steps=2, image_size=28, random_state=0
    )
    assert list(table) == [
        "backbone",
        "stage",
        "n_features",
        "brittleness",
        "rank",
        "images_per_second",
    ]
    with pytest.raises(ValueError, match="with anomalies"):
        RepresentationDisplay(table=table).plot()


def test_each_backbone_passes_once(digits, monkeypatch):
    """The features' pass, the student's, and the gradients'; nothing twice."""
    X, other = digits
    seen = []
    run = BackboneFeatures._front

    def counted(self):
        seen.append(type(self).__name__)
        return run(self)

    monkeypatch.setattr(BackboneFeatures, "_front", counted)
    compare_representations(
        ["mnist_lenet"], X, other, max_steps=1, image_size=28, random_state=0
    )
    # one image, and both groups
    assert seen.count("BackboneFeatures") == 3


def test_pictures(table):
    import matplotlib

    matplotlib.use("agg")
    display = RepresentationDisplay(table=table).plot()
    assert len(display.axes_) == 3
    pearson = table[["mahalanobis_auroc", "kd_auroc"]].corr().iloc[0, 1]
    assert f"Pearson {pearson:.2f}" in display.axes_[0].get_title()
    assert display.axes_[2].get_xscale() == "log"
    again = RepresentationDisplay(table=table).plot(axes=display.axes_)
    assert again.figure_ is display.figure_
    assert isinstance(table, pd.DataFrame)
