"""Knowledge distillation: its equations, its cloner, its maps."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.ndimage import binary_opening, uniform_filter
from scipy.spatial.distance import cosine, mahalanobis
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from skdeepad import KDClonerEstimator
from skdeepad.augmentation import RotationAndScaling
from skdeepad.backbones import Backbone, load_backbone
from skdeepad.backbones._cloner import make_cloner
from skdeepad.detectors._base import as_unseen, by_rank_as_unseen
from skdeepad.detectors._kd_cloner import has_converged
from skdeepad.detectors._source_and_cloner import (
    SourceAndCloner,
    discrepancy,
    residuals,
    total_loss,
)
from skdeepad.frozen import frozen_copy
from skdeepad.localization import gradient, guided, refine, smoothgrad
from skdeepad.objectives import direction_loss, value_loss

RNG = np.random.default_rng(0)
VGG_STAGES = ("stage2", "stage3", "stage4", "stage5")
CPU = torch.device("cpu")


def tiny_source():
    """Two stages of maps, the second smaller and not signed; and pooled features."""
    torch.manual_seed(0)
    return Backbone(
        {
            "first": nn.Conv2d(3, 5, 3, padding=1),
            "second": nn.Sequential(nn.Conv2d(5, 7, 3, stride=2, padding=1), nn.ReLU()),
            "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        },
        in_channels=3,
    )


def make(**options):
    defaults = {"max_steps": 3, "batch_size": 8, "precision": "float32", "sigma": 1}
    defaults |= {"random_state": 0, "score_stages": ("first", "second")}
    return KDClonerEstimator(tiny_source(), **{**defaults, **options})


@pytest.fixture(scope="module")
def fitted(photos):
    return make().fit(photos)


# equations


def test_losses_of_the_papers_example():
    """Section 3.1: equally far from a*, and yet in another direction."""
    e = 0.7
    a1, a2, target = torch.zeros(3, 1, 6, dtype=torch.float64)
    a1[0, 2], a2[0, 1], target[0, 1] = e, (math.sqrt(2) + 1) * e, e
    assert_allclose(value_loss(target, a1), value_loss(target, a2))
    assert_allclose(value_loss(target, a1), 2 * e**2 / 6)
    assert_allclose(direction_loss(target, a1), 1)
    assert_allclose(direction_loss(target, a2), 0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 4)])
def test_losses_against_scipy(shape):
    source, cloner = RNG.normal(size=(2, *shape))
    values = value_loss(torch.tensor(source), torch.tensor(cloner))
    directions = direction_loss(torch.tensor(source), torch.tensor(cloner))
    for i, (s, c) in enumerate(zip(source, cloner, strict=True)):
        assert_allclose(values[i], np.mean((s - c) ** 2))
        assert_allclose(directions[i], cosine(s.ravel(), c.ravel()))


def by_hand(detector, images):
    """Eq. 4 for each image, and each stage's activations, from the networks."""
    x = torch.tensor(images.transpose(0, 3, 1, 2)).float() / 255
    source = detector.backbone_.stages
    first = source["first"](x)
    expected = [first, source["second"](first)]
    given = detector.cloner_(x)
    network = detector._network
    totals, pairs = 0, []
    for k, (s, c) in enumerate(zip(expected, given, strict=True)):
        s = (s - network.means[k][:, None, None]) / network.scales[k][:, None, None]
        pairs.append((s, c))
        value = (s - c).square().mean((1, 2, 3))
        cos = [1 - cosine(a.ravel(), b.ravel()) for a, b in zip(s, c, strict=True)]
        totals = totals + value.numpy()
        totals = totals + detector.direction_weight_ * (1 - np.array(cos))
    return totals, pairs


def test_score_is_the_total_loss(fitted, photos):
    new = 255 - photos[:6]
    totals, _ = by_hand(fitted, new)
    assert_allclose(fitted.score_samples(new), -totals, rtol=1e-4)


