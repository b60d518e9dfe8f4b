"""PANDA: its equations, its adaptations, and what it promises besides."""

from __future__ import annotations

import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import log_expit, softmax
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.svm import OneClassSVM
from torch import nn
from torch.nn import functional as F

from skdeepad import GaussianScorer, KNNScorer, OneClassKFold, PANDAEstimator
from skdeepad.backbones import Backbone, load_backbone
from skdeepad.fisher import fisher_diagonal, mean_squared_gradients, sampled_loss
from skdeepad.inference import FeaturePass, regroup
from skdeepad.objectives import compactness, elastic_penalty, outlier_exposure
from skdeepad.training import (
    DivergedError,
    QuickGradients,
    shuffled_batches,
    train,
    with_quick_gradients,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 6)).astype(np.float32)
NEW = RNG.normal(size=(40, 6)).astype(np.float32)
ODD = (3 + RNG.normal(size=(40, 6))).astype(np.float32)
LABELS = np.r_[np.ones(120), -np.ones(40)]
UNSUPERVISED = [None, "early_stopping", "ses", "ewc"]
ADAPTATIONS = [*UNSUPERVISED, "joint", "outlier_exposure"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:max_steps:sklearn.exceptions.ConvergenceWarning"
)


def linear_network():
    """A frozen layer, a trained one, and a head of three classes."""
    torch.manual_seed(0)
    return Backbone(
        {"first": nn.Linear(6, 5), "second": nn.Linear(5, 4)},
        nn.Linear(4, 3),
        vectors=True,
    )


def make(adaptation="ewc", **options):
    paper = {"include_initial": False, "trainable_stages": "second"}
    options = {**paper, "max_steps": 20, "random_state": 0, **options}
    return PANDAEstimator(linear_network(), adaptation=adaptation, **options)


def fit(estimator):
    if estimator.adaptation == "outlier_exposure":
        return estimator.fit(np.r_[X, ODD], LABELS)
    if estimator.adaptation == "joint":
        return estimator.fit(X, X_pretrain=NEW, y_pretrain=np.arange(40) % 3)
    return estimator.fit(X)


each_adaptation = pytest.mark.parametrize("adaptation", ADAPTATIONS)


# the equations


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_compactness():
    features, center = tensors((7, 3), (3,))
    expected = np.mean(np.linalg.norm(features - center, axis=1) ** 2)
    assert_allclose(compactness(features, center), expected, rtol=1e-6)


def test_elastic_penalty():
    now, before, fisher = tensors(5, 5, 5)
    expected = 0.5 * np.dot(7 * fisher.numpy(), (now - before).numpy() ** 2)
    halves = [torch.split(t, [2, 3]) for t in (now, before, 7 * fisher)]
    assert_allclose(elastic_penalty(*halves), expected, rtol=1e-5)


def test_outlier_exposure():
    logits = torch.tensor([-2.0, 0.5, 3.0, -50.0])
    outlier = torch.tensor([False, True, False, True])
    signs = np.where(outlier, 1, -1)
    expected = -np.mean(log_expit(signs * logits.double().numpy()))
    assert_allclose(outlier_exposure(logits, outlier), expected, rtol=1e-6)


