"""A report on images in one HTML file: for whoever wants to look."""

from __future__ import annotations

import base64
import io
import os
import platform
import warnings
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..conformal import select_anomalies
from ..localization import fit_size
from ..runtime._files import printable, replacing
from ._scored import ScoredImages, Threshold

SIDE = 256  # pixels of a picture's longer side
MAP_SIDE = 64
MOST_BYTES = 15_000  # of a picture, so that 200 of them and their maps take 5 MB
QUALITIES = ((SIDE, 80), (SIDE, 60), (SIDE, 40), (SIDE * 3 // 4, 40), (SIDE // 2, 40))
N_BINS = 48
N_SUSPECTS = 20
PACKAGES = ("skdeepad", "scikit-learn", "torch", "numpy")


@dataclass(frozen=True)
class Picture:
    """An image, small enough to be part of a page, and its map."""

    image: bytes
    width: int
    height: int
    map: NDArray[np.float32] | None


def report(
    detector: Any,
    X: Any,
    path: str | os.PathLike[str],
    *,
    X_train: Any = None,
    drift: Any = None,
    alpha: float = 0.1,
    n_images: int = 200,
    title: str = "Anomaly report",
    verbose: bool | int | str = "auto",
) -> Path:
    """Write what a detector says of images to one HTML file.

    The file needs no other file and no network: send it to whoever wants to look. It
    has a summary, a histogram of the scores with a threshold that can be moved, the
    images in the order of their scores, with maps over them where the detector has
    ``anomaly_map``, the files that could not be read, and what made it. It can be read
    without JavaScript, and be printed.

    Parameters
    ----------
    detector : detector
        A fitted detector of this package, or any other with ``score_samples`` and
        ``offset_``.
    X : array-like, sequence of paths, or folder
        Images, in any form that it takes. Files that cannot be read are listed.
    path : str or path-like
        The file; one that is there is replaced once the new one is complete.
    X_train : array-like, sequence of paths, or folder, default=None
        The images that the detector was fitted to: those of them that look least
        normal are shown, too. It takes the ``suspects_`` of a
        `skdeepad.RobustDetector`, and the lowest scores of other detectors.
    drift : skdeepad.conformal.DriftMonitor, default=None
        A monitor that was updated with X: its report and alarm are shown.
    alpha : float, default=0.1
        Images that `skdeepad.conformal.select_anomalies` selects at this false
        discovery rate are marked, in (0, 1).
    n_images : int, default=200
        How many images are shown, the least normal ones; the others are listed by
        name and score. 200 take less than 5 MB.
    title : str, default="Anomaly report"
        The heading.
    verbose : bool, int or "auto", default="auto"
        Whether to show a progress bar.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    ValueError
        If X holds no images, if none of them can be read, or if the detector has no
        threshold.
    OSError
        If the file cannot be written.
    ImportError
        If Jinja2 is not installed: ``pip install "skdeepad[cli]"``.

    See Also
    --------
    AnomalyMapDisplay : Maps over images, as a figure.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from skdeepad import MahalanobisFeatureScorer
    >>> from skdeepad.datasets import make_texture_defects
    >>> from skdeepad.inspection import report
    >>> data = make_texture_defects(
    ...     n_train=30, n_test_good=4, n_test_defective=4, image_size=32, random_state=0
    ... )
    >>> detector = MahalanobisFeatureScorer(image_size=32).fit(data.X_train)
    >>> with TemporaryDirectory() as folder:
    ...     written = report(detector, data.X_test, Path(folder, "report.html"))
    ...     written.read_text(encoding="utf-8")[:15]
    '<!DOCTYPE html>'
    """
    template = _template()
    threshold = Threshold(detector)
    with replacing(path) as part:
        part.touch()  # not after an hour
        images = ScoredImages(detector, X, maps=True, pictures=True, verbose=verbose)
        found = _Found(images, n_images)
        context = {
            **_summary(detector, threshold, found, alpha),
            **_suspects(detector, X_train, verbose),
            "title": printable(title),
            "no_maps": images.no_maps,
            "drift": None if drift is None else drift.report(),
            "drift_alarm": drift is not None and drift.alarm_,
            "model": printable(repr(detector), "\n"),
            "versions": {name: version(name) for name in PACKAGES}
            | {"Python": platform.python_version()},
            "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        }
        part.write_text(template.render(context), encoding="utf-8")
    return Path(path)


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            'report needs Jinja2. Install it: pip install "skdeepad[cli]".'
        ) from error
    loader = PackageLoader("skdeepad", "inspection")
    page = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return page.get_template("report.html.jinja")


class _Found:
    """All scores, and pictures of some images: of `shown`, or the least normal."""

    def __init__(self, images: ScoredImages, n_images: int, shown: Any = None) -> None:
        self.names = short_names(images.names)
        self.scores = np.full(len(images), np.nan)
        self.failed: dict[int, str] = {}
        self.pictures: dict[int, Picture] = {}
        for batch in images:
            self.scores[batch.index] = batch.scores
            self.failed |= batch.failed
            # NaN is last
            worst = np.argsort(self.scores)[:n_images] if shown is None else shown
            self.pictures = {
                i: picture for i, picture in self.pictures.items() if i in worst
            }
            for k in np.flatnonzero(np.isin(batch.index, worst)).tolist():
                i = int(batch.index[k])
                found = None if batch.maps is None else batch.maps[k]
                size = images.inputs.size(i)
                self.pictures[i] = make_picture(batch.pixels[k], size, found)
        order = np.argsort(self.scores)
        self.order = order[~np.isnan(self.scores[order])]
        if not len(self.order):
            first = next(iter(self.failed.values()), "")
            raise ValueError(f"X holds no image that can be read. {first}".strip())


def _summary(
    detector: Any, threshold: Threshold, found: _Found, alpha: float
) -> dict[str, Any]:
    """Give what the page says of the images."""
    decisions = found.scores - threshold.offset
    n = len(found.order)
    p = threshold.p_values(found.scores)
    selected, warned = np.zeros(len(decisions), dtype=bool), []
    if p is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            selected = select_anomalies(p, alpha)
        warned = [str(warning.message) for warning in caught]
    level = _map_level(detector, found)
    rows = [
        {
            "name": found.names[i],
            "rank": rank,
            "score": float(found.scores[i]),
            "decision": float(decisions[i]),
            "p": None if p is None else float(p[i]),
            "selected": bool(selected[i]),
            "flagged": bool(decisions[i] < 0),
            "picture": _shown(found.pictures.get(int(i)), level),
        }
        for rank, i in enumerate(found.order, 1)
    ]
    held_out = (
        None if threshold.held_out is None else threshold.held_out - threshold.offset
    )
    return {
        "n_images": len(found.names),
        "n_scored": n,
        "n_flagged": sum(row["flagged"] for row in rows),
        "threshold": threshold,
        "n_held_out": None if held_out is None else len(held_out),
        "held_out": [] if held_out is None else _quantiles(held_out),
        "recalibrates": hasattr(detector, "recalibrate"),
        "expected": threshold.false_alarms(n),
        "alpha": alpha,
        "n_selected": int(selected.sum()),
        "has_p_values": p is not None,
        "warned": warned,
        "cards": [row for row in rows if row["picture"]],
        "others": [row for row in rows if not row["picture"]],
        "has_maps": any(p.map is not None for p in found.pictures.values()),
        "failed": [
            (found.names[i], printable(why)) for i, why in sorted(found.failed.items())
        ],
        "histogram": histogram(decisions[found.order], held_out),
    }


def _suspects(detector: Any, X_train: Any, verbose: Any) -> dict[str, Any]:
    """Give the training images that look least normal."""
    known = getattr(detector, "suspects_", None)
    if X_train is None:
        named = [] if known is None else [f"X[{i}]" for i in known[:N_SUSPECTS]]
        return {"suspects": [{"name": name, "picture": None} for name in named]}
    images = ScoredImages(detector, X_train, maps=False, pictures=True, verbose=verbose)
    shown = None if known is None else known[:N_SUSPECTS]
    found = _Found(images, N_SUSPECTS, shown)
    order = found.order[:N_SUSPECTS] if shown is None else shown
    return {
        "suspects": [
            {
                "name": found.names[i],
                "picture": _shown(found.pictures.get(int(i)), 1.0),
            }
            for i in order
        ]
    }


def short_names(names: list[str]) -> list[str]:
    """Leave out the folder that all files are in."""
    try:
        folder = os.path.commonpath(names) if os.sep in names[0] else ""
    except ValueError:  # some are absolute, others are not
        folder = ""
    folder = os.path.dirname(folder) if folder in names else folder
    cut = len(folder.rstrip(os.sep)) + 1 if folder else 0
    return [printable(name[cut:]) for name in names]


def make_picture(
    pixels: NDArray[np.float32], size: tuple[int, int], found: NDArray[Any] | None
) -> Picture:
    """Make a picture of pixels (channels, height, width), in the aspect of `size`."""
    shown = np.rint(np.clip(pixels[:3], 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(
        shown[0] if len(shown) < 3 else shown.transpose(1, 2, 0).copy()
    )
    for side, quality in QUALITIES:
        scale = min(side / max(size), 1)
        height, width = (max(1, round(scale * length)) for length in size)
        shrunk = image.resize((width, height), Image.Resampling.LANCZOS)
        data = _webp(shrunk, quality=quality)
        if len(data) <= MOST_BYTES:
            break
    if found is not None:
        sides = [max(1, round(MAP_SIDE * length / max(size))) for length in size]
        found = fit_size(np.asarray(found, dtype=np.float32), (sides[0], sides[1]))
    return Picture(data, width, height, found)


def _map_level(detector: Any, found: _Found) -> float:
    """Give the middle of the scale of maps: their threshold, if there is one."""
    level = getattr(detector, "map_offset_", np.nan)
    maps = [p.map for p in found.pictures.values() if p.map is not None]
    largest = max((float(np.nanmax(m)) for m in maps), default=0.0)
    return float(level) if level > 0 else largest / 2


def _shown(picture: Picture | None, level: float) -> dict[str, Any] | None:
    """Give what a page needs of a picture."""
    if picture is None:
        return None
    over = None
    if picture.map is not None and level > 0:
        # transparent where there is nothing; half way, and orange, at the threshold
        strength = np.clip(np.nan_to_num(picture.map) / (2 * level), 0, 1)
        colours = np.empty((*strength.shape, 4))
        colours[..., 0] = 255
        colours[..., 1] = 240 * strength**1.5
        colours[..., 2] = 0
        colours[..., 3] = 255 * strength
        image = Image.fromarray(colours.astype(np.uint8))
        over = _uri(_webp(image, quality=60, alpha_quality=60))
    return {
        "image": _uri(picture.image),
        "map": over,
        "width": picture.width,
        "height": picture.height,
    }


def _webp(image: Image.Image, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "WEBP", **options)
    return data.getvalue()


def _uri(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def _quantiles(held_out: NDArray[np.float64], most: int = 1000) -> list[float]:
    """Give enough of the sorted held-out decisions to look up how many are lower."""
    ordered = np.sort(held_out)
    at = np.linspace(0, len(ordered) - 1, min(len(ordered), most)).round().astype(int)
    return [float(f"{x:.6g}") for x in ordered[at]]


def histogram(
    decisions: NDArray[np.float64], held_out: NDArray[np.float64] | None
) -> dict[str, Any]:
    """Count scores, on an axis that the far ones do not squeeze: they end it."""
    everything = decisions if held_out is None else np.append(decisions, held_out)
    high = max(float(everything.max()), 0.0)
    low = min(max(float(everything.min()), -4 * high), 0.0) if high else -1.0
    if high == 0:
        low = min(float(everything.min()), -1e-9)
    margin = 0.02 * (high - low)
    low, high = low - margin, high + margin
    edges = np.linspace(low, high, N_BINS + 1)
    counts = np.histogram(np.clip(decisions, low, high), edges)[0]
    expected = np.zeros(N_BINS)
    if held_out is not None and len(held_out):
        share = np.histogram(np.clip(held_out, low, high), edges)[0] / len(held_out)
        expected = share * len(decisions)
    return {
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "expected": [] if held_out is None else expected.round(2).tolist(),
        "top": float(max(counts.max(), expected.max(), 1)),
        "cut": int((decisions < low).sum()),
    }