@pytest.mark.parametrize("loss", ["value", "direction", "total"])
def test_score_is_the_chosen_loss(photos, loss):
    detector = make(loss=loss, direction_weight=3.0).fit(photos)
    new = 255 - photos[:6]
    _, pairs = by_hand(detector, new)
    value = sum(value_loss(s, c) for s, c in pairs)
    direction = sum(direction_loss(s, c) for s, c in pairs)
    wanted = {"value": value, "direction": direction, "total": value + 3 * direction}
    assert_allclose(-detector.score_samples(new), wanted[loss], rtol=1e-4)


def test_scored_stages_are_chosen(photos):
    detector = make(score_stages="second").fit(photos)
    new = 255 - photos[:6]
    _, pairs = by_hand(detector, new)
    total = value_loss(*pairs[1])
    total = total + detector.direction_weight_ * direction_loss(*pairs[1])
    assert_allclose(-detector.score_samples(new), total, rtol=1e-4)


def test_lambda_makes_the_first_terms_equal(photos):
    """Section 3.1: from the errors on the untrained network."""
    # one mini-batch of all training images, and an untrained cloner
    options = {"batch_size": 64, "learning_rate": 1e-12, "max_steps": 1, "tol": -9}
    detector = make(**options).fit(photos)
    halves = [
        make(**options, loss=loss).fit(photos).loss_curve_[0]
        for loss in ("value", "direction")
    ]
    assert_allclose(detector.direction_weight_, halves[0] / halves[1], rtol=1e-5)
    assert_allclose(detector.loss_curve_[0], 2 * halves[0], rtol=1e-5)


def test_channels_are_standardized(fitted, photos):
    """By the images that are trained on: held-out ones count as new."""
    trained = trained_rows(fitted, photos)
    assert len(trained) < len(photos)
    x = torch.tensor(trained.transpose(0, 3, 1, 2)).float() / 255
    outputs = tiny_source().forward_stages(x, ("first", "second"))
    network = fitted._network
    for k, activations in enumerate(outputs.values()):
        mean = activations.mean((0, 2, 3)).detach()
        assert_allclose(network.means[k], mean, atol=1e-5)
        variance = activations.var((0, 2, 3), correction=0).detach()
        # what is hardly ever active is not blown up
        variance = variance.clamp(min=0.01 * variance.mean())
        assert_allclose(network.scales[k], variance.sqrt(), rtol=1e-3)
    raw = make(standardize=False).fit(photos)._network
    assert all((mean == 0).all() for mean in raw.means)
    assert all((scale == 1).all() for scale in raw.scales)