def test_mean_squared_gradients_are_of_single_samples():
    (x,) = tensors((6, 3))
    weight = torch.ones(3, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    fisher = mean_squared_gradients([weight, unused], ((row @ weight) for row in x))
    assert_allclose(fisher[0], np.mean(x.numpy() ** 2, axis=0), rtol=1e-5)
    assert_array_equal(fisher[1], [0, 0])


@pytest.mark.parametrize("shape, kernel", [((2, 3, 9, 11), 5), ((3, 2, 8, 5), (7, 5))])
@pytest.mark.parametrize("stride", [1, 2, (3, 2)])
@pytest.mark.parametrize("padding", [0, (2, 1), 3])
def test_quick_gradients_are_those_of_autograd(shape, kernel, stride, padding):
    x, *_ = tensors(np.prod(shape))
    n_channels = shape[1]
    conv = nn.Conv2d(
        n_channels, n_channels, kernel, stride, padding, groups=n_channels, bias=False
    ).double()
    x = x.double().reshape(shape).requires_grad_(True)
    plain = conv(x)
    with QuickGradients():
        quick = conv(x)
    assert "DepthwiseConvolution" in type(quick.grad_fn).__name__
    assert_array_equal(plain.detach(), quick.detach())
    inputs = [x, conv.weight]
    wanted = torch.autograd.grad(plain.sin().sum(), inputs)
    for found, expected in zip(
        torch.autograd.grad(quick.sin().sum(), inputs), wanted, strict=True
    ):
        assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 5, groups=4),
        nn.Conv2d(4, 8, 5, groups=4, bias=False),
        nn.Conv2d(4, 4, 5, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 4, 5, groups=4, bias=False, padding="same"),
        nn.Conv2d(4, 4, 5, groups=4, bias=False, dilation=2),
        nn.Conv2d(4, 4, 5, groups=4, bias=False).requires_grad_(False),
    ],
)
def test_other_convolutions_stay_as_they_are(conv):
    x = torch.ones(1, 4, 9, 9, requires_grad=True)
    outputs = with_quick_gradients(conv(x) for _ in range(2))
    for output in outputs:
        assert "DepthwiseConvolution" not in type(output.grad_fn).__name__
    kernel = nn.Conv2d(4, 4, 5, groups=4, bias=False).weight
    for output in with_quick_gradients([x]):
        # only what is computed inside is changed
        plain = F.conv2d(output, kernel, groups=4)
        assert "DepthwiseConvolution" not in type(plain.grad_fn).__name__


def test_sampled_loss_gives_the_fisher_information():
    """Of a softmax: the covariance of its one-hot outcomes; of a Gaussian: 1."""
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    n = 4000
    losses = (sampled_loss(logits, nn.Identity(), generator) for _ in range(n))
    (fisher,) = mean_squared_gradients([logits], losses)
    p = softmax([1.0, 0.0, -1.0])
    assert_allclose(fisher[0], p * (1 - p), atol=0.02)
    losses = (sampled_loss(logits, None, generator) for _ in range(n))
    (fisher,) = mean_squared_gradients([logits], losses)
    assert_allclose(fisher[0], [1, 1, 1], atol=0.1)


# the training loop


