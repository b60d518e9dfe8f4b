"""The hypersphere family: losses, training, labels, degenerate cases."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    cross_val_score,
)
from torch import nn

from skdeepad import DeepSAD, DeepSVDD, GaussianScorer, HSCClassifier
from skdeepad.backbones import load_backbone
from skdeepad.backbones._decoder import make_decoder
from skdeepad.backbones._small import ContrastNormalization, biases, without_biases
from skdeepad.detectors._deep_svdd import away_from_zero
from skdeepad.detectors._hsc import whitening
from skdeepad.objectives import (
    focal_loss,
    hypersphere_loss,
    radial_distance,
    semi_supervised_loss,
    soft_boundary_loss,
)
from skdeepad.training import balanced_batches

distances = st.floats(1e-12, 1e4)
mpmath.mp.dps = 60


def value_and_slope(function, d):
    """Give a pure function's value and derivative at d, in float64."""
    at = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    value = function(at)
    value.sum().backward()
    return value.item(), at.grad.item()


# ------------------------------------------------------------------------------ losses


@given(distances)
def test_hypersphere_loss_of_outliers(d):
    value, slope = value_and_slope(
        lambda at: hypersphere_loss(at, torch.tensor([True])), d
    )
    exact = mpmath.mpf(d)
    # float64 has no number below 5e-324
    assert_allclose(value, float(-mpmath.log1p(-mpmath.exp(-exact))), 1e-13, 5e-324)
    assert_allclose(slope, float(-1 / mpmath.expm1(exact)), 1e-13, 5e-324)


@given(distances)
def test_hypersphere_loss_of_normal_samples(d):
    function = lambda at: hypersphere_loss(at, torch.tensor([False]))  # noqa: E731
    assert value_and_slope(function, d) == (d, 1)


def test_hypersphere_loss_is_finite_at_the_origin():
    z = torch.zeros(2, 3, requires_grad=True)
    loss = hypersphere_loss(radial_distance(z), torch.tensor([True, False]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(z.grad).all()


@given(distances, st.floats(0.01, 10))
def test_deep_sad_loss(d, eta):
    for label, value, slope in (
        (-1, eta / (d + 1e-6), -eta / (d + 1e-6) ** 2),
        (0, d, 1),
        (1, eta * (d + 1e-6), eta),
    ):
        found = value_and_slope(
            lambda at, label=label: semi_supervised_loss(
                at, torch.tensor([label]), eta
            ),
            d,
        )
        assert_allclose(found, (value, slope), rtol=1e-12)


@given(st.floats(-50, 50), st.sampled_from([0.0, 0.5, 2.0, 4.0]), st.booleans())
def test_focal_loss(logit, gamma, outlier):
    value, slope = value_and_slope(
        lambda at: focal_loss(at, torch.tensor([outlier]), gamma), logit
    )
    sign = 1 if outlier else -1

    def exact(x):
        p = 1 / (1 + mpmath.exp(-sign * x))
        return -((1 - p) ** gamma) * mpmath.log(p)

    assert_allclose(value, float(exact(mpmath.mpf(logit))), rtol=1e-10)
    expected = float(mpmath.diff(exact, mpmath.mpf(logit)))
    assert_allclose(slope, expected, rtol=1e-9)


def test_focal_loss_without_focus_is_cross_entropy():
    logits = torch.linspace(-5, 5, 11, dtype=torch.float64)
    outlier = torch.arange(11) % 2 == 0
    expected = nn.functional.binary_cross_entropy_with_logits(
        logits, outlier.double(), reduction="none"
    )
    assert_allclose(focal_loss(logits, outlier, 0.0), expected, rtol=1e-12)


def test_soft_boundary_loss_by_hand():
    squared = torch.tensor([0.5, 1.0, 4.0, 9.0], dtype=torch.float64)
    loss = soft_boundary_loss(squared, torch.tensor(1.5, dtype=torch.float64), 0.25)
    assert loss.item() == 1.5**2 + (1.75 + 6.75) / 4 / 0.25


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=8))
def test_distances(values):
    values = np.array(values) / 1e4
    z = torch.from_numpy(values[None])
    squared = float(np.sum(np.square(values)))
    expected = {
        "l2_squared": squared,
        "l2": np.sqrt(squared),
        "l1": np.sum(np.abs(values)),
        "pseudo_huber": float(mpmath.powm1(mpmath.mpf(squared) + 1, 0.5)),
    }
    for norm, distance in expected.items():
        assert_allclose(radial_distance(z, norm).item(), distance, rtol=1e-12)