def test_training_takes_adams_steps(photos):
    """Against torch's own optimizer on the same mini-batch, written out."""
    options = {"batch_size": 64, "max_steps": 2, "loss": "value"}
    detector = make(**options).fit(photos)
    untrained = make(**{**options, "learning_rate": 1e-12}).fit(photos)
    cloner = untrained.cloner_.requires_grad_(True).train()
    for module in cloner.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    optimizer = torch.optim.Adam(cloner.parameters(), lr=1e-3)
    trained_on = trained_rows(detector, photos)
    for _ in range(2):
        _, pairs = by_hand_with_grad(untrained, trained_on)
        loss = sum(F.mse_loss(c, s) for s, c in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(
        detector.cloner_.parameters(), cloner.parameters(), strict=True
    ):
        assert_allclose(ours.detach(), theirs.detach(), atol=2e-4)


def trained_rows(detector, photos):
    """The images that were not held out: scores of held-out ones are kept as they are,
    and the others get those of their rank."""
    losses = detector._all_features(detector._check_inputs(photos))
    plain = detector._score(losses)
    told = detector.score_samples(photos)
    return photos[~np.isclose(plain, told, rtol=1e-9)]


def by_hand_with_grad(detector, images):
    x = torch.tensor(images.transpose(0, 3, 1, 2)).float() / 255
    network = detector._network
    with torch.no_grad():
        outputs = detector.backbone_.forward_stages(x, ("first", "second"))
        expected = network.standardize(outputs.values())
    return None, list(zip(expected, detector.cloner_(x), strict=True))


def test_convergence():
    falling = list(np.linspace(2, 1, 300))
    assert not has_converged(falling, 1e-3)
    assert has_converged([1.0] * 200, 1e-3)
    assert not has_converged([1.0] * 199, 1e-3)  # once in 100 steps
    assert not has_converged([1.0] * 200, -math.inf)


def test_training_stops_once_it_has_converged(photos):
    detector = make(max_steps=1000, tol=0.99).fit(photos)
    assert detector.n_iter_ == len(detector.loss_curve_) == 200


# the threshold


def test_scores_of_training_images_are_brought_to_the_level_of_unseen_ones():
    distances, unseen = np.array([-1.0, -3.0]), np.array([-4.0, -8.0])
    assert_allclose(as_unseen(distances, unseen), [-3, -9])  # stretched
    assert_allclose(as_unseen(-distances, unseen), [-7, -5])  # shifted
    # ranks of 1/2, 3/4 and 1/4 between -12, -8, -4 and -4 at 0, 1/3, 2/3 and 1
    by_rank = by_rank_as_unseen(np.array([-2.0, -1.0, -3.0]), unseen)
    assert_allclose(by_rank, [-6, -4, -9])


# the cloner


def test_vgg16_has_the_papers_cloner():
    source = load_backbone("vgg16", weights=None)
    cloner = make_cloner(source, VGG_STAGES, (3, 32, 32), compact=True, signed=False)
    assert sum(p.numel() for p in cloner.parameters()) == 343_984
    convolutions = [m for m in cloner.modules() if isinstance(m, nn.Conv2d)]
    widths = [16, 16, 16, 128, 16, 16, 256, 16, 16, 512, 16, 16, 512]
    assert [m.out_channels for m in convolutions] == widths
    assert all(m.bias is None and m.kernel_size == (3, 3) for m in convolutions)
    kinds = "".join(
        type(m).__name__[0] for block in cloner.blocks.values() for m in block
    )
    assert kinds == "CBRCRM" * 2 + "CBRCBRCRM" * 3
    with torch.inference_mode():
        given = cloner(torch.rand(2, 3, 32, 32))
        wanted = source.forward_stages(torch.rand(2, 3, 32, 32), VGG_STAGES)
    assert [o.shape for o in given] == [o.shape for o in wanted.values()]


def test_vgg16_is_cloned_from_its_name():
    images = RNG.random((6, 32, 32))
    detector = KDClonerEstimator.from_paper(weights=None, max_steps=2, random_state=0)
    detector.fit(images)
    assert detector.stages_ == VGG_STAGES
    assert detector.score_stages_ == VGG_STAGES[1:]
    assert sum(p.numel() for p in detector.cloner_.parameters()) == 343_984
    assert detector.direction_weight_ == 100
    assert np.isfinite(detector.anomaly_map(images)).all()


def test_equal_cloner_has_the_sources_widths():
    source = load_backbone("vgg16", weights=None)
    cloner = make_cloner(source, VGG_STAGES, (3, 32, 32), compact=False, signed=False)
    ours, theirs = (
        [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
        for net in (cloner, source)
    )
    assert ours == theirs


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientnet_lite0", (112, 96)),
        ("resnet18", (64, 64)),
        ("convnext_tiny", (64, 64)),
        ("timm/vit_tiny_patch16_224", (224, 224)),
        ("mnist_lenet", (28, 28)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 5, 2)), (33, 32)),
    ],
)
def test_cloner_fits_any_source(name, size, compact):
    source = load_backbone(name, weights=None)
    channels = source.in_channels
    stages = source.stage_names[-3:]
    shape = (channels, *size)
    cloner = make_cloner(source, stages, shape, compact=compact, signed=True)
    x = torch.rand(2, *shape)
    with torch.inference_mode():
        wanted = source.forward_stages(x, stages)
        given = cloner(source.normalize(x))
    assert [o.shape for o in given] == [o.shape for o in wanted.values()]
    biased = [m for m in cloner.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(m.bias is None for m in biased)


def test_outputs_are_signed_where_the_source_is():
    source = tiny_source()
    stages = ("first", "second")
    cloner = make_cloner(source, stages, (3, 32, 32), compact=True, signed=False)
    first, second = cloner(torch.rand(2, 3, 32, 32))
    assert first.min() < 0
    assert second.min() == 0
    cloner = make_cloner(source, stages, (3, 32, 32), compact=True, signed=True)
    assert cloner(torch.rand(2, 3, 32, 32))[1].min() < 0


class OwnCloner(nn.Module):
    def __init__(self, channels=5):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, 7, 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        first = self.first(x)
        return first, self.second(first)


class NamedCloner(OwnCloner):
    def forward(self, x):
        first, second = super().forward(x)
        return {"second": second, "first": first}


@pytest.mark.parametrize("cloner", [OwnCloner(), OwnCloner, NamedCloner()])
def test_own_cloner_is_copied_and_trained(photos, cloner):
    before = [p.clone() for p in cloner.parameters()] if cloner is not OwnCloner else []
    detector = make(cloner=cloner, stages=("first", "second")).fit(photos)
    assert isinstance(detector.cloner_, OwnCloner)
    if before:
        assert all(map(torch.equal, cloner.parameters(), before))
        assert not torch.equal(detector.cloner_.first.weight, before[0])
    assert np.isfinite(detector.score_samples(photos)).all()


@pytest.mark.parametrize(
    ("cloner", "message"),
    [
        (OwnCloner(4), r"cloner gives activations of shapes \[\(4, 32, 32\)"),
        (nn.Linear(3, 3), "cloner fails on images of shape"),
        (lambda: 3, "cloner=.* is not 'compact'"),
    ],
)
def test_wrong_cloner_is_told(photos, cloner, message):
    with pytest.raises(ValueError, match=message):
        make(cloner=cloner, stages=("first", "second")).fit(photos)


# parameters


def test_last_four_stages_are_learnt(textures):
    detector = KDClonerEstimator(image_size=32, max_steps=1, random_state=0)
    detector.fit(textures.X_train)
    assert len(detector.stages_) == 4
    assert detector.score_stages_ == detector.stages_[1:]
    assert not {"pool", "conv_head"} & set(detector.stages_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_stages": "pool"}, "score_stages='pool' must name stages"),
        ({"scaling": (1.1, 0.9)}, "scaling"),
        ({"scaling": (1.0,)}, "scaling"),
        ({"stages": "third"}, "stages=.*not found"),
        ({"learning_rate": 1e30}, "Lower learning_rate"),
    ],
)
def test_wrong_parameters_are_told(photos, fitted, options, message):
    detector = clone(fitted).fit(photos)
    before = detector.score_samples(photos)
    with pytest.raises(ValueError, match=message):
        detector.set_params(**{"score_stages": "second", **options}).fit(photos)
    detector.set_params(**fitted.get_params())
    assert_array_equal(detector.score_samples(photos), before)


