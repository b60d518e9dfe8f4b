"""`from_paper`, against derivations of its own from what the official codes do.

The networks are written out a second time here, in float64, as plain functions of
weights; steps are taken by hand. Nothing of the package is used but its weights.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch.nn import functional as F

from skdeepad import (
    DeepSAD,
    DeepSVDD,
    HSCClassifier,
    KDClonerEstimator,
    OpenSetClassifier,
    PANDAEstimator,
)
from skdeepad.backbones import Backbone, load_backbone
from skdeepad.backbones._decoder import make_decoder
from skdeepad.backbones._small import without_biases

pytestmark = pytest.mark.filterwarnings("ignore:validation_fraction=0")
SIZES = {
    "svdd_mnist_lenet": (1, 28, 28),
    "fashion_mnist_lenet": (1, 28, 28),
    "svdd_cifar10_lenet": (3, 32, 32),
}


def images(n, shape, seed=0):
    return np.random.default_rng(seed).random((n, *shape), dtype=np.float32)


def norm(x):
    """BatchNorm of a mini-batch, which learns nothing."""
    axes = (0, *range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-4)


def convolve(x, weight):
    """Convolution, BatchNorm, leaky ReLU, max-pooling."""
    x = F.conv2d(x, weight, padding=2)
    return F.max_pool2d(F.leaky_relu(norm(x), 0.01), 2)


def enlarge(x):
    """Repeat rows and columns."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def lenet(x, weights):
    """The encoders of Deep SVDD and Deep SAD, BatchNorm in training."""
    *rest, last = weights
    for weight in rest:
        x = (
            convolve(x, weight)
            if weight.ndim == 4
            else F.leaky_relu(norm(x @ weight.T))
        )
        x = x.flatten(1) if x.shape[-1] in (4, 7) and x.ndim == 4 else x
    return x @ last.T


def decode(name, z, weights):
    """The decoders of the official code of Deep SVDD and Deep SAD."""
    weights = list(weights)
    if name == "svdd_mnist_lenet":
        x = z.view(len(z), 2, 4, 4)
    elif name == "fashion_mnist_lenet":
        x = norm(z @ weights.pop(0).T).view(len(z), 8, 4, 4)
    else:
        x = norm(z).view(len(z), 8, 4, 4)
    x = F.leaky_relu(x, 0.01)
    if name != "svdd_cifar10_lenet":
        x = enlarge(x)
    paddings = [2, 2, 2, 2] if name == "svdd_cifar10_lenet" else [2, 3, 2]
    for i, (weight, padding) in enumerate(zip(weights, paddings, strict=True)):
        if i:
            x = enlarge(F.leaky_relu(norm(x), 0.01))
        x = F.conv_transpose2d(x, weight, padding=padding)
    return torch.sigmoid(x)


def adam(weights, loss, decay, rate=1e-4):
    """Give what Adam's first step makes of weights."""
    gradients = torch.autograd.grad(loss, weights)
    decayed = [g + decay * w for g, w in zip(gradients, weights, strict=True)]
    return [
        (w - rate * g / (g.abs() + 1e-8)).detach()
        for w, g in zip(weights, decayed, strict=True)
    ]


# ----------------------------------------------------------------- the LeNets


@pytest.mark.parametrize("name", SIZES)
def test_autoencoders_are_the_official_ones(name):
    shape = SIZES[name]
    encoder = without_biases(load_backbone(name, in_channels=shape[0]).clone())
    decoder = make_decoder(
        encoder.stages.values(), shape, unit=True, normalize_code=True
    )
    x = torch.from_numpy(images(5, shape)).double()
    whole = nn.Sequential(encoder, decoder).double().train().requires_grad_(True)
    weights = [p.detach().clone().requires_grad_() for p in whole.parameters()]
    n_encoder = len(list(encoder.parameters()))
    z = lenet(x, weights[:n_encoder])
    expected = decode(name, z, weights[n_encoder:])
    found = whole(x)
    assert_allclose(found.detach(), expected.detach(), rtol=1e-10)
    # one step of the autoencoder: the sum of squares of an image, mean of the batch
    (found - x).square().flatten(1).sum(1).mean().backward()
    error = ((expected - x) ** 2).sum() / len(x)
    optimizer = torch.optim.Adam(whole.parameters(), 1e-4, weight_decay=5e-4)
    optimizer.step()
    for after, by_hand in zip(
        whole.parameters(), adam(weights, error, 5e-4), strict=True
    ):
        assert_allclose(after.detach(), by_hand, rtol=1e-9, atol=1e-12)


