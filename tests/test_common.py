"""scikit-learn's own checks, whole, on every public estimator."""

from __future__ import annotations

import os

# scikit-learn skips its array API check without it; scipy reads it on import
os.environ["SCIPY_ARRAY_API"] = "1"

from unittest import SkipTest

import pytest
from estimators import PUBLIC, make
from sklearn.base import clone
from sklearn.covariance import MinCovDet
from sklearn.ensemble import IsolationForest
from sklearn.pipeline import make_pipeline
from sklearn.utils import InputTags, get_tags
from sklearn.utils.estimator_checks import (
    _get_check_estimator_ids,
    _yield_outliers_checks,
    check_dataframe_column_names_consistency,
    check_get_feature_names_out_error,
    check_global_output_transform_pandas,
    check_param_validation,
    check_set_output_transform,
    check_set_output_transform_pandas,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
    parametrize_with_checks,
)
from torch import nn

from skdeepad import (
    BackboneFeatures,
    CentroidScorer,
    ClassGaussianScorer,
    ConformalDetector,
    DeepSAD,
    DeepSVDD,
    DetectorEnsemble,
    GaussianScorer,
    GEOMDetector,
    HSCClassifier,
    KDClonerEstimator,
    KMeansScorer,
    KNNScorer,
    MahalanobisFeatureScorer,
    MHRotDetector,
    MSADEstimator,
    OpenSetClassifier,
    PANDAEstimator,
    PatchDetector,
    RobustDetector,
    RotNetDetector,
)
from skdeepad.conformal import DriftMonitor


class Network(nn.Sequential):
    """Takes vectors of any length, as the checks have many."""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 8), nn.Tanh())


# small budgets, as checks fit hundreds of times
ESTIMATORS = [make(public, max_steps=50, pretrain_steps=10) for public in PUBLIC]
SETTINGS = [
    KNNScorer(n_neighbors=1, metric="euclidean"),
    KNNScorer(n_neighbors=3, metric="cosine"),
    KNNScorer(metric="cosine", aggregation="kth"),
    KMeansScorer(n_clusters=3, metric="euclidean", random_state=0),
    KMeansScorer(metric="cosine"),
    CentroidScorer(metric="euclidean"),
    CentroidScorer(metric="cosine"),
    ClassGaussianScorer(relative=True),
    GaussianScorer("oas"),
    GaussianScorer("empirical"),
    GaussianScorer("diagonal", contamination=0.5),
    GaussianScorer(MinCovDet(random_state=0)),
    BackboneFeatures("mlp", stages=("stage1", "stage2"), grid=2, batch_size=1),
    BackboneFeatures(Network, precision="bfloat16", random_state=0),
    MahalanobisFeatureScorer(covariance="diagonal"),
    MahalanobisFeatureScorer(joint=False, weights=None, random_state=0),
    MahalanobisFeatureScorer(Network, stages="0", covariance="oas"),
    PANDAEstimator(adaptation=None),
    PANDAEstimator(
        adaptation="early_stopping", max_steps=20, trainable_stages="stage2"
    ),
    PANDAEstimator(adaptation="ses", max_steps=20, n_checkpoints=3, scorer="centroid"),
    PANDAEstimator(Network, max_steps=5, normalize=False, scorer=IsolationForest()),
    MSADEstimator(Network, angular=True, max_steps=5, random_state=0),
    RotNetDetector(Network, optimizer="sgd", max_steps=10, random_state=0),
    MHRotDetector(max_steps=10, batch_size=128, random_state=0),
    GEOMDetector(density="none", max_steps=10, random_state=0),
    PatchDetector(scorer="gaussian", positions="shared", random_state=0),
    PatchDetector(Network, scorer=IsolationForest(n_estimators=5, random_state=0)),
    PatchDetector(metric="cosine", aggregation="reweighted", n_patches=50),
    KDClonerEstimator(cloner="equal", max_steps=10, loss="value"),
    KDClonerEstimator(discrepancy="mahalanobis", max_steps=10, random_state=0),
    KDClonerEstimator(Network, max_steps=10, standardize=False, direction_weight=2),
    HSCClassifier(objective="bce", contamination=None, max_steps=20, random_state=0),
    HSCClassifier(Network, objective="focal", trainable_stages=None, max_steps=20),
    DeepSVDD(
        objective="soft-boundary", warm_up_steps=5, max_steps=20, pretrain_steps=0
    ),
    DeepSAD(balanced=False, max_steps=10, pretrain_steps=10),
    OpenSetClassifier(head="cosine", anomaly_score="h", max_steps=50),
    OpenSetClassifier(n_members=2, reconstruction_weight=0.1, max_steps=50),
    KNNScorer(metric="mahalanobis"),
    ConformalDetector(make_pipeline(GaussianScorer(), KNNScorer()), cv=5),
    ConformalDetector(IsolationForest(n_estimators=5, random_state=0)),
    ConformalDetector(GaussianScorer(), method="split"),
    ConformalDetector(KNNScorer(), method="cv+"),
    RobustDetector(GaussianScorer()),
    RobustDetector(KNNScorer()),
    RobustDetector(
        IsolationForest(n_estimators=5, random_state=0),
        training_contamination=0.0,
        cv=2,
    ),
    DetectorEnsemble(
        [
            ("knn", KNNScorer()),
            ("forest", IsolationForest(n_estimators=5, random_state=0)),
        ],
        scale="rank",
        weights=[2, 1],
    ),
    DetectorEnsemble([("gaussian", MahalanobisFeatureScorer(random_state=0))]),
]