def test_steps_are_those_of_sgd_by_hand():
    rate, momentum, decay, clip = 0.1, 0.9, 0.01, 0.5
    target = np.array([3.0, -4.0])
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], rate, momentum, weight_decay=decay)
    losses = ((weight - torch.tensor(target)).square().sum() for _ in range(2))
    values = list(train(optimizer, losses, clip_norm=clip))
    w, velocity, expected = np.zeros(2), np.zeros(2), []
    for _ in range(2):
        expected.append(np.sum((w - target) ** 2))
        gradient = 2 * (w - target)
        gradient *= min(1, clip / np.linalg.norm(gradient))
        velocity = momentum * velocity + gradient + decay * w
        w = w - rate * velocity
    assert_allclose(weight.detach(), w, rtol=1e-5)
    assert_allclose(values, expected, rtol=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing():
    weight = torch.ones(1, requires_grad=True)
    losses = iter([weight.sum(), (weight * torch.inf).sum()])
    steps = train(torch.optim.SGD([weight], 0.1), losses)
    next(steps)
    before = weight.item()
    with pytest.raises(DivergedError, match="the loss is inf"):
        next(steps)
    assert weight.item() == before


def test_batches_go_through_all_samples_again_and_again():
    batches = shuffled_batches(np.arange(10, 17), 3, np.random.RandomState(0))
    epochs = [np.concatenate([next(batches) for _ in range(3)]) for _ in range(4)]
    for epoch in epochs:
        assert_array_equal(np.sort(epoch), np.arange(10, 17))
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("normalize", [False, True])
def test_two_steps_of_adaptation_by_hand(normalize):
    """The whole estimator against NumPy, with one batch of all rows."""
    rate, momentum, decay = 0.05, 0.9, 0.02
    estimator = make(
        "early_stopping",
        normalize=normalize,
        batch_size=200,
        max_steps=2,
        learning_rate=rate,
        momentum=momentum,
        weight_decay=decay,
        clip_norm=None,
    ).fit(X)
    held_out = np.random.RandomState(0).permutation(120)[:40]
    rows = np.setdiff1d(np.arange(120), held_out)
    state = {
        k: v.numpy().astype(float) for k, v in linear_network().state_dict().items()
    }
    z = X.astype(float) @ state["stages.first.weight"].T + state["stages.first.bias"]
    W, b = state["stages.second.weight"], state["stages.second.bias"]

    def features(rows):
        f = z[rows] @ W.T + b
        length = np.linalg.norm(f, axis=1, keepdims=True) if normalize else 1.0
        return f / length, length

    center = features(rows)[0].mean(axis=0)
    vW, vb = np.zeros_like(W), np.zeros_like(b)
    losses = []
    for _ in range(2):
        psi, length = features(rows)
        losses.append(np.mean(np.sum((psi - center) ** 2, axis=1)))
        up = 2 * (psi - center) / len(rows)
        if normalize:  # the derivative of f / |f|
            up = (up - psi * np.sum(up * psi, axis=1, keepdims=True)) / length
        vW = momentum * vW + up.T @ z[rows] + decay * W
        vb = momentum * vb + up.sum(axis=0) + decay * b
        W, b = W - rate * vW, b - rate * vb
    assert_allclose(estimator.loss_curve_, losses, rtol=1e-4)
    assert_allclose(
        estimator.transform(X), features(slice(None))[0], rtol=1e-3, atol=1e-5
    )


# the adaptations


def moved(estimator):
    """How far training took the features."""
    before = make(None).fit(X).transform(NEW)
    return np.abs(estimator.transform(NEW) - before).max()


def test_ewc_with_lambda_0_is_early_stopping():
    free = make("early_stopping").fit(X)
    assert_array_equal(
        make("ewc", ewc_lambda=0).fit(X).score_samples(NEW), free.score_samples(NEW)
    )
    assert moved(free) > 0.05


def test_ewc_with_an_enormous_lambda_is_no_adaptation():
    free, held = (
        moved(make(a, ewc_lambda=1e12).fit(X)) for a in ("early_stopping", "ewc")
    )
    assert held < 0.05 * free


def test_ewc_is_between():
    distances = [moved(make(ewc_lambda=k).fit(X)) for k in (0, 0.1, 1, 10, 100)]
    assert (np.diff(distances) < 0).all()


def test_the_stiffest_spring_takes_a_step_back():
    """Weights are then where their last step alone would have brought them."""
    options = {"batch_size": 200, "momentum": 0, "clip_norm": None}
    options |= {"learning_rate": 1e-3, "normalize": False}
    initial = linear_network().state_dict()
    fisher = {name: torch.ones_like(value) for name, value in initial.items()}
    held = make(ewc_lambda=1e12, fisher=fisher, max_steps=2, **options).fit(X)
    free = make("early_stopping", max_steps=1, **options).fit(X)
    first = initial["stages.second.weight"]
    steps = [
        next(iter(estimator._versions.clone().stages.values())).second.weight - first
        for estimator in (held, free)
    ]
    assert_allclose(steps[0], steps[1], rtol=0.05, atol=1e-6)
    assert steps[1].abs().max() > 1e-4


def test_ses_scores_by_the_largest_of_normalized_distances():
    estimator = make("ses", n_checkpoints=4, normalize=False).fit(X)
    assert estimator.checkpoints_ == (5, 10, 15, 20)
    held_out = np.random.RandomState(0).permutation(120)[:40]
    rest = np.setdiff1d(np.arange(120), held_out)

    def knn(gallery, rows):
        near = NearestNeighbors(n_neighbors=2).fit(gallery)
        return np.mean(near.kneighbors(rows)[0] ** 2, axis=1)

    ratios = []
    for old, new in zip(
        np.split(estimator.transform(X), 4, axis=1),
        np.split(estimator.transform(NEW), 4, axis=1),
        strict=True,
    ):
        ratios.append(knn(old, new) / knn(old[rest], old[held_out]).mean())
    assert_allclose(-estimator.score_samples(NEW), np.max(ratios, axis=0), rtol=1e-4)
    assert len({*np.argmax(ratios, axis=0)}) > 1


def test_the_initial_features_count_as_much_as_the_adapted_ones():
    both = make(include_initial=True).fit(X)
    assert both.checkpoints_ == (0, 20)
    initial, adapted = make(None).fit(X), make().fit(X)
    assert_array_equal(both.transform(NEW)[:, :4], initial.transform(NEW))
    assert_array_equal(both.transform(NEW)[:, 4:], adapted.transform(NEW))
    held_out = np.random.RandomState(0).permutation(120)[:40]
    rest = np.setdiff1d(np.arange(120), held_out)
    ratios = []
    for old, new in zip(
        np.split(both.transform(X), 2, axis=1),
        np.split(both.transform(NEW), 2, axis=1),
        strict=True,
    ):
        typical = KNNScorer().fit(old[rest]).score_samples(old[held_out]).mean()
        ratios.append(KNNScorer().fit(old).score_samples(new) / -typical)
    assert_allclose(both.score_samples(NEW), np.mean(ratios, axis=0), rtol=1e-6)
    ses = make("ses", include_initial=True, n_checkpoints=1).fit(X)
    assert ses.checkpoints_ == (0, 20)


def test_checkpoints_are_those_of_shorter_trainings():
    long = make("ses", n_checkpoints=2).fit(X)
    short = make("early_stopping", max_steps=10).fit(X)
    assert_array_equal(long.transform(NEW)[:, :4], short.transform(NEW))
    assert_array_equal(long.loss_curve_[:10], short.loss_curve_)


def test_joint_keeps_the_classes_apart():
    """With all weight on classification, the pretraining images are learnt."""
    classes = (NEW[:, 0] > 0).astype(int)
    estimator = make("joint", joint_alpha=0, max_steps=200, learning_rate=0.1)
    estimator.fit(X, X_pretrain=NEW, y_pretrain=classes)
    assert estimator.loss_curve_[-20:].mean() < 0.5 * estimator.loss_curve_[:5].mean()
    both = make("joint", joint_alpha=1e6, clip_norm=1.0)
    both.fit(X, X_pretrain=NEW, y_pretrain=classes)
    alone = make("early_stopping", clip_norm=1.0).fit(X)
    # with all weight on compactness, what is left is Eq. 1 and a clipped gradient
    assert both.loss_curve_[0] == pytest.approx(1e6 * alone.loss_curve_[0], rel=1e-3)


@pytest.mark.parametrize("normalize", [False, True])
def test_outlier_exposure_learns_to_tell_outliers(normalize):
    estimator = make("outlier_exposure", max_steps=100, normalize=normalize)
    estimator.fit(np.r_[X, ODD], LABELS)
    new = np.r_[NEW, 3 + np.random.default_rng(1).normal(size=(40, 6))]
    y = np.repeat([1, -1], 40)
    scores = estimator.score_samples(new)
    assert roc_auc_score(y, scores) > 0.97
    logit = estimator._logit
    by_hand = (
        estimator.transform(new) @ logit.weight.detach().numpy()[0] + logit.bias.item()
    )
    assert_allclose(scores, -by_hand, rtol=1e-4, atol=1e-4)


@each_adaptation
def test_what_is_not_trained_stays(adaptation):
    network = linear_network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    estimator = fit(make(adaptation).set_params(backbone=network))
    for state in (network.state_dict(), estimator.backbone_.state_dict()):
        for name, value in before.items():
            assert_array_equal(state[name], value)
    assert estimator.trained_stages_ == ("second",)


def test_a_stage_in_the_middle_can_be_trained_alone():
    estimator = make(trainable_stages="first", max_steps=5).fit(X)
    (version,) = estimator._versions.clone().stages.values()
    then, now = linear_network().stages, version
    assert (now.first.weight != then["first"].weight).any()
    assert_array_equal(now.second.weight, then["second"].weight.detach())


# the Fisher diagonal


def test_fisher_is_saved_and_found_again(tmp_path):
    network = linear_network()
    values = {
        name: torch.rand(value.shape) for name, value in network.named_parameters()
    }
    torch.save(values, tmp_path / "fisher.pt")
    by_mapping = make(fisher=values).fit(X).score_samples(NEW)
    by_file = make(fisher=tmp_path / "fisher.pt").fit(X).score_samples(NEW)
    assert_array_equal(by_mapping, by_file)
    assert (by_mapping != make().fit(X).score_samples(NEW)).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no values of shape"),
        ({"stages.second.weight": np.ones(2)}, "for the weight 'stages.second.weight'"),
    ],
)
def test_a_fisher_of_another_network(values, message):
    with pytest.raises(ValueError, match=message):
        make(fisher=values).fit(X)


