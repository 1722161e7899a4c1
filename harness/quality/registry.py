"""The metrics by name: the only list of them."""

from __future__ import annotations

from harness.quality import geometry
from harness.quality.metric import Metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "geometry", geometry.VERSION, "duplicates, nearest neighbours and experts of the dictionary", geometry.run
        ),
    )
}
