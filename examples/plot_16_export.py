"""
Export a detector, and score without torch
==========================================

One ONNX file holds everything from pixels to the score. The runtime that reads it needs
neither torch nor scikit-learn.
"""

import tempfile
from pathlib import Path

from skdeepad import PatchDetector, export_onnx
from skdeepad.datasets import make_texture_defects

data = make_texture_defects(
    "brick",
    n_train=60,
    n_test_good=30,
    n_test_defective=30,
    image_size=96,
    random_state=0,
)

# %%
# Fit and export
# --------------
# ``precision="float32"``, as graphs compute in float32, too.

detector = PatchDetector(image_size=96, precision="float32", random_state=0)
detector.fit(data.X_train)
folder = tempfile.TemporaryDirectory()
file = Path(folder.name, "bricks.onnx")
export_onnx(detector, file)
print(f"{file.stat().st_size / 2**20:.1f} MB")

# %%
# Score
# -----

from skdeepad.runtime import load

model = load(file)
ours, theirs = detector.score_samples(data.X_test), model.score_samples(data.X_test)
print(f"largest relative difference: {abs(theirs / ours - 1).max():.0e}")

# %%
# The threshold can be changed afterwards.

flagged = (model.predict(data.X_test) == -1).sum()
model.threshold = model.thresholds[0.2]
print(f"flagged: {flagged}, then {(model.predict(data.X_test) == -1).sum()}")

# %%
# Both score alike
# ----------------

import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
for name, kind, colour in (("good", 1, "C0"), ("defective", -1, "C3")):
    rows = data.y_test == kind
    ax.scatter(ours[rows], theirs[rows], s=16, color=colour, label=name)
ax.axline((ours.mean(), ours.mean()), slope=1, color="gray", lw=0.8)
ax.set(xlabel="score by torch", ylabel="score by ONNX Runtime")
ax.legend()
folder.cleanup()