def test_fisher_diagonal_of_labelled_images():
    images = np.random.default_rng(0).random((5, 3, 8, 8), dtype=np.float32)
    torch.manual_seed(0)
    network = Backbone(
        {"conv": nn.Conv2d(3, 4, 3), "relu": nn.ReLU()},
        nn.Linear(4, 3),
        in_channels=3,
    )
    y = np.array([0, 1, 2, 1, 0])
    fisher = fisher_diagonal(images, y, backbone=network, random_state=0)
    expected = 0
    for image, label in zip(images, y, strict=True):
        network.zero_grad()
        network.requires_grad_(True)
        maps = network.forward_stages(torch.from_numpy(image)[None], ["relu"])["relu"]
        logits = network.head(maps.mean((2, 3)))
        (-torch.log_softmax(logits, 1)[0, label]).backward()
        expected = expected + network.stages["conv"].weight.grad ** 2 / 5
    assert_allclose(fisher["stages.conv.weight"], expected, rtol=1e-4)
    assert not any("head" in name for name in fisher)
    drawn = fisher_diagonal(images, backbone=network, random_state=0)
    assert drawn.keys() == fisher.keys()


@pytest.mark.parametrize("y", [[0, 1, 2, 3, 4], [0.5] * 5, [-1] * 5])
def test_classes_that_the_head_does_not_know(y):
    with pytest.raises(ValueError, match="integers from 0 to 2"):
        make("joint").fit(X, X_pretrain=NEW[:5], y_pretrain=y)


