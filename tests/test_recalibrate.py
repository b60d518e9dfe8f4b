"""A new threshold without a new fit."""

from __future__ import annotations

import numpy as np
import pytest
from estimators import PUBLIC, make
from numpy.testing import assert_array_equal

from skdeepad import HSCClassifier, KDClonerEstimator, KNNScorer, load, save
from skdeepad.base import cheapest_threshold, threshold_below

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
GOOD = 3 + RNG.normal(size=(50, 3))  # of a new batch, which is different
DETECTORS = [public for public in PUBLIC if hasattr(public, "recalibrate")]


def fitted(public, **options):
    options = {"max_steps": 3, "pretrain_steps": 0, "random_state": 0, **options}
    return make(public, **options).fit(X, np.where(np.arange(60) % 4, 1, -1))


def test_every_detector_has_it():
    without = {"BackboneFeatures", "OneClassKFold"}
    assert {public.__name__ for public in PUBLIC} - without == {
        public.__name__ for public in DETECTORS
    }


@pytest.mark.filterwarnings("ignore")  # few samples, few steps
@pytest.mark.parametrize("public", DETECTORS)
def test_recalibrate(public):
    detector, other = (
        fitted(public, contamination=0.2),
        fitted(public, contamination=0.4),
    )
    scores, offset = detector.score_samples(GOOD), detector.offset_
    assert detector.recalibrate() is detector
    assert detector.offset_ == offset

    detector.set_params(contamination=0.4)
    assert detector.offset_ == offset  # the parameter alone changes nothing
    detector.recalibrate()
    assert detector.offset_ == pytest.approx(other.offset_, rel=1e-12)
    detector.recalibrate(contamination=0.2)
    assert detector.contamination == 0.2
    assert detector.offset_ == offset

    detector.recalibrate(GOOD)
    assert_array_equal(detector.score_samples(GOOD), scores)
    assert detector.offset_ == threshold_below(scores, 0.2)
    detector.recalibrate(contamination=0.4)  # by the same samples
    assert detector.offset_ == threshold_below(scores, 0.4)
    assert (scores < detector.offset_).mean() == pytest.approx(0.4, abs=0.02)

    with pytest.raises(ValueError, match="contamination"):
        detector.recalibrate(contamination=0.7)
    assert detector.contamination == 0.4
    assert detector.offset_ == threshold_below(scores, 0.4)


def test_too_few_samples_are_told():
    detector = KNNScorer().fit(X)
    with pytest.warns(UserWarning, match="cannot be kept"):
        detector.recalibrate(contamination=0.001)


def test_least_cost():
    """Against all thresholds between two scores, by the definition of cost."""
    rng = np.random.default_rng(0)
    detector = KNNScorer().fit(X)
    new = np.concatenate([rng.normal(size=(40, 3)), 1.5 + rng.normal(size=(15, 3))])
    y = np.repeat([1, -1], [40, 15])
    scores = detector.score_samples(new)
    ordered = np.sort(scores)
    between = [ordered[0] - 1, *(ordered[1:] + ordered[:-1]) / 2, ordered[-1] + 1]
    for cost, prevalence in (
        ({"false_alarm": 1, "miss": 1}, None),
        ({"false_alarm": 1, "miss": 20}, 0.05),
        ({"false_alarm": 1, "miss": 1000}, None),
        ({"false_alarm": 1, "miss": 0}, None),
        ({"false_alarm": 0, "miss": 1}, 0.5),
    ):

        def expected(threshold, cost=cost, rare=prevalence or 15 / 55):
            flagged = scores < threshold
            alarms, misses = flagged[:40].mean(), 1 - flagged[40:].mean()
            return (1 - rare) * cost["false_alarm"] * alarms + (
                rare * cost["miss"] * misses
            )

        detector.recalibrate(new, y, cost=cost, prevalence=prevalence)
        costs = [expected(t) for t in between]
        assert expected(detector.offset_) == pytest.approx(min(costs))
        lowest = between[int(np.argmin(np.round(costs, 12)))]
        assert (scores < detector.offset_).sum() == (scores < lowest).sum()
        assert detector.offset_ not in scores
        below = (scores[:40] < detector.offset_).sum()
        assert detector.contamination == pytest.approx(min((below + 1) / 41, 0.5))
        assert_array_equal(detector.held_out_scores_, np.sort(scores[:40]))
    detector.recalibrate(contamination=0.2)  # by the normal ones of them
    assert detector.offset_ == threshold_below(scores[:40], 0.2)
    detector.recalibrate(new, y)
    assert detector.offset_ == threshold_below(scores[:40], 0.2)