def test_cache_changes_nothing(photos, fitted):
    kept, computed = (
        clone(fitted).set_params(max_cache_bytes=size).fit(photos)
        for size in (2**30, 0)
    )
    assert_array_equal(kept.loss_curve_, computed.loss_curve_)
    assert_array_equal(kept.score_samples(photos), computed.score_samples(photos))


# residuals


def residuals_by_hand(source, cloner, window):
    energy = (source**2).mean(1) + (cloner**2).mean(1)
    apart = (source - cloner) / np.sqrt(energy)[:, None]
    return uniform_filter(apart, (1, 1, *window), mode="constant")


@pytest.mark.parametrize(
    ("shape", "window"), [((32, 16), (7, 3)), ((8, 7), (3, 1)), ((1, 4), (1, 1))]
)
def test_residuals_against_scipy(shape, window):
    """The window is 3/16 of the sides, and odd."""
    source, cloner = RNG.normal(size=(2, 2, 3, *shape))
    found = residuals(torch.tensor(source), torch.tensor(cloner))
    assert_allclose(found, residuals_by_hand(source, cloner, window), atol=1e-12)
    # the scale of activations does not matter
    again = residuals(torch.tensor(9 * source), torch.tensor(9 * cloner))
    assert_allclose(found, again)


@pytest.fixture(scope="module")
def by_residuals(photos):
    return make(discrepancy="mahalanobis", opening=False, sigma=0).fit(photos)