# scoring


@pytest.mark.parametrize(
    "scorer",
    [
        *("knn", "kmeans", "centroid"),
        IsolationForest(random_state=0),
        OneClassSVM(),
        EllipticEnvelope(),
        make_pipeline(GaussianScorer(), KNNScorer()),
    ],
)
@pytest.mark.parametrize("adaptation", [None, "ewc"])
def test_any_outlier_detector_scores(scorer, adaptation):
    estimator = make(adaptation, scorer=scorer, normalize=False, max_steps=5).fit(X)
    y = np.repeat([1, -1], 40)
    assert roc_auc_score(y, estimator.score_samples(np.r_[NEW, ODD])) > 0.8
    assert (estimator.predict(X) == -1).sum() == 6  # 5 % of 120
    again = estimator.scorers_[0].score_samples(estimator.transform(NEW))
    assert_array_equal(estimator.score_samples(NEW), again)


@pytest.mark.parametrize("adaptation", UNSUPERVISED)
@pytest.mark.parametrize("n", [50, 1000])
def test_false_alarms_on_samples_never_seen(adaptation, n):
    alarms = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        train, test = rng.normal(size=(n, 6)), rng.normal(size=(400, 6))
        detector = make(
            adaptation, contamination=0.1, max_steps=40, random_state=seed
        ).fit(train)
        alarms.append(np.mean(detector.predict(test) == -1))
    assert 0.06 < np.mean(alarms) < 0.15


# speed and memory


