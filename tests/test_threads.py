"""Seeded draws are the same in any thread, and leave torch's global stream alone."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from skdeepad import (
    DeepSVDD,
    HSCClassifier,
    KDClonerEstimator,
    OpenSetClassifier,
    PANDAEstimator,
)
from skdeepad.augmentation import EachImage, paper_augmentation
from skdeepad.backbones import Backbone, _from_name, load_backbone
from skdeepad.draws import OwnDraws, each_with_own_draws

ROWS = np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32)
IMAGES = np.random.default_rng(1).random((48, 28, 28), dtype=np.float32)
CLASSES = np.arange(48) % 3
KNOWN = np.where(np.arange(48) < 36, 1, -1)


@pytest.fixture(autouse=True)
def _global_stream_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


# what draws

TRANSFORMS = v2.Compose(
    [
        v2.ColorJitter(0.01, 0.01, 0.01, 0.01),
        v2.RandomHorizontalFlip(),
        v2.RandomCrop((28, 28), padding=3),
        v2.GaussianNoise(sigma=0.001),
    ]
)
DRAWS = {
    "rand": lambda: torch.rand(7),
    "randn": lambda: torch.randn(40, dtype=torch.float64),
    "randint": lambda: torch.randint(3, 99, (9,)),
    "randint_to": lambda: torch.randint(99, (9,)),
    "randint_like": lambda: torch.randint_like(torch.ones(9), 3, 50),
    "rand_like": lambda: torch.rand_like(torch.ones(9)),
    "randn_like": lambda: torch.randn_like(torch.ones(40)),
    "randperm": lambda: torch.randperm(20),
    "normal": lambda: torch.normal(torch.zeros(9), torch.ones(9)),
    "normal_of_floats": lambda: torch.normal(0.0, 1.0, (9,)),
    "multinomial": lambda: torch.multinomial(torch.ones(9), 4),
    "bernoulli": lambda: torch.bernoulli(torch.full((30,), 0.4)),
    "exponential": lambda: torch.empty(9).exponential_(),
    "distribution": lambda: torch.distributions.Beta(1.0, 2.0).sample((4,)),
    "gumbel": lambda: F.gumbel_softmax(torch.ones(9)),
    "dropout": lambda: F.dropout(torch.ones(50), 0.3),
    "dropout2d": lambda: nn.Dropout2d()(torch.ones(2, 20, 3, 3)),
    "alpha_dropout": lambda: nn.AlphaDropout()(torch.ones(50)),
    "rrelu": lambda: nn.RReLU()(-torch.ones(50)),
    "attention": lambda: nn.MultiheadAttention(8, 2, 0.5)(*[torch.ones(9, 2, 8)] * 3)[
        0
    ],
    "lstm": lambda: nn.LSTM(5, 5, 2, dropout=0.5)(torch.ones(9, 2, 5))[0],
    "linear": lambda: nn.Linear(9, 9).weight,
    "conv": lambda: nn.Conv2d(3, 4, 3).weight,
    "kaiming": lambda: nn.init.kaiming_normal_(torch.empty(5, 6)),
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(5, 6)),
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(30)),
    "sparse": lambda: nn.init.sparse_(torch.empty(30, 4), 0.3),
    "transforms": lambda: TRANSFORMS(torch.from_numpy(IMAGES[:1])),
    "erasing": lambda: v2.RandomErasing()(torch.from_numpy(IMAGES[:1])),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_numbers_are_those_of_the_global_stream(draw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = [draw(), draw()]
    with OwnDraws(5):
        drawn = [draw(), draw()]
    for ours, theirs in zip(drawn, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_given_generator_is_used():
    expected = torch.rand(3, generator=torch.Generator().manual_seed(1))
    with OwnDraws(0) as outer, OwnDraws(1):
        assert torch.equal(torch.rand(3), expected)
        generator = torch.Generator().manual_seed(1)
        assert torch.equal(torch.rand(3, generator=generator), expected)
    assert not outer.generators


def test_fused_dropout():
    # as on CUDA; here it can be called by name
    x = torch.ones(2000, requires_grad=True)
    with OwnDraws(0):
        y, kept = torch.native_dropout(x, 0.25, True)
        none, _ = torch.native_dropout(x, 1.0, True)
        whole, _ = torch.native_dropout(x, 0.25, False)
    y.sum().backward()
    assert torch.equal(y, kept * x / 0.75)
    assert torch.equal(x.grad, kept / 0.75)
    assert 0.7 < kept.float().mean() < 0.8
    assert not none.any()
    assert torch.equal(whole, x)


def test_weights_that_are_not_there_yet():
    with OwnDraws(0):
        assert nn.Linear(3, 2, device="meta").weight.is_meta


def test_a_stream_goes_on_when_it_is_copied():
    def draw(draws):
        with draws:
            return torch.rand(3)

    draws = OwnDraws(0)
    first = draw(draws)
    twins = copy.deepcopy(draws), pickle.loads(pickle.dumps(draws))
    second = draw(draws)
    assert not torch.equal(first, second)
    for twin in twins:
        assert torch.equal(draw(twin), second)


def test_a_stream_is_not_kept_for_what_does_not_draw():
    plain = each_with_own_draws((torch.ones(1) for _ in range(3)), 0)
    assert torch.cat(list(plain)).tolist() == [1, 1, 1]
    drawn = each_with_own_draws((torch.rand(1) for _ in range(3)), 0)
    expected = torch.Generator().manual_seed(0)
    for value in drawn:
        assert torch.equal(value, torch.rand(1, generator=expected))
        assert not torch.equal(torch.rand(1, generator=torch.Generator()), value)


# threads


def in_threads(work, n):
    """Do the same in n threads that start together."""
    barrier = Barrier(n)

    def together(_):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(together, range(n)))


def weights(module):
    return torch.cat([p.flatten() for p in module.state_dict().values()])


def test_backbones():
    def load():
        return [weights(load_backbone("cifar10_lenet", seed=0)) for _ in range(50)]

    expected = load()[0]
    for loaded in in_threads(load, 4):
        assert all(torch.equal(found, expected) for found in loaded)


@pytest.mark.parametrize(
    "name", ["mlp", "mnist_lenet", "fashion_mnist_lenet", "cifar10_lenet"]
)
def test_backbones_are_what_a_global_seed_makes(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = weights(_from_name(name, None, 3))
    assert torch.equal(weights(load_backbone(name, seed=3, in_channels=3)), expected)


class Dropping(nn.Sequential):
    """Draws in training, without a module that says so."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