def test_score_is_the_mean_of_the_largest_mahalanobis_lengths(by_residuals, photos):
    detector, new = by_residuals, 255 - photos[:4]
    trained = trained_rows(detector, photos)
    maps = 0
    for k, window in enumerate([(7, 7), (3, 3)]):
        normal, found = (
            residuals_by_hand(*(a.detach().numpy() for a in pairs[k]), window)
            for _, pairs in (by_hand(detector, x) for x in (trained, new))
        )
        n_channels = normal.shape[1]
        rows = normal.transpose(0, 2, 3, 1).reshape(-1, n_channels)
        moment = rows.T @ rows / len(rows)
        moment += 0.01 * np.trace(moment) / n_channels * np.eye(n_channels)
        precision = np.linalg.inv(moment)
        at = found.transpose(0, 2, 3, 1)
        lengths = np.apply_along_axis(
            lambda r, p=precision: mahalanobis(r, np.zeros(len(r)), p) ** 2, 3, at
        )
        stage_map = torch.tensor(lengths / n_channels)[:, None]
        maps = maps + F.interpolate(stage_map, size=(32, 32), mode="bilinear")[:, 0]
    maps = maps.sqrt()
    assert_allclose(detector.anomaly_map(new), maps, rtol=1e-3)
    largest = np.sort(maps.flatten(1), axis=1)[:, -51:]  # a twentieth of 1,024
    assert_allclose(-detector.score_samples(new), largest.mean(axis=1), rtol=1e-3)


def test_residuals_of_vectors():
    X = RNG.normal(size=(80, 4)).astype(np.float32)
    detector = KDClonerEstimator(discrepancy="mahalanobis", random_state=0).fit(X)
    scores = detector.score_samples(np.concatenate([X, 9 - X]))
    assert scores[:80].mean() > scores[80:].mean()


def test_cache_changes_no_residuals(by_residuals, photos):
    computed = clone(by_residuals).set_params(max_cache_bytes=0).fit(photos)
    assert_array_equal(
        computed.score_samples(photos), by_residuals.score_samples(photos)
    )


def test_residuals_in_memory_are_not_losses(by_residuals, photos, tmp_path):
    """The folder keeps the two apart."""
    told = [
        clone(by_residuals).set_params(discrepancy=name, memory=tmp_path).fit(photos)
        for name in ("loss", "mahalanobis")
    ]
    new = 255 - photos[:4]
    for detector in told:
        detector.score_samples(new)
    assert_array_equal(told[1].score_samples(new), by_residuals.score_samples(new))
    alike = make(opening=False, sigma=0).fit(photos).score_samples(new)
    assert_array_equal(told[0].score_samples(new), alike)


def test_residuals_find_what_losses_do_not(textures):
    """A flat spot in a texture: no activation is large there."""
    early = ("stage2", "stage3", "stage4")
    options = {"stages": early, "score_stages": early, "image_size": 64}
    spoilt = textures.X_test[textures.y_test == 1].copy()
    good = spoilt.copy()
    spoilt[:, 8:20, 8:20] = spoilt.mean(axis=(1, 2), keepdims=True)
    X, y = np.concatenate([good, spoilt]), np.repeat([1, 0], len(good))
    found = [
        roc_auc_score(
            y,
            KDClonerEstimator(discrepancy=name, max_steps=40, random_state=0, **options)
            .fit(textures.X_train)
            .score_samples(X),
        )
        for name in ("loss", "mahalanobis")
    ]
    assert found[1] > max(found[0], 0.9)


# augmentation


