"""Detectors from a classifier's own outputs."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import logsumexp, softmax
from scipy.stats import entropy
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from torch import nn

from skdeepad import OpenSetClassifier
from skdeepad.detectors._open_set import Deconfidence, normality
from skdeepad.training import shuffled_batches

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    """Digits below 6 to learn, all digits to score."""
    X, y = load_digits(return_X_y=True)
    X = X.reshape(-1, 8, 8) / 16
    known = (y < 6) & (np.arange(len(y)) < 1000)
    return X[known], y[known], X[1000:1400], y[1000:1400]


def lenet(**options):
    defaults = {"max_steps": 80, "batch_size": 64, "random_state": 0}
    return OpenSetClassifier("mnist_lenet", **{**defaults, **options})


@pytest.fixture(scope="module")
def fitted(digits):
    X, y, _, _ = digits
    return lenet().fit(X, y)


# ------------------------------------------------------------------------------ scores


def test_scores_against_scipy():
    logits = rng.normal(scale=5, size=(20, 6))
    h, g = rng.normal(size=(20, 6)), rng.uniform(size=(20, 1))
    outputs = torch.from_numpy(np.hstack([logits, h, g]))
    p = softmax(logits, axis=1)
    expected = {
        "max_logit": logits.max(axis=1),
        "max_softmax": p.max(axis=1),
        "entropy": -entropy(p, axis=1),
        "energy": logsumexp(logits, axis=1),
        "h": h.max(axis=1),
        "g": g[:, 0],
    }
    for score, values in expected.items():
        assert_allclose(normality(outputs, score, 6), values, rtol=1e-10, atol=1e-12)


def test_factors_of_generalized_odin_by_hand():
    z = rng.normal(size=(8, 5))
    for kind in ("inner", "cosine", "euclidean"):
        head = Deconfidence(kind, 5, 3).double().eval()
        W = head.weight.detach().numpy()
        linear, norm, _ = head.g
        u = z @ linear.weight.detach().numpy().T + linear.bias.item()
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(2.0)
        u = (u - 0.3) / np.sqrt(2 + norm.eps)
        g = 1 / (1 + np.exp(-u))
        h = {
            "inner": z @ W.T,
            "cosine": np.array(
                [
                    [
                        a @ w / ((np.sqrt(a @ a) + 1e-4) * (np.sqrt(w @ w) + 1e-4))
                        for w in W
                    ]
                    for a in z
                ]
            ),
            "euclidean": -np.array([[np.mean((a - w) ** 2) for w in W] for a in z]),
        }[kind]
        with torch.no_grad():
            out = head(torch.from_numpy(z)).numpy()
        assert_allclose(out, np.hstack([h / g, h, g]), rtol=1e-6)


@pytest.mark.parametrize("score", ["max_logit", "entropy"])
def test_unknown_classes_score_lower(fitted, digits, score):
    _, _, X_test, y_test = digits
    model = clone(fitted).set_params(anomaly_score=score)
    model = model.fit(*digits[:2])
    assert roc_auc_score(y_test < 6, model.score_samples(X_test)) > 0.8
    known = model.predict_known(X_test)
    assert_array_equal(known == 1, model.score_samples(X_test) >= model.offset_)
    # of other writers than those it has learnt from
    assert np.mean(known[y_test < 6] == -1) < 0.25


# --------------------------------------------------------------------------- classifier


def test_outputs_agree(fitted, digits):
    _, _, X_test, y_test = digits
    decision = fitted.decision_function(X_test)
    assert decision.shape == (400, 6)
    assert_allclose(fitted.predict_proba(X_test), softmax(decision, axis=1))
    assert_array_equal(fitted.predict(X_test), decision.argmax(axis=1))
    assert_allclose(fitted.score_samples(X_test), decision.max(axis=1), rtol=1e-5)
    assert fitted.score(X_test[y_test < 6], y_test[y_test < 6]) > 0.9
    again = pickle.loads(pickle.dumps(fitted))
    assert_array_equal(again.score_samples(X_test), fitted.score_samples(X_test))
    alone = fitted.score_samples(X_test[5:6])
    assert_allclose(alone, fitted.score_samples(X_test)[5:6], rtol=1e-6)


def test_fit_predict_tells_known_from_unknown(digits):
    X, y, _, _ = digits
    model = lenet(max_steps=5)
    known = model.fit_predict(X, y)
    assert set(known) == {-1, 1}
    assert_array_equal(known, model.predict_known(X))


def test_classes_keep_their_names(digits):
    X, y, _, _ = digits
    names = np.array(["zero", "one", "two", "three", "four", "five"])[y]
    model = lenet(max_steps=60).fit(X, names)
    assert_array_equal(model.classes_, np.unique(names))
    assert np.mean(model.predict(X) == names) > 0.8


def test_a_frozen_network_with_a_head(digits):
    X, y, X_test, y_test = digits
    model = OpenSetClassifier(image_size=32, max_steps=100, random_state=0)
    model.fit(X[:200], y[:200])
    assert model.trained_stages_ == ()
    assert model.score(X_test[y_test < 6], y_test[y_test < 6]) > 0.8


def test_cross_validation(digits):
    X, y, _, _ = digits
    assert (cross_val_score(lenet(max_steps=60), X, y, cv=2) > 0.7).all()


# ------------------------------------------------------------------ variants


@pytest.mark.parametrize("head", ["inner", "cosine", "euclidean"])
def test_generalized_odin_learns(digits, head):
    X, y, X_test, y_test = digits
    model = lenet(head=head, learning_rate=0.005).fit(X, y)
    assert model.score(X_test[y_test < 6], y_test[y_test < 6]) > 0.6
    for score in ("h", "g"):
        again = clone(model).set_params(anomaly_score=score, max_steps=5).fit(X, y)
        n = len(again.classes_)
        outputs = again._all_features(again._check_inputs(X_test[:9]))
        column = outputs[:, n : 2 * n].max(axis=1) if score == "h" else outputs[:, -1]
        assert_allclose(again.score_samples(X_test[:9]), column, rtol=1e-6)


def test_without_a_reconstruction_it_is_the_plain_classifier(fitted, digits):
    X, y, X_test, _ = digits
    plain, hybrid = (
        lenet(reconstruction_weight=weight, max_steps=5).fit(X, y)
        for weight in (0.0, 0.9)
    )
    assert_array_equal(plain.loss_curve_, fitted.loss_curve_[:5])
    assert hybrid.loss_curve_[0] > plain.loss_curve_[0]
    assert not np.allclose(
        hybrid.decision_function(X_test), plain.decision_function(X_test)
    )


def test_first_loss_of_the_hybrid_by_hand(digits):
    """Cross-entropy of an untrained network is known; the rest is the error's."""
    X, y, _, _ = digits
    losses = [
        lenet(reconstruction_weight=weight, max_steps=1).fit(X, y).loss_curve_[0]
        for weight in (0, 1, 3)
    ]
    assert_allclose(losses[2] - losses[0], 3 * (losses[1] - losses[0]), rtol=1e-3)
    assert 0.05 < losses[1] - losses[0] < 0.4  # of pixels in [0, 1] around 0.5


