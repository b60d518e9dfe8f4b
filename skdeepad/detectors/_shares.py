"""Where in the image its score comes from, for scores of averaged features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones._backbone import pool
from ..frozen import frozen_copy
from ..inference import INPUT, Tap, n_at_once, padded, regroup, to_tensor
from ..inputs import Vectors
from ._base import MIN_HELD_OUT
from ._maps import AnomalyMapMixin


class Step(NamedTuple):
    """A stage that samples pass, in which precision, and whether its output counts."""

    stage: nn.Module
    dtype: torch.dtype
    counts: bool


Route = tuple[Tap, list[Step]]  # from what the front gives to features


class PositionShares(AnomalyMapMixin):
    """Maps of detectors whose scores are of whole images: shares of the score.

    A subclass defines ``_tangent(features)``.

    Attributes
    ----------
    map_offset_ : float
        The threshold on maps: the share of new normal images whose map exceeds it
        anywhere is `contamination`, by the maps of at most 40 images that were held
        out. NaN where there are no maps.
    """

    def anomaly_map(self, X: Any) -> Any:
        """Show from where in images their scores come.

        The score of an image is one of features that are averages over positions. A
        map parts it among them: at each position it is what the score would be, to
        first order, if the image were everywhere as it is there. With a distance S of
        the averages f of the activations ``a_p`` at P positions::

            m_p = S(f) + (a_p - f)' dS/df,    mean_p m_p = S(f)

        For the Mahalanobis distance this is ``(a_p - mu)' Sigma^-1 (f - mu) / S(f)``.
        Where features are no averages (linear layers, the last stage of some
        networks, scaling to unit length), all that is behind the last activations with
        positions is linearised::

            m_p = S + P (a_p' dS/da_p - mean_q a_q' dS/da_q)

        It shows what made the score of *this* image, and is no detector of patches,
        such as `PatchDetector`: shares are relative to the image's own direction away
        from normal ones. They may be negative, where an image is more normal than in
        the mean.

        Returns
        -------
        ndarray of float32, shape (n_samples, height, width)
            A map of each image, at its size: higher = more anomalous, on one scale for
            all images; normal ones seldom exceed `map_offset_`. A list of maps where
            files differ in size. NaN for files skipped by ``on_error="skip"``. With
            ``opening=False`` the mean of a map is minus the score of the image as a new
            one, exactly where images are not resized, whatever `sigma`.

        Raises
        ------
        ValueError
            If X holds vectors, or if features are scored by a detector that is not of
            this package.
        """
        return super().anomaly_map(X)

    def _tangent(
        self, features: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give minus the scores of features, and the gradients of these."""
        raise NotImplementedError

    def _has_maps(self) -> bool:
        return self.image_size_ is not None

    def _position_scores(
        self, inputs: Any
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        routes = self._routes(inputs)
        taps = tuple(dict.fromkeys(start for start, _ in routes))
        front = replace(self._front(), taps=taps)
        batches = iter(self._run(front, inputs, False))
        first = next(batches, None)
        if first is None:
            return
        # as many at once as in scoring, so that roundings are the same
        limit, last = self._n_at_end * self.batch_size, taps.index(routes[-1][0])
        dtype = self._end_dtype or front.dtype
        size = n_at_once(to_tensor(first[1][last]), limit, front.device, dtype)
        for index, arrays in regroup(chain([first], batches), size):
            # the caller may have turned gradients off
            with torch.inference_mode(False), torch.enable_grad():
                given = [padded(to_tensor(a).to(front.device), size) for a in arrays]
                starts = dict(zip(taps, given, strict=True))
                found = [
                    pair
                    for start, steps in routes
                    for pair in follow(starts[start], steps, self.backbone_.as_map)
                ]
                shares = self._shares(found, len(index))
            yield index, shares

    def _routes(self, inputs: Vectors) -> list[Route]:
        """Give the ways from what the front gives to the features of samples."""
        front = self._front()
        network = frozen_copy(self.backbone_, front.device, front.dtype)
        shape = front.sample_shape(inputs)

        def through_front(last: str, counts: bool) -> Route:
            """Begin at the last stage, up to this one, that has positions."""
            names = (INPUT, *network.stage_names)
            start = end = names.index(last)
            while start and not self._stage_has_positions(names[start], shape):
                start -= 1
            stages = [
                nn.Identity(),
                *(network.stages[n] for n in names[start + 1 : end + 1]),
            ]
            steps = [Step(stage, front.dtype, False) for stage in stages]
            steps[-1] = steps[-1]._replace(counts=counts)
            return Tap(names[start], "output"), steps

        taps, end = self._taps(), self._end()
        routes = [through_front(tap.stage, True) for tap in taps if tap.form == 1]
        if end is not None:
            dtype = self._end_dtype or front.dtype
            live: Any = frozen_copy(end, front.device, dtype)
            for stages in live.routes():
                start, steps = through_front(taps[0].stage, False)
                steps += [Step(s, dtype, n in self.stages_) for n, s in stages]
                routes.append((start, steps))
        return routes

    def _stage_has_positions(self, stage: str, shape: tuple[int, ...]) -> bool:
        (shape,) = self._pass((Tap(stage, "output"),)).shapes(shape)
        return have_positions(self.backbone_.as_map(torch.zeros(1, *shape)))

    def _shares(
        self, found: list[tuple[Tensor, Tensor]], n: int
    ) -> NDArray[np.float32]:
        """Part the scores of the first n samples among positions: see `anomaly_map`."""
        features = torch.cat([f.detach()[:n] for _, f in found], dim=1)
        scores, slopes = self._tangent(features.cpu().numpy())
        widths = [f.shape[1] for _, f in found]
        shares = torch.from_numpy(scores)[:, None, None]
        parts = torch.from_numpy(slopes).split(widths, dim=1)
        for (a, feature), slope in zip(found, parts, strict=True):
            slope = padded(slope.to(feature), len(feature))
            # features of several stages may follow from the same maps
            (by_a,) = torch.autograd.grad(feature, a, slope, retain_graph=True)
            products = by_a[:n].cpu().double() * a.detach()[:n].cpu()
            products = self.backbone_.as_map(products).sum(dim=1)
            size: Any = self.image_size_
            each = products[:, None] * products[0].numel()
            each = F.interpolate(each, size, mode="bilinear")[:, 0]
            shares = shares + (each - each.mean(dim=(1, 2), keepdim=True))
        return shares.float().numpy()

    def _check_maps(self) -> None:
        super()._check_maps()
        if not self._has_maps():
            raise ValueError(
                "The features are scored by a detector that is not of this package, "
                "which does not tell where scores come from. Choose one of "
                "skdeepad.scorers."
            )

    def _learn_maps(self, held_out: Vectors) -> None:
        """Set the threshold on maps by some of the images that were held out."""
        self.map_offset_ = np.nan
        if self._has_maps() and len(held_out):
            some = np.arange(len(held_out))[:: -(-len(held_out) // MIN_HELD_OUT)]
            self._learn_map_offset(held_out.take(some))

    def locate(self, X: Any) -> Any:
        """List the regions of anomalous images where the map exceeds `map_offset_`.

        Raises
        ------
        ValueError
            If the detector has no maps, or has learnt no threshold for them, as
            detectors of older versions: call `recalibrate` with good images.
        """
        return super().locate(X)

    def _recalibrate(
        self, X: Any, scores: NDArray[np.float64] | None, good: NDArray[np.bool_] | None
    ) -> None:
        super()._recalibrate(X, scores, good)
        # of files of versions that had no maps
        missing = np.isnan(getattr(self, "map_offset_", np.nan))
        if good is not None and missing and self._has_maps():
            self._learn_map_offset(self._check_inputs(X).take(np.flatnonzero(good)))


class OutputShares(PositionShares):
    """The same for detectors that train a network, and score its outputs.

    A subclass defines ``_anomaly(outputs)``, which gives minus their scores.
    """

    if TYPE_CHECKING:  # of the detector
        _network: Any

    def _anomaly(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        outputs = torch.from_numpy(features.astype(np.float64))
        return -self._anomaly(outputs).numpy()

    def _tangent(
        self, features: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        x = torch.from_numpy(features).requires_grad_()
        outputs = self._network.projection(self._network.whitening(x))
        scores = self._anomaly(outputs.double())
        (slopes,) = torch.autograd.grad(scores.sum(), x)
        return scores.detach().numpy(), slopes.double().numpy()


def have_positions(output: Tensor) -> bool:
    """Tell whether a stage's output is laid out in space."""
    return output.ndim == 4 and output[0, 0].numel() > 1


def follow(
    x: Tensor, steps: list[Step], as_map: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pass samples through stages; give features, and the last maps before them.

    Each pair is of the last output with positions, and of the features that follow from
    it, of shape (n_samples, n_features): only what is between them has gradients.
    """
    a = x
    for stage, dtype, counts in steps:
        x = x.float() if dtype == torch.float32 else x
        with torch.autocast(x.device.type, torch.bfloat16, dtype == torch.bfloat16):
            with torch.no_grad():
                output = stage(x)
            if have_positions(as_map(output)):
                x = a = output.detach().requires_grad_()
            else:
                x = stage(x.clone())  # a leaf must not be changed in place
        if counts:
            yield a, pool(as_map(x))