def test_augmentation_turns_and_scales():
    image = torch.zeros(1, 1, 41, 41)
    image[0, 0, 20, 30] = 1  # right of the middle, ten pixels
    augment = RotationAndScaling(90, (1.0, 1.0), seed=0)
    angles = []
    for _ in range(20):
        found = augment(image)[0, 0]
        y, x = np.unravel_index(int(found.argmax()), (41, 41))
        assert np.hypot(y - 20, x - 20) == pytest.approx(10, abs=1.5)
        angles.append(np.arctan2(y - 20, x - 20))
    assert np.ptp(angles) > 1
    assert np.abs(angles).max() < np.pi / 2 + 0.1
    larger = RotationAndScaling(0, (2.0, 2.0), seed=0)(image)[0, 0]
    assert np.unravel_index(int(larger.argmax()), (41, 41)) == (20, 40)
    unchanged = RotationAndScaling(0, (1.0, 1.0), seed=0)(image)
    assert_allclose(unchanged, image, atol=1e-5)


def test_augmentation_keeps_the_aspect():
    """A turn by a right angle of an oblong image keeps distances in pixels."""
    image = torch.zeros(1, 1, 21, 41)
    image[0, 0, 10, 26] = 1
    augment = RotationAndScaling(180, (1.0, 1.0), seed=3)
    for _ in range(10):
        found = augment(image)[0, 0]
        y, x = np.unravel_index(int(found.argmax()), (21, 41))
        assert np.hypot(y - 10, x - 20) == pytest.approx(6, abs=1.2)


def test_augmentation_changes_training(photos, fitted):
    turned = make(rotation=20, scaling=(0.9, 1.05))
    losses = turned.fit(photos).loss_curve_
    assert not np.array_equal(losses, fitted.loss_curve_)
    assert_array_equal(clone(turned).fit(photos).loss_curve_, losses)
    with pytest.raises(ValueError, match="need images"):
        KDClonerEstimator(rotation=20).fit(RNG.random((20, 4)))


# maps


def test_gradient_map_against_differences(fitted, photos):
    """Eq. 5, by central differences of the score."""
    detector = pickle.loads(pickle.dumps(fitted))
    detector.set_params(localization="gradient", sigma=0, opening=False)
    image = np.float32(photos[:1]) / 255 * 0.8 + 0.1
    found = detector.anomaly_map(image)[0]
    step = 1e-2
    for y, x in [(3, 4), (16, 16), (30, 9)]:
        slopes = []
        for channel in range(3):
            more, less = image.copy(), image.copy()
            more[0, y, x, channel] += step
            less[0, y, x, channel] -= step
            scores = detector.score_samples(np.concatenate([more, less]))
            slopes.append((scores[1] - scores[0]) / (2 * step))
        assert_allclose(found[y, x], np.abs(slopes).sum(), rtol=0.05, atol=2e-3)


def test_discrepancy_map_by_hand(fitted, photos):
    detector = pickle.loads(pickle.dumps(fitted))
    detector.set_params(sigma=0, opening=False, score_stages="first")
    new = 255 - photos[:2]
    _, pairs = by_hand(detector, new)
    maps = []
    for s, c in pairs:
        value = (s - c).square().mean(1)
        direction = 1 - (s * c).sum(1) / s.norm(dim=1) / c.norm(dim=1)
        both = value + detector.direction_weight_ * direction
        maps.append(F.interpolate(both[:, None], size=(32, 32), mode="bilinear")[:, 0])
    wanted = (maps[0] + maps[1]).detach().numpy()
    assert_allclose(detector.anomaly_map(new), wanted, rtol=1e-3)


@pytest.fixture(scope="module")
def network(fitted):
    return fitted._network


def total(network, x):
    return total_loss(("first", "second"), [1.0, 2.0], network, x)


def test_smoothgrad_is_the_mean_over_noise(network):
    x = torch.rand(2, 3, 32, 32)
    noise = 0.1 * torch.randn(3, 3, 32, 32)
    maps = [gradient(total, network, x + n) for n in noise]
    assert_allclose(smoothgrad(total, noise, network, x), sum(maps) / 3, rtol=1e-5)
    assert_array_equal(
        smoothgrad(total, 0 * noise[:1], network, x), gradient(total, network, x)
    )