@pytest.mark.parametrize("kind", ["arrays", "paths"])
@each_adaptation
def test_scores_are_the_same_without_the_cache(adaptation, kind, textures, image_files):
    train, test = textures.X_train, textures.X_test
    if kind == "paths":
        train, test = image_files.train, image_files.test

    def scores(bound):
        estimator = PANDAEstimator(
            adaptation=adaptation,
            image_size=32,
            max_steps=3,
            n_checkpoints=2,
            batch_size=8,
            max_cache_bytes=bound,
            random_state=0,
        )
        if adaptation == "outlier_exposure":  # drawn more than once for a batch
            estimator.fit(train, np.repeat([1, -1], [21, 3]))
        elif adaptation == "joint":
            estimator.fit(train, X_pretrain=train, y_pretrain=np.arange(24))
        else:
            estimator.fit(train)
        return np.r_[estimator.offset_, estimator.score_samples(test)]

    assert_array_equal(scores(2**30), scores(0))


@pytest.mark.parametrize("sizes", [[3, 3, 1], [20], [1] * 9, [4], []])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_batches_are_cut_anew(sizes, size):
    """Every sample once, in its order, with its own values."""
    edges = np.cumsum([0, *sizes])
    batches = [np.arange(*pair) for pair in pairwise(edges)]
    cut = list(
        regroup(((index, [10 * index[:, None], index]) for index in batches), size)
    )
    assert all(len(index) == size for index, _ in cut[:-1])
    assert all(0 < len(index) <= size for index, _ in cut)
    for index, (values, more) in cut:
        assert_array_equal(values, 10 * index[:, None])
        assert_array_equal(more, index)
    assert [i for index, _ in cut for i in index] == list(range(sum(sizes)))


def test_a_pass_refuses_what_it_cannot_pad():
    estimator = make(None, batch_size=8).fit(X)
    task = estimator._front()
    assert task.run(torch.zeros(8, 6))[0].shape == (8, 5)
    with pytest.raises(ValueError, match="A pass of 8 samples was given 9"):
        task.run(torch.zeros(9, 6))


def count_trunk(monkeypatch):
    """Count the images that frozen stages see."""
    seen = []
    run = FeaturePass.run

    def counted(self, values):
        seen.append(len(values))
        return run(self, values)

    monkeypatch.setattr(FeaturePass, "run", counted)
    return seen


@pytest.mark.parametrize("adaptation", ["early_stopping", "ses", "ewc"])
def test_frozen_stages_run_once(adaptation, monkeypatch):
    seen = count_trunk(monkeypatch)
    estimator = make(adaptation, batch_size=40).fit(X)
    assert sum(seen) == 120
    seen.clear()
    estimator.score_samples(NEW)
    assert sum(seen) == 40


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_keeps_what_frozen_stages_make(
    precision, tmp_path, textures, monkeypatch
):
    options = {"image_size": 32, "max_steps": 2, "precision": precision}
    plain = PANDAEstimator(**options, random_state=0).fit(textures.X_train)
    kept = PANDAEstimator(**options, random_state=0, memory=tmp_path)
    seen = count_trunk(monkeypatch)
    kept.fit(textures.X_train)
    assert sum(seen) == len(textures.X_train)
    seen.clear()
    kept.set_params(max_steps=1).fit(textures.X_train[::-1])
    kept.set_params(max_steps=2).fit(textures.X_train)
    assert not seen
    assert_array_equal(
        kept.score_samples(textures.X_test), plain.score_samples(textures.X_test)
    )


# signs of trouble


def test_a_diverging_loss_is_told_and_survived():
    estimator = make("ses", normalize=False, clip_norm=None, max_steps=40).fit(X)
    expected = estimator.score_samples(NEW)
    estimator.set_params(learning_rate=1e6)
    with pytest.raises(ValueError, match=r"diverged.* steps\. Lower learning_rate"):
        estimator.fit(X)
    assert_array_equal(estimator.score_samples(NEW), expected)


def test_a_budget_beyond_the_data_is_told():
    with pytest.warns(ConvergenceWarning, match="Set max_steps to 125 or less"):
        make(max_steps=126, learning_rate=1e-3).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(max_steps=125, learning_rate=1e-3).fit(X)


