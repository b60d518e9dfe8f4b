"""The command: folders in; models, tables, maps and pages out; hostile folders, too."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.pipeline import make_pipeline

import skdeepad
from skdeepad import BackboneFeatures, KNNScorer
from skdeepad.command._commands import skdeepad as command
from skdeepad.conformal import select_anomalies
from skdeepad.detectors import MahalanobisFeatureScorer, PatchDetector
from skdeepad.persistence._archive import pack

ODD = "a\n<script>alert(1)</script>\"'&.png"


def run(*args, code=0):
    """Run a command in this process; give what it prints."""
    result = CliRunner().invoke(command, [str(a) for a in args])
    assert result.exit_code == code, result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.exception
    return result.output


def rows_of(table):
    with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def put(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image)).save(path)


@pytest.fixture(scope="module")
def folders(textures, tmp_path_factory):
    """Folders of good, new and defective images; three new ones cannot be read."""
    root = tmp_path_factory.mktemp("folders")
    for i, image in enumerate(textures.X_train):
        put(image, root / "good" / f"{i:02}.png")
    for i, (image, label) in enumerate(
        zip(textures.X_test, textures.y_test, strict=True)
    ):
        put(image, root / "new" / "good side" / f"{i:02}.png")
        if label == -1:
            put(image, root / "bad" / "spot" / f"{i:02}.png")
    put(textures.X_test[0], root / "new" / ODD)
    put(textures.X_test[1], root / "new" / "left" / "00.png")
    put(textures.X_test[2], root / "new" / "left" / "00.jpg")
    whole = (root / "new" / "left" / "00.jpg").read_bytes()
    (root / "new" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "new" / "empty.png").touch()
    (root / "new" / "text.png").write_text("this is no image")
    (root / "nothing").mkdir()
    (root / "words").mkdir()
    (root / "words" / "notes.txt").write_text("no image here")
    return root


@pytest.fixture(scope="module")
def model(folders):
    """A quick model, as `fit` writes it."""
    path = folders / "m.skdeepad"
    told = run(
        *("fit", folders / "good", "--out", path, "--detector", "mahalanobis"),
        *("--image-size", 32, "--contamination", 0.1, "--bad", folders / "bad"),
    )
    assert "Images to learn from: 24\n" in told
    assert "Known defects: " in told and " of 8 found" in told
    return path


@pytest.fixture(scope="module")
def patch_model(folders, textures):
    """A model with maps."""
    path = folders / "patch.skdeepad"
    options = {"image_size": 32, "n_patches": 50, "random_state": 0}
    skdeepad.save(PatchDetector(**options, on_error="skip").fit(textures.X_train), path)
    return path


# fit


def test_fit_writes_what_python_fits(model, folders, textures):
    fitted = skdeepad.load(model)
    alone = MahalanobisFeatureScorer(image_size=32, contamination=0.1)
    alone.fit(sorted((folders / "good").iterdir()))
    assert fitted.offset_ == alone.offset_
    new = fitted.score_samples(textures.X_test)
    np.testing.assert_array_equal(new, alone.score_samples(textures.X_test))


def test_fit_with_defects_that_cannot_be_read(folders, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    options = ("--detector", "mahalanobis", "--image-size", 32, "--bad")
    out = tmp_path / "m.skdeepad"
    told = run("fit", folders / "good", "--out", out, *options, tmp_path / "bad")
    assert out.is_file() and "1 of 1 images cannot be read" in told
    assert "Known defects" not in told


def test_fit_replaces_nothing_unless_forced(model, folders):
    before = model.read_bytes()
    args = ("fit", folders / "good", "--out", model, "--detector", "mahalanobis")
    told = run(*args, "--image-size", 32, code=2)
    assert "is there already" in told and "--force" in told
    assert model.read_bytes() == before
    other = model.with_name("other.skdeepad")
    other.write_text("not a model")
    run(*args[:3], other, *args[4:], "--image-size", 32, "--force")
    assert skdeepad.load(other).contamination == 0.05


def test_fit_understands_the_layout_of_mvtec(folders, textures, tmp_path):
    for i in range(20):
        put(textures.X_train[i], tmp_path / "train" / "good" / f"{i}.png")
    for i in range(4):
        kind = "good" if textures.y_test[i] == 1 else "spot"
        put(textures.X_test[i], tmp_path / "test" / kind / f"{i}.png")
        put(textures.X_test[i], tmp_path / "ground_truth" / kind / f"{i}_mask.png")
    put(textures.X_test[-1], tmp_path / "test" / "spot" / "last.png")
    put(textures.X_test[0], tmp_path / "test" / "good" / "first.png")
    out = tmp_path / "m.skdeepad"
    options = ("--detector", "mahalanobis", "--image-size", 32)
    told = run("fit", tmp_path, "--out", out, *options)
    assert "train/good" in told and "learn from: 20\n" in told
    n_bad = len(list((tmp_path / "test" / "spot").iterdir()))
    assert f"of {n_bad} found" in told
    told = run("score", out, tmp_path, "--csv", tmp_path / "scores.csv")
    rows = rows_of(tmp_path / "scores.csv")
    assert len(rows) == 6  # of test alone: neither train nor masks
    assert {Path(row["path"]).parent.name for row in rows} == {"good", "spot"}
    assert "AUROC" in told


# score


def test_the_table_holds_what_python_says(model, folders, tmp_path):
    table = tmp_path / "scores.csv"
    told = run("score", model, folders / "new", "--csv", table, "--fdr", 0.2)
    rows = rows_of(table)
    assert [Path(row["path"]) for row in rows] == skdeepad.datasets.list_images(
        folders / "new"
    )
    columns = ["path", "score", "decision", "label", "p_value", "discovery", "error"]
    assert list(rows[0]) == columns
    read = [row for row in rows if not row["error"]]
    detector = skdeepad.load(model)
    paths = [row["path"] for row in read]
    column = {
        name: np.array([float(row[name]) for row in read]) for name in columns[1:-1]
    }
    np.testing.assert_allclose(
        column["score"], detector.score_samples(paths), rtol=1e-9
    )
    np.testing.assert_allclose(
        column["decision"], column["score"] - detector.offset_, atol=1e-9
    )
    np.testing.assert_array_equal(column["label"], detector.predict(paths))
    np.testing.assert_allclose(column["p_value"], detector.p_values(paths))
    selected = select_anomalies(column["p_value"], 0.2)
    np.testing.assert_array_equal(column["discovery"], selected)
    assert f"{len(read)} images scored, {(column['label'] < 0).sum()} flagged" in told


def test_unreadable_images_are_named_and_do_not_stop(model, folders, tmp_path):
    table = tmp_path / "scores.csv"
    told = run("score", model, folders / "new", "--csv", table)
    failed = [row for row in rows_of(table) if row["error"]]
    assert sorted(Path(row["path"]).name for row in failed) == [
        "cut.jpg",
        "empty.png",
        "text.png",
    ]
    for row in failed:
        assert (row["score"], row["decision"], row["p_value"]) == ("", "", "")
        assert row["label"] == "-1"  # not known to be good
    # long names are cut in the warning; the table has all of them
    assert "3 of 22 images cannot be read" in told
    assert "cut.jpg" in told
    assert told.count("Warning: ") == 1


def test_scripts_are_told_of_anomalies(model, folders, textures, tmp_path):
    args = ("--csv", tmp_path / "scores.csv", "--fail-on-anomaly", "--force")
    run("score", model, folders / "bad", *args, code=3)
    assert (tmp_path / "scores.csv").is_file()
    detector = skdeepad.load(model)
    best = textures.X_test[np.argmax(detector.score_samples(textures.X_test))]
    put(best, tmp_path / "one" / "best.png")
    run("score", model, tmp_path / "one", *args)
    (tmp_path / "one" / "unknown.png").touch()
    run("score", model, tmp_path / "one", *args, code=3)


def test_maps_are_named_after_images(patch_model, folders, textures, tmp_path):
    maps = tmp_path / "maps"
    args = ("score", patch_model, folders / "new", "--csv", tmp_path / "scores.csv")
    run(*args, "--maps", maps)
    found = {str(p.relative_to(maps)) for p in maps.rglob("*") if p.is_file()}
    assert {ODD, "left/00.png.png", "left/00.jpg.png", "good side/00.png"} < found
    assert len(found) == len(rows_of(tmp_path / "scores.csv")) - 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["maps", "scores.csv"]
    detector = skdeepad.load(patch_model)
    wanted = detector.anomaly_map([folders / "new" / "good side" / "03.png"])[0]
    wanted = 255 * np.clip(wanted / (2 * detector.map_offset_), 0, 1)
    grey = np.asarray(Image.open(maps / "good side" / "03.png"))
    assert grey.shape == textures.X_test.shape[1:3]
    np.testing.assert_allclose(grey, wanted, atol=0.51)
    # others stay where maps are replaced
    (maps / "mine.txt").write_text("mine")
    run(*args, "--maps", maps, "--force")
    assert (maps / "mine.txt").read_text() == "mine"
    (tmp_path / "scores.csv").unlink()
    assert "is not empty" in run(*args, "--maps", maps, code=2)


def test_a_pipeline(folders, textures, tmp_path):
    """It has p-values, and no maps."""
    path = tmp_path / "m.skdeepad"
    features = BackboneFeatures(image_size=32, on_error="skip")
    pipeline = make_pipeline(features, KNNScorer()).fit(textures.X_train)
    skdeepad.save(pipeline, path)
    args = ("score", path, folders / "new", "--csv", tmp_path / "scores.csv")
    told = run(*args, "--maps", tmp_path / "maps", code=2)
    assert "Pipeline has no anomaly_map" in told
    assert list(tmp_path.iterdir()) == [path]
    run(*args, "--fdr", 0.5)
    row = next(r for r in rows_of(tmp_path / "scores.csv") if "03" in r["path"])
    image = textures.X_test[3:4]
    assert float(row["score"]) == pytest.approx(pipeline.score_samples(image)[0])
    p = pipeline[-1].p_values(pipeline[0].transform(image))
    assert float(row["p_value"]) == pytest.approx(p[0])


def test_stages_without_maps(patch_model, folders, tmp_path, monkeypatch):
    def refuse(self, X):
        raise ValueError("these stages have no maps")

    monkeypatch.setattr(PatchDetector, "anomaly_map", refuse)
    args = ("score", patch_model, folders / "bad", "--csv", tmp_path / "scores.csv")
    told = run(*args, "--maps", tmp_path / "maps", code=1)
    assert "these stages have no maps" in told and not list(tmp_path.iterdir())
    run(*args)
    run("report", patch_model, folders / "bad", "--out", tmp_path / "report.html")
    assert (
        "No maps: these stages have no maps" in (tmp_path / "report.html").read_text()
    )


# what goes wrong


@pytest.mark.parametrize("folder", ["nothing", "words"])
def test_folders_without_images(folder, model, folders, tmp_path):
    for args in (
        ("fit", folders / folder, "--out", tmp_path / "m.skdeepad"),
        ("score", model, folders / folder, "--csv", tmp_path / "scores.csv"),
        ("report", model, folders / folder, "--out", tmp_path / "report.html"),
        ("compare", folders / folder),
    ):
        told = run(*args, code=1)
        assert f"There is no image in '{folders / folder}'" in told
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_models(model, folders, tmp_path):
    broken = tmp_path / "broken.skdeepad"
    for content in (b"", b"something else", model.read_bytes()[:-100]):
        broken.write_bytes(content)
        for args in (
            ("score", broken, folders / "new", "--csv", tmp_path / "scores.csv"),
            ("report", broken, folders / "new", "--out", tmp_path / "report.html"),
            ("export", broken, "--out", tmp_path / "m.onnx"),
            ("info", broken),
        ):
            told = run(*args, code=1)
            assert told.startswith("Error: The file") and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == [broken]


def test_targets_that_cannot_be_written(model, folders, tmp_path):
    missing = tmp_path / "missing" / "scores.csv"
    args = ("score", model, folders / "new", "--csv")
    assert "Nothing can be written" in run(*args, missing, code=2)
    assert "is a folder" in run(*args, tmp_path, "--force", code=2)
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in run(
        *args, tmp_path / "scores.csv", "--maps", file, "--force", code=2
    )


def test_nothing_half_written_stays(model, folders, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("in the middle")

    monkeypatch.setattr("skdeepad.command._results._write_table", fail)
    monkeypatch.setattr("skdeepad.inspection._report._suspects", fail)
    table = tmp_path / "scores.csv"
    table.write_text("yesterday")
    args = ("score", model, folders / "new", "--csv", table, "--force")
    assert "in the middle" in run(*args, code=1)
    args = ("report", model, folders / "new", "--out", tmp_path / "report.html")
    assert "in the middle" in run(*args, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]
    assert table.read_text() == "yesterday"


def test_a_folder_of_which_nothing_can_be_read(model, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.png").touch()
    for args in (("score", "--csv"), ("report", "--out")):
        told = run(args[0], model, tmp_path / "new", args[1], tmp_path / "o", code=1)
        assert "can be read" in told
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.skipif(os.name != "posix", reason="names are text on Windows")
def test_names_that_are_no_text(model, textures, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    put(textures.X_test[0], tmp_path / "new" / "plain.png")
    (tmp_path / "new" / "plain.png").rename(tmp_path / "new" / name)
    run("score", model, tmp_path / "new", "--csv", tmp_path / "scores.csv")
    assert Path(rows_of(tmp_path / "scores.csv")[0]["path"]).name == name
    run("report", model, tmp_path / "new", "--out", tmp_path / "r.html")
    assert "caf\\udce9.png" in (tmp_path / "r.html").read_text(encoding="utf-8")


# the others


def test_report(model, folders, tmp_path):
    out = tmp_path / "report.html"
    args = ("report", model, folders / "new", "--out", out)
    run(*args, "--good", folders / "good", "--images", 5)
    page = out.read_text(encoding="utf-8")
    assert "new: anomaly report" in page
    assert "Training images that look least normal" in page and "Drift" in page
    assert "more images, which are more normal" in page
    assert "is there already" in run(*args, code=2)
    assert out.read_text(encoding="utf-8") == page


def test_info(model, patch_model):
    told = run("info", model)
    assert told.startswith("MahalanobisFeatureScorer, ")
    detector = skdeepad.load(model)
    for name in ("contamination", "image_size", "offset_", "image_size_", "stages_"):
        assert f"  {name}: {getattr(detector, name)!r}\n" in told
    assert f"skdeepad {skdeepad.__version__}" in told
    assert "  held_out_scores_: 'array of shape (24,)'" in told
    assert "  backbone_: 'efficientnet_lite0'" in told
    detector = skdeepad.load(patch_model)
    assert f"  map_offset_: {detector.map_offset_!r}\n" in run("info", patch_model)


def test_info_of_a_forged_file(tmp_path):
    path = tmp_path / "forged.skdeepad"
    made_with = {"skdeepad": "\x1b[31mred"}
    root = {"class": "a.B", "attributes": [["x_", "\n\x1b[2J"], ["y_", [0]]]}
    manifest = {"format": 1, "made_with": made_with, "objects": [root], "root": [0]}
    path.write_bytes(pack(manifest, [], {}))
    told = run("info", path)
    assert told.startswith("B, ") and "\x1b" not in told
    assert "  x_: '\\n\\x1b[2J'\n" in told and "  y_: 'B'\n" in told
    for broken in ({"root": 3}, {"root": [1]}, {"made_with": 3}, {"objects": [[]]}):
        path.write_bytes(pack(manifest | broken, [], {}))
        assert "The file is not one that save wrote" in run("info", path, code=1)


def test_export(model, tmp_path, monkeypatch):
    def export_onnx(detector, path, *, overwrite):
        if overwrite is None:
            raise ValueError
        Path(path).write_text(f"{type(detector).__name__} {overwrite}")

    monkeypatch.setattr(skdeepad, "export_onnx", export_onnx, raising=False)
    out = tmp_path / "m.onnx"
    run("export", model, "--out", out)
    assert out.read_text() == "MahalanobisFeatureScorer False"
    assert "is there already" in run("export", model, "--out", out, code=2)
    run("export", model, "--out", out, "--force")
    assert out.read_text() == "MahalanobisFeatureScorer True"

    def missing(*args, **options):
        raise ImportError('Install it: pip install "skdeepad[onnx]".')

    monkeypatch.setattr(skdeepad, "export_onnx", missing, raising=False)
    told = run("export", model, "--out", out, "--force", code=1)
    assert 'pip install "skdeepad[onnx]"' in told


def test_compare(folders):
    options = ("--detector", "mahalanobis", "--image-size", 32)
    told = run("compare", folders / "good", "--bad", folders / "bad", *options)
    assert "16 good images to learn from, 8 held back, 8 defects (spot)" in told
    assert "mahalanobis" in told and "spot (" in told
    told = run("compare", folders / "good", *options, "--detector", "patch")
    assert "40 defects (blur, cut_paste, noise, patch_shuffle, rotation)" in told
    lines = told.splitlines()
    assert {line.split()[0] for line in lines[-2:]} == {"mahalanobis", "patch"}


def test_compare_needs_a_few_images(folders, tmp_path, textures):
    put(textures.X_test[0], tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    told = run("compare", tmp_path, code=1)
    assert "b.png" in told and "1 good images that can be read; 15 are needed" in told


@pytest.mark.parametrize("name", [None, *sorted(command.commands)])
def test_help_teaches(name):
    told = run(*([name] if name else []), "--help")
    assert f"skdeepad {name or 'fit'} " in told  # an example
    assert len(told.splitlines()) > 8
    assert max(map(len, told.splitlines())) <= 80


def test_a_process_of_its_own(model, folders, tmp_path):
    """What a shell runs: quick help without torch, and errors in one line."""
    code = "import sys; from skdeepad.command import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(skdeepad.__file__).parents[1])}

    def shell(*args, code=code):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            capture_output=True,
            text=True,
            env=environment,
        )

    check = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); "
    informed = shell("info", model, code=check + code)
    assert informed.returncode == 0
    assert not {"torch", "sklearn", "scipy"} & set(
        informed.stdout.splitlines()[-1].split()
    )
    scored = shell("score", model, folders / "new", "--csv", tmp_path / "scores.csv")
    assert scored.returncode == 0, scored.stderr
    assert "Traceback" not in scored.stderr
    assert len(rows_of(tmp_path / "scores.csv")) == 22
    without = "import sys; sys.modules['click'] = None; "
    lacking = shell("--help", code=without + code)
    assert lacking.returncode == 1
    assert 'pip install "skdeepad[cli]"' in lacking.stderr