def test_guided_relu_hands_positive_gradients_on():
    relu = guided(nn.Sequential(nn.ReLU()))
    x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    assert_array_equal(relu(x).detach(), [0, 2, 3])
    relu(x).backward(torch.tensor([1.0, 4.0, -5.0]))
    assert_array_equal(x.grad, [0, 4, 0])


def test_guided_backprop_leaves_the_cloner_as_it_was(fitted, photos):
    detector = pickle.loads(pickle.dumps(fitted))
    before = repr(detector.cloner_)
    detector.set_params(localization="guided_backprop")
    maps = detector.anomaly_map(photos[:4])
    assert repr(detector.cloner_) == before
    assert not any(m._backward_hooks or m._forward_hooks for m in all_modules(detector))
    plain = detector.set_params(localization="gradient").anomaly_map(photos[:4])
    assert not np.allclose(maps, plain)


def all_modules(detector):
    return detector._network.modules()


def test_maps_in_two_threads(fitted, photos):
    detectors = [pickle.loads(pickle.dumps(fitted)) for _ in range(2)]
    detectors[1] = detectors[0]  # one estimator, two threads
    wanted = detectors[0].set_params(localization="guided_backprop").anomaly_map(photos)
    found = {}

    def work(k):
        found[k] = detectors[k].anomaly_map(photos)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_array_equal(found[0], wanted)
    assert_array_equal(found[1], wanted)


def test_refine_smooths_and_opens():
    maps = RNG.random((2, 16, 16)).astype(np.float32)
    cross = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    opened = refine(maps, 0, opening=True)
    # opening a grey map is opening it at each threshold
    for threshold in (0.2, 0.5, 0.8):
        for found, raw in zip(opened, maps, strict=True):
            wanted = binary_opening(np.pad(raw, 2, "symmetric") >= threshold, cross)
            assert_array_equal(found >= threshold, wanted[2:-2, 2:-2])
    smooth = refine(maps, 2.0, opening=False)
    assert smooth.std() < maps.std() / 2
    assert_allclose(refine(maps[:1], 2.0, opening=False), smooth[:1])
    assert_array_equal(refine(maps, 0, opening=False), maps)


@pytest.mark.parametrize(
    "localization", ["discrepancy", "gradient", "smoothgrad", "guided_backprop"]
)
def test_maps_do_not_depend_on_neighbours(fitted, photos, localization):
    detector = pickle.loads(pickle.dumps(fitted))
    detector.set_params(localization=localization, n_noisy=3)
    maps = detector.anomaly_map(photos)
    assert maps.shape == photos.shape[:3]
    assert maps.dtype == np.float32
    assert (maps >= 0).all()
    order = RNG.permutation(len(photos))[:11]
    assert_array_equal(detector.anomaly_map(photos[order]), maps[order])
    again = pickle.loads(pickle.dumps(detector)).anomaly_map(photos[:3])
    assert_array_equal(again, maps[:3])


def test_maps_have_the_size_of_their_images(photos):
    maps = make(image_size=(48, 20)).fit(photos).anomaly_map(photos[:2])
    assert maps.shape == (2, 32, 32)


