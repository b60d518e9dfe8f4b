"""Every public estimator where scikit-learn's own go: searches, files, other rooms."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import cache

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from estimators import PUBLIC, make, takes
from joblib import Parallel, delayed
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import uniform
from sklearn import config_context
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    StratifiedKFold,
    TunedThresholdClassifierCV,
    cross_validate,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import Bunch
from threadpoolctl import threadpool_limits

import skdeepad
from skdeepad import (
    BackboneFeatures,
    HSCClassifier,
    KNNScorer,
    MahalanobisFeatureScorer,
    OneClassKFold,
    PANDAEstimator,
)
from skdeepad.detectors._transformations import TransformationDetector
from skdeepad.metrics import anomaly_roc_auc

pytestmark = pytest.mark.xdist_group("searches")  # each is done once

# what a search may choose between, so that the choice matters
CHOICES = {
    "BackboneFeatures": {"stages": ["stage1", "stage2"]},
    "CentroidScorer": {"metric": ["euclidean", "cosine"]},
    "ClassGaussianScorer": {"covariance": ["diagonal", "oas"]},
    "ConformalDetector": {"estimator__stages": ["stage1", "stage2"]},
    "DeepSAD": {"learning_rate": [1e-4, 1e-2]},
    "DeepSVDD": {"learning_rate": [1e-4, 1e-2]},
    "DetectorEnsemble": {"weights": [[1, 0], [0, 1]]},
    "GEOMDetector": {"density": ["dirichlet", "none"]},
    "GaussianScorer": {"covariance": ["diagonal", "oas"]},
    "HSCClassifier": {"objective": ["hsc", "bce"]},
    "KDClonerEstimator": {"loss": ["value", "direction"]},
    "KMeansScorer": {"n_clusters": [1, 4]},
    "KNNScorer": {"n_neighbors": [1, 5]},
    "MahalanobisFeatureScorer": {"stages": ["stage1", "stage2"]},
    "MHRotDetector": {"learning_rate": [1e-4, 1e-1]},
    "MSADEstimator": {"learning_rate": [1e-6, 30.0]},
    "OpenSetClassifier": {"head": ["linear", "cosine"]},
    "PANDAEstimator": {"normalize": [True, False]},
    "PatchDetector": {"metric": ["cosine", "euclidean"]},
    "RobustDetector": {"estimator__stages": ["stage1", "stage2"]},
    "RotNetDetector": {"learning_rate": [1e-4, 1e-1]},
}
BUDGETS = {"max_steps": 2, "pretrain_steps": 1, "batch_size": 8, "random_state": 0}
# images first: loky starts a process anew that grows much after its first tasks
NETWORKS = {
    # the pretrained network, by name; the last stage is trained where some are
    "images": {"image_size": 32, "trainable_stages": "conv_head"},
    "vectors": {},
    "paths": {"backbone": "mnist_lenet"},
}
CASES = [(public, kind) for kind in NETWORKS for public in PUBLIC]
every_case = pytest.mark.parametrize(
    ("public", "kind"),
    CASES,
    ids=[f"{public.__name__}-{kind}" for public, kind in CASES],
)


def pipeline(public, kind):
    """Put an estimator, "it", behind others, and a scorer behind mere features."""
    network = NETWORKS[kind]
    first = StandardScaler() if kind == "vectors" else FunctionTransformer()
    steps = [("first", first)]
    sees_images = takes(public, "backbone") or takes(public, "estimator")
    if kind != "vectors" and not sees_images:
        options = {**BUDGETS, **network, "stages": "stage2"}
        steps.append(("features", make(BackboneFeatures, **options)))
    if kind != "vectors" and issubclass(public, TransformationDetector):
        # up to 72 passes for each image: small ones, a network from scratch
        network = {"image_size": 8, "trainable_stages": "stage3"}
    steps.append(("it", make(public, **BUDGETS, **network)))
    if public is BackboneFeatures:
        steps.append(("scorer", KNNScorer()))
    return Pipeline(steps)


def search(public, kind, samples, **options):
    """Choose by cross-validation, trained on normal samples and tested on both."""
    model = pipeline(public, kind)
    # classifiers are trained on both, too
    cv = StratifiedKFold(2) if is_classifier(model) else OneClassKFold(2)
    grid = {f"it__{name}": values for name, values in CHOICES[public.__name__].items()}
    return GridSearchCV(
        model, grid, scoring="roc_auc", cv=cv, error_score="raise", **options
    ).fit(*samples[kind])


@pytest.fixture(scope="module")
def samples(textures, image_files):
    """Vectors, images and their files, some of them anomalies."""
    rng = np.random.default_rng(0)
    vectors = np.r_[rng.normal(size=(40, 6)), rng.normal(1, 1, size=(10, 6))]
    vectors @= rng.normal(size=(6, 6))  # correlated
    labels = np.r_[np.ones(8, dtype=int), textures.y_test]
    return {
        "vectors": (vectors, np.repeat([1, -1], [40, 10])),
        "images": (np.concatenate([textures.X_train[:8], textures.X_test]), labels),
        "paths": ([*image_files.train[:8], *image_files.test], labels),
    }


@pytest.fixture(scope="module")
def searched(samples):
    """What each search in two processes found; each is done once."""
    return cache(lambda public, kind: search(public, kind, samples, n_jobs=2))


@every_case
def test_search_in_processes(public, kind, samples, searched):
    there = searched(public, kind).cv_results_
    with threadpool_limits(1):  # as there: sums are rounded by the number of threads
        here = search(public, kind, samples, refit=False).cv_results_
    assert len(set(here["mean_test_score"])) == 2  # the choice matters
    for fold in ("split0_test_score", "split1_test_score"):
        assert_array_equal(there[fold], here[fold])


@every_case
def test_clones_are_as_new(public, kind, searched):
    fitted = searched(public, kind).best_estimator_["it"]
    new = clone(fitted)
    assert str(new.get_params()) == str(fitted.get_params())
    assert set(vars(new)) == set(new.get_params(deep=False)) < set(vars(fitted))


@every_case
def test_skops(public, kind, samples, searched):
    sio = pytest.importorskip("skops.io")
    model, (X, _) = searched(public, kind).best_estimator_, samples[kind]
    saved = sio.dumps(model)
    loaded = sio.loads(saved, trusted=sio.get_untrusted_types(data=saved))
    assert_array_equal(loaded.score_samples(X), model.score_samples(X))


def test_files_are_read_in_another_process(samples, searched, tmp_path):
    """One process for all, as it takes long to start."""
    told, expected = [], []
    for public, kind in CASES:
        X, _ = samples[kind]
        model = searched(public, kind).best_estimator_
        name = f"{public.__name__}-{kind}"
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(model))
        joblib.dump(model, tmp_path / f"{name}.joblib")
        skdeepad.save(model, tmp_path / f"{name}.skdeepad")
        told += [(f"{name}.{end}", X) for end in ("pickle", "joblib", "skdeepad")]
        expected += 3 * [model.score_samples(X)]
    (tmp_path / "told").write_bytes(pickle.dumps(told))
    code = """
