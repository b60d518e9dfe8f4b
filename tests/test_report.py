"""The report: one page, of any detector, in a real browser where there is one."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import IsolationForest
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline

from skdeepad import (
    BackboneFeatures,
    ConformalDetector,
    KNNScorer,
    MahalanobisFeatureScorer,
    PatchDetector,
    RobustDetector,
)
from skdeepad.conformal import DriftMonitor, false_alarm_interval
from skdeepad.inspection import report
from skdeepad.inspection._report import (
    _shown,
    _uri,
    histogram,
    make_picture,
    short_names,
)
from skdeepad.inspection._scored import ScoredImages
from skdeepad.runtime._files import printable

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
HOSTILE = "<img src=x onerror=alert(1)>\n\"'&{{ 7 * 7 }}.png"


class Page(HTMLParser):
    """A page's elements, with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text = [], ""
        source = path.read_text(encoding="utf-8")
        self.feed(source)
        assert source.startswith("<!DOCTYPE html>")

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not self.elements or self.elements[-1][0] not in ("style", "script"):
            self.text += data

    def all(self, tag, **wanted):
        return [
            a
            for name, a in self.elements
            if name == tag and all(a.get(k) == v for k, v in wanted.items())
        ]

    def cards(self):
        return [a for a in self.all("li") if "data-decision" in a]