# ------------------------------------------------------------------------- mini-batches


def test_few_outliers_are_cycled_and_many_drawn():
    def outliers_of(n):
        batches = balanced_batches(
            np.arange(6), np.arange(100, 100 + n), 4, np.random.RandomState(0)
        )
        pairs = [(next(batches), next(batches)) for _ in range(4)]
        assert [len(normal) for normal, _ in pairs] == [4, 2, 4, 2]
        assert all(len(normal) == len(others) for normal, others in pairs)
        return np.concatenate([others for _, others in pairs])

    assert set(outliers_of(1)) == {100}
    _, counts = np.unique(outliers_of(3), return_counts=True)
    assert_array_equal(counts, 4)
    assert len(set(outliers_of(500))) == 12


def test_training_steps_are_those_by_hand():
    """Two steps of Adam on a linear network, all samples in each mini-batch."""
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(6, 3)), rng.normal(3, 1, size=(6, 3))])
    X, y = X.astype(np.float32), np.repeat([1, -1], 6)
    model = HSCClassifier(
        nn.Linear(3, 2, bias=False),
        norm="l2_squared",
        max_steps=2,
        learning_rate=0.1,
        contamination=None,
        batch_size=6,
        random_state=0,
    )
    torch.manual_seed(0)
    given_net = nn.Linear(3, 2, bias=False)
    fitted = clone(model).set_params(backbone=given_net).fit(X, y)
    W = given_net.weight.detach().numpy().astype(np.float64)
    m, v = np.zeros_like(W), np.zeros_like(W)
    losses = []
    for step in (1, 2):
        Z = X @ W.T
        d = np.sum(Z**2, axis=1)
        losses.append((d[:6].sum() - np.log(-np.expm1(-d[6:])).sum()) / 12)
        slope = np.where(y == 1, 1, -1 / np.expm1(d)) / 12
        gradient = 2 * (slope[:, None] * Z).T @ X
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        W -= 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    assert_allclose(fitted.loss_curve_, losses, rtol=1e-5)
    assert_allclose(fitted.score_samples(X), -np.sum((X @ W.T) ** 2, axis=1), 1e-4)


def test_deep_svdd_steps_are_those_by_hand():
    """Samples a u: the centre is mean(a) W u, the gradient 2 var(a) (W u) u'."""
    rng = np.random.default_rng(0)
    u, a = np.array([1.0, -2.0, 0.5]), rng.uniform(1, 2, size=30)
    net = nn.Linear(3, 2, bias=False)
    W = np.array([[0.5, -0.2, 0.9], [-0.4, 0.3, 0.1]])
    net.weight.data = torch.from_numpy(W).float()
    options = {"pretrain_steps": 0, "max_steps": 1, "weight_decay": 0.0}
    detector = DeepSVDD(net, learning_rate=0.01, batch_size=20, **options)
    detector.fit(np.outer(a, u))
    away = detector.center_ / (W @ u)
    assert_allclose(away, away[0], rtol=1e-5)
    assert 1.3 < away[0] < 1.7
    expected = W - 0.01 * np.sign(np.outer(W @ u, u))
    assert_allclose(trained_weight(detector), expected, rtol=1e-4)
    scores = detector.score_samples(np.outer([9.0], u))
    z = 9 * expected @ u
    assert_allclose(scores, -np.sum((z - detector.center_) ** 2), rtol=1e-4)


def test_the_centre_stays_away_from_zero():
    center = away_from_zero(np.array([0.0, 0.05, -0.05, 0.3, -2.0]))
    assert_array_equal(center, [0.1, 0.1, -0.1, 0.3, -2.0])


def trained_weight(detector):
    (stage,) = detector.backbone_.stages.values()
    return stage.weight.numpy().astype(np.float64)


# ------------------------------------------------------------------------------ metric


def test_it_starts_as_the_mahalanobis_distance():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)) + 2
    y = np.repeat([1, -1], 40)
    model = HSCClassifier(
        nn.Identity(),
        trainable_stages=None,
        norm="l2_squared",
        learning_rate=1e-12,
        max_steps=1,
        contamination=None,
    ).fit(X, y)
    gaussian = GaussianScorer().fit(np.float32(X[:40]))
    new = np.float32(rng.normal(size=(10, 5)))
    squared = np.sum(gaussian.transform(new) ** 2, axis=1)
    assert_allclose(-model.score_samples(new), squared / 5, rtol=1e-4)