def test_tied_scores_stay_together():
    tied = np.array([3.0, 3.0 * (1 + 1e-12)])
    offset = cheapest_threshold(np.append(tied, 5), np.append(tied, 1), 1, 10)
    assert 3 < offset < 5
    assert cheapest_threshold(np.array([1.0]), np.array([2.0]), 1, 5) > 2
    assert cheapest_threshold(np.array([1.0]), np.array([2.0]), 5, 1) < 1


def test_what_costs_need():
    detector = KNNScorer().fit(X)
    before, cost = detector.offset_, {"false_alarm": 1, "miss": 2}
    y = np.repeat([1, -1], 25)
    for options, message in (
        ({"cost": cost}, "need X"),
        ({"X": GOOD, "cost": cost}, "y labels none"),
        ({"X": GOOD, "y": y, "cost": {"miss": 2}}, "what errors cost"),
        ({"X": GOOD, "y": y, "cost": {**cost, "miss": -1}}, "what errors cost"),
        ({"X": GOOD, "y": y, "cost": cost, "prevalence": 1.0}, "prevalence"),
        ({"X": GOOD, "y": (1 - y) // 2, "cost": cost}, r"y must be \+1"),
        ({"X": GOOD, "y": y[:9], "cost": cost}, "inconsistent"),
        ({"X": GOOD, "y": np.full(50, -1)}, "no normal sample"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.recalibrate(**options)
    assert detector.offset_ == before and detector.contamination == 0.05


def test_what_is_kept_is_saved(tmp_path):
    detector = KNNScorer().fit(X)
    save(detector, tmp_path / "file")
    again = load(tmp_path / "file").recalibrate(contamination=0.3)
    assert again.offset_ == detector.recalibrate(contamination=0.3).offset_


@pytest.mark.filterwarnings("ignore")
def test_without_held_out_scores_new_samples_are_needed():
    classifier = fitted(HSCClassifier, contamination=None)
    with pytest.raises(ValueError, match="pass the share"):
        classifier.recalibrate(GOOD)
    with pytest.raises(ValueError, match="keeps no held-out scores"):
        classifier.recalibrate(contamination=0.1)
    assert classifier.contamination is None
    classifier.recalibrate(GOOD, contamination=0.1)
    scores = classifier.score_samples(GOOD)
    assert classifier.offset_ == threshold_below(scores, 0.1)


def test_maps_have_a_new_threshold_too(photos):
    detector = KDClonerEstimator(
        image_size=32, max_steps=2, contamination=0.1, random_state=0
    ).fit(photos[:30])
    before = detector.map_offset_
    detector.recalibrate(contamination=0.5)
    assert detector.map_offset_ < before
    detector.recalibrate(contamination=0.1)
    assert detector.map_offset_ == before
    detector.recalibrate(photos[30:], contamination=0.2)
    peaks = detector.anomaly_map(photos[30:]).max(axis=(1, 2)).astype(np.float64)
    assert detector.map_offset_ == -threshold_below(-peaks, 0.2)


def test_unreadable_files_are_left_out(photos, image_files, tmp_path):
    detector = KDClonerEstimator(
        image_size=32, max_steps=2, on_error="skip", random_state=0
    ).fit(photos)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped"):
        detector.recalibrate([*image_files.photos[:20], broken])
    assert np.isfinite([detector.offset_, detector.map_offset_]).all()
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match="X has no normal sample that can be read"),
    ):
        detector.recalibrate([broken])
