"""Tables of the documents, made from benchmarks/results.

    python benchmarks/tables.py

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` of README.md and docs/ stands the
table of that name, which this writes; tests/test_tables.py fails where one differs from
the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", *(f"docs/{path.name}" for path in PAGES))
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.S)
FASHION = "one_vs_rest-fashion-mnist-"
PANDA = f"{FASHION}panda-112-"


def mean_of(name: str) -> dict[str, Any]:
    """Give the means of a result, by its name; of one row of it, as NAME:ROW."""
    file, _, row = name.partition(":")
    content = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    mean = content["rows"][row]["mean"] if row else content["mean"]
    if isinstance(mean, float):
        return {"auroc": mean, "std": None}
    if isinstance(mean["auroc"], dict):
        alarms = mean["false_alarm_rate"]["mean"]
        return {**mean["auroc"], "auroc": mean["auroc"]["mean"], "alarms": alarms}
    return {**mean, "alarms": mean["false_alarm_rate"]}


def auroc(name: str, *, bold: bool = False) -> str:
    """Give a mean AUROC, with its spread over seeds where there were some."""
    mean = mean_of(name)
    text = f"{mean['auroc']:.2f}"
    text = f"**{text}**" if bold else text
    return text if mean["std"] is None else f"{text} ± {mean['std']:.2f}"


def alarms(name: str) -> str:
    """Give the share of new normal images flagged."""
    return f"{100 * mean_of(name)['alarms']:.1f} %"


def by_class(name: str) -> list[str]:
    """Give the AUROC of each class, and their mean."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    runs = [row["runs"] for row in content["classes"]]
    found = [sum(run["auroc"] for run in each) / len(each) for each in runs]
    return [*(f"{value:.2f}" for value in found), auroc(name)]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay out a table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def readme() -> str:
    """Compare all detectors on Fashion-MNIST."""
    best = [
        ("`HSCClassifier`, with 64 known anomalies", "hypersphere-own:HSC"),
        (
            "`DetectorEnsemble` of `PANDAEstimator` at 160 pixels and a whitened stage "
            "at 64",
            f"{FASHION}panda-ensemble-160",
        ),
        ("`PANDAEstimator`, at 160 pixels", f"{FASHION}panda-160-ewc"),
        (
            "`DetectorEnsemble` of two frozen views of whole images",
            f"{FASHION}ensemble-160",
        ),
        ("`PANDAEstimator`", f"{PANDA}ewc"),
    ]
    others = [
        (
            "`PANDAEstimator(adaptation=None)`, at 160 pixels",
            f"{FASHION}panda-160-none",
        ),
        ("`MahalanobisFeatureScorer`", f"{FASHION}mahalanobis-112"),
        ("... at 64 pixels", f"{FASHION}mahalanobis-64"),
        ("... `joint=False`, summed over stages", f"{FASHION}mahalanobis-112-sum"),
        (
            "`PANDAEstimator(adaptation=None)`; `BackboneFeatures`, "
            '`KNNScorer(metric="cosine")`',
            f"{FASHION}cosine-knn-112",
        ),
        ("`BackboneFeatures`, `GaussianScorer`", f"{FASHION}gaussian-112"),
        ("`KDClonerEstimator`", f"{FASHION}kd-cloner-112-kd"),
        (
            "`DeepSVDD`, a LeNet from scratch at 28 pixels",
            f"{FASHION}deep-svdd-28-defaults",
        ),
        ("`BackboneFeatures`, `KNNScorer`", f"{FASHION}knn-112"),
    ]
    published = [
        (
            "kNN on an unadapted ResNet-152, published "
            "([PANDA](https://arxiv.org/abs/2010.05903))",
            "94.5",
            "",
        ),
        ("PANDA, that ResNet-152 adapted, published", "95.6", ""),
        (
            "knowledge distillation from a VGG-16, published "
            "([Salehi et al.](https://arxiv.org/abs/2011.11108))",
            "94.49",
            "",
        ),
    ]
    rows = [
        (label, auroc(name, bold=name in dict(best).values()), alarms(name))
        for label, name in best + others
    ]
    # the spread of the one row that has several seeds is in docs/panda.md
    rows = [(label, figure.partition(" ±")[0], share) for label, figure, share in rows]
    return table(["detector", "AUROC", "false alarms at 5 %"], [*rows, *published])