def test_whitening():
    X = np.random.default_rng(0).normal(3, 2, size=(500, 4)).astype(np.float32)
    layer = whitening(X)
    assert_allclose(layer(torch.from_numpy(X)).mean(dim=0), 0, atol=1e-4)
    precision = (layer.weight.T @ layer.weight).numpy()
    assert_allclose(precision, LedoitWolf().fit(X).precision_, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------- classifier


@pytest.fixture(scope="module")
def digits():
    """Zeros, and few of the other digits: images, labels, and what is scored."""
    X, y = load_digits(return_X_y=True)
    X, y = X.reshape(-1, 8, 8) / 16, np.where(y == 0, 1, -1)
    known = (np.arange(len(y)) < 900) & ((y == 1) | (np.arange(len(y)) % 8 == 0))
    return X[known], y[known], X[900:1200], y[900:1200]


def lenet(**options):
    defaults = {"max_steps": 60, "batch_size": 32, "random_state": 0}
    return HSCClassifier("mnist_lenet", **{**defaults, **options})


@pytest.mark.parametrize("objective", ["hsc", "bce", "focal"])
@pytest.mark.parametrize("contamination", [None, 0.1])
def test_outputs_agree(digits, objective, contamination):
    X, y, X_test, y_test = digits
    model = lenet(objective=objective, contamination=contamination).fit(X, y)
    assert is_classifier(model)
    assert_array_equal(model.classes_, [-1, 1])
    decision, scores = model.decision_function(X_test), model.score_samples(X_test)
    probability = model.predict_proba(X_test)
    assert_allclose(decision, scores - model.offset_)
    assert_allclose(probability.sum(axis=1), 1)
    assert_array_equal(probability[:, 1] > 0.5, decision > 0)
    assert_array_equal(model.predict(X_test), np.where(decision >= 0, 1, -1))
    if contamination is None:
        expected = np.exp(scores) if objective == "hsc" else expit(scores)
        assert_allclose(probability[:, 1], expected)
    assert roc_auc_score(y_test, decision) > 0.98


@pytest.mark.parametrize("norm", ["l2_squared", "l2", "l1"])
def test_norms_learn(digits, norm):
    X, y, X_test, y_test = digits
    model = lenet(norm=norm).fit(X, y)
    assert roc_auc_score(y_test, model.score_samples(X_test)) > 0.98


def test_scores_do_not_tie_where_probabilities_do(digits):
    X, y, X_test, _ = digits
    model = lenet(norm="l2_squared", contamination=None).fit(X, y)
    far = X_test[model.score_samples(X_test) < -20]
    assert len(far) > 10
    assert len(np.unique(model.score_samples(far))) == len(np.unique(far, axis=0))


def test_labels_of_any_kind(digits):
    X, y, X_test, _ = digits
    expected = lenet(max_steps=2).fit(X, y).predict(X_test)
    for anomaly, normal in ((0, 1), ("bad", "good"), (False, True), (3.0, 7.0)):
        labels = np.where(y == 1, normal, anomaly)
        model = lenet(max_steps=2, normal_label=normal).fit(X, labels)
        assert_array_equal(model.classes_, [anomaly, normal])
        assert_array_equal(model.predict(X_test) == normal, expected == 1)


def test_scikit_learn_takes_it_for_a_classifier(digits):
    X, y, X_test, y_test = digits
    quick = lenet(max_steps=10)
    assert (cross_val_score(quick, X, y, scoring="roc_auc", cv=3) > 0.9).all()
    search = GridSearchCV(
        quick, {"objective": ["hsc", "bce", "focal"]}, scoring="roc_auc", cv=2
    ).fit(X, y)
    assert roc_auc_score(y_test, search.decision_function(X_test)) > 0.9
    calibrated = CalibratedClassifierCV(quick, cv=2).fit(X, y)
    assert calibrated.predict_proba(X_test).shape == (300, 2)
    fixed = FixedThresholdClassifier(quick, threshold=0.9, pos_label=1).fit(X, y)
    assert np.mean(fixed.predict(X_test) == 1) <= np.mean(
        quick.fit(X, y).predict(X_test) == 1
    )


def test_it_can_be_partly_trained(digits):
    X, y, X_test, _ = digits
    options = {"image_size": 32, "max_steps": 2, "random_state": 0, "batch_size": 16}
    source = load_backbone("efficientnet_lite0")
    model = HSCClassifier(trainable_stages="stage7", **options).fit(X, y)
    assert model.trained_stages_ == ("stage7",)
    for name, trained in (("stage6", False), ("stage7", True)):
        pairs = zip(
            model.backbone_.stages[name].parameters(),
            source.stages[name].parameters(),
            strict=True,
        )
        assert trained == any(not torch.equal(new, old) for new, old in pairs)
        # BatchNorm of a network that is trained in part keeps its statistics
        pairs = zip(
            model.backbone_.stages[name].buffers(),
            source.stages[name].buffers(),
            strict=True,
        )
        assert all(torch.equal(new, old) for new, old in pairs)
    # features of frozen and of trained stages, and the same without the cache
    expected = model.score_samples(X_test[:20])
    again = clone(model).set_params(max_cache_bytes=0).fit(X, y)
    assert_allclose(again.score_samples(X_test[:20]), expected, rtol=1e-3)


def test_augmentation(digits):
    X, y, _, _ = digits
    seen = []

    def darken(image):
        seen.append(tuple(image.shape))
        return image * 0.9

    state = torch.get_rng_state()
    plain, dark, paper = (
        lenet(augmentation=change, max_steps=5).fit(X, y)
        for change in (None, darken, "paper")
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert set(seen) == {(1, 28, 28)}
    assert len(seen) > 5 * 32
    assert not np.array_equal(plain.loss_curve_, dark.loss_curve_)
    assert not np.array_equal(plain.loss_curve_, paper.loss_curve_)
    assert_array_equal(clone(paper).fit(X, y).loss_curve_, paper.loss_curve_)
    with pytest.raises(ValueError, match="must keep the shape"):
        lenet(augmentation=lambda image: image[:, :-1]).fit(X, y)


def test_augmentation_is_for_images():
    with pytest.raises(ValueError, match="augmentation needs images"):
        HSCClassifier(augmentation="paper").fit(np.eye(20), [1, -1] * 10)


# ------------------------------------------------------------------- degenerate cases


@pytest.mark.parametrize("y", [np.ones(20), np.zeros(20), np.full(20, "good")])
def test_one_class_is_not_enough(y):
    with pytest.raises(ValueError, match="y has one class only"):
        HSCClassifier().fit(np.eye(20), y)


def test_without_labels_noise_stands_for_outliers(digits):
    X, y, _, _ = digits
    with pytest.warns(UserWarning, match="random noise is used"):
        model = lenet(image_size=28).fit(X[y == 1])
    assert_array_equal(model.classes_, [-1, 1])
    noise = np.random.default_rng(0).random((50, 8, 8))
    scores = model.score_samples(np.concatenate([X[y == 1], noise]))
    assert roc_auc_score(np.repeat([1, 0], [len(scores) - 50, 50]), scores) > 0.99


def test_outliers_that_teach_nothing_are_told():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(100, 5)), rng.normal(1e3, 1, size=(5, 5))])
    y = np.repeat([1, -1], [100, 5])
    model = HSCClassifier(nn.Identity(), trainable_stages=None, max_steps=5)
    with pytest.warns(ConvergenceWarning, match="teach the network nothing"):
        model.fit(X, y)
    near = np.concatenate([X[:100], rng.normal(2, 1, size=(5, 5))])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model.fit(near, y)


