"""RotNet, MHRot and GEOM: transformations, losses and scores, by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import shift
from scipy.optimize import minimize
from scipy.special import gammaln, psi
from torch import nn
from torch.nn import functional as F

from skdeepad import GEOMDetector, MHRotDetector, RotNetDetector
from skdeepad.backbones import Backbone, load_backbone
from skdeepad.detectors._transformations import fit_dirichlet, inverse_psi
from skdeepad.detectors._views import DrawnViews, Views
from skdeepad.extension import check_detector

DETECTORS = [RotNetDetector, MHRotDetector, GEOMDetector]
X = np.random.default_rng(0).random((20, 8, 8), dtype=np.float32)
each_detector = pytest.mark.parametrize("make", DETECTORS)


def convolutions():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh())
    second = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh())
    return Backbone({"first": first, "second": second}, in_channels=1)


class Colours(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Tanh())


def views_of(make, shape=(1, 8, 8)):
    return Views(
        make._mirrored,
        make._moved,
        multi_headed=make._multi_headed,
        repeat_edge=make._repeat_edge,
        shape=shape,
        seed=0,
    )


# ----------------------------------------------------------------- transformations


def by_hand(image, flip, down, right, turns, repeat_edge):
    """Mirror, move by two of eight pixels, turn: with NumPy and SciPy."""
    image = np.fliplr(image) if flip else image
    mode = "reflect" if repeat_edge else "mirror"
    return np.rot90(shift(image, (2 * down, 2 * right), mode=mode, order=0), turns)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (RotNetDetector, [(0, 0, 0, k) for k in range(4)]),
        (MHRotDetector, [*itertools.product([0], [-1, 0, 1], [-1, 0, 1], range(4))]),
        (GEOMDetector, [*itertools.product([0, 1], [0, -1, 1], [0, -1, 1], range(4))]),
    ],
)
def test_transformations_against_hand_made_ones(make, expected):
    views, image = views_of(make), X[0]
    assert len(views) == len(expected)
    x = torch.from_numpy(np.repeat(X[:1], len(expected), axis=0))[:, None]
    together = views.apply(x, np.arange(len(expected)))
    for t, step in enumerate(expected):
        wanted = by_hand(image, *step, repeat_edge=make is GEOMDetector)
        assert_array_equal(together[t, 0], wanted)
        assert_array_equal(views.transform(x[:1], t)[0, 0], wanted)
        heads = [t]
        if make is MHRotDetector:
            heads = [step[1] + 1, step[2] + 1, step[3]]
        assert_array_equal(views.labels[t], heads)


def test_a_move_by_hand():
    """A quarter of four pixels down; the edge is repeated, or is not."""
    column = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    moved = {}
    for make in (MHRotDetector, GEOMDetector):
        views = views_of(make, (1, 4, 4))
        t = views.steps.index((0, 1, 0, 0))
        moved[make] = views.transform(column, t)[0, 0, :, 0].tolist()
    assert moved == {MHRotDetector: [2, 1, 2, 3], GEOMDetector: [1, 1, 2, 3]}


def test_transformations_of_vectors():
    views = views_of(GEOMDetector, (5,))
    x = torch.randn(3, 5)
    assert_array_equal(views.transform(x, 0), x)
    found = [views.transform(x, t) for t in range(72)]
    for out in found:
        assert_allclose(out.abs().sort(dim=1)[0], x.abs().sort(dim=1)[0])
    assert len({tuple(out[0].tolist()) for out in found}) > 70


def test_each_image_is_drawn_with_each_view_once_an_epoch():
    views = views_of(MHRotDetector)
    drawn = DrawnViews(views, 4, None)
    rng = np.random.RandomState(0)
    batches = drawn.draw(np.array([3, 5, 7]), np.empty(0, dtype=int), 10, rng)
    pairs = []
    for index in itertools.islice(batches, 3):  # 27 items
        which = drawn.waiting.popleft()
        pairs += zip(index.tolist(), which.tolist(), strict=True)
        assert_array_equal(np.diff(which.reshape(-1, 4)), 1)  # turns go together
    assert sorted(pairs) == [(i, t) for i in (3, 5, 7) for t in range(36)]


# --------------------------------------------------------------------- training


def cross_entropy(logits, labels, widths):
    """The mean over heads."""
    parts = torch.split(logits, widths, dim=1)
    terms = [
        -(part.softmax(1)[torch.arange(len(part)), label]).log().mean()
        for part, label in zip(parts, labels.T, strict=True)
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("make", [RotNetDetector, MHRotDetector])
def test_two_steps_by_hand(make):
    """All images with all views in each mini-batch; Adam, in float64."""
    n_items = 20 if make is RotNetDetector else 180
    detector = make(
        convolutions(),
        max_steps=2,
        batch_size=n_items,
        learning_rate=0.01,
        validation_fraction=0,
        random_state=0,
    )
    start = {}

    class Watched(make):
        def _train(self, *args, **options):
            head = self._network.projection
            start["head"] = [p.detach().double() for p in head.parameters()]
            return super()._train(*args, **options)

    detector.__class__ = Watched
    with pytest.warns(UserWarning, match="validation_fraction=0"):
        detector.fit(X)
    views = views_of(make)
    x = torch.from_numpy(X).double()[:, None]
    x = torch.cat([views.transform(x, t) for t in range(len(views))])
    labels = torch.from_numpy(np.repeat(views.labels, 20, axis=0))
    weights = [p.detach().double() for p in convolutions().parameters()]
    weights += start["head"]

    def loss(weights):
        at = torch.tanh(F.conv2d(x, *weights[:2], padding=1))
        at = torch.tanh(F.conv2d(at, *weights[2:4], padding=1)).mean(dim=(2, 3))
        return cross_entropy(at @ weights[4].T + weights[5], labels, views.widths)

    weights = [w.requires_grad_() for w in weights]
    first = loss(weights)
    gradients = torch.autograd.grad(first, weights)
    after = [
        w - 0.01 * g / (g.abs() + 1e-8) for w, g in zip(weights, gradients, strict=True)
    ]
    expected = [first.item(), loss(after).item()]
    assert_allclose(detector.loss_curve_, expected, rtol=1e-3)


def test_loss_of_outliers_by_hand():
    """Half the cross-entropy with equal probabilities, the mean over heads."""
    detector = MHRotDetector()
    detector._views = views_of(MHRotDetector)
    logits = torch.randn(5, 10, dtype=torch.float64)
    p = [part.softmax(dim=1).numpy() for part in logits.split([3, 3, 4], dim=1)]
    expected = 0.5 * np.mean([-np.log(q).mean() for q in p])
    assert detector._loss_of_outliers(logits).item() == pytest.approx(expected)


def test_outliers_are_taught_to_give_equal_probabilities():
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 8, dtype=np.float32)
    normal = ramp[:, None] * 0.8 + 0.1 * rng.random((40, 8, 8), dtype=np.float32)
    odd = ramp[:, None] ** 2 * 0.5 + 0.1 * rng.random((40, 8, 8), dtype=np.float32)
    X, y = np.concatenate([normal, odd[:20]]), np.repeat([1, -1], [40, 20])
    options = {"max_steps": 60, "learning_rate": 0.01, "random_state": 0}
    with_, without = (
        MHRotDetector(convolutions(), **options).fit(X[rows], y[rows])
        for rows in (slice(None), slice(40))
    )
    # the mean of -log p, which is least where all answers are equal: 1.19
    found = [
        -d._log_p(d._all_features(d._check_inputs(odd[20:]))) for d in (with_, without)
    ]
    assert found[0].mean() < found[1].mean() - 0.1
    assert with_.score_samples(normal).mean() > with_.score_samples(odd[20:]).mean()


def test_sgd_falls_along_a_cosine():
    rates = []

    class Watched(RotNetDetector):
        def _take_steps(self, optimizer, losses, n_steps, seed, **options):
            assert optimizer.defaults["nesterov"]
            for loss in super()._take_steps(
                optimizer, losses, n_steps, seed, **options
            ):
                rates.append(optimizer.param_groups[0]["lr"])
                yield loss

    options = {"optimizer": "sgd", "learning_rate": 0.1, "max_steps": 4}
    Watched(convolutions(), **options).fit(X)
    expected = 1e-6 + (0.1 - 1e-6) * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    assert_allclose(rates, expected)


# ----------------------------------------------------------------------- scores


@each_detector
def test_scores_by_hand(make):
    """Each view through the trained network; NumPy does the rest."""
    detector = make(convolutions(), max_steps=5, random_state=0).fit(X)
    new = np.random.default_rng(1).random((6, 8, 8), dtype=np.float32)
    views = views_of(make)

    def log_p(images):
        x = torch.from_numpy(images)[:, None]
        heads = []
        with torch.inference_mode():
            for t in range(len(views)):
                logits = detector._network(views.transform(x, t)).double()
                parts = logits.split(views.widths, dim=1)
                heads.append([part.log_softmax(dim=1).numpy() for part in parts])
        return heads

    found = log_p(new)
    truth = np.array(
        [
            [part[:, label] for part, label in zip(parts, labels, strict=True)]
            for parts, labels in zip(found, views.labels, strict=True)
        ]
    )
    if make is RotNetDetector:
        expected = truth.mean(axis=(0, 1))
    elif make is MHRotDetector:
        expected = np.exp(truth).mean(axis=(0, 1))
    else:
        expected = np.zeros(6)
        for t, (part,) in enumerate(found):
            expected += part @ (detector.alpha_[t] - 1) / 72
        simple = make(convolutions(), density="none", max_steps=5, random_state=0)
        assert_allclose(
            simple.fit(X).score_samples(new),
            np.exp(truth).mean(axis=(0, 1)),
            rtol=1e-4,
        )
    assert_allclose(detector.score_samples(new), expected, rtol=1e-4)


def test_dirichlet_against_the_likelihood():
    rng = np.random.default_rng(0)
    true = np.array([[2.0, 5.0, 1.0], [0.4, 0.6, 9.0]])
    p = np.stack([rng.dirichlet(alpha, size=300) for alpha in true], axis=1)
    found = fit_dirichlet(np.log(p))
    for alpha, mean in zip(found, np.log(p).mean(axis=0), strict=True):

        def loss(log_alpha, mean=mean):
            alpha = np.exp(log_alpha)
            return gammaln(alpha).sum() - gammaln(alpha.sum()) - (alpha - 1) @ mean

        best = minimize(loss, np.zeros(3), tol=1e-12)
        assert_allclose(alpha, np.exp(best.x), rtol=1e-3)
    assert_allclose(found, true, rtol=0.25)


def test_inverse_of_psi():
    x = np.geomspace(1e-3, 1e5, 50)
    assert_allclose(inverse_psi(psi(x)), x, rtol=1e-9)


# --------------------------------------------------------------------- networks


def test_wide_residual_network_by_hand():
    network = load_backbone("wrn10_1", in_channels=3).clone().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    scale = (1 + 1e-5) ** -0.5  # BatchNorm before any training
    with torch.no_grad():
        at = F.conv2d(2 * x - 1, network.stages["stem"].weight, padding=1)
        for i, stride in ((1, 1), (2, 2), (3, 2)):
            (block,) = network.stages[f"stage{i}"]
            before = F.relu(at * scale)
            y = F.conv2d(before, block.conv1.weight, stride=stride, padding=1)
            y = F.conv2d(F.relu(y * scale), block.conv2.weight, padding=1)
            if i > 1:
                at = F.conv2d(before, block.shortcut.weight, stride=stride)
            at = at + y
        assert_allclose(network(x), F.relu(at * scale))


def test_size_of_the_papers_networks():
    """Layer by layer: WRN-16-4 without its head."""
    size = 27 * 16
    width = 16
    for out in (64, 128, 256):
        for first in (True, False):
            size += 2 * width + 9 * width * out + 2 * out + 9 * out * out
            size += width * out if first else 0
            width = out
    size += 2 * 256
    network = load_backbone("wrn16_4")
    assert sum(p.numel() for p in network.parameters()) == size


def test_behind_frozen_stages():
    """Views are made of images, before the frozen stages see them."""
    network = convolutions()
    detector = RotNetDetector(
        network,
        stages="second",
        trainable_stages="second",
        max_steps=3,
        random_state=0,
    ).fit(X)
    after = detector.backbone_.state_dict()
    for name, before in network.state_dict().items():
        assert torch.equal(before, after[name]) == (".first." in name)
    new = torch.from_numpy(X[:4])[:, None]
    views = views_of(RotNetDetector)
    with torch.inference_mode():
        expected = 0.0
        for t in range(4):
            z = detector.backbone_(views.transform(new, t)).mean(dim=(2, 3))
            logits = detector._network.projection(z).double()
            expected += logits.log_softmax(dim=1)[:, t].numpy() / 4
    features = detector._all_features(detector._check_inputs(X[:4]))
    assert_allclose(detector._score(features), expected, rtol=1e-3, atol=1e-6)


def test_augmentation_comes_before_the_views():
    seen = []

    def watch(image):
        seen.append(image.clone())
        return image

    detector = MHRotDetector(
        convolutions(), augmentation=watch, max_steps=1, batch_size=2, random_state=0
    ).fit(X)
    assert len(seen) == 8
    known = {image.tobytes() for image in X}
    assert all(image.numpy().tobytes() in known for image in seen)
    assert detector.n_iter_ == 1


def test_images_must_be_square():
    with pytest.raises(ValueError, match="cannot be turned by 90 degrees"):
        RotNetDetector(convolutions(), max_steps=1).fit(X[:, :, :6])


def test_contract():
    check_detector(RotNetDetector(Colours, max_steps=5), scikit_learn=False)


def test_from_paper():
    numbers = MHRotDetector.from_paper().get_params()
    assert (numbers["backbone"], numbers["learning_rate"]) == ("wrn16_4", 0.1)
    assert numbers["max_steps"] == 200 * 79
    assert MHRotDetector.from_paper("imagenet").weights is None
    assert RotNetDetector.from_paper().optimizer == "sgd"
    assert GEOMDetector.from_paper("fashion_mnist").max_steps == 3 * 3375
    assert GEOMDetector.from_paper().backbone == "wrn10_4"
    for make in (MHRotDetector, GEOMDetector):
        assert make.from_paper().validation_fraction == 0
        with pytest.raises(ValueError, match="dataset='svhn' is not one of cifar10"):
            make.from_paper("svhn")