def picture_of(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def detector(textures):
    options = {"image_size": 32, "n_patches": 50, "random_state": 0}
    return PatchDetector(**options, contamination=0.1).fit(textures.X_train)


@pytest.fixture(scope="module")
def quick(textures):
    return MahalanobisFeatureScorer(image_size=32).fit(textures.X_train)


@pytest.fixture(scope="module")
def files(textures, tmp_path_factory):
    """Files with hostile names, of which one cannot be read."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / "sub" / f"{i:02}.png" for i in range(len(textures.X_test))]
    paths[0] = folder / HOSTILE
    (folder / "sub").mkdir()
    for image, path in zip(textures.X_test, paths, strict=True):
        Image.fromarray(image).save(path, "PNG")
    (folder / "broken.png").write_text("<script>alert(2)</script>")
    return [*paths, folder / "broken.png"]


@pytest.fixture(scope="module")
def page(detector, files, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.warns(UserWarning, match=r"1 of 17 images cannot be read.*broken"):
        assert report(detector, files, path, title="<b>Tonight</b>") == path
    return path


# what it says


def test_what_the_page_says(page, detector, files):
    parsed = Page(page)
    decisions = detector.decision_function(files[:-1])
    found = [float(card["data-decision"]) for card in parsed.cards()]
    np.testing.assert_allclose(found, np.sort(decisions), atol=1e-6)
    flagged = [card.get("class") == "flagged" for card in parsed.cards()]
    assert flagged == [decision < 0 for decision in found]
    low, high = false_alarm_interval(detector)
    text = " ".join(parsed.text.split())
    assert f"{16 * low:.1f} to {16 * high:.1f} (95 %)" in text
    assert "1 could not be read" in text
    assert f"Flagged{sum(flagged)}" in text.replace(" ", "")
    assert "PatchDetector(contamination=0.1" in text and "scikit-learn " in text
    p = np.sort(detector.p_values(files[:-1]))
    shown = [float(x) for x in re.findall(r"p\s=\s([\d.]+)", text)]
    np.testing.assert_allclose(shown, p, rtol=0.01)


def test_names_are_escaped(page, files):
    parsed = Page(page)
    shown = HOSTILE.replace("\n", "\\n")
    assert [card["data-name"] for card in parsed.cards()].count(shown) == 1
    assert len(parsed.all("img", alt=shown)) == 1
    assert "<b>Tonight</b>" in parsed.text and shown in parsed.text
    assert "broken.png" in parsed.text
    assert not any("onerror" in attributes for _, attributes in parsed.elements)
    assert len(parsed.all("script")) == 2
    assert "sub/01.png" in parsed.text  # without the folder that all are in


def test_nothing_is_loaded(page):
    parsed = Page(page)
    for _, attributes in parsed.elements:
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page.read_text(encoding="utf-8").replace("url(#cut)", "")
    policy = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy[0]["content"].startswith("default-src 'none'")


def test_pictures_and_maps(page, textures, detector):
    parsed = Page(page)
    images = parsed.all("img")
    worst = np.argsort(detector.score_samples(textures.X_test))[0]
    picture = np.asarray(picture_of(images[0]["src"]).convert("RGB"), dtype=float)
    assert np.abs(picture - textures.X_test[worst][..., None]).mean() < 8
    over = np.asarray(picture_of(images[1]["src"]).convert("RGBA"), dtype=float)
    wanted = detector.anomaly_map(textures.X_test[[worst]])[0]
    wanted = 255 * np.clip((wanted / detector.map_offset_ - 0.75) / 0.75, 0, 1)
    seen = Image.fromarray(over[..., 3].astype(np.uint8)).resize((32, 32))
    assert np.corrcoef(np.asarray(seen).ravel(), wanted.ravel())[0, 1] > 0.95


def test_many_images(quick, textures, tmp_path):
    path = report(quick, textures.X_test, tmp_path / "report.html", n_images=5)
    parsed = Page(path)
    scores = np.sort(quick.decision_function(textures.X_test))
    found = [float(card["data-decision"]) for card in parsed.cards()]
    np.testing.assert_allclose(found, scores[:5], rtol=1e-6)
    others = [
        float(r["data-decision"]) for r in parsed.all("tr") if "data-decision" in r
    ]
    np.testing.assert_allclose(others, scores[5:], rtol=1e-6)
    assert len(parsed.all("img")) == 5 + len(
        re.findall('class="map"', path.read_text())
    )


def test_pictures_are_small():
    """Noise is what compresses least: 200 pictures and maps take less than 5 MB."""
    rng = np.random.default_rng(0)
    noise = rng.random((3, 256, 256)).astype(np.float32)
    found = make_picture(np.zeros_like(noise), (3000, 2000), None)
    assert (found.width, found.height) == (171, 256)
    found = make_picture(noise, (400, 400), rng.random((256, 256)))
    over = _shown(found, 0.5)["map"]
    assert 200 * (len(_uri(found.image)) + len(over)) < 5e6 - 200_000
    assert found.map.shape == (64, 64)


# detectors


def test_the_same_scores_as_from_files(textures, image_files, tmp_path):
    """Files are read once; what a detector recognises, it recognises."""
    options = {"image_size": 160, "stages": "stage2"}
    detector = MahalanobisFeatureScorer(**options).fit(image_files.train)
    scored = ScoredImages(
        detector, image_files.train, maps=False, pictures=True, verbose=False
    )
    assert scored.as_seen
    scores = np.concatenate([batch.scores for batch in scored])
    np.testing.assert_array_equal(scores, detector.score_samples(image_files.train))


def test_colour_after_grey(quick, photos, image_files, tmp_path):
    """Files are what they are to the detector, whatever it was fitted to."""
    for size in (32, 160):
        detector = MahalanobisFeatureScorer(image_size=size, stages="stage2")
        detector.fit(photos[..., 0])
        for files in (image_files.photos[:4], image_files.test[:4]):
            path = report(detector, files, tmp_path / "report.html")
            found = [float(card["data-decision"]) for card in Page(path).cards()]
            wanted = np.sort(detector.decision_function(files))
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_detectors_around_others(textures, image_files, tmp_path):
    tiny = {"weights": None, "image_size": 28, "random_state": 0}
    inner = MahalanobisFeatureScorer("mnist_lenet", **tiny)
    for outer in (ConformalDetector(inner, cv=2), RobustDetector(inner, cv=2)):
        detector = outer.fit(image_files.train)
        path = report(detector, image_files.train, tmp_path / "report.html")
        found = sorted(float(c["data-decision"]) for c in Page(path).cards())
        wanted = np.sort(detector.decision_function(image_files.train))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert f"X[{detector.suspects_[0]}]" in Page(path).text
    path = report(detector, textures.X_test, path, X_train=image_files.train)
    suspects = Page(path).text.partition("Training images that look least normal")[2]
    names = re.findall(r"train\d+\.png", suspects)
    wanted = [image_files.train[i].name for i in detector.suspects_[:20]]
    assert names == wanted


def test_other_detectors(textures, tmp_path):
    features = BackboneFeatures(image_size=32)
    forest = make_pipeline(features, IsolationForest(random_state=0))
    path = report(forest.fit(textures.X_train), textures.X_test, tmp_path / "r.html")
    found = [float(card["data-decision"]) for card in Page(path).cards()]
    decisions = np.sort(forest.decision_function(textures.X_test))
    np.testing.assert_allclose(found, decisions, rtol=1e-6)
    assert "False alarms to expect" not in Page(path).text
    assert "Pipeline has no anomaly_map" in Page(path).text
    scorer = make_pipeline(features, KNNScorer()).fit(textures.X_train)
    report(scorer, textures.X_test, path)
    assert "False alarms to expect" in Page(path).text
    with pytest.raises(ValueError, match="BackboneFeatures has no threshold"):
        report(features.fit(textures.X_train), textures.X_test, path)


def test_suspects_of_any_detector(quick, textures, tmp_path):
    path = report(quick, textures.X_test, tmp_path / "r.html", X_train=textures.X_train)
    suspects = Page(path).text.partition("Training images that look least normal")[2]
    names = [int(i) for i in re.findall(r"X\[(\d+)\]", suspects)]
    order = np.argsort(quick.score_samples(textures.X_train))
    assert names == order[:20].tolist()


def test_drift(quick, textures, tmp_path):
    monitor = DriftMonitor(FrozenEstimator(quick), alpha=0.5, random_state=0)
    monitor.fit(textures.X_train).update(textures.X_test[:2])
    path = report(quick, textures.X_test, tmp_path / "r.html", drift=monitor)
    assert "No alarm" in Page(path).text and "brightness: " in Page(path).text
    monitor.update(np.zeros((40, *textures.X_test.shape[1:]), np.uint8))
    assert monitor.alarm_
    report(quick, textures.X_test, path, drift=monitor)
    assert "not like the training images any more" in Page(path).text


def test_what_cannot_be_reported(quick, textures, tmp_path):
    path = tmp_path / "report.html"
    (tmp_path / "broken.png").touch()
    with pytest.raises(ValueError, match="no image that can be read"), pytest.warns():
        report(quick, [tmp_path / "broken.png"], path)
    with pytest.raises(ValueError, match="X is empty"):
        report(quick, [], path)
    with pytest.raises(FileNotFoundError):
        report(quick, textures.X_test, tmp_path / "missing" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["broken.png"]


def test_without_jinja(quick, textures, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "skdeepad\[cli\]"'):
        report(quick, textures.X_test, tmp_path / "report.html")


# its parts


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["X[0]", "X[1]"], ["X[0]", "X[1]"]),
        (["/a/b/c.png", "/a/d.png"], ["b/c.png", "d.png"]),
        (["/a/b.png"], ["b.png"]),
        (["a.png", "b/c.png"], ["a.png", "b/c.png"]),
        (["b/c.png", "/a.png"], ["b/c.png", "/a.png"]),
        (["/a/\x1b[31m.png", "/a/\u202eb\udce9"], ["\\x1b[31m.png", "\\u202eb\\udce9"]),
    ],
)
def test_names_are_short_and_can_be_shown(names, short):
    assert short_names(names) == short
    assert all(name.isprintable() for name in short)


def test_printable():
    assert printable("a\nb\t", "\n") == "a\nb\\t"


def test_histogram():
    found = histogram(np.array([-100.0, -1, 0.5, 1]), np.array([0.0, 1]))
    assert sum(found["counts"]) == 4
    assert found["cut"] == 1 and found["counts"][0] == 1  # the far one ends the axis
    assert -4.3 < found["low"] < -4 and 1 < found["high"] < 1.2
    assert sum(found["expected"]) == pytest.approx(4, abs=0.05)
    for same in (np.zeros(3), np.full(3, 2.0), np.full(3, -2.0)):
        found = histogram(same, None)
        assert found["low"] < 0 < found["high"] and sum(found["counts"]) == 3


# in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no browser on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
        launched = playwright.chromium.launch(**options)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, page):
    """Open the page; nothing may fail in it, nor be loaded."""
    opened, troubles = [], []

    def visit(**options):
        context = browser.new_context(
            viewport={"width": 1000, "height": 800}, **options
        )
        tab = context.new_page()
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("dialog", lambda dialog: troubles.append(dialog.message))
        tab.on("request", lambda request: troubles.append(request.url[:40]))
        tab.goto(page.as_uri())
        opened.append(context)
        return tab

    yield visit
    for context in opened:
        context.close()
    assert all(url.startswith(("data:", "file:")) for url in troubles), troubles


def decisions_in(tab):
    cards = "cards => cards.map(card => Number(card.dataset.decision))"
    return tab.eval_on_selector_all(".gallery li[data-decision]", cards)


def flagged_in(tab):
    cards = "cards => cards.map(card => Number(card.dataset.decision))"
    return tab.eval_on_selector_all(".gallery li.flagged", cards)


def test_the_threshold_moves(visit, detector):
    tab = visit()
    values = decisions_in(tab)
    assert values == sorted(values)
    assert flagged_in(tab) == [value for value in values if value < 0]
    at = (values[-2] + values[-1]) / 2
    slider = tab.locator("#threshold")
    slider.evaluate(
        "(s, at) => { s.value = at; s.dispatchEvent(new Event('input')) }", at
    )
    at = float(slider.input_value())
    below = sum(value < at for value in values)
    assert len(flagged_in(tab)) == below
    assert tab.inner_text("[data-count]") == str(below)
    told = tab.inner_text("#told")
    assert f"{below} of {len(values)} images are flagged" in told
    share = (detector.held_out_scores_ - detector.offset_ < at).mean()
    about = re.search(r"about ([\d.]+) % would be", told)
    assert float(about[1]) == pytest.approx(100 * share, abs=0.5)
    # the nearest first, and again when the threshold moves
    tab.select_option("#order", "near")
    assert decisions_in(tab) == sorted(values, key=lambda value: abs(value - at))
    slider.evaluate("s => { s.value = s.min; s.dispatchEvent(new Event('input')) }")
    assert decisions_in(tab) == values
    tab.select_option("#order", "high")
    assert decisions_in(tab) == values[::-1]


def test_by_keyboard(visit):
    tab = visit()
    before = tab.inner_text("#told")
    reached = []
    for _ in range(4):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id"))
    assert reached[:3] == ["threshold", "order", "opacity"]
    tab.focus("#threshold")
    tab.keyboard.press("PageUp")
    assert tab.inner_text("#told") != before
    tab.focus("#opacity")
    tab.keyboard.press("Home")
    assert (
        tab.locator(".map").first.evaluate("map => getComputedStyle(map).opacity")
        == "0"
    )
    for control in tab.locator("input, select").all():
        assert control.evaluate("c => c.labels.length") == 1
    assert all(
        image.get_attribute("alt") is not None for image in tab.locator("img").all()
    )


def test_without_javascript(visit):
    tab = visit(java_script_enabled=False)
    assert tab.locator(".gallery figure").count() == 16
    assert not tab.locator("#threshold").is_visible()
    assert tab.locator("svg").is_visible()


def luminance(tab):
    colours = tab.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.body).color]"
    )
    return [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in colours]


def test_dark_light_paper_and_phones(visit):
    back, text = luminance(visit())
    assert back > 0.9 and text < 0.2
    dark = visit(color_scheme="dark")
    back, text = luminance(dark)
    assert back < 0.2 and text > 0.8
    dark.emulate_media(media="print", color_scheme="dark")
    back, text = luminance(dark)
    assert back > 0.9 and text < 0.2
    assert not dark.locator("#threshold").is_visible()
    assert dark.pdf()[:4] == b"%PDF"
    dark.emulate_media(media="screen")
    dark.set_viewport_size({"width": 320, "height": 640})
    assert dark.evaluate("document.documentElement.scrollWidth") <= 320