@pytest.mark.parametrize("make", [DeepSVDD, DeepSAD])
def test_collapse_is_told(make):
    X = np.ones((40, 6))
    with pytest.warns(ConvergenceWarning, match="collapsed"):
        make(pretrain_steps=0, max_steps=2).fit(X)


@pytest.mark.parametrize("make", [DeepSVDD, DeepSAD])
def test_scores_are_not_constant(make, digits):
    """The bug that several packages shipped: a centre that nothing leaves."""
    X, y, X_test, _ = digits
    detector = make(pretrain_steps=20, max_steps=100, random_state=0).fit(X[y == 1])
    scores = detector.score_samples(X_test)
    assert np.std(scores) > 0.01 * np.abs(scores).mean()


@pytest.mark.parametrize("make", [DeepSVDD, DeepSAD])
@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)),
        nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)),
    ],
)
def test_networks_with_biases_are_refused(make, net):
    with pytest.raises(ValueError, match=r"backbone has biases.*bias=False"):
        make(net).fit(np.eye(30)[:, :4])


@pytest.mark.parametrize(
    "name", ["mlp", "mnist_lenet", "svdd_cifar10_lenet", "resnet18"]
)
def test_our_networks_lose_their_biases(name):
    backbone = without_biases(load_backbone(name, weights=None).clone())
    assert biases(backbone) == []
    norms = [
        m for m in backbone.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    assert all(norm.weight is None for norm in norms)
    assert norms or name == "mlp"


def test_soft_boundary(digits):
    X, y, X_test, _ = digits
    options = {"pretrain_steps": 0, "max_steps": 40, "random_state": 0}
    soft = DeepSVDD(objective="soft-boundary", nu=0.2, warm_up_steps=10, **options)
    soft.fit(X[y == 1])
    assert soft.radius_ > 0
    assert soft.score_samples(X_test).max() <= soft.radius_**2
    with pytest.warns(ConvergenceWarning, match="Set warm_up_steps"):
        clone(soft).set_params(warm_up_steps=100).fit(X[y == 1])
    one = DeepSVDD(**options).fit(X[y == 1])
    assert one.radius_ == 0
    assert one.score_samples(X_test).max() <= 0


# ----------------------------------------------------------------- networks and labels


def test_numbers_of_the_papers():
    def size(name, channels=1):
        return sum(
            p.numel() for p in load_backbone(name, in_channels=channels).parameters()
        )

    conv = 16 * 25 + 16 + 2 * 16 + 32 * 16 * 25 + 32 + 2 * 32
    assert size("mnist_lenet") == conv + 1568 * 64 + 64 + 2 * 64 + 64 * 32 + 32
    assert size("fashion_mnist_lenet") == conv + 1568 * 128 + 128 * 3 + 128 * 64 + 64
    conv = 8 * 25 + 8 + 2 * 8 + 4 * 8 * 25 + 4 + 2 * 4
    assert size("svdd_mnist_lenet") == conv + 196 * 32 + 32
    model = HSCClassifier.from_paper("cifar10", random_state=1)
    assert (model.backbone, model.max_steps) == ("cifar10_lenet", 7812)
    assert DeepSVDD.from_paper().batch_size == 200
    for make in (HSCClassifier, DeepSVDD):
        with pytest.raises(ValueError, match="dataset='svhn' is not one of mnist"):
            make.from_paper("svhn")


def test_decoder_mirrors_the_encoder():
    encoder = [
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 5 * 5, 7)),
    ]
    decoder = make_decoder(encoder, (1, 20, 20), unit=True).eval()
    out = decoder(torch.zeros(2, 7))
    assert out.shape == (2, 1, 20, 20)
    assert out.min() >= 0
    assert out.max() <= 1
    kinds = [type(m).__name__ for m in decoder]
    assert kinds.count("ConvTranspose2d") == 2
    assert biases(decoder) == []


