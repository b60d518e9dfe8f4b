"""Mean-shifted contrastive loss: the equation, steps by hand, views, thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from skdeepad import MSADEstimator
from skdeepad.augmentation import contrastive_views
from skdeepad.backbones import Backbone
from skdeepad.objectives import mean_shifted_contrastive_loss

RNG = np.random.default_rng(0)
X = (2 + RNG.normal(size=(30, 6))).astype(np.float32)
NEW = (2 + RNG.normal(size=(20, 6))).astype(np.float32)


def network():
    """A frozen layer, and a trained one."""
    torch.manual_seed(0)
    return Backbone({"a": nn.Linear(6, 5), "b": nn.Linear(5, 4)}, vectors=True)


def make(**options):
    options = {"trainable_stages": "b", "random_state": 0, **options}
    return MSADEstimator(network(), **options)


def unit(f):
    return f / (f**2).sum(1, keepdims=True) ** 0.5


def loss_by_hand(f, center, temperature):
    """The sum that the paper writes down, pair by pair."""
    theta = unit(f - center)
    n, total = len(f) // 2, 0.0
    for i in range(2 * n):
        similar = [(theta[i] * theta[j]).sum() / temperature for j in range(2 * n)]
        exps = [s.exp() if isinstance(s, torch.Tensor) else np.exp(s) for s in similar]
        share = exps[(i + n) % (2 * n)] / sum(exps[:i] + exps[i + 1 :])
        total = total - (
            share.log() if isinstance(share, torch.Tensor) else np.log(share)
        )
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_loss_and_gradient_against_the_formula(temperature):
    rng = np.random.default_rng(1)
    f, center = unit(rng.normal(size=(6, 3))), np.array([0.2, -0.1, 0.3])
    at = torch.from_numpy(f).requires_grad_()
    loss = mean_shifted_contrastive_loss(at, torch.from_numpy(center), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(loss_by_hand(f, center, temperature), rel=1e-12)
    step = 1e-6
    for i, j in np.ndindex(f.shape):
        moved = np.zeros_like(f)
        moved[i, j] = step
        ahead, behind = (
            loss_by_hand(f + s * moved, center, temperature) for s in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        assert at.grad[i, j] == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("angular", [False, True])
def test_two_steps_by_hand(angular):
    """Vectors have no views: each is its own pair. All in one mini-batch."""
    rate, momentum, decay = 0.03, 0.9, 0.01
    detector = make(
        angular=angular,
        max_steps=2,
        learning_rate=rate,
        momentum=momentum,
        weight_decay=decay,
        validation_fraction=0,
    )
    with pytest.warns(UserWarning, match="validation_fraction=0"):
        detector.fit(X)
    state = {k: v.double() for k, v in network().state_dict().items()}
    z = torch.from_numpy(X).double() @ state["stages.a.weight"].T
    z = z + state["stages.a.bias"]
    weights = [state["stages.b.weight"], state["stages.b.bias"]]

    def features(weights):
        return unit(z @ weights[0].T + weights[1])

    center = features(weights).mean(dim=0)
    if angular:
        center = center / center.norm()
    assert_allclose(detector.center_, center, rtol=1e-5)
    velocity, losses = [0.0, 0.0], []
    for _ in range(2):
        weights = [w.detach().requires_grad_() for w in weights]
        f = features(weights)
        loss = loss_by_hand(torch.cat([f, f]), center, 0.25)
        if angular:  # once for each view
            loss = loss + 2 * ((f - center) ** 2).sum(dim=1).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        for i, gradient in enumerate(gradients):
            velocity[i] = (
                momentum * velocity[i] + gradient + decay * weights[i].detach()
            )
            weights[i] = weights[i].detach() - rate * velocity[i]
    assert_allclose(detector.loss_curve_, losses, rtol=1e-5)
    assert losses[1] < losses[0]
    found = detector._all_features(detector._check_inputs(X))
    assert_allclose(unit(found), features(weights), rtol=1e-3, atol=1e-5)


def test_scores_are_distances_to_two_neighbours():
    detector = make(max_steps=3).fit(X)
    gallery, new = (
        unit(detector._all_features(detector._check_inputs(x)).astype(float))
        for x in (X, NEW)
    )
    squared = ((new[:, None] - gallery) ** 2).sum(axis=2)
    nearest = np.sort(squared, axis=1)[:, :2].mean(axis=1)
    # 1 - cosine is half the squared distance
    assert_allclose(detector.score_samples(NEW), -nearest / 2, rtol=1e-4, atol=1e-7)


def test_held_out_images_set_the_threshold():
    """They are scored by the others alone, to whose level those are brought."""
    detector = make(max_steps=3).fit(X)
    scores = detector.score_samples(X)
    features = unit(detector._all_features(detector._check_inputs(X)).astype(float))
    squared = ((features[:, None] - features) ** 2).sum(axis=2) / 2
    np.fill_diagonal(squared, np.inf)
    own = -np.sort(squared, axis=1)[:, :2].mean(axis=1)
    stretched = scores / own
    # those trained on share one factor, and there are twenty of them
    factor = np.median(stretched)
    trained = np.isclose(stretched, factor, rtol=1e-4)
    assert trained.sum() == 20
    held_out = ~trained
    others = np.sort(squared[held_out][:, trained], axis=1)[:, :2].mean(axis=1)
    assert_allclose(scores[held_out], -others, rtol=1e-4)
    assert scores[trained].mean() == pytest.approx(scores[held_out].mean(), rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_views(channels):
    images = torch.rand(8, channels, 24, 32)
    first = contrastive_views((24, 32), 0)
    one, other = first(images), first(images)
    assert one.shape == images.shape
    assert one.min() >= 0 and one.max() <= 1
    changed = (one - other).abs().flatten(1).amax(dim=1)
    assert (changed > 0.01).all()
    before = torch.get_rng_state()
    assert_array_equal(contrastive_views((24, 32), 0)(images), one)
    assert_array_equal(torch.get_rng_state(), before)


def test_shares_of_the_views():
    """Of coloured images of one colour, a fifth turns grey."""
    colour = torch.tensor([0.9, 0.2, 0.4])[:, None, None].expand(-1, 8, 8)
    views = contrastive_views((8, 8), 0)(colour.expand(400, -1, -1, -1))
    grey = (views.amax(dim=1) - views.amin(dim=1)).flatten(1).amax(dim=1) < 1e-6
    assert 0.13 < grey.float().mean() < 0.27
    same = torch.isclose(views, colour, atol=1e-5).flatten(1).all(dim=1)
    # neither coloured nor grey: a fifth of four fifths
    assert 0.1 < same.float().mean() < 0.22


def convolutions():
    torch.manual_seed(0)
    stages = {
        name: nn.Sequential(nn.Conv2d(n, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
        for name, n in (("one", 3), ("two", 4))
    }
    return Backbone(stages, in_channels=3)


def test_views_are_trained_on_and_images_make_the_centre(photos):
    """BatchNorm keeps its statistics, as in the official code."""
    seen = []

    def watch(image):
        seen.append(image)
        return image * torch.rand(())

    options = {"max_steps": 2, "batch_size": 4, "random_state": 0}
    detector = MSADEstimator(convolutions(), augmentation=watch, **options)
    detector.fit(photos)
    assert len(seen) == 2 * 2 * 4  # steps, views, images
    plain = MSADEstimator(convolutions(), augmentation=None, **options).fit(photos)
    assert_array_equal(detector.center_, plain.center_)
    assert not np.allclose(detector.loss_curve_, plain.loss_curve_)
    after = detector.backbone_.state_dict()
    for name, before in convolutions().state_dict().items():
        if "running" in name:
            assert_array_equal(after[name], before)
        elif name.endswith("two.0.weight"):
            assert not torch.equal(after[name], before)


def test_augmentation_is_for_images():
    with pytest.raises(ValueError, match="augmentation needs images"):
        make(augmentation=lambda image: image).fit(X)


def test_from_paper():
    numbers = MSADEstimator.from_paper(angular=True).get_params()
    assert numbers["trainable_stages"] == ("stage3", "stage4")
    assert (numbers["learning_rate"], numbers["momentum"]) == (1e-5, 0)
    assert (numbers["temperature"], numbers["batch_size"]) == (0.25, 64)
    assert numbers["max_steps"] == 1580
    assert numbers["validation_fraction"] == 0
