"""Every scorer against brute force, scipy and scikit-learn."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.covariance import (
    OAS,
    EmpiricalCovariance,
    LedoitWolf,
    MinCovDet,
    ShrunkCovariance,
)
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GroupKFold, KFold

from skdeepad.scorers import (
    CentroidScorer,
    ClassGaussianScorer,
    GaussianScorer,
    KMeansScorer,
    KNNScorer,
)

METRICS = ["sqeuclidean", "euclidean", "cosine"]
GAUSSIANS = {
    name: GaussianScorer(name)
    for name in ("ledoit_wolf", "oas", "empirical", "diagonal")
}
DISTANCES = [
    KNNScorer(),
    KNNScorer(1, metric="euclidean"),
    KNNScorer(3, metric="cosine", aggregation="kth"),
    CentroidScorer(),
    CentroidScorer(metric="euclidean"),
    CentroidScorer(metric="cosine"),
]
CROSS_FITTED = [KMeansScorer(2, random_state=0), GaussianScorer(ShrunkCovariance())]
WHITENED = KNNScorer(metric="mahalanobis")
SCORERS = [*DISTANCES, WHITENED, *GAUSSIANS.values(), *CROSS_FITTED]

each_scorer = pytest.mark.parametrize("scorer", SCORERS, ids=str)
each_gaussian = pytest.mark.parametrize("scorer", GAUSSIANS.values(), ids=str)
quick = settings(deadline=None, max_examples=20)


def make_rows(n=60, d=4, seed=0):
    """Correlated rows about a mean that is not the origin, as features have."""
    mixing = np.random.default_rng(42).normal(size=(d, d)) + 2 * np.eye(d)
    return np.random.default_rng(seed).normal(size=(n, d)) @ mixing + 3


X, NEW = make_rows(), make_rows(40, seed=1)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def without_each(rows):
    for i, row in enumerate(rows):
        yield row[None], np.delete(rows, i, axis=0)


def refit_scores(scorer, rows):
    """Score each row by a fit to the others."""
    return [
        clone(scorer).fit(others).score_samples(row)[0]
        for row, others in without_each(rows)
    ]


# the numbers


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("aggregation", ["mean", "kth"])
def test_knn_is_brute_force(metric, aggregation):
    scorer = KNNScorer(3, metric=metric, aggregation=aggregation).fit(X)
    within = cdist(X, X, metric)
    np.fill_diagonal(within, np.inf)  # a row is not its own neighbour
    for rows, distances in ((NEW, cdist(NEW, X, metric)), (X, within)):
        nearest = np.sort(distances, axis=1)[:, :3]
        expected = nearest.mean(axis=1) if aggregation == "mean" else nearest[:, 2]
        np.testing.assert_allclose(scorer.score_samples(rows), -expected)


def test_a_twin_is_a_neighbour():
    scorer = KNNScorer(2).fit([[0.0], [0.0], [5.0], [9.0]])
    new = [[1.0], [6.0], [4.0]]
    assert scorer.score_samples(new).tolist() == [-1, -5, -(1 + 16) / 2]


def scores_of(distances, metric):
    """Turn Euclidean distances, of unit vectors for cosine, into scores."""
    squared = distances**2
    return -{"euclidean": distances, "sqeuclidean": squared, "cosine": squared / 2}[
        metric
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_centroid_is_the_distance_to_the_mean(metric):
    scorer = CentroidScorer(metric=metric).fit(X)
    rows, new = (unit(X), unit(NEW)) if metric == "cosine" else (X, NEW)
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(scorer.center_, mean)
    expected = scores_of(np.linalg.norm(new - mean, axis=1), metric)
    np.testing.assert_allclose(scorer.score_samples(NEW), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_kmeans_is_the_distance_to_the_nearest_mean(metric):
    # three groups so far apart that k-means finds them from any start, in any fold
    group = np.arange(60) % 3
    rows = 100 * np.eye(3)[group] + np.random.default_rng(0).normal(size=(60, 3))
    scorer = KMeansScorer(3, metric=metric, random_state=0).fit(rows)
    train, new = rows, NEW[:, :3]
    if metric == "cosine":
        train, new = unit(train), unit(new)

    peer = KMeans(3, n_init=10, random_state=1).fit(train)
    expected = scores_of(peer.transform(new).min(axis=1), metric)
    np.testing.assert_allclose(scorer.score_samples(NEW[:, :3]), expected)

    held_out = np.empty(60)
    for others, fold in KFold(10, shuffle=True, random_state=0).split(train):
        means = [train[others][group[others] == k].mean(axis=0) for k in range(3)]
        held_out[fold] = scores_of(cdist(train[fold], means).min(axis=1), metric)
    np.testing.assert_allclose(scorer.score_samples(rows), held_out)


@pytest.mark.parametrize(
    ("name", "peer", "n", "d"),
    [
        *(("ledoit_wolf", LedoitWolf(), *shape) for shape in [(60, 4), (20, 50)]),
        *(("oas", OAS(), *shape) for shape in [(60, 4), (20, 50), (3, 2)]),
        *(("empirical", EmpiricalCovariance(), *shape) for shape in [(60, 4), (5, 3)]),
        (MinCovDet(random_state=0), MinCovDet(random_state=0), 60, 4),
    ],
)
def test_gaussian_is_sklearns(name, peer, n, d):
    rows, new = make_rows(n, d), make_rows(40, d, seed=1)
    scorer, peer = GaussianScorer(name).fit(rows), clone(peer).fit(rows)
    np.testing.assert_allclose(scorer.location_, peer.location_)
    np.testing.assert_allclose(
        scorer.shrinkage_, getattr(peer, "shrinkage_", 0), rtol=1e-9
    )
    # besides, the scorer floors variances at 1e-9 of the largest
    expected = -np.sqrt(peer.mahalanobis(new))
    np.testing.assert_allclose(scorer.score_samples(new), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "metric", "options"),
    [
        ("empirical", "mahalanobis", {"VI": np.linalg.inv(np.cov(X.T, bias=True))}),
        ("diagonal", "seuclidean", {"V": X.var(axis=0)}),
    ],
)
def test_gaussian_is_scipys(name, metric, options):
    expected = -cdist(NEW, [X.mean(axis=0)], metric, **options)[:, 0]
    got = GaussianScorer(name).fit(X).score_samples(NEW)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# training rows


@pytest.mark.parametrize(
    "scorer", [*DISTANCES, GAUSSIANS["empirical"], GAUSSIANS["diagonal"]], ids=str
)
def test_leave_one_out_is_a_refit(scorer):
    got = clone(scorer).fit(X).score_samples(X)
    np.testing.assert_allclose(got, refit_scores(scorer, X), rtol=1e-6)


@pytest.mark.parametrize("name", ["ledoit_wolf", "oas"])
@pytest.mark.parametrize(("n", "d"), [(60, 4), (20, 50)])
def test_leave_one_out_holds_the_shrinkage(name, n, d):
    rows = make_rows(n, d)
    scorer = GaussianScorer(name).fit(rows)
    weight, scale = scorer.shrinkage_, rows.var(axis=0).mean()
    expected = []
    for row, others in without_each(rows):
        covariance = (1 - weight) * np.cov(others.T, bias=True)
        covariance += weight * scale * np.eye(d)
        r = (row - others.mean(axis=0))[0]
        expected.append(-np.sqrt(r @ np.linalg.solve(covariance, r)))
    got = scorer.score_samples(rows)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    # the true refit chooses its shrinkage anew
    np.testing.assert_allclose(got, refit_scores(scorer, rows), rtol=0.1)


@pytest.mark.parametrize(("n", "d"), [(60, 4), (20, 50)])
def test_whitened_neighbours_leave_a_row_out_of_both(n, d):
    """Out of its neighbours, and out of the covariance, whose shrinkage is held."""
    rows = np.repeat(make_rows(n, d), [2] * 5 + [3] * 2 + [1] * (n - 7), axis=0)
    scorer = KNNScorer(3, metric="mahalanobis").fit(rows)
    weight, scale = scorer._gaussian.shrinkage_, rows.var(axis=0).mean()
    expected = []
    for row in rows:
        others = rows[(rows != row).any(axis=1)]
        covariance = (1 - weight) * np.cov(others.T, bias=True)
        covariance += weight * scale * np.eye(d)
        distances = cdist([row], others, "mahalanobis", VI=np.linalg.inv(covariance))
        expected.append(-np.sort(distances[0])[:3].mean())
    np.testing.assert_allclose(scorer.score_samples(rows), expected, rtol=1e-9)


def test_whitened_neighbours_are_scipys():
    scorer = KNNScorer(1, metric="mahalanobis").fit(X)
    precision = LedoitWolf().fit(X).get_precision()
    expected = cdist(NEW, X, "mahalanobis", VI=precision).min(axis=1)
    np.testing.assert_allclose(scorer.score_samples(NEW), -expected)


@pytest.mark.parametrize(
    "scorer", [*DISTANCES, GAUSSIANS["empirical"], GAUSSIANS["diagonal"]], ids=str
)
def test_copies_are_left_out_together(scorer):
    rows = np.concatenate([X, X[:10], X[:5]])
    got = clone(scorer).fit(rows).score_samples(X[:20])
    expected = [
        clone(scorer).fit(rows[(rows != row).any(axis=1)]).score_samples([row])[0]
        for row in X[:20]
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@each_scorer
def test_groups_are_left_out_together(scorer):
    families = np.arange(60) % 20
    rows = X[families] + 1e-3 * X
    with pytest.warns(UserWarning, match=r"near copies .* groups="):
        alone = clone(scorer).fit(rows).score_samples(rows)
    got = clone(scorer).fit(rows, groups=families.astype(str)).score_samples(rows)
    expected = np.empty(60)
    _, numbers = np.unique(families.astype(str), return_inverse=True)
    folds = GroupKFold(10, shuffle=True, random_state=0)
    for train, test in folds.split(rows, groups=numbers):
        assert not set(families[train]) & set(families[test])
        expected[test] = clone(scorer).fit(rows[train]).score_samples(rows[test])
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert np.median(got) < np.median(alone)


@each_scorer
def test_wrong_groups(scorer):
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        clone(scorer).fit(X, groups=[1, 2])
    with pytest.raises(ValueError, match="at least two groups"):
        clone(scorer).fit(X, groups=np.zeros(len(X)))


def test_unrelated_rows_are_no_copies(recwarn):
    for d in (1, 2, 20):
        KNNScorer().fit(np.random.default_rng(d).normal(size=(2000, d)))
    assert not recwarn


@each_scorer
def test_only_training_rows_are_recalled(scorer):
    scorer = clone(scorer).fit(X)
    held_out, moved = scorer.score_samples(X), scorer.score_samples(X + 1e-9)
    assert (moved > held_out).mean() > 0.6
    mixed = np.concatenate([NEW, X[::-2]])
    expected = np.concatenate([scorer.score_samples(NEW), held_out[::-2]])
    np.testing.assert_allclose(scorer.score_samples(mixed), expected, rtol=1e-9)


# the threshold


@each_scorer
def test_offset_is_just_above_an_order_statistic(scorer):
    """A new score falls below the 2nd of 19 with probability 2 / (19 + 1)."""
    scorer = clone(scorer).set_params(contamination=0.1).fit(X[:19])
    below, above = np.sort(scorer.score_samples(X[:19]))[1:3]
    assert scorer.offset_ == pytest.approx(below, abs=(above - below) / 10)
    assert below < scorer.offset_ < above  # and on neither


@each_scorer
def test_share_of_training_rows_flagged(scorer):
    flagged = clone(scorer).set_params(contamination=0.2).fit_predict(X) == -1
    assert flagged.sum() == 12


@each_scorer
@pytest.mark.parametrize(("n", "draws"), [(50, 50), (5000, 3)])
def test_share_of_new_rows_flagged(scorer, n, draws):
    m, share = 2000, scorer.contamination
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(draws):
        rows = 3 + rng.normal(size=(n + m, 2))
        flagged.append(clone(scorer).fit(rows[:n]).predict(rows[n:]) == -1)
    # The share below the k-th of n exchangeable scores is Beta(k, n + 1 - k), of
    # variance share (1 - share) / (n + 2); counting it on m rows adds a binomial's.
    # Scores left out of n are not quite exchangeable with one left out of n + 1:
    # a quarter of one fit's deviation is allowed for that.
    variance = share * (1 - share)
    one, mean = variance / (n + 2), variance * (1 / (n + 2) + 1 / m) / draws
    assert abs(np.mean(flagged) - share) < 3 * np.sqrt(mean) + np.sqrt(one) / 4


# streams


def assert_same_fit(a, b):
    assert a.n_samples_seen_ == b.n_samples_seen_
    for name in ("location_", "shrinkage_", "offset_"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-7)
    for rows in (X, NEW):
        np.testing.assert_allclose(
            a.score_samples(rows), b.score_samples(rows), rtol=1e-7
        )


@each_gaussian
@quick
@given(
    # "empirical" needs 6 rows before it can be inverted
    cuts=st.sets(st.integers(6, len(X) - 1), max_size=8),
    seed=st.integers(0, 999),
)
def test_partial_fit_is_fit_in_parts(scorer, cuts, seed):
    parts = clone(scorer)
    for part in np.split(np.random.default_rng(seed).permutation(X), sorted(cuts)):
        assert parts.partial_fit(part) is parts
    assert_same_fit(parts, clone(scorer).fit(X))


@each_gaussian
def test_partial_fit_goes_on_after_fit(scorer):
    scorer = clone(scorer).fit(X[:30]).partial_fit(X[30:])
    assert_same_fit(scorer, clone(scorer).fit(X))
    scorer.fit(X[:30])  # anew
    assert_same_fit(scorer, clone(scorer).fit(X[:30]))


@each_gaussian
def test_a_part_that_was_interrupted_may_be_sent_again(scorer, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    again = clone(scorer).fit(X[:30])
    with monkeypatch.context() as patch:
        patch.setattr(GaussianScorer, "_set_offset", interrupt)
        with pytest.raises(KeyboardInterrupt):
            again.partial_fit(X[30:])
    assert_same_fit(again, clone(scorer).fit(X[:30]))
    assert_same_fit(again.partial_fit(X[30:]), clone(scorer).fit(X))


def test_partial_fit_leaves_known_anomalies_out():
    y = np.where(np.arange(60) % 3, 1, -1)
    scorer = GaussianScorer().partial_fit(X[:30], y[:30]).partial_fit(X[30:], y[30:])
    assert_same_fit(scorer, GaussianScorer().fit(X[y == 1]))


@each_gaussian
def test_stream_longer_than_the_sample(scorer):
    rows = make_rows(3000)
    scorers = clone(scorer).fit(rows), clone(scorer), clone(scorer)
    for part in np.split(rows, 5):
        scorers[1].partial_fit(part)
    for part in np.split(rows[::-1], 3):
        scorers[2].partial_fit(part)
    whole, one, other = scorers
    assert one.offset_ == pytest.approx(other.offset_)
    # 1,024 rows set the threshold, the share below which is Beta distributed
    below = (whole.score_samples(rows) < one.offset_).mean()
    assert below == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 1026))
    new, held_out = one.score_samples(rows + 1e-9), one.score_samples(rows)
    assert (~np.isclose(new, held_out, rtol=1e-6)).sum() == 1024
    np.testing.assert_allclose(one.score_samples(NEW), whole.score_samples(NEW))


@given(
    scorer=st.sampled_from(list(GAUSSIANS.values())),
    cuts=st.sets(st.integers(1, 8).map(lambda k: 6 * k), max_size=4),
    drift=st.sampled_from([0, 1, 100]),
)
def test_merged_parts_are_the_whole(scorer, cuts, drift):
    rows = X + drift * np.arange(len(X))[:, None]  # the parts' means are far apart
    first, *others = (clone(scorer).fit(part) for part in np.split(rows, sorted(cuts)))
    before = pickle.dumps(others)
    assert first.merge(others) is first
    whole = clone(scorer).fit(rows)
    assert_same_fit(first, whole)
    assert pickle.dumps(others) == before


def test_merge_refuses_others_features():
    scorer = GaussianScorer().fit(X)
    before = vars(scorer).copy()
    for other in (GaussianScorer().fit(X[:, :3]), GaussianScorer(MinCovDet()).fit(X)):
        with pytest.raises(ValueError, match=r"others\[1\] \(GaussianScorer"):
            scorer.merge([GaussianScorer().fit(NEW), other])
    with pytest.raises(NotFittedError):
        scorer.merge([GaussianScorer()])
    assert vars(scorer) == before
    assert not hasattr(GaussianScorer(MinCovDet()), "merge")


def test_partial_fit_needs_a_covariance_by_name():
    scorer = GaussianScorer(MinCovDet())
    assert not hasattr(scorer, "partial_fit")
    with pytest.raises(AttributeError) as caught:
        scorer.partial_fit(X)
    assert "Use 'ledoit_wolf'" in str(caught.value.__cause__)
    assert hasattr(scorer.set_params(covariance="oas"), "partial_fit")


# transform


@each_gaussian
def test_norm_of_whitened_rows_is_the_distance(scorer):
    scorer = clone(scorer).fit(X)
    norms = np.linalg.norm(scorer.transform(NEW), axis=1)
    np.testing.assert_allclose(norms, -scorer.score_samples(NEW))


@pytest.mark.parametrize("covariance", ["empirical", EmpiricalCovariance()])
def test_whitened_rows_have_unit_covariance(covariance):
    white = GaussianScorer(covariance).fit_transform(X)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(4), atol=1e-6)


# hard numbers


@pytest.mark.parametrize(
    "scorer", [s for s in SCORERS if getattr(s, "metric", "") != "cosine"], ids=str
)
def test_a_large_mean_costs_nothing(scorer):
    near, far = clone(scorer).fit(X), clone(scorer).fit(X + 1e6)
    for rows in (X, NEW):
        np.testing.assert_allclose(
            far.score_samples(rows + 1e6), near.score_samples(rows), rtol=1e-5
        )


@each_scorer
def test_single_precision_rows(scorer):
    rows, new = X.astype(np.float32), NEW.astype(np.float32)
    single = clone(scorer).fit(rows)
    double = clone(scorer).fit(rows.astype(np.float64))
    for part in (rows, new):
        scores = single.score_samples(part)
        assert scores.dtype == np.float64
        expected = double.score_samples(part.astype(np.float64))
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


@pytest.mark.parametrize("constant", [0, 0.1, 1e5])
@each_scorer
def test_a_constant_feature(scorer, constant):
    rows = np.column_stack([X, np.full(60, constant)])
    scorer = clone(scorer).fit(rows)
    assert np.isfinite(scorer.score_samples(rows)).all()
    if isinstance(scorer, GaussianScorer):
        moved = rows + np.eye(5)[4] * 20
        assert scorer.score_samples(moved).max() < scorer.score_samples(rows).min()


def test_ill_conditioned_rows():
    scales = 10.0 ** np.arange(-4, 2)
    rows, new = make_rows(60, 6) * scales, make_rows(40, 6, seed=1) * scales
    scorer = GaussianScorer("empirical").fit(rows)
    # the distance does not depend on the features' scales
    peer = EmpiricalCovariance().fit(rows / scales)
    expected = -np.sqrt(peer.mahalanobis(new / scales))
    np.testing.assert_allclose(scorer.score_samples(new), expected, rtol=1e-7)
    np.testing.assert_allclose(
        scorer.score_samples(rows), refit_scores(scorer, rows), rtol=1e-7
    )


@pytest.mark.parametrize("name", ["empirical", "diagonal"])
@pytest.mark.parametrize("large", [1e3, 1e6, 1e9])
def test_ten_sigma_beside_a_feature_of_a_large_scale(name, large):
    rows = np.random.default_rng(0).normal(size=(500, 3)) * [1, large, 1]
    scorer = GaussianScorer(name).fit(rows)
    away = rows.mean(axis=0) + np.array([10, 0, 0])
    assert -scorer.score_samples([away])[0] == pytest.approx(10, rel=0.1)


@each_scorer
def test_memory_is_bounded(scorer):
    rng = np.random.default_rng(0)
    rows, new = rng.normal(size=(5000, 3)), rng.normal(size=(20_000, 3))
    tracemalloc.start()
    try:
        clone(scorer).fit(rows).score_samples(new)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # all distances at once would take 800 MB


# invariances


@quick
@given(seed=st.integers(0, 999), d=st.integers(1, 6))
@pytest.mark.parametrize(
    "scorer", [s for s in SCORERS if s is not GAUSSIANS["diagonal"]], ids=str
)
def test_rotation_changes_nothing(scorer, seed, d):
    rotation = ortho_group.rvs(d, random_state=seed) if d > 1 else -np.eye(1)
    rows, new = make_rows(40, d, seed), make_rows(10, d, seed + 1)
    plain, turned = clone(scorer).fit(rows), clone(scorer).fit(rows @ rotation)
    for part in (rows, new):
        np.testing.assert_allclose(
            turned.score_samples(part @ rotation),
            plain.score_samples(part),
            rtol=1e-6,
            atol=1e-9,
        )


@quick
@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
@each_scorer
def test_shift_and_scale(scorer, shift, scale):
    metric = getattr(scorer, "metric", "mahalanobis")
    shift = 0 if metric == "cosine" else shift
    factor = {"sqeuclidean": scale**2, "euclidean": scale}.get(metric, 1)
    plain, moved = clone(scorer).fit(X), clone(scorer).fit(scale * X + shift)
    for part in (X, NEW):
        np.testing.assert_allclose(
            moved.score_samples(scale * part + shift),
            factor * plain.score_samples(part),
            rtol=1e-5,
        )


@quick
@given(seed=st.integers(0, 999))
def test_no_linear_map_changes_the_empirical_gaussian(seed):
    turn, turn_again = ortho_group.rvs(4, size=2, random_state=seed)
    mixing = turn * [0.5, 1, 2, 3] @ turn_again
    plain, mixed = (GaussianScorer("empirical").fit(Z) for Z in (X, X @ mixing))
    for part in (X, NEW):
        np.testing.assert_allclose(
            mixed.score_samples(part @ mixing), plain.score_samples(part), rtol=1e-3
        )


# labels and errors


@each_scorer
def test_known_anomalies_are_left_out(scorer):
    y = np.where(np.arange(60) % 3, 1, -1)
    labelled, normal = clone(scorer).fit(X, y), clone(scorer).fit(X[y == 1])
    assert labelled.offset_ == normal.offset_
    for part in (X, NEW):
        np.testing.assert_array_equal(
            labelled.score_samples(part), normal.score_samples(part)
        )


@each_scorer
def test_class_numbers_are_no_labels(scorer, recwarn):
    labelled = clone(scorer).fit(X, np.arange(60) % 7)
    assert labelled.offset_ == clone(scorer).fit(X).offset_
    assert not len(recwarn)


@each_scorer
def test_zeros_and_ones_are_warned_of(scorer):
    with pytest.warns(UserWarning, match=r"np\.where\(y == 1, -1, 1\)"):
        labelled = clone(scorer).fit(X, np.arange(60) % 2)
    assert labelled.offset_ == clone(scorer).fit(X).offset_


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["good"] * 60, r"np\.where\(y == 'good', 1, -1\)"),
        ([1] * 59, "inconsistent numbers of samples"),
        ([-1] * 60, "every row as an anomaly"),
        ([-1] * 59 + [1], r"Found 1 normal sample\(s\)"),
        (np.ones((60, 2)), "1d array"),
    ],
)
@each_scorer
def test_wrong_labels(scorer, y, message):
    with pytest.raises(ValueError, match=message):
        clone(scorer).fit(X, y)


@pytest.mark.parametrize(
    ("scorer", "n", "message"),
    [
        *((scorer, 1, r"1 normal sample\(s\)") for scorer in SCORERS),
        (KNNScorer(n_neighbors=5), 5, "minimum of 6 is required by KNNScorer"),
        (KMeansScorer(n_clusters=5), 4, "minimum of 5 is required by KMeansScorer"),
        (GAUSSIANS["empirical"], 5, r"n_features \+ 1 = 5 .*'ledoit_wolf'"),
    ],
    ids=str,
)
def test_too_few_samples(scorer, n, message):
    with pytest.raises(ValueError, match=message):
        clone(scorer).fit(X[:n])


@quick
@given(value=st.floats(-1e9, 1e9), n=st.integers(7, 30))
@each_gaussian
def test_equal_rows_have_no_covariance(scorer, value, n):
    with pytest.raises(ValueError, match="All training samples are identical"):
        clone(scorer).fit(np.full((n, 3), value))


@pytest.mark.parametrize("scorer", DISTANCES, ids=str)
def test_equal_rows_are_normal(scorer):
    rows = np.full((9, 3), 0.1)
    scores = clone(scorer).fit(rows).score_samples(rows)
    np.testing.assert_allclose(scores, 0, atol=1e-9)
    assert (clone(scorer).fit_predict(rows) == 1).all()


BAD = [
    (X[:, :2] * np.nan, None),
    (X[:1, :2], None),
    (X[:9, :2], [-1] * 9),
    (np.full((9, 4), "word"), None),
]


@pytest.mark.parametrize(
    ("scorer", "method"),
    [
        *((scorer, "fit") for scorer in SCORERS),
        *((scorer, "partial_fit") for scorer in GAUSSIANS.values()),
    ],
    ids=str,
)
def test_a_failing_fit_changes_nothing(scorer, method):
    scorer = clone(scorer)
    for fitted in (False, True):
        if fitted:
            expected = scorer.fit(X).score_samples(NEW)
        before = vars(scorer).copy()
        for rows, y in BAD:
            with pytest.raises(ValueError):
                getattr(scorer, method)(rows, y)
            assert vars(scorer) == before
    np.testing.assert_array_equal(scorer.score_samples(NEW), expected)


# ------------------------------------------------------------- several normal classes


@pytest.fixture(scope="module")
def classes():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4))
    means = rng.normal(scale=6, size=(3, 4))
    y = np.arange(240) % 3
    return rng.normal(size=(240, 4)) @ mixing + means[y], y


@pytest.mark.parametrize("relative", [False, True])
def test_distance_to_the_nearest_class(classes, relative):
    X, y = classes
    scorer = ClassGaussianScorer(relative=relative).fit(X, y)
    means = np.array([X[y == k].mean(axis=0) for k in range(3)])
    assert_allclose(scorer.means_, means)
    assert_array_equal(scorer.classes_, range(3))
    new = np.random.default_rng(1).normal(scale=5, size=(30, 4))
    within = LedoitWolf().fit(X - means[y]).get_precision()
    squared = [np.einsum("ij,jk,ik->i", new - m, within, new - m) for m in means]
    expected = -np.sqrt(np.min(squared, axis=0))
    if relative:
        overall = LedoitWolf().fit(X).mahalanobis(new)
        expected = overall - np.min(squared, axis=0)
    assert_allclose(scorer.score_samples(new), expected, rtol=1e-6)


def test_one_class_is_the_gaussian(classes):
    X, _ = classes
    new = X[:9] + 0.1
    expected = GaussianScorer().fit(X).score_samples(new)
    for y in (None, np.ones(240), np.full(240, 7), np.linspace(0, 1, 240)):
        found = ClassGaussianScorer().fit(X, y).score_samples(new)
        assert_allclose(found, expected, rtol=1e-6)


def test_anomalies_among_classes_are_left_out(classes):
    X, y = classes
    labels = np.where(np.arange(240) < 5, -1, y)
    found = ClassGaussianScorer().fit(X, labels).score_samples(X[:5])
    expected = ClassGaussianScorer().fit(X[5:], y[5:]).score_samples(X[:5])
    assert_allclose(found, expected)
    assert 0 < np.mean(ClassGaussianScorer().fit(X, y).predict(X) == -1) < 0.1


def test_a_class_of_one_sample(classes):
    X, y = classes
    scorer = ClassGaussianScorer().fit(X, np.where(np.arange(240) == 0, 9, y))
    assert_array_equal(scorer.classes_, [0, 1, 2, 9])
    assert np.isfinite(scorer.score_samples(X)).all()