def test_autoencoder_learns(digits):
    """The encoder that reconstructs is another than the one that was drawn."""
    X, y, _, _ = digits
    options = {"max_steps": 1, "random_state": 0, "learning_rate": 1e-3}
    with_, without = (
        DeepSVDD(pretrain_steps=n, **options).fit(X[y == 1]) for n in (50, 0)
    )
    assert not np.allclose(with_.center_, without.center_)


def test_contrast_normalization(digits):
    x = torch.rand(5, 3, 6, 7, dtype=torch.float64)
    contrast = ContrastNormalization()
    out = contrast(x)
    assert_allclose(out.mean(dim=(1, 2, 3)), 0, atol=1e-12)
    assert_allclose(out.abs().mean(dim=(1, 2, 3)), 1)
    assert torch.equal(contrast(torch.ones(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))
    X, y, X_test, _ = digits
    detector = DeepSVDD(
        contrast_normalization=True, pretrain_steps=5, max_steps=5, random_state=0
    ).fit(X[y == 1])
    assert detector.backbone_.stage_names[0] == "contrast"
    # brightness and contrast are gone
    assert_allclose(
        detector.score_samples(X_test * 0.5 + 0.2),
        detector.score_samples(X_test),
        rtol=1e-2,
    )
    with pytest.raises(ValueError, match="contrast_normalization needs images"):
        DeepSVDD(contrast_normalization=True).fit(np.eye(30))


@pytest.mark.parametrize("make", [DeepSVDD, DeepSAD])
def test_batchnorm_learns_with_the_objective(make, digits):
    X, y, _, _ = digits
    detector = make(pretrain_steps=0, max_steps=2, random_state=0).fit(X[y == 1])
    norms = [m for m in detector.backbone_.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(norm.num_batches_tracked == 2 for norm in norms)
    assert all(norm.running_mean.any() for norm in norms)


def test_the_soft_boundary_leaves_nu_outside():
    """One mini-batch holds all 80 that are trained on; the rate lets them lie."""
    X = np.random.default_rng(0).normal(size=(120, 3))
    options = {"nu": 0.2, "warm_up_steps": 1, "pretrain_steps": 0, "max_steps": 2}
    net = nn.Linear(3, 2, bias=False)
    detector = DeepSVDD(
        net, objective="soft-boundary", learning_rate=1e-12, batch_size=80, **options
    ).fit(X)
    z = X @ trained_weight(detector).T
    distances = np.linalg.norm(z - detector.center_, axis=1)
    # 16 of the 80, and some of the 40 others
    assert 16 <= np.sum(distances > detector.radius_) <= 56


def test_a_mini_batch_of_one_is_the_same_without_the_cache(digits):
    """BatchNorm is given it twice, which is more than the frozen pass takes."""
    X, y, _, _ = digits
    options = {"batch_size": 1, "pretrain_steps": 0, "max_steps": 3}
    curves = [
        DeepSVDD(max_cache_bytes=bound, random_state=0, **options)
        .fit(X[y == 1][:30])
        .loss_curve_
        for bound in (2**30, 0)
    ]
    assert_array_equal(*curves)


def test_deep_sad_without_labels_is_deep_svdd(digits):
    X, y, X_test, _ = digits
    options = {"pretrain_steps": 5, "max_steps": 5, "random_state": 0}
    expected = DeepSVDD(**options).fit(X[y == 1]).score_samples(X_test)
    for labels in (None, np.zeros((y == 1).sum()), np.full((y == 1).sum(), 5)):
        found = DeepSAD(**options).fit(X[y == 1], labels).score_samples(X_test)
        assert_array_equal(found, expected)


@pytest.mark.parametrize("balanced", [True, False])
def test_deep_sad_learns_from_anomalies(digits, balanced):
    X, y, X_test, y_test = digits
    options = {"pretrain_steps": 0, "max_steps": 60, "random_state": 0}
    labels = np.where(y == 1, 0, -1)
    aurocs = [
        roc_auc_score(y_test, detector.score_samples(X_test))
        for detector in (
            DeepSAD(balanced=balanced, **options).fit(X, labels),
            DeepSVDD(**options).fit(X[y == 1]),
        )
    ]
    assert aurocs[0] > aurocs[1]
    assert aurocs[0] > 0.95


def test_deep_sad_warns_of_zeros_and_ones(digits):
    X, y, _, _ = digits
    with pytest.warns(UserWarning, match="known to be normal"):
        DeepSAD(pretrain_steps=0, max_steps=1).fit(X, (y == 1).astype(int))


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milestones": (0.5, 2)}, r"milestones=\(0.5, 2\) must be shares"),
        ({"trainable_stages": "fc9"}, r"trainable_stages=\['fc9'\] not found"),
        ({"stages": "fc9"}, r"stages=\['fc9'\] not found"),
        (
            {"trainable_stages": None, "projection": None},
            "projection=None leaves nothing to train",
        ),
        ({"learning_rate": 1e30}, "Training diverged: the loss is"),
    ],
)
def test_bad_parameters_leave_the_fitted_state(digits, options, message):
    X, y, X_test, _ = digits
    model = lenet(max_steps=5).fit(X, y)
    expected = model.score_samples(X_test[:5])
    with pytest.raises(ValueError, match=message):
        model.set_params(**options).fit(X, y)
    assert_array_equal(model.score_samples(X_test[:5]), expected)


def test_more_than_two_classes_are_refused():
    with pytest.raises(ValueError, match="Only binary classification is supported"):
        HSCClassifier().fit(np.eye(21), [0, 1, 2] * 7)


def test_augmented_training_is_the_same_from_a_cache(digits, tmp_path):
    """The second fit finds its first pass there, and passes nothing before training."""
    X, y, _, _ = digits
    options = {"pretrain_steps": 2, "max_steps": 3, "random_state": 0}
    curves = [
        DeepSVDD(
            "svdd_mnist_lenet",
            image_shape=(8, 8),
            augmentation=torch.sqrt,
            memory=memory,
            **options,
        )
        .fit(X[y == 1][:40].reshape(40, -1))
        .loss_curve_
        for memory in (None, tmp_path, tmp_path)
    ]
    assert_array_equal(curves[0], curves[1])
    assert_array_equal(curves[0], curves[2])
