"""
From a folder to a report
=========================

A folder of good photographs, a folder of new ones, and one page of HTML for whoever
wants to look.
"""

import tempfile
from pathlib import Path

from PIL import Image

from skdeepad import PatchDetector
from skdeepad.datasets import list_images, make_texture_defects
from skdeepad.inspection import report

# %%
# Two folders
# -----------

data = make_texture_defects(
    "brick",
    n_train=60,
    n_test_good=20,
    n_test_defective=10,
    image_size=128,
    random_state=0,
)
folder = tempfile.TemporaryDirectory()
for name, images in (("good", data.X_train), ("new", data.X_test)):
    Path(folder.name, name).mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(Path(folder.name, name, f"{i:02}.png"))
Path(folder.name, "new", "broken.png").write_text("not an image")

# %%
# The report
# ----------
# Files that cannot be read are named in it, and do not stop it. In a shell:
# ``skdeepad fit good --out model.skdeepad``, then
# ``skdeepad report model.skdeepad new --out report.html``.

detector = PatchDetector(image_size=96, on_error="skip", random_state=0)
detector.fit(Path(folder.name, "good"))
page = report(detector, Path(folder.name, "new"), Path(folder.name, "report.html"))
print(f"{page.stat().st_size / 2**20:.2f} MB")

# %%
# What is in it
# -------------
# The images in the order of their scores, maps over them, and a threshold to move. The
# first of them:

import matplotlib.pyplot as plt
import numpy as np

files = list_images(Path(folder.name, "new"))
decisions = detector.decision_function(files)
first = [files[i] for i in np.argsort(decisions)[:6]]
maps = detector.anomaly_map(first)
fig, axes = plt.subplots(1, 6, figsize=(10, 2), layout="constrained")
for ax, file, found, decision in zip(
    axes, first, maps, np.sort(decisions), strict=False
):
    ax.imshow(Image.open(file), cmap="gray")
    ax.imshow(found, cmap="inferno", alpha=0.4, vmax=2 * detector.map_offset_)
    ax.set_title(f"{decision:+.2f}", fontsize=9)
    ax.set_axis_off()
folder.cleanup()