def test_collapse_is_told():
    collapsing = {"normalize": False, "learning_rate": 0.3, "max_steps": 125}
    with pytest.warns(ConvergenceWarning, match=r"collapsed.*Lower max_steps"):
        make("early_stopping", **collapsing).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("early_stopping").fit(X)


# errors


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({"adaptation": "outlier_exposure"}, None, "needs known anomalies"),
        ({"adaptation": "joint"}, None, "fit.X, X_pretrain=..., y_pretrain=..."),
        (
            {"trainable_stages": "third"},
            None,
            r"trainable_stages=\['third'\] not found",
        ),
        ({"adaptation": "SES"}, None, "adaptation"),
    ],
)
def test_errors_name_the_parameter_and_the_remedy(options, y, message):
    with pytest.raises(ValueError, match=message):
        make(**options).fit(X, y)


def test_stages_without_weights():
    network = Backbone({"linear": nn.Linear(6, 4), "relu": nn.ReLU()}, vectors=True)
    with pytest.raises(
        ValueError, match=r"trainable_stages=\('relu',\) have no weights"
    ):
        PANDAEstimator(network, trainable_stages="relu").fit(X)


def test_joint_needs_a_head():
    network = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="needs a backbone with a head"):
        PANDAEstimator(network, adaptation="joint").fit(
            X, X_pretrain=NEW, y_pretrain=np.zeros(40, int)
        )


def test_known_anomalies_are_left_out():
    labelled = make().fit(np.r_[X, ODD], LABELS)
    assert_array_equal(labelled.score_samples(NEW), make().fit(X).score_samples(NEW))


# in scikit-learn


@each_adaptation
def test_pickle(adaptation):
    estimator = fit(make(adaptation, max_steps=4))
    again = pickle.loads(pickle.dumps(estimator))
    assert_array_equal(again.score_samples(NEW), estimator.score_samples(NEW))


@pytest.mark.parametrize("adaptation", [None, "ewc", "ses"])
def test_a_pickle_holds_what_training_has_changed(adaptation, textures):
    estimator = PANDAEstimator(
        image_size=32,
        adaptation=adaptation,
        trainable_stages="stage7",
        n_checkpoints=2,
        max_steps=2,
        random_state=0,
    ).fit(textures.X_train)
    stage = load_backbone("efficientnet_lite0").stages["stage7"]
    trained = len(estimator.checkpoints_) - 1  # those of step 0 are the network's
    weights = trained * sum(p.numel() for p in stage.parameters())
    features = len(estimator.checkpoints_) * textures.X_train.shape[0] * 1280
    data = pickle.dumps(estimator)
    assert len(data) < 4 * (weights + 2 * features) + 100_000
    assert_array_equal(
        pickle.loads(data).score_samples(textures.X_test),
        estimator.score_samples(textures.X_test),
    )


def test_grid_search():
    search = GridSearchCV(
        make(max_steps=3, normalize=False),
        {"adaptation": [None, "ewc"], "scorer": ["knn", "centroid"]},
        cv=OneClassKFold(3),
        scoring="roc_auc",
        error_score="raise",
    ).fit(np.r_[X, ODD], LABELS)
    assert search.best_score_ > 0.9


def test_from_paper():
    params = PANDAEstimator.from_paper().get_params()
    assert params["backbone"] == "resnet152"
    assert params["max_steps"] == 7800
    assert PANDAEstimator.from_paper("early_stopping").max_steps == 2300
    small = PANDAEstimator.from_paper(
        "outlier_exposure",
        backbone="resnet18",
        weights=None,
        max_steps=1,
        image_size=32,
    )
    assert (small.learning_rate, small.weight_decay, small.clip_norm) == (0.1, 0, 1e-3)
    images = np.random.default_rng(0).random((12, 3, 32, 32), dtype=np.float32)
    small.fit(images, np.repeat([1, -1], 6))
    assert small.trained_stages_ == ("stage4",)
    assert small.transform(images).shape == (12, 512)
