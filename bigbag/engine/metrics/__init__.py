"""Numbers that say how good a model is: per bag, and per instance where instance labels are known.

Every metric is one exact function of labels, outputs and weights of the bags, computed for any number of weightings at
once: all weights 1 give the metric itself, the counts of a resample its bootstrap replicate
(:mod:`bigbag.evaluation.bootstrap`). scikit-learn, torchmetrics and scikit-survival are the tests' references.

A metric that the data do not define (the AUROC of bags of one class, say) is never given a conventional value:
:func:`bag_metrics` leaves it out and logs the reason once, :func:`why_undefined` says it.
"""

from bigbag.engine.metrics.calibration import reliability_curve
from bigbag.engine.metrics.concordance import concordance_index, discordant_pairs
from bigbag.engine.metrics.instances import instance_metrics
from bigbag.engine.metrics.probabilities import TASKS, THRESHOLD, probabilities, risk_of
from bigbag.engine.metrics.tasks import bag_metrics, check_bags, headline, metric_range, weighted_metrics, why_undefined

__all__ = [
    "TASKS",
    "THRESHOLD",
    "bag_metrics",
    "check_bags",
    "concordance_index",
    "discordant_pairs",
    "headline",
    "instance_metrics",
    "metric_range",
    "probabilities",
    "reliability_curve",
    "risk_of",
    "weighted_metrics",
    "why_undefined",
]