def test_maps_of_files(photos, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for i, path in enumerate(paths):
        Image.fromarray(photos[i]).resize((32 + 4 * (i == 3), 32)).save(path)
    detector = make(image_size=32, on_error="skip").fit(paths)
    assert detector.anomaly_map(paths[:3]).shape == (3, 32, 32)
    maps = detector.anomaly_map(paths[:4])
    assert [m.shape for m in maps] == [(32, 32)] * 3 + [(32, 36)]
    paths[1].write_bytes(b"broken")
    with pytest.warns(UserWarning, match="cannot be read"):
        maps = detector.anomaly_map(paths[:3])
    assert np.isnan(maps).all(axis=(1, 2)).tolist() == [False, True, False]
    assert detector.predict(paths[2:4]).shape == (2,)


def test_no_maps_of_vectors():
    detector = KDClonerEstimator(max_steps=2).fit(RNG.random((20, 4)))
    with pytest.raises(ValueError, match="for images"):
        detector.anomaly_map(RNG.random((2, 4)))


def test_no_maps_without_stages_that_have_some(photos):
    detector = make(stages=("second", "pool"), score_stages="pool").fit(photos)
    with pytest.raises(ValueError, match="have no maps"):
        detector.anomaly_map(photos[:2])
    maps = detector.set_params(localization="gradient").anomaly_map(photos[:2])
    assert (maps.max(axis=(1, 2)) > 0).all()


def test_maps_find_a_defect(textures):
    """A person would agree: the map is highest where the image was changed."""
    detector = KDClonerEstimator(
        image_size=64,
        stages=("stage2", "stage3", "stage5"),
        max_steps=40,
        random_state=0,
    ).fit(textures.X_train)
    image = textures.X_test[textures.y_test == 1][:1].copy()
    image[0, 4:12, 18:26] = 255
    found = detector.anomaly_map(image)[0]
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert 2 <= y <= 13
    assert 16 <= x <= 27


def test_same_maps_in_a_fresh_process(fitted, photos, tmp_path):
    detector = pickle.loads(pickle.dumps(fitted)).set_params(localization="gradient")
    file = tmp_path / "detector.pickle"
    file.write_bytes(pickle.dumps((detector, photos[:3])))
    code = (
        "import pickle, sys; import numpy as np;"
        f"detector, X = pickle.load(open({str(file)!r}, 'rb'));"
        f"np.save({str(tmp_path / 'maps.npy')!r}, detector.anomaly_map(X))"
    )
    # the source of this test is a module of the tests'
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_array_equal(np.load(tmp_path / "maps.npy"), detector.anomaly_map(photos[:3]))


def test_shared_source_is_not_folded(textures):
    """Folding BatchNorm works on copies, the source within the pair included."""
    before = [*load_backbone("efficientnet_lite0").state_dict()]
    detector = KDClonerEstimator(image_size=32, max_steps=1, random_state=0)
    detector.fit(textures.X_train).score_samples(textures.X_test)
    assert [*load_backbone("efficientnet_lite0").state_dict()] == before
    folded = frozen_copy(detector._network, CPU, detector._dtype)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_no_discrepancy_of_two_networks_alike():
    source = tiny_source()

    class Copycat(nn.Module):
        def forward(self, x):
            return [source.stages["first"](x)]

    means, scales = [torch.zeros(5)], [torch.ones(5)]
    pair = SourceAndCloner(source, Copycat(), ("first",), means, scales).frozen()
    x = torch.rand(2, 3, 32, 32)
    assert_allclose(total_loss(("first",), [1.0, 1.0], pair, x), 0, atol=1e-6)
    assert_allclose(discrepancy(("first",), [1.0, 1.0], pair, x), 0, atol=1e-6)


def test_channels_that_hardly_vary_are_not_blown_up():
    X = RNG.normal(size=(60, 4)).astype(np.float32)
    X[:, 3] = 0
    source = Backbone({"only": nn.Identity()}, vectors=True)
    detector = KDClonerEstimator(source, max_steps=2, random_state=0).fit(X)
    scales, trained = detector._network.scales[0], trained_rows(detector, X)
    assert_allclose(scales[:3], trained[:, :3].std(axis=0), rtol=1e-4)
    assert_allclose(scales[3], np.sqrt(0.01 * trained.var(axis=0).mean()), rtol=1e-4)
    constant = KDClonerEstimator(source, max_steps=2).fit(np.ones((30, 4)))
    assert_array_equal(constant._network.scales[0], 1)
    assert np.isfinite(constant.score_samples(X)).all()


def test_for_defects_scores_all_of_four_early_stages():
    detector = KDClonerEstimator.for_defects(max_steps=3, image_size=32)
    assert (detector.max_steps, detector.discrepancy) == (3, "mahalanobis")
    detector.fit(RNG.random((20, 16, 16)))
    assert detector.score_stages_ == ("stage2", "stage3", "stage4", "stage5")
    assert np.isfinite(detector.map_offset_)
