"""Every public estimator, for the tests that go through all of them."""

from __future__ import annotations

import inspect

import skdeepad

PUBLIC = [
    public
    for public in (getattr(skdeepad, name) for name in skdeepad.__all__)
    if hasattr(public, "fit")
]


def takes(public, name):
    """Tell whether an estimator has a parameter."""
    return name in inspect.signature(public).parameters


def make(public, **options):
    """Make one, with those of the options that it has."""
    if takes(public, "estimator"):
        inner = make(skdeepad.MahalanobisFeatureScorer, **options)
        options = {**options, "estimator": inner}
    if takes(public, "training_contamination"):
        # what stands out among training samples would be flagged beside `contamination`
        options = {"training_contamination": 0.0, **options}
    return public(**{name: v for name, v in options.items() if takes(public, name)})
