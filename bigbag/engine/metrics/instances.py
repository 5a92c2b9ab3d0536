"""How well instance scores find the positive instances, exactly and in little memory."""

from __future__ import annotations

import numpy as np

from bigbag.engine.metrics.undefined import leave_out


def instance_metrics(y_inst: np.ndarray, scores: np.ndarray, threshold: float | None = None) -> dict[str, float]:
    """AUROC, average precision and F1 of instance scores against instance labels.

    All are exact, ties included, and equal scikit-learn's; the work is one in-place float32 sort, so tens of
    millions of instances need about 5 bytes each. With positives ``p`` and negatives ``n``::

        AUROC   = mean over pairs of  [score(p) > score(n)] + [score(p) = score(n)] / 2
        AP      = mean over p of  #{positives scored >= score(p)} / #{instances scored >= score(p)}
        F1(t)   = 2 #{positives scored >= t} / (#{instances scored >= t} + #{positives})
        best F1 = max over p of  F1(score(p))

    Attention has no natural threshold. The best F1 is an upper bound, since its threshold is chosen on the very
    instances; the F1 at a threshold chosen on validation bags is what a threshold achieves.

    Args:
        y_inst: ``(T,)`` integers: 1 positive, 0 negative, -1 unknown. Unknown instances do not count. With any other
            value there is no telling what is positive, and the result is empty.
        scores: ``(T,)``, larger meaning more positive: attention (before or after a softmax) or a prediction. Compared
            as float32.
        threshold: of ``instance_f1``; None leaves it out.

    Returns:
        ``instance_auroc``, ``instance_average_precision``, ``instance_best_f1``, the ``instance_best_threshold`` where
        it is reached (the highest of equals) and ``instance_f1``, absent where one class only is known; and
        ``num_instances``, the number of known ones.

    Raises:
        ValueError: shapes differ, or a score is NaN.
    """
    y_inst, scores = np.asarray(y_inst).reshape(-1), np.asarray(scores).reshape(-1)
    if y_inst.shape != scores.shape:
        raise ValueError(f"y_inst has {len(y_inst)} instances, scores has {len(scores)}: expected one score each")
    names = "instance metrics"
    if len(y_inst) and (y_inst.min() < -1 or y_inst.max() > 1):
        leave_out(names, f"instance labels are -1, 0 or 1; these go from {y_inst.min()} to {y_inst.max()}")
        return {}
    positive = np.sort(scores[y_inst == 1].astype(np.float32, copy=False))
    negative = scores[y_inst == 0].astype(np.float32, copy=False)
    negative.sort()
    for part in (positive, negative):
        if len(part) and np.isnan(part[-1]):  # NaN sorts last
            raise ValueError("scores: NaN among the instance scores; the model or its input is not finite")
    result: dict[str, float] = {"num_instances": len(positive) + len(negative)}
    if len(positive) == 0 or len(negative) == 0:
        missing = "positive" if len(positive) == 0 else "negative"
        leave_out(names, f"no instance is labelled {missing}")
        return result
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    pairs = len(positive) * len(negative)
    result["instance_auroc"] = float((below.sum(dtype=np.float64) + not_above.sum(dtype=np.float64)) / 2 / pairs)
    true = len(positive) - np.searchsorted(positive, positive, side="left")
    found = true + len(negative) - below
    result["instance_average_precision"] = float(np.mean(true / found))
    f1 = 2 * true / (found + len(positive))
    best = len(f1) - 1 - int(f1[::-1].argmax())
    result["instance_best_f1"], result["instance_best_threshold"] = float(f1[best]), float(positive[best])
    if threshold is not None:
        hits = len(positive) - int(np.searchsorted(positive, np.float32(threshold), side="left"))
        alarms = len(negative) - int(np.searchsorted(negative, np.float32(threshold), side="left"))
        result["instance_f1"] = 2 * hits / (hits + alarms + len(positive))
    return result