def dropping():
    stages = {"stage": Dropping(nn.Linear(12, 8, bias=False), nn.ReLU())}
    return Backbone(stages, in_channels=12, vectors=True)


def cloner():
    return Cloner(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
    )


class Cloner(nn.Sequential):
    """Learns two stages, and draws in training."""

    def forward(self, x):
        first = self[0](F.dropout(x, 0.5, self.training))
        return [first, self[1](first)]


FITS = {
    "DeepSVDD": (DeepSVDD(max_steps=20), ROWS),
    "DeepSVDD, dropout": (DeepSVDD(dropping, max_steps=20), ROWS),
    "HSCClassifier": (
        HSCClassifier("mnist_lenet", augmentation="paper", max_steps=6),
        IMAGES,
        KNOWN,
    ),
    "KDClonerEstimator, dropout": (
        KDClonerEstimator(
            "mnist_lenet",
            cloner=cloner,
            stages=("stage1", "stage2"),
            max_steps=6,
        ),
        IMAGES,
    ),
    "KDClonerEstimator": (
        KDClonerEstimator("mnist_lenet", max_steps=6),
        IMAGES,
    ),
    "PANDAEstimator": (
        PANDAEstimator("mnist_lenet", max_steps=6),
        IMAGES,
    ),
    "PANDAEstimator, outliers": (
        PANDAEstimator("mnist_lenet", adaptation="outlier_exposure", max_steps=6),
        IMAGES,
        KNOWN,
    ),
    "OpenSetClassifier": (
        OpenSetClassifier("mnist_lenet", max_steps=6),
        IMAGES,
        CLASSES,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FITS.values(), ids=FITS)
def test_fits(case):
    estimator, *data = case
    n_threads = torch.get_num_threads()

    def scores():
        # a thread that is new takes torch's default otherwise
        torch.set_num_threads(n_threads)
        fitted = copy.deepcopy(estimator).set_params(random_state=0, batch_size=16)
        return fitted.fit(*data).score_samples(data[0])

    expected = [scores(), scores()]
    np.testing.assert_array_equal(*expected)
    for found in in_threads(scores, 2):
        np.testing.assert_array_equal(found, expected[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmentation_is_a_stream_of_its_own(channels):
    images = torch.from_numpy(IMAGES[: 8 * channels]).view(8, channels, 28, 28)

    def augmented(make=lambda: EachImage(TRANSFORMS, 0)):
        augment = make()
        return torch.stack([augment(images) for _ in range(5)])

    expected = augmented()
    assert not torch.equal(expected[0], expected[1])
    for found in in_threads(augmented, 2):
        assert torch.equal(found, expected)
    paper = augmented(lambda: paper_augmentation((28, 28), 0))
    assert torch.equal(paper, expected)