def test_perturbation_raises_scores(fitted, digits):
    X, y, X_test, _ = digits
    perturbed = lenet(perturbation=0.01).fit(X, y)
    assert_array_equal(perturbed.loss_curve_, fitted.loss_curve_)
    before, after = fitted.score_samples(X_test), perturbed.score_samples(X_test)
    assert np.mean(after > before) > 0.95
    # the first order says by how much
    network = nn.Sequential(*perturbed._network.stages.values())
    x = torch.from_numpy(X_test[:5]).float()[:, None]
    x = nn.functional.interpolate(x, (28, 28), mode="bilinear", antialias=True)
    x.requires_grad_()
    logits = perturbed._network.projection(network(x))
    (slope,) = torch.autograd.grad(logits.amax(dim=1).sum(), x)
    with torch.no_grad():
        moved = perturbed._network.projection(network(x + 0.01 * slope.sign()))
    assert_allclose(after[:5], moved.amax(dim=1), rtol=1e-4)


def test_an_ensemble_averages_its_members(digits):
    X, y, X_test, y_test = digits
    ensemble = lenet(n_members=2, max_steps=30).fit(X, y)
    members = ensemble.estimators_
    scores = [member.score_samples(X_test) for member in members]
    assert_allclose(ensemble.score_samples(X_test), np.mean(scores, axis=0))
    assert not np.allclose(scores[0], scores[1])
    p = np.mean([member.predict_proba(X_test) for member in members], axis=0)
    assert_allclose(ensemble.predict_proba(X_test), p, rtol=1e-6)
    alarms = np.mean(ensemble.predict_known(X_test[y_test < 6]) == -1)
    assert alarms < 0.25


def test_a_classifier_that_is_trained_already(digits):
    X, y, X_test, y_test = digits
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    images = torch.from_numpy(X).float()
    for index in (
        b
        for b, _ in zip(
            shuffled_batches(np.arange(len(X)), 64, np.random.RandomState(0)),
            range(100),
            strict=False,
        )
    ):
        loss = nn.functional.cross_entropy(
            net(images[index]), torch.from_numpy(y[index])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = OpenSetClassifier(net, head="given", precision="float32", image_size=8)
    model.fit(X)
    with torch.no_grad():
        logits = net(torch.from_numpy(X_test).float()).numpy()
    assert_allclose(model.decision_function(X_test), logits, rtol=1e-4, atol=1e-4)
    assert model.n_iter_ == 0
    assert_array_equal(model.classes_, range(6))
    assert roc_auc_score(y_test < 6, model.score_samples(X_test)) > 0.7
    named = clone(model).fit(X, np.array(list("abcdef"))[y])
    assert_array_equal(
        named.predict(X_test), np.array(list("abcdef"))[logits.argmax(1)]
    )
    with pytest.raises(ValueError, match=r"y has 3 classes, but .* 6 logits"):
        clone(model).fit(X, y % 3)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anomaly_score": "g"}, "Set head to one of inner"),
        (
            {"reconstruction_weight": 1.0, "trainable_stages": "fc2"},
            "needs all stages to be trained",
        ),
    ],
)
def test_bad_parameters(digits, options, message):
    X, y, _, _ = digits
    with pytest.raises(ValueError, match=message):
        lenet(**options).fit(X, y)


def test_bad_labels(digits):
    X, _, _, _ = digits
    with pytest.raises(ValueError, match="requires y to be passed"):
        lenet().fit(X)
    with pytest.raises(ValueError, match="y has one class only, 3"):
        lenet().fit(X, np.full(len(X), 3))