def panda_adaptation() -> str:
    """Show what adaptation is worth, at two sizes of images."""
    pairs = [
        (
            '`adaptation=None, normalize=False` (the paper\'s "unadapted")',
            f"{FASHION}knn-112",
            None,
        ),
        ("`adaptation=None`", f"{PANDA}none", f"{FASHION}panda-160-none"),
        ('`adaptation="early_stopping"`', f"{PANDA}adaptations-early_stopping", None),
        (
            '`adaptation="ses", max_steps=100, n_checkpoints=5`',
            f"{PANDA}adaptations-ses",
            None,
        ),
        ('`adaptation="ewc"`', f"{PANDA}ewc", f"{FASHION}panda-160-ewc"),
    ]
    rows = [
        (
            label,
            auroc(small, bold=small.endswith("ewc")),
            auroc(large, bold=large.endswith("ewc")) if large else "",
        )
        for label, small, large in pairs
    ]
    return table(["", "112 pixels", "160 pixels"], rows)


def panda_budget() -> str:
    """Show how PANDA's defaults were chosen, on training images."""
    budget = f"{PANDA}validation-budget-"
    settings = {
        "no adaptation": "none",
        "15 steps, lambda 0": "15_steps_lambda_0.0",
        "30 steps, lambda 0": "30_steps_lambda_0.0",
        "100 steps, lambda 0": "100_steps_lambda_0.0",
        "30 steps, lambda 0.3": "30_steps_lambda_0.3",
        "100 steps, lambda 3": "100_steps_lambda_3.0",
        "the defaults: 30 steps, lambda 0.3, initial features too": "defaults",
    }
    rows = [(label, *by_class(budget + name)) for label, name in settings.items()]
    return table(["", "T-shirt", "Dress", "Shirt", "Bag", "mean"], rows)


def panda_adaptations() -> str:
    """Repeat PANDA's table 4."""
    rows = [
        ("`None`", auroc(f"{PANDA}none"), "94.5"),
        (
            '`"joint"`',
            auroc(f"{FASHION}panda-joint-112-adaptations-joint"),
            "94.9",
        ),
        ('`"early_stopping"`', auroc(f"{PANDA}adaptations-early_stopping"), "95.4"),
        (
            '`"ses"`, 5 checkpoints over 100 steps',
            auroc(f"{PANDA}adaptations-ses", bold=True),
            "95.5",
        ),
        ('`"ewc"`', auroc(f"{PANDA}ewc"), "95.6"),
    ]
    return table(["`adaptation`", "here", "paper"], rows)


def panda_scorers() -> str:
    """Compare what scores the adapted features."""
    rows = [
        ('`"knn"`', auroc(f"{PANDA}ewc", bold=True), "96.2"),
        ('`"kmeans"`, 10 means', auroc(f"{PANDA}scorers-kmeans"), "94.9"),
        ('`"centroid"`', auroc(f"{PANDA}scorers-centroid"), "94.2"),
    ]
    return table(["`scorer`", "here", "paper"], rows)


def panda_stages() -> str:
    """Compare which stages are trained."""
    rows = [
        (
            "none; the features whitened (`whitened-knn`)",
            auroc(f"{FASHION}whitened-knn-112"),
            "94.6",
        ),
        (
            "the last stage (`stage7`, `conv_head`)",
            auroc(f"{PANDA}stages-last"),
            "94.8",
        ),
        (
            "the last two (from `stage6` on, the default)",
            auroc(f"{PANDA}ewc"),
            "96.2",
        ),
        (
            "the last three (from `stage5` on)",
            auroc(f"{PANDA}stages-last_three", bold=True),
            "95.9",
        ),
    ]
    return table(["trained", "here", "paper"], rows)


TABLES = {
    "fashion-mnist": readme,
    "panda-adaptation": panda_adaptation,
    "panda-budget": panda_budget,
    "panda-adaptations": panda_adaptations,
    "panda-scorers": panda_scorers,
    "panda-stages": panda_stages,
}


def written(text: str) -> str:
    """Give a document with its tables as the results have them."""
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[4]}", text)


def main() -> None:
    """Write all tables."""
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {name}")


if __name__ == "__main__":
    main()