GAIN = math.sqrt(2 / (1 + 0.01**2))  # of leaky ReLU


@pytest.mark.parametrize("name", ["mnist_lenet", "cifar10_lenet"])
def test_weights_of_hsc_start_as_official(name):
    layers = [
        m for m in load_backbone(name).modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    for layer in layers:
        fan_out, fan_in = layer.weight.flatten(1).shape
        if isinstance(layer, nn.Conv2d):
            fan_out *= 25
        gain = 1 if layer is layers[-1] else GAIN
        expected = gain * math.sqrt(2 / (fan_in + fan_out))
        n = layer.weight.numel()
        assert layer.weight.std() == pytest.approx(expected, rel=4 / math.sqrt(2 * n))
        # a normal distribution: some lie beyond what a uniform one of this size has
        assert layer.weight.abs().max() > 2 * expected


def test_weights_of_deep_svdd_start_as_official():
    network = load_backbone("svdd_cifar10_lenet")
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            n_out, n_in = layer.weight.shape[:2]
            bound = GAIN * math.sqrt(6 / (25 * (n_in + n_out)))
            assert 0.98 * bound < layer.weight.abs().max() <= bound
    # elsewhere as torch draws them
    last = list(network.stages.values())[-1][-1].weight
    assert 0.98 < last.abs().max() * math.sqrt(2048) <= 1
    small = load_backbone("svdd_mnist_lenet", in_channels=1).stages["stage1"][0].weight
    assert 0.95 < small.abs().max() * math.sqrt(25) <= 1


def test_hsc_sees_cifar10_as_official():
    network = load_backbone("cifar10_lenet").clone().double()
    x = torch.from_numpy(images(3, (3, 32, 32))).double()
    mean = torch.tensor([0.491373, 0.482353, 0.446667], dtype=torch.float64)
    std = torch.tensor([0.247059, 0.243529, 0.261569], dtype=torch.float64)
    at = (x - mean[:, None, None]) / std[:, None, None]
    for i in (1, 2, 3):
        conv, bn = network.stages[f"stage{i}"][:2]
        at = F.conv2d(at, conv.weight, conv.bias, padding=2)
        at = at / math.sqrt(1 + 1e-4)  # statistics before any training
        at = F.max_pool2d(F.leaky_relu(at * bn.weight[0] + bn.bias[0], 0.01), 2)
    hidden, output = network.stages["fc1"][1], network.stages["fc2"][0]
    at = at.flatten(1) @ hidden.weight.T + hidden.bias
    at = F.leaky_relu(at / math.sqrt(1 + 1e-4), 0.01) @ output.weight.T + output.bias
    assert_allclose(network(x).detach(), at.detach(), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------- Deep SVDD, Deep SAD


@pytest.fixture(scope="module")
def contrast():
    """20 images as Deep SVDD sees them, and as they are."""
    X = images(20, (28, 28))
    flat = X.reshape(20, -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.abs(flat).mean(axis=1, keepdims=True)
    flat = (flat - flat.min()) / (flat.max() - flat.min())
    return X, torch.from_numpy(flat).view(20, 1, 28, 28)


def center_of(x, weights):
    """The mean output of the untrained network, whose BatchNorm has seen nothing."""
    for weight in weights[:-1]:
        x = F.conv2d(x, weight, padding=2) / math.sqrt(1 + 1e-4)
        x = F.max_pool2d(F.leaky_relu(x, 0.01), 2)
    c = (x.flatten(1) @ weights[-1].T).mean(dim=0)
    return torch.where(c.abs() < 0.1, torch.where(c < 0, -0.1, 0.1), c)


def drawn_weights(detector, X, y=None):
    """The weights with which a detector starts, in float64."""
    never = type(detector).from_paper(
        pretrain_steps=0, max_steps=1, learning_rate=1e-30, random_state=0
    )
    network = never.fit(X, y)._network
    return [p.detach().double().requires_grad_() for p in network.parameters()]


def test_steps_of_deep_svdd(contrast):
    X, x = contrast
    detector = DeepSVDD.from_paper(
        objective="soft-boundary",
        pretrain_steps=0,
        warm_up_steps=1,
        max_steps=2,
        milestones=(),
        random_state=0,
    ).fit(X)
    weights = drawn_weights(detector, X)
    c = center_of(x, weights).detach()
    assert_allclose(detector.center_, c, rtol=1e-4)
    d = (lenet(x, weights) - c).square().sum(dim=1)
    loss = d.mean() / 0.1  # nu; the radius is 0
    after = adam(weights, loss, 5e-7)
    second = (lenet(x, after) - c).square().sum(dim=1)
    assert_allclose(detector.loss_curve_, [loss.item(), second.mean() / 0.1], rtol=1e-3)
    # the radius is that of the last step's distances
    assert detector.radius_ == pytest.approx(
        np.quantile(second.sqrt().numpy(), 0.9), rel=1e-3
    )


def test_the_radius_waits_for_the_warm_up(contrast):
    with pytest.warns(UserWarning, match="radius is still 0"):
        detector = DeepSVDD.from_paper(
            objective="soft-boundary", pretrain_steps=0, warm_up_steps=2, max_steps=2
        ).fit(contrast[0])
    assert detector.radius_ == 0


def test_phases_have_milestones_of_their_own(contrast):
    """The rate falls in each after its own share of the steps: to nothing, here."""
    numbers = DeepSVDD.from_paper("cifar10").get_params()
    assert numbers["pretrain_milestones"] == (250 / 350,)
    assert numbers["milestones"] == (50 / 150,)
    rates = []

    class Watched(DeepSVDD):
        def _take_steps(self, optimizer, losses, n_steps, seed, **options):
            for loss in super()._take_steps(
                optimizer, losses, n_steps, seed, **options
            ):
                rates.append(optimizer.param_groups[0]["lr"])
                yield loss

    Watched.from_paper(
        pretrain_steps=4,
        pretrain_milestones=(0.75,),
        max_steps=4,
        milestones=(0.25,),
        random_state=0,
    ).fit(contrast[0])
    assert_allclose(rates, [*[1e-4] * 3, 1e-5, 1e-4, *[1e-5] * 3])
    with pytest.raises(ValueError, match="pretrain_milestones=\\(1,\\) must be shares"):
        DeepSVDD(pretrain_milestones=(1,), pretrain_steps=1).fit(contrast[0])


def test_a_step_of_deep_sad():
    X = images(20, (28, 28))
    x = torch.from_numpy(X).double()[:, None]
    y = np.repeat([0, 1, -1], [12, 4, 4])
    detector = DeepSAD.from_paper(
        pretrain_steps=0, max_steps=2, milestones=(), random_state=0
    ).fit(X, y)
    weights = drawn_weights(detector, X, y)
    c = center_of(x[y >= 0], weights).detach()
    assert_allclose(detector.center_, c, rtol=1e-4)

    def loss(weights):
        d = (lenet(x, weights) - c).square().sum(dim=1)
        known = torch.from_numpy(y)
        return torch.where(known == 0, d, (d + 1e-6) ** known.double()).mean()

    first = loss(weights)
    after = adam(weights, first, 5e-7)
    assert_allclose(detector.loss_curve_, [first.item(), loss(after)], rtol=1e-3)


def test_numbers_of_deep_sad():
    numbers = DeepSAD.from_paper("fashion_mnist").get_params()
    assert numbers["max_steps"] == numbers["pretrain_steps"] == 150 * 47
    assert not numbers["balanced"]
    assert not numbers["contrast_normalization"]


# ------------------------------------------------------------------------ PANDA


def test_steps_of_ewc_are_those_of_the_official_loop():
    """The official loop divides by d, and has its own scale of the Fisher diagonal."""
    rng = np.random.default_rng(0)
    X = 3 * rng.normal(size=(30, 6)).astype(np.float32)
    torch.manual_seed(0)
    net = Backbone({"a": nn.Linear(6, 5), "b": nn.Linear(5, 4)}, vectors=True)
    start = {k: v.clone().double() for k, v in net.state_dict().items()}
    d, n_steps, clip = 4, 3, 1e-3
    # as stiff as the paper's lambda makes some weights: 200 times the old bound
    official = {k: torch.full_like(v, 2.0) for k, v in start.items()}
    fisher = {k: 32 * v.float() for k, v in official.items()}
    detector = PANDAEstimator.from_paper(
        backbone=net,
        trainable_stages="b",
        fisher=fisher,
        ewc_lambda=1e4 * d / 32,
        max_steps=n_steps,
        random_state=0,
    ).fit(X)

    z = torch.from_numpy(X).double() @ start["stages.a.weight"].T
    z = z + start["stages.a.bias"]
    names = ["stages.b.weight", "stages.b.bias"]
    first = [start[name] for name in names]
    weights = [w.clone() for w in first]
    center = (z @ first[0].T + first[1]).mean(dim=0)
    velocity = [torch.zeros_like(w) for w in weights]
    losses = []
    for _ in range(n_steps):
        weights = [w.requires_grad_() for w in weights]
        loss = ((z @ weights[0].T + weights[1] - center) ** 2).mean(dim=1).mean()
        for name, w, w0 in zip(names, weights, first, strict=True):
            loss = loss + 1e4 / 2 * (official[name] * (w - w0) ** 2).sum()
        losses.append(d * loss.item())
        gradients = torch.autograd.grad(loss, weights)
        length = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert length > clip  # so that both clip
        for i, gradient in enumerate(gradients):
            w = weights[i].detach()
            velocity[i] = 0.9 * velocity[i] + gradient * clip / length + 5e-5 * w
            weights[i] = w - 0.01 * velocity[i]
    assert_allclose(detector.loss_curve_, losses, rtol=1e-5)
    expected = (z @ weights[0].T + weights[1]).numpy()
    assert_allclose(detector.transform(X), expected, rtol=1e-4, atol=1e-5)


def test_springs_are_bounded_only_where_wanted():
    assert PANDAEstimator().bound_stiffness
    assert not PANDAEstimator.from_paper().bound_stiffness
    assert PANDAEstimator.from_paper("ses").validation_fraction == 0.1


# ------------------------------------------------------------ knowledge distillation


def tiny_source():
    torch.manual_seed(1)
    stages = {
        f"stage{i}": nn.Sequential(
            nn.Conv2d(3 if i == 2 else 4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        for i in (2, 3, 4, 5)
    }
    return Backbone(stages, in_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))


@pytest.mark.parametrize("dataset", ["mnist", "mvtec", "cifar10"])
def test_score_of_the_cloner(dataset):
    """Grey images, as MNIST's, three times: by both networks written out."""
    X = images(6, (1, 32, 32))
    detector = KDClonerEstimator.from_paper(
        dataset,
        backbone=tiny_source(),
        image_size=32,
        precision="float32",
        max_steps=1,
        random_state=0,
    ).fit(X)
    x = torch.from_numpy(X).double().expand(-1, 3, -1, -1)
    if dataset == "cifar10":
        mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.1]]).double()
        x = (x - mean[:, None, None]) / std[:, None, None]
    source, cloner = tiny_source().double(), detector.cloner_.double()
    weight = 2 if dataset == "mvtec" else 100
    with torch.no_grad():
        at, total = x, torch.zeros(6)
        found = cloner(x)
        for name, c in zip(
            ("stage2", "stage3", "stage4", "stage5"), found, strict=True
        ):
            conv = source.stages[name][0]
            at = F.max_pool2d(
                F.relu(F.conv2d(at, conv.weight, conv.bias, padding=1)), 2
            )
            if name != "stage2":  # learnt and not scored
                s, c = at.flatten(1), c.flatten(1)
                cosine = (s * c).sum(1) / (s.norm(dim=1) * c.norm(dim=1))
                total = total + ((s - c) ** 2).mean(1) + weight * (1 - cosine)
    detector.cloner_.float()
    assert_allclose(detector.score_samples(X), -total, rtol=1e-4)


def test_numbers_of_the_cloner():
    numbers = KDClonerEstimator.from_paper("cifar10").get_params()
    assert (numbers["image_size"], numbers["max_steps"]) == (224, 15800)
    assert numbers["normalize_input"]
    assert KDClonerEstimator.from_paper("mvtec").image_size == 128
    assert KDClonerEstimator.from_paper().max_steps == 4700
    with pytest.raises(ValueError, match="dataset='svhn' is not one of fashion_mnist"):
        KDClonerEstimator.from_paper("svhn")


# ----------------------------------------------------------------- open-set


def test_loss_of_the_hybrid_network():
    model = OpenSetClassifier.from_paper(hybrid=True)
    assert (model.backbone, model.weights) == ("resnet34", None)
    assert OpenSetClassifier.from_paper().reconstruction_weight == 0
    X, y = images(12, (3, 32, 32)), np.arange(12) % 2
    small = OpenSetClassifier.from_paper(
        "cifar100",
        hybrid=True,
        backbone="cifar10_lenet",
        max_steps=1,
        learning_rate=1e-30,
        random_state=0,
    )
    watched = {}

    def watch(outputs, targets, rows, decoder, rng):
        watched["decoder"], watched["rows"] = decoder, rows
        return OpenSetClassifier._losses(small, outputs, targets, rows, decoder, rng)

    small._losses = watch
    small.fit(X, y)
    rows = watched["rows"]
    assert len(rows) == 8  # a third of few images is held out, a quarter of many
    network, decoder = small._network.train(), watched["decoder"].train()
    with torch.no_grad():
        x = (
            torch.from_numpy(X[rows])
            - torch.tensor(small.backbone_.mean)[:, None, None]
        ) / torch.tensor(small.backbone_.std)[:, None, None]
        z = network.encode(x)
        logits = network.projection(z)
        p = logits.softmax(1)[torch.arange(8), torch.from_numpy(y[rows])]
        error = ((decoder(z) - x) ** 2).sum() / x.numel()
        expected = -p.log().mean() + 0.005 * error
    assert small.loss_curve_[0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("make", [DeepSAD, DeepSVDD, HSCClassifier, OpenSetClassifier])
def test_unknown_data_sets_are_told(make):
    with pytest.raises(ValueError, match="dataset='svhn' is not one of"):
        make.from_paper("svhn")


# ----------------------------------------------------------- nothing is held out


@pytest.mark.parametrize(
    "detector",
    [
        PANDAEstimator(max_steps=1, include_initial=True),
        PANDAEstimator("mlp", adaptation="ses", n_checkpoints=2, max_steps=2),
        KDClonerEstimator(max_steps=1),
        KDClonerEstimator(max_steps=1, discrepancy="mahalanobis"),
        DeepSVDD(max_steps=1, pretrain_steps=0),
        DeepSAD(max_steps=1, pretrain_steps=0),
        HSCClassifier(max_steps=1),
        OpenSetClassifier(max_steps=1),
    ],
    ids=str,
)
def test_no_image_is_held_out(detector):
    X = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    y = np.repeat([1, -1], [40, 10])
    detector.set_params(validation_fraction=0, random_state=0)
    with pytest.warns(UserWarning, match="validation_fraction=0 trains on all images"):
        detector.fit(X, y)
    n = 50 if isinstance(detector, OpenSetClassifier) else 40
    assert len(detector.held_out_scores_) == n
    assert np.isfinite(detector.score_samples(X)).all()
    # nothing is brought to the level of others: these are the scores themselves
    if not isinstance(detector, PANDAEstimator):
        features = detector._all_features(detector._check_inputs(X[:n]))
        own = detector._score(features)
        assert_allclose(detector.score_samples(X[:n]), own, rtol=1e-6)


@pytest.mark.parametrize("make", [PANDAEstimator, KDClonerEstimator, DeepSVDD, DeepSAD])
def test_the_papers_hold_no_image_out(make):
    assert make.from_paper().validation_fraction == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HSCClassifier.from_paper().contamination is None
