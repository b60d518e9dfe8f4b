"""Detectors on one scale, and the passes that they share."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import OneClassSVM

from skdeepad import (
    BackboneFeatures,
    CentroidScorer,
    DeepSAD,
    DetectorEnsemble,
    GaussianScorer,
    HSCClassifier,
    KMeansScorer,
    KNNScorer,
    MahalanobisFeatureScorer,
    OneClassKFold,
    PANDAEstimator,
    PatchDetector,
)
from skdeepad.detectors._ensemble import frozen_fronts
from skdeepad.inference import FeaturePass
from skdeepad.metrics import anomaly_roc_auc_score

rng = np.random.default_rng(0)
X = rng.normal(size=(80, 4))
NEW = np.concatenate([rng.normal(size=(20, 4)), rng.normal(size=(5, 4)) + 4, X[:5]])
SHARES = [(0.75, 0.25), (0.5, 0.5)]
MEMBERS = [("knn", KNNScorer()), ("gaussian", GaussianScorer())]


def on_stage(stage, size=32, scorer=None):
    features = BackboneFeatures(stages=stage, image_size=size, batch_size=8)
    return make_pipeline(features, scorer or KNNScorer())


def on_column(i):
    return make_pipeline(FunctionTransformer(lambda rows: rows[:, [i]]), KNNScorer())


@pytest.fixture
def passes(monkeypatch):
    """How many images went through the network, by the stages that were wanted."""
    count = Counter()
    run = FeaturePass.run

    def counted(self, values):
        count[tuple(sorted(tap.stage for tap in self.taps))] += len(values)
        return run(self, values)

    monkeypatch.setattr(FeaturePass, "run", counted)
    return count


# one scale


@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_logarithms_of_scores_over_their_medians(weights):
    ensemble = DetectorEnsemble(MEMBERS, weights=weights).fit(X)
    expected = np.zeros(len(NEW))
    for member, share in zip(MEMBERS, SHARES[weights is None], strict=True):
        fitted = clone(member[1]).fit(X)
        median = np.median(fitted.score_samples(X))
        expected -= share * np.log(fitted.score_samples(NEW) / median)
    np.testing.assert_allclose(ensemble.score_samples(NEW), expected)


@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_ranks_among_the_training_samples(weights):
    ensemble = DetectorEnsemble(MEMBERS, scale="rank", weights=weights).fit(X)
    expected = np.zeros(len(NEW))
    for member, share in zip(MEMBERS, SHARES[weights is None], strict=True):
        fitted = clone(member[1]).fit(X)
        known = fitted.score_samples(X)
        for i, score in enumerate(fitted.score_samples(NEW)):
            # its rank among them, from 0; ties count one half
            expected[i] += share * (rankdata([score, *known])[0] - 1) / len(X)
    np.testing.assert_allclose(ensemble.score_samples(NEW), expected)
    assert ensemble.score_samples(NEW + 100).max() == 0


def test_one_member_is_itself_on_another_scale():
    alone = KNNScorer().fit(X)
    for scale in ("log", "rank"):
        one = DetectorEnsemble([("knn", KNNScorer())], scale=scale).fit(X)
        np.testing.assert_array_equal(one.predict(NEW), alone.predict(NEW))
    one = DetectorEnsemble([("knn", KNNScorer())]).fit(X)
    orders = (np.argsort(d.score_samples(NEW)) for d in (one, alone))
    np.testing.assert_array_equal(*orders)


def test_repeated_samples_are_new_ones_to_each_other():
    ensemble = DetectorEnsemble(MEMBERS).fit(np.repeat(X, 3, axis=0))
    assert np.isfinite(ensemble.score_samples(np.concatenate([X, NEW]))).all()
    flagged = ensemble.predict(np.random.default_rng(1).normal(size=(2000, 4))) == -1
    assert flagged.mean() == pytest.approx(0.05, abs=0.04)


def test_samples_that_are_all_the_same():
    ensemble = DetectorEnsemble([("knn", KNNScorer())]).fit(np.ones((30, 4)))
    assert ensemble.predict([[1, 1, 1, 1], [1, 2, 1, 1]]).tolist() == [1, -1]


@pytest.mark.parametrize("scale", ["log", "rank"])
def test_false_alarms_on_new_samples(scale):
    draw = np.random.default_rng(1)
    ensemble = DetectorEnsemble(MEMBERS, scale=scale, contamination=0.1)
    ensemble.fit(draw.normal(size=(1000, 4)))
    flagged = (ensemble.predict(draw.normal(size=(4000, 4))) == -1).mean()
    assert flagged == pytest.approx(0.1, abs=0.03)


def test_scores_that_are_no_distances():
    members = [("knn", KNNScorer()), ("svm", OneClassSVM())]
    with pytest.raises(ValueError, match=r"'svm' .* above 0\. Set scale='rank'"):
        DetectorEnsemble(members).fit(X)
    ensemble = DetectorEnsemble(members, scale="rank").fit(X)
    assert (
        ensemble.score_samples(NEW[:20]).mean()
        > ensemble.score_samples(NEW[20:25]).mean()
    )


# members


def test_members_by_name():
    ensemble = DetectorEnsemble(MEMBERS).set_params(knn__n_neighbors=5)
    assert MEMBERS[0][1].n_neighbors == 5  # as in scikit-learn, members are the user's
    MEMBERS[0][1].n_neighbors = 2
    ensemble = DetectorEnsemble(MEMBERS).set_params(gaussian="drop").fit(X)
    assert list(ensemble.named_estimators_) == ["knn"]
    assert not hasattr(MEMBERS[0][1], "offset_")
    assert ensemble.get_params()["knn__metric"] == "sqeuclidean"
    search = GridSearchCV(
        DetectorEnsemble(MEMBERS),
        {"knn__n_neighbors": [1, 3], "scale": ["log", "rank"]},
        scoring="roc_auc",
        cv=OneClassKFold(2),
    )
    y = np.r_[np.ones(20), -np.ones(5), np.ones(5)]
    assert search.fit(NEW, y).best_score_ > 0.9


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"estimators": []}, "estimators has no member"),
        ({"estimators": [("a", "drop")]}, "estimators has no member"),
        ({"estimators": [("a", KNNScorer()), ("a", KNNScorer())]}, "not unique"),
        ({"estimators": [("a__b", KNNScorer())]}, "must not contain __"),
        ({"estimators": [("scale", KNNScorer())]}, "conflict"),
        ({"estimators": MEMBERS, "weights": [1]}, "weights=.* 2 numbers"),
        ({"estimators": MEMBERS, "weights": [1, -1]}, "none of them negative"),
        ({"estimators": MEMBERS, "weights": [0, 0]}, "not all of them 0"),
    ],
)
def test_what_is_no_ensemble(options, told):
    ensemble = DetectorEnsemble(MEMBERS).fit(X)
    before = vars(ensemble.set_params(**options)).copy()
    with pytest.raises(ValueError, match=told):
        ensemble.fit(X)
    assert vars(ensemble) == before
    with pytest.raises(TypeError, match="'a' is 1, which has no fit"):
        DetectorEnsemble([("a", 1)]).fit(X)


def test_known_anomalies_teach_those_that_learn_from_them():
    y = np.r_[np.ones(60), -np.ones(20)]
    far = np.r_[X[:60], X[60:] + 3]
    members = [
        ("knn", KNNScorer()),
        ("forest", IsolationForest(n_estimators=5, random_state=0)),
        ("hsc", HSCClassifier(max_steps=50, random_state=0)),
        ("sad", DeepSAD(max_steps=5, pretrain_steps=5, random_state=0)),
    ]
    ensemble = DetectorEnsemble(members).fit(far, y)
    assert len(ensemble.training_scores_) == 60
    fitted = ensemble.named_estimators_
    for name, member in members[:2]:
        np.testing.assert_array_equal(
            fitted[name].score_samples(NEW),
            clone(member).fit(far[:60]).score_samples(NEW),
        )
    for name, member in members[2:]:
        np.testing.assert_array_equal(
            fitted[name].score_samples(NEW),
            clone(member).fit(far, y).score_samples(NEW),
        )


# passes


def test_one_pass_for_all_stages(textures, passes):
    members = [
        ("early", on_stage("stage2")),
        ("late", on_stage("stage6", scorer=make_pipeline(GaussianScorer()))),
        ("both", MahalanobisFeatureScorer(stages=("stage2", "stage4"), image_size=32,
                                          batch_size=8)),
        ("large", on_stage("stage2", size=48)),
        ("other", IsolationForestOnPixels()),
    ]  # fmt: skip
    ensemble = DetectorEnsemble(members[:-1]).fit(textures.X_train)
    together = ("stage2", "stage4", "stage6")
    # and once more for the threshold on maps that the third learns
    for_maps = ("stage2", "stage2", "stage4", "stage4", "stage6")
    assert passes == {together: 24, ("stage2",): 24, for_maps: 24}
    passes.clear()
    scores = ensemble.score_samples(textures.X_test)
    assert passes == {together: 16, ("stage2",): 16}
    # and they see what they would see alone
    for (_, alone), column in zip(members, ensemble.training_scores_.T, strict=False):
        alone = clone(alone).fit(textures.X_train)
        known = alone.score_samples(textures.X_train)
        np.testing.assert_array_equal(np.sort(known), column)
    assert anomaly_roc_auc_score(textures.y_test, scores) > 0.7


class IsolationForestOnPixels(IsolationForest):
    """Has no network."""


def test_known_anomalies_pass_once(textures, passes):
    stages = "stage2", "stage4"
    members = [(stage, on_stage(stage)) for stage in stages]
    DetectorEnsemble(members).fit(textures.X_test, textures.y_test)
    assert passes == {stages: 16}


def test_blocks_are_the_whole(textures, passes, monkeypatch):
    members = [(stage, on_stage(stage)) for stage in ("stage2", "stage4")]
    ensemble = DetectorEnsemble(members).fit(textures.X_train)
    scores = ensemble.score_samples(textures.X_test)
    monkeypatch.setattr("skdeepad.detectors._ensemble.BLOCK", 5)
    passes.clear()
    np.testing.assert_array_equal(ensemble.score_samples(textures.X_test), scores)
    assert passes.total() == 16


def test_paths_and_arrays_agree(textures, image_files):
    members = [(stage, on_stage(stage)) for stage in ("stage2", "stage4")]
    on_arrays = DetectorEnsemble(members).fit(textures.X_train)
    on_paths = DetectorEnsemble(members).fit(image_files.train)
    for scale in ("log", "rank"):
        for ensemble in (on_arrays, on_paths):
            ensemble.set_params(scale=scale)
        np.testing.assert_array_equal(
            on_paths.score_samples(image_files.test),
            on_arrays.score_samples(textures.X_test),
        )


@pytest.mark.parametrize("scale", ["log", "rank"])
@pytest.mark.filterwarnings("ignore:1 of 25 image files")
def test_unreadable_files_have_no_score(image_files, tmp_path, scale):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    options = {"image_size": 32, "on_error": "skip"}
    members = [
        (stage, MahalanobisFeatureScorer(stages=stage, **options))
        for stage in ("stage2", "stage4")
    ]
    ensemble = DetectorEnsemble(members, scale=scale).fit([*image_files.train, bad])
    assert len(ensemble.training_scores_) == 24
    with pytest.warns(UserWarning, match=r"1 of 3 images cannot be read"):
        scores = ensemble.score_samples([*image_files.test[:2], bad])
    assert np.isnan(scores).tolist() == [False, False, True]
    with pytest.warns(UserWarning, match="cannot be read"):
        predicted = ensemble.predict([bad])
    assert predicted.tolist() == [-1]


def test_trained_members_take_part(textures):
    members = [
        ("panda", PANDAEstimator(image_size=32, max_steps=2, random_state=0)),
        ("frozen", on_stage("stage6", scorer=KMeansScorer(2, random_state=0))),
    ]
    ensemble = DetectorEnsemble(members).fit(textures.X_train)
    assert np.isfinite(ensemble.score_samples(textures.X_test)).all()


def test_patches_and_whole_images_are_the_default(textures):
    ensemble = DetectorEnsemble().fit(textures.X_train)
    members = [
        ("patches", PatchDetector(image_size=160, random_state=0)),
        ("cosine", on_stage("pool", 160, KNNScorer(metric="cosine"))),
    ]
    by_hand = DetectorEnsemble(members, combine="max").fit(textures.X_train)
    np.testing.assert_allclose(
        ensemble.score_samples(textures.X_test),
        by_hand.score_samples(textures.X_test),
        atol=1e-1,
    )  # batches of another size, in bfloat16
    maps = ensemble.named_estimators_["patches"].anomaly_map(textures.X_test[:2])
    assert maps.shape == (2, 32, 32)
    assert not list(frozen_fronts(ensemble.estimators_[:1]))  # maps fill the memory


def test_the_default_for_vectors():
    vectors = DetectorEnsemble().fit(X)
    assert list(vectors.named_estimators_) == ["cosine", "whitened"]
    assert vectors.n_features_in_ == 4


@pytest.mark.parametrize("scale", ["log", "rank"])
def test_the_largest_score_counts(scale):
    members = [("near", KNNScorer()), ("centre", CentroidScorer())]
    ensemble = DetectorEnsemble(members, scale=scale, combine="max").fit(X)
    new = np.random.default_rng(1).normal(size=(30, 4)) * 2
    columns = [m.fit(X).score_samples(new) for _, m in members]
    held_out = [m.score_samples(X) for _, m in members]
    if scale == "log":
        z = [
            (np.log(-a) - np.log(-b).mean()) / np.log(-b).std()
            for a, b in zip(columns, held_out, strict=True)
        ]
        assert set(np.argmax(z, axis=0)) == {0, 1}  # each of them decides somewhere
        expected = -np.max(z, axis=0)
    else:
        shares = [
            (b[:, None] < a).mean(axis=0)
            for a, b in zip(columns, held_out, strict=True)
        ]
        expected = np.min(shares, axis=0)
    np.testing.assert_allclose(ensemble.score_samples(new), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="weights are for combine='mean'"):
        ensemble.set_params(weights=[1, 2]).fit(X)


def test_one_alarm_is_enough():
    draw = np.random.default_rng(0)
    train, new = draw.normal(size=(300, 7)), draw.normal(size=(200, 7))
    new[:100, 0] += 5  # one of seven members sees it
    members = [(f"column {i}", on_column(i)) for i in range(7)]
    found = {}
    for combine in ("mean", "max"):
        ensemble = DetectorEnsemble(members, combine=combine).fit(train)
        flagged = ensemble.predict(new) < 0
        assert flagged[100:].mean() < 0.15
        found[combine] = flagged[:100].mean()
    assert found["max"] > 0.8 > 0.75 > found["mean"]


# maps


def test_maps_of_members_over_their_thresholds(textures):
    options = {"image_size": 32, "random_state": 0}
    members = [
        ("patches", PatchDetector(**options)),
        ("whole", MahalanobisFeatureScorer(stages="stage2", **options)),
    ]
    ensemble = DetectorEnsemble(members, weights=[3, 1]).fit(textures.X_train)
    patches, whole = ensemble.estimators_
    maps = [m.anomaly_map(textures.X_test) / m.map_offset_ for m in (patches, whole)]
    expected = 0.75 * maps[0] + 0.25 * maps[1]
    found = ensemble.anomaly_map(textures.X_test)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert ensemble.map_offset_ == 1
    largest = DetectorEnsemble(ensemble.estimators, combine="max").fit(textures.X_train)
    maps = [m.anomaly_map(textures.X_test) / m.map_offset_ for m in largest.estimators_]
    found = largest.anomaly_map(textures.X_test)
    np.testing.assert_allclose(found, np.max(maps, axis=0), rtol=1e-6)
    whole.map_offset_ = np.nan
    with pytest.raises(ValueError, match="'whole' have the threshold nan"):
        ensemble.anomaly_map(textures.X_test)


def test_there_are_no_maps_without_those_of_all_members():
    ensemble = DetectorEnsemble(MEMBERS).fit(X)
    assert np.isnan(ensemble.map_offset_)
    assert not hasattr(ensemble, "anomaly_map")
    assert not hasattr(DetectorEnsemble(), "anomaly_map")