import pickle
from pathlib import Path
import joblib, pandas, skdeepad
load = {
    ".joblib": joblib.load, ".pickle": pandas.read_pickle, ".skdeepad": skdeepad.load
}
told = pickle.loads(Path("told").read_bytes())
said = [load[Path(file).suffix](file).score_samples(X) for file, X in told]
Path("said").write_bytes(pickle.dumps(said))
"""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    said = pickle.loads((tmp_path / "said").read_bytes())
    for (file, _), there, here in zip(told, said, expected, strict=True):
        assert_array_equal(there, here, err_msg=file)


# ------------------------------------------------------- around a classifier of images


@pytest.fixture(scope="module")
def digits():
    """Images of one digit and of others."""
    X, y = load_digits(return_X_y=True)
    X, y = X.reshape(-1, 8, 8) / 16, np.where(y == 8, 1, -1)
    normal, other = np.flatnonzero(y == 1), np.flatnonzero(y == -1)
    train = np.r_[normal[:60], other[:60]]
    test = np.r_[normal[60:160], other[60:160]]
    return Bunch(X=X[train], y=y[train], X_test=X[test], y_test=y[test])


def hsc(**options):
    given = {"max_steps": 20, "batch_size": 32, "random_state": 0, **options}
    return HSCClassifier("mnist_lenet", **given)


def logistic(**options):
    features = BackboneFeatures("mnist_lenet", random_state=0, stages="stage2")
    return make_pipeline(features, StandardScaler(), LogisticRegression(**options))


def auc(model, digits):
    return roc_auc_score(digits.y_test, model.predict_proba(digits.X_test)[:, 1])


@pytest.fixture(scope="module")
def model(digits):
    return hsc().fit(digits.X, digits.y)


def test_voting(digits, model):
    members = [("hsc", hsc()), ("logistic", logistic())]
    voting = VotingClassifier(members, voting="soft").fit(digits.X, digits.y)
    alone = [model, logistic().fit(digits.X, digits.y)]
    expected = np.mean([one.predict_proba(digits.X_test) for one in alone], axis=0)
    assert_allclose(voting.predict_proba(digits.X_test), expected)
    assert auc(voting, digits) > 0.95


def test_stacking(digits, model):
    stack = StackingClassifier(
        [("hsc", hsc()), ("logistic", logistic())], LogisticRegression(), cv=2
    ).fit(digits.X, digits.y)
    seen = stack.transform(digits.X_test)
    assert_array_equal(seen[:, 0], model.predict_proba(digits.X_test)[:, 1])
    assert (stack.final_estimator_.coef_ > 0).all()  # both are of use
    assert auc(stack, digits) > 0.95


def test_bagging(digits):
    rows, new = digits.X.reshape(-1, 64), digits.X_test.reshape(-1, 64)
    bagging = BaggingClassifier(
        hsc(image_shape=(8, 8)), n_estimators=3, random_state=0
    ).fit(rows, digits.y)
    members = [member.predict_proba(new)[:, 1] for member in bagging.estimators_]
    assert len({tuple(member) for member in members}) == 3
    expected = np.mean(members, axis=0)
    assert_allclose(bagging.predict_proba(new)[:, 1], expected)
    assert roc_auc_score(digits.y_test, expected) > 0.9  # few steps, from scratch


def test_calibration_of_what_is_fitted(digits, model):
    """With the shares that the classes have, not those of balanced mini-batches."""
    rare = np.r_[
        np.flatnonzero(digits.y_test == 1), np.flatnonzero(digits.y_test == -1)[:20]
    ]
    odd, even = rare[1::2], rare[::2]
    frozen = FrozenEstimator(model)
    calibrated = CalibratedClassifierCV(frozen).fit(
        digits.X_test[odd], digits.y_test[odd]
    )
    assert calibrated.calibrated_classifiers_[0].estimator.estimator is model
    losses = [
        log_loss(digits.y_test[even], one.predict_proba(digits.X_test[even]))
        for one in (calibrated, model)
    ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("method", ["predict_proba", "decision_function"])
def test_thresholds(digits, model, method):
    scores = getattr(model, method)(digits.X_test)
    scores = scores[:, 1] if scores.ndim == 2 else scores
    thresholds = np.quantile(scores, [0.2, 0.4, 0.6])
    expected = [np.where(scores >= value, 1, -1) for value in thresholds]
    given = {"estimator": FrozenEstimator(model), "response_method": method}
    for value, predicted in zip(thresholds, expected, strict=True):
        fixed = FixedThresholdClassifier(threshold=value, pos_label=1, **given)
        fixed.fit(digits.X, digits.y)
        assert_array_equal(fixed.predict(digits.X_test), predicted)
    tuned = TunedThresholdClassifierCV(
        thresholds=thresholds, cv="prefit", refit=False, **given
    ).fit(digits.X_test, digits.y_test)
    accuracies = [
        balanced_accuracy_score(digits.y_test, predicted) for predicted in expected
    ]
    assert tuned.best_score_ == max(accuracies)
    assert tuned.best_threshold_ == thresholds[np.argmax(accuracies)]


def test_cross_validate(digits):
    scoring = {"area": "roc_auc", "anomalies": anomaly_roc_auc, "share": "accuracy"}
    found = cross_validate(
        hsc(),
        digits.X,
        digits.y,
        cv=StratifiedKFold(2),
        scoring=scoring,
        return_estimator=True,
        return_indices=True,
        error_score="raise",
    )
    assert_allclose(found["test_anomalies"], found["test_area"])
    for i, fitted in enumerate(found["estimator"]):
        test = found["indices"]["test"][i]
        expected = np.mean(fitted.predict(digits.X[test]) == digits.y[test])
        assert found["test_share"][i] == expected > 0.6


# ----------------------------------------------------------------------------- searches


def detector(**options):
    given = {"image_size": 32, "stages": "stage2", "random_state": 0, **options}
    return MahalanobisFeatureScorer(**given)


def test_randomized_search(samples):
    X, y = samples["images"]
    drawn = RandomizedSearchCV(
        detector(),
        {"contamination": uniform(0.1, 0.3), "stages": ["stage1", "stage2"]},
        n_iter=3,
        scoring=anomaly_roc_auc,
        cv=OneClassKFold(2),
        random_state=0,
        error_score="raise",
    ).fit(X, y)
    share = drawn.best_params_["contamination"]
    new = detector(**drawn.best_params_).fit(X, y)
    assert_array_equal(drawn.score_samples(X), new.score_samples(X))
    assert_allclose(
        (new.predict(X[y == 1]) == -1).mean(), share, atol=1 / (y == 1).sum()
    )


def test_halving_on_samples_and_on_steps(digits):
    grid = {"objective": ["hsc", "bce", "focal"]}
    options = {"cv": 2, "scoring": "roc_auc", "random_state": 0, "factor": 2}
    options["return_train_score"] = False  # folds train on one class
    by_steps = HalvingGridSearchCV(
        hsc(), grid, resource="max_steps", min_resources=5, max_resources=10, **options
    ).fit(digits.X, digits.y)
    assert by_steps.n_resources_ == [5, 10]
    assert by_steps.best_estimator_.n_iter_ == 10
    by_samples = HalvingGridSearchCV(
        detector(),
        {"stages": ["stage1", "stage2", "pool"]},
        **{**options, "cv": OneClassKFold(2)},
        min_resources=60,
    ).fit(digits.X, digits.y)
    assert by_samples.n_resources_ == [60, 120]
    assert np.isfinite(by_samples.cv_results_["mean_test_score"]).all()


def test_workers_share_the_processors(samples, searched):
    """After a search in two processes, these have their half of the threads."""
    searched(BackboneFeatures, "images")
    threads = Parallel(n_jobs=2)(delayed(torch.get_num_threads)() for _ in range(4))
    assert max(threads) <= max(1, joblib.cpu_count() // 2)


# ---------------------------------------------------------------- tables, and metadata


def test_names_go_through_a_pipeline(samples):
    X, _ = samples["paths"]
    model = make_pipeline(
        BackboneFeatures(image_size=32), StandardScaler(), KNNScorer()
    )
    named = clone(model).set_output(transform="pandas").fit(X)
    names = named[0].get_feature_names_out()
    assert_array_equal(named[-1].feature_names_in_, names)
    assert_array_equal(named[:-1].transform(X).columns, names)
    assert_allclose(named.score_samples(X), model.fit(X).score_samples(X))


def test_files_in_a_column_of_a_table(samples):
    paths, y = samples["paths"]
    table = pd.DataFrame({"path": map(str, paths), "weight": np.arange(len(y)) % 7})
    features = BackboneFeatures(image_size=32, stages="stage2")
    columns = ColumnTransformer(
        [("image", features, ["path"]), ("number", StandardScaler(), ["weight"])]
    ).set_output(transform="pandas")
    given = clone(columns).fit_transform(table)
    seen = clone(features).fit_transform(paths)
    assert_array_equal(given.iloc[:, :-1], seen)
    assert list(given)[-2:] == [f"image__stage2_{seen.shape[1] - 1}", "number__weight"]
    grid = {"columntransformer__image__stages": ["stage1", "stage2"]}
    found = GridSearchCV(
        make_pipeline(columns, KNNScorer()),
        grid,
        scoring="roc_auc",
        cv=OneClassKFold(2),
        error_score="raise",
    ).fit(table, y)
    assert len(set(found.cv_results_["mean_test_score"])) == 2
    assert found.predict(table[::-1]).tolist() == found.predict(table)[::-1].tolist()


def test_weights_go_where_they_are_asked_for(digits, model):
    weights = np.where(digits.y == 1, 5.0, 1.0)
    with config_context(enable_metadata_routing=True):
        asks = (
            BackboneFeatures("mnist_lenet", random_state=0),
            LogisticRegression().set_fit_request(sample_weight=True),
        )
        voting = VotingClassifier([("hsc", hsc()), ("logistic", make_pipeline(*asks))])
        plain, weighted = (
            clone(voting).fit(digits.X, digits.y, **given)
            for given in ({}, {"sample_weight": weights})
        )
        with pytest.raises(TypeError, match="sample_weight"):
            make_pipeline(FunctionTransformer(), hsc()).fit(
                digits.X, digits.y, sample_weight=weights
            )
    probabilities = [
        [one.predict_proba(digits.X_test) for one in fitted.estimators_]
        for fitted in (plain, weighted)
    ]
    assert_array_equal(probabilities[0][0], model.predict_proba(digits.X_test))
    assert_array_equal(probabilities[0][0], probabilities[1][0])
    assert (probabilities[0][1] != probabilities[1][1]).any()


def test_pretraining_images_go_through_a_pipeline(samples):
    X, _ = samples["images"]
    given = {"X_pretrain": X[:4], "y_pretrain": [1, 2, 3, 4]}
    panda = PANDAEstimator(
        adaptation="joint", image_size=32, max_steps=2, random_state=0
    )
    expected = clone(panda).fit(X, **given).score_samples(X)
    with config_context(enable_metadata_routing=True):
        panda.set_fit_request(X_pretrain=True, y_pretrain=True)
        model = make_pipeline(FunctionTransformer(), panda).fit(X, **given)
    assert_array_equal(model.score_samples(X), expected)
