"""What other processes get: forked ones, and those that unpickle a detector."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from skdeepad.backbones import load_backbone

FORKED = """
import os, warnings
import numpy as np, torch
from skdeepad import DeepSVDD, KMeansScorer, KNNScorer, MahalanobisFeatureScorer

warnings.simplefilter("ignore")
torch.set_num_threads(2)
X = np.random.default_rng(0).integers(0, 256, size=(24, 32, 32, 3), dtype=np.uint8)
rows = X.reshape(24, -1) / 255
detector = MahalanobisFeatureScorer(image_size=64, precision="float32").fit(X)
scorers = [KNNScorer().fit(rows), KMeansScorer().fit(rows)]
scores = detector.score_samples(X)
child = os.fork()
if not child:
    assert np.array_equal(detector.score_samples(X), scores)
    for scorer in scorers:
        scorer.score_samples(rows + 0.01)
        scorer.fit(rows)
    detector.fit(X)
    DeepSVDD("cifar10_lenet", max_steps=2, pretrain_steps=2).fit(X)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.get_num_threads() == 2
"""

UNPICKLED = """
import pickle, sys, torch

before = torch.get_rng_state()
pickle.load(open(sys.argv[1], "rb"))
assert torch.equal(torch.get_rng_state(), before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_after_use():
    """Without care the child waits for ever, for threads that its parent has."""
    # the limit is for a child that waits; it takes seconds
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=300)


def test_unpickling_leaves_the_callers_generator_alone(tmp_path):
    file = tmp_path / "backbone.pickle"
    file.write_bytes(pickle.dumps(load_backbone("efficientnet_lite0")))
    subprocess.run([sys.executable, "-c", UNPICKLED, str(file)], check=True)