each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


@parametrize_with_checks(ESTIMATORS + SETTINGS)
@pytest.mark.filterwarnings("ignore")  # many a check provokes them
def test_scikit_learn_check(estimator, check):
    try:
        check(estimator)
    except SkipTest as reason:
        pytest.fail(f"skipped: {reason}")


@parametrize_with_checks(
    [DriftMonitor(KNNScorer()), DriftMonitor(DeepSVDD(max_steps=5))]
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_check_of_the_monitor(estimator, check):
    check(estimator)


OUTLIER_CHECKS = [
    (estimator, check)
    for estimator in ESTIMATORS + SETTINGS
    if isinstance(estimator, HSCClassifier)
    for check in _yield_outliers_checks(estimator)
]


@pytest.mark.parametrize(
    ("estimator", "check"), OUTLIER_CHECKS, ids=_get_check_estimator_ids
)
@pytest.mark.filterwarnings("ignore")
def test_classifiers_are_outlier_detectors_too(estimator, check):
    check(type(estimator).__name__, clone(estimator))


@each_estimator
def test_tags_switch_no_check_off(estimator):
    tags = get_tags(estimator)
    assert tags.input_tags == InputTags()
    assert tags.target_tags.required == isinstance(estimator, OpenSetClassifier)
    assert not (tags.non_deterministic or tags.no_validation or tags._skip_test)


def test_every_public_estimator_is_checked():
    checked = {type(estimator).__name__ for estimator in ESTIMATORS}
    assert {type(estimator).__name__ for estimator in SETTINGS} == checked
    assert checked == {public.__name__ for public in PUBLIC}


# what scikit-learn asks of its own estimators besides


@each_estimator
def test_parameters_are_validated(estimator):
    check_param_validation(type(estimator).__name__, estimator)


@each_estimator
@pytest.mark.filterwarnings("ignore:y holds 0 and 1")
def test_names_of_columns_are_checked(estimator):
    check_dataframe_column_names_consistency(type(estimator).__name__, estimator)


@pytest.mark.parametrize(
    "check",
    [
        check_get_feature_names_out_error,
        check_global_output_transform_pandas,
        check_set_output_transform,
        check_set_output_transform_pandas,
        check_transformer_get_feature_names_out,
        check_transformer_get_feature_names_out_pandas,
    ],
)
@pytest.mark.parametrize(
    "estimator", [e for e in ESTIMATORS if hasattr(e, "transform")], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_names_of_features_come_out(estimator, check):
    check(type(estimator).__name__, estimator)
