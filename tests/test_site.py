"""The site's pages: code that runs, objects that are all there, and a real browser.

The last needs the built site (``python -m sphinx -W docs build/site``) and Chromium.
"""

from __future__ import annotations

import re
import shutil
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from test_package import NAMES, PUBLIC

import skdeepad

DOCS = Path(__file__).parents[1] / "docs"
SITE = DOCS.parent / "build" / "site"
GUIDE = [DOCS / "quickstart.md", *sorted((DOCS / "guide").glob("*.md"))]
ON_IMAGES = (
    r"(PatchDetector|MahalanobisFeatureScorer|BackboneFeatures|HSCClassifier)"
    r"\((?:image_size=\d+)?,? ?"
)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)


# the sources


def test_the_reference_has_every_public_object_once():
    text = (DOCS / "reference.rst").read_text(encoding="utf-8")
    listed, module = [], None
    for line in text.splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif re.fullmatch(r"   \w+", line):
            listed.append((module, line.strip()))
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(NAMES)
    scorers = {name for _, name in NAMES} - set(PUBLIC)  # objects without a page
    scorers -= {name for module, name in NAMES if module == "skdeepad.extension"}
    scorers -= {name for _, name in NAMES if name.endswith("Error")}
    assert {name for _, name in listed} == {name for _, name in NAMES} - scorers
    assert all(f"``{name}``" in text for name in scorers)


@pytest.fixture
def place(textures, tmp_path, monkeypatch):
    """A folder with the photographs that the pages speak of."""
    parts = {
        "good": textures.X_train,
        "new": textures.X_test[:6],
        "good_new": textures.X_test[textures.y_test == 1],
        "good_today": textures.X_test[textures.y_test == 1],
        "bad": textures.X_test[textures.y_test == -1],
    }
    for name, images in parts.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    with mpl.rc_context():
        yield


@pytest.mark.filterwarnings("ignore")  # few images
@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_code_on_the_page_runs(page, place, textures):
    X, y = textures.X_test, textures.y_test
    small = {"image_size": 32, "random_state": 0}
    names = {
        "np": np,
        "PatchDetector": skdeepad.PatchDetector,
        "detector": skdeepad.PatchDetector(**small).fit(textures.X_train),
        "good_images": textures.X_train,
        "images": textures.X_train,
        "new_images": X,
        "new_good_images": X[y == 1],
        "test_images": X,
        "y_test": y,
        "X": X,
        "y": y,
        "labels": np.where(y == 1, "good", "bad"),
        "masks": textures.masks_test,
        "part_of_each_image": np.arange(len(textures.X_train)) // 2,
        "each_hour": [X, X],
        "grid": {"image_size": [32]},
    }
    source = page.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", source, flags=re.S):
        if ">>>" not in code:
            code = re.sub(ON_IMAGES, r"\1(image_size=32, ", code)  # quicker
            exec(compile(code, page.name, "exec"), names)


# the built site


class Links(HTMLParser):
    """Where a page leads to, and what it can be entered at."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places, self.pictures = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "img":
            self.pictures.append(attrs)


needs_site = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason="the site is not built"
)


@pytest.fixture(scope="module")
def pages():
    return {
        path.relative_to(SITE).as_posix(): Links(path)
        for path in SITE.rglob("*.html")
        if "_static" not in path.parts
    }


@needs_site
def test_links_lead_somewhere(pages):
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):  # another site, or mail
                continue
            target, place = urldefrag(urljoin(name, link))
            target = target or name
            assert (SITE / target).exists(), f"{name}: {link}"
            if place and target in pages:
                assert place in pages[target].places, f"{name}: {link}"


@needs_site
def test_every_page_is_three_clicks_away(pages):
    found, edge = {"index.html"}, {"index.html"}
    for _ in range(3):
        edge = {
            urldefrag(urljoin(name, link))[0]
            for name in edge
            for link in pages[name].links
            if not re.match(r"[a-z]+:", link)
        } & (set(pages) - found)
        found |= edge
    apart = set(pages) - found
    aside = {"search.html", "sg_execution_times.html"}  # a form, and a log
    assert apart <= {*aside, "gallery/sg_execution_times.html"}


@needs_site
def test_pictures_have_a_description(pages):
    for name, page in pages.items():
        for picture in page.pictures:
            assert picture.get("alt") is not None, f"{name}: {picture}"


class Quiet(SimpleHTTPRequestHandler):
    """A server that does not print what it is asked for."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    handler = partial(Quiet, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@needs_site
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_site_in_a_browser(address):
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"]
        )
        tab = browser.new_page()
        errors = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda m: m.type == "error" and errors.append(m.text))
        for page in ("index.html", "quickstart.html", "gallery/index.html"):
            tab.goto(address + page)
            assert tab.title()
        # search finds a class by its name
        tab.goto(address + "search.html?q=PANDAEstimator")
        tab.wait_for_selector("#search-results li a")
        hits = tab.locator("#search-results li a").all_inner_texts()
        assert any("PANDAEstimator" in hit for hit in hits)
        # nothing is wider than a phone, apart from what scrolls by itself
        tab.set_viewport_size({"width": 390, "height": 800})
        tab.goto(address + "guide/which_detector.html")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
        assert not errors
