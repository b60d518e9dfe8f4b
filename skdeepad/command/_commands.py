"""The commands; what they need is imported when they run."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from typing import Any, TextIO

import click

from ..runtime._files import printable
from ._folders import check_target, listed

DETECTORS = {
    "patch": "PatchDetector",
    "mahalanobis": "MahalanobisFeatureScorer",
    "panda": "PANDAEstimator",
    "kd": "KDClonerEstimator",
}
EXIT_CODES = """\b
Exit codes:
  0  done
  1  it failed; no output was written
  2  the command line is wrong, or an output is there already
  3  with --fail-on-anomaly: done, and not all images are good

Images that cannot be read are named, and do not stop a command."""


class _Group(click.Group):
    """Turns errors into one line, and warnings, too."""

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except (ImportError, OSError, TypeError, ValueError) as error:
                if getattr(error, "errno", None) == errno.EPIPE:
                    raise  # nobody reads any more
                message = printable(str(error), "\n")
                raise click.ClickException(message) from error


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"Warning: {printable(str(message))}", err=True)


def _option(name: str, help: str, **more: Any) -> Any:
    return click.option(name, help=help, show_default=True, **more)


def _path(exists: str = "") -> click.Path:
    return click.Path(
        exists=bool(exists),
        dir_okay=exists != "file",
        file_okay=exists != "folder",
        path_type=Path,
    )


force = _option("--force", "Replace outputs that are there.", is_flag=True)
contamination = _option(
    "--contamination",
    "The share of new good images that may be flagged.",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.05,
)
image_size = _option(
    "--image-size",
    "Pixels to which the sides of images are resized; smaller is faster. By default "
    "what the network was trained on, 224.",
    type=click.IntRange(16),
)
fdr = click.FloatRange(0, 1, min_open=True, max_open=True)
model_argument = click.argument("model", type=_path("file"))
folder_argument = click.argument("folder", type=_path("folder"))


@click.group(
    cls=_Group,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="skdeepad")
def skdeepad() -> None:
    """Find defective images, having seen good ones only.

    \b
    Learn from a folder of good images, then look at new ones:
      skdeepad fit good --out model.skdeepad
      skdeepad report model.skdeepad new --out report.html
    \b
    Every night, for a script:
      skdeepad score model.skdeepad tonight --csv scores.csv --force
    \b
    Which detector suits these images?
      skdeepad compare good --bad defects

    Folders are read with their sub-folders. Of a folder laid out as the MVTec AD data
    set is (train/good, test/<kind>, ground_truth), fit reads train/good, and score and
    report read test. 'skdeepad COMMAND --help' has more examples.
    """


@skdeepad.command(short_help="Learn from good images; write a model.")
@click.argument("good", type=_path("folder"))
@_option("--out", "The file of the model.", type=_path(), required=True)
@_option(
    "--detector",
    "patch: small defects, and where they are. mahalanobis: whole images, the fastest. "
    "panda: whole images, trained. kd: trained, with maps.",
    type=click.Choice([*DETECTORS]),
    default="patch",
)
@_option(
    "--backbone",
    "The network; skdeepad.backbones.list_backbones() in Python lists them.",
    default="auto",
)
@_option(
    "--bad",
    "Images with known defects. Nothing is learnt from them: they tell how many "
    "defects the model finds. Of an MVTec AD folder, test/<kind>.",
    type=_path("folder"),
)
@contamination
@image_size
@_option("--seed", "Of all that is random.", type=int, default=0)
@force
def fit(
    good: Path,
    out: Path,
    detector: str,
    backbone: str,
    bad: Path | None,
    contamination: float,
    image_size: int | None,
    seed: int,
    force: bool,
) -> None:
    """Learn what the images of the folder GOOD look like; write a model.

    \b
    Examples:
      skdeepad fit good --out model.skdeepad
      skdeepad fit good --out model.skdeepad --bad defects
      skdeepad fit good --out model.skdeepad --detector panda --image-size 128
      skdeepad fit mvtec/bottle --out bottle.skdeepad --contamination 0.01

    A hundred good images are a start. With n of them, a contamination below 1/n
    cannot be kept. In Python, skdeepad.load reads the model.
    """
    check_target(out, force)
    paths = listed(good, "train")
    known_bad = listed(bad, "test") if bad else listed(good, "bad")
    click.echo(f"Images to learn from: {len(paths)}")

    from .. import detectors, save
    from ._results import say_found, say_threshold

    model = getattr(detectors, DETECTORS[detector])(
        backbone, contamination=contamination, image_size=image_size, on_error="skip"
    )
    model.set_params(
        **{"random_state": seed} if "random_state" in model.get_params() else {}
    )
    model.fit(paths)
    save(model, out)
    click.echo(f"Model: {printable(str(out))}")
    say_threshold(model)
    if known_bad:
        say_found(model, known_bad)


@skdeepad.command(short_help="Score images; write a table, and maps.")
@model_argument
@folder_argument
@_option("--csv", "The table.", type=_path(), required=True)
@_option("--maps", "A folder for maps, as PNG, if the model has maps.", type=_path())
@_option("--fdr", "Mark discoveries, of which this share may be false.", type=fdr)
@_option("--fail-on-anomaly", "Exit with 3 if an image is not good.", is_flag=True)
@force
@click.pass_context
def score(
    ctx: click.Context,
    model: Path,
    folder: Path,
    csv: Path,
    maps: Path | None,
    fdr: float | None,
    fail_on_anomaly: bool,
    force: bool,
) -> None:
    """Score the images of FOLDER; write a table.

    \b
    Examples:
      skdeepad score model.skdeepad tonight --csv scores.csv
      skdeepad score model.skdeepad tonight --csv scores.csv --maps maps --fdr 0.1
      skdeepad score model.skdeepad tonight --csv scores.csv --fail-on-anomaly \\
        || echo "have a look at scores.csv"

    \b
    Columns of the table:
      path       of the image
      score      higher = more normal; empty if the image cannot be read
      decision   score minus threshold: below 0 for anomalies
      label      1 good; -1 anomaly, or not known to be good, as it cannot be read
      p_value    the share of good images that look at least as unusual
      discovery  with --fdr: 1 for the images that are selected
      error      why the image cannot be read

    A map is a grey PNG of the size of its image, with the name and the sub-folder of
    its image: 0 is normal, 128 the threshold of maps, 255 twice that or more. If the
    model has no threshold of maps, 255 is the largest value of each map.

    With --fdr 0.1, a tenth of the discoveries at most is expected to be good images
    (Benjamini and Hochberg), however many images there are.
    """
    from ._results import score_folder

    all_good = score_folder(model, folder, csv, maps, fdr, force)
    if fail_on_anomaly and not all_good:
        ctx.exit(3)


@skdeepad.command(short_help="Score images; write a page to look at.")
@model_argument
@folder_argument
@_option("--out", "The HTML file.", type=_path(), required=True)
@_option(
    "--good",
    "The folder that the model was fitted to: the page then shows training images that "
    "look suspicious, and whether the new images have drifted from them.",
    type=_path("folder"),
)
@_option(
    "--fdr",
    "Mark discoveries, of which this share may be false.",
    type=fdr,
    default=0.1,
)
@_option("--images", "How many images to show.", type=click.IntRange(1), default=200)
@force
def report(
    model: Path,
    folder: Path,
    out: Path,
    good: Path | None,
    fdr: float,
    images: int,
    force: bool,
) -> None:
    """Score the images of FOLDER; write one HTML file to look at.

    It has the images in the order of their scores, with maps over them, and a
    threshold that can be moved. It needs no other file and no network.

    \b
    Examples:
      skdeepad report model.skdeepad tonight --out report.html
      skdeepad report model.skdeepad tonight --out report.html --good good
    """
    from ._results import write_report

    write_report(model, folder, out, good, fdr, images, force)
    click.echo(f"Report: {printable(str(out))}")


@skdeepad.command(short_help="Write a model for ONNX Runtime.")
@model_argument
@_option("--out", "The ONNX file.", type=_path(), required=True)
@force
def export(model: Path, out: Path, force: bool) -> None:
    """Write a model as one ONNX file, which needs neither torch nor this package.

    \b
    Example:
      skdeepad export model.skdeepad --out model.onnx
    """
    check_target(out, force)

    from ..persistence import load

    detector = load(model)

    from .. import export_onnx

    export_onnx(detector, out, overwrite=force)
    click.echo(f"ONNX model: {printable(str(out))}")


@skdeepad.command(short_help="Tell what a model is.")
@model_argument
def info(model: Path) -> None:
    """Tell what a model is, by what its file says; it is not loaded.

    \b
    Example:
      skdeepad info model.skdeepad
    """
    from ..persistence._summary import summarize

    told = summarize(model)
    versions = ", ".join(f"{name} {v}" for name, v in told["made_with"].items())
    size = model.stat().st_size / 1e6
    lines = [f"{told['class']}, {size:.1f} MB, made with {versions}", "Parameters:"]
    lines += [f"  {name}: {value!r}" for name, value in told["parameters"].items()]
    lines += ["Learnt:", *(f"  {k}: {v!r}" for k, v in told["fitted"].items())]
    click.echo(printable("\n".join(lines), "\n"))


@skdeepad.command(short_help="Which detector suits these images?")
@click.argument("good", type=_path("folder"))
@_option(
    "--bad",
    "Images with defects; sub-folders are kinds. Without them, good images are "
    "spoilt in five ways. Of an MVTec AD folder, test/<kind>.",
    type=_path("folder"),
)
@_option(
    "--detector",
    "Which detectors; may be given more than once. [default: all]",
    type=click.Choice([*DETECTORS]),
    multiple=True,
)
@_option(
    "--backbone",
    "Which networks; may be given more than once.",
    multiple=True,
    default=["auto"],
)
@contamination
@image_size
@_option(
    "--images",
    "Use so many good images, at random.",
    type=click.IntRange(20),
    default=150,
)
def compare(
    good: Path,
    bad: Path | None,
    detector: tuple[str, ...],
    backbone: tuple[str, ...],
    contamination: float,
    image_size: int | None,
    images: int,
) -> None:
    """Tell which detector suits the images of the folder GOOD.

    A third of the good images is held back to count false alarms. Defects that you
    know tell most; without any, the detectors are compared on spoilt good images,
    which is a hint and no more.

    \b
    Examples:
      skdeepad compare good --bad defects
      skdeepad compare good --detector patch --detector mahalanobis
      skdeepad compare good --backbone auto --backbone efficientnet_lite2

    \b
    Columns of the table:
      AUROC         1 if all defects score below all good images, 0.5 is chance
      found         defects below the threshold
      false alarms  good images that were held back below the threshold
      fit, score    seconds for all images
    """
    from ._comparison import compare_on

    names = detector or tuple(DETECTORS)
    compare_on(good, bad, names, backbone, contamination, image_size, images)
