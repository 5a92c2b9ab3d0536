"""Criteria of tasks, and what of them comes from the training labels."""

import numpy as np
import pytest
import torch

from bigbag.config import ConfigError, ModelConfig, TaskConfig, build_config
from bigbag.models import build_model, load_model, save_model
from bigbag.models.criteria import build_criterion, fit_task


def test_balanced_class_weights():
    task = fit_task(TaskConfig(type="multiclass", num_outputs=3, class_weights="balanced"), [0, 0, 0, 1, 1, 2])
    assert task.class_weights == pytest.approx([6 / 9, 6 / 6, 6 / 3])
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels, torch.tensor([6 / 9, 1.0, 2.0]))
    torch.testing.assert_close(build_criterion(task)(logits, labels), expected)
    with pytest.raises(ConfigError, match="no training bag has label 1"):
        fit_task(TaskConfig(type="multiclass", num_outputs=3, class_weights="balanced"), [0, 0, 2])


def test_pos_weight():
    task = fit_task(TaskConfig(pos_weight="balanced"), [0, 0, 0, 1])
    assert task.pos_weight == 3.0
    assert build_criterion(task)(torch.zeros(1), torch.ones(1)).item() == pytest.approx(3 * np.log(2))
    task = fit_task(TaskConfig(type="multilabel", num_outputs=2, pos_weight="balanced"), [[0, 1], [0, 1], [1, 0]])
    assert task.pos_weight == [2.0, 0.5]


def test_time_bins_hold_as_many_events():
    task = TaskConfig(type="survival_discrete", num_outputs=4)
    labels = [[t, 1] for t in range(1, 101)] + [[500, 0]] * 50
    fitted = fit_task(task, labels)
    counts = np.bincount(np.searchsorted(fitted.time_bins, np.arange(1, 101), side="right"))
    assert counts.tolist() == [25, 25, 25, 25]
    with pytest.raises(ConfigError, match="do not make 4 bins"):
        fit_task(task, [[1, 1], [1, 1], [2, 0]])
    assert fit_task(fitted, [[3, 1]]).time_bins == fitted.time_bins


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"type": "survival", "num_outputs": 2}, "does not go with num_outputs 2"),
        ({"type": "survival_discrete"}, "does not go with num_outputs 1"),
        ({"class_weights": [1.0, 2.0]}, "goes with task type multiclass"),
        ({"type": "multiclass", "num_outputs": 3, "class_weights": [1.0, 2.0]}, "expected 3 numbers"),
        ({"pos_weight": -1.0}, "positive weights"),
        ({"type": "survival_discrete", "num_outputs": 3, "time_bins": [2.0, 1.0]}, "ascending"),
        ({"type": "survival_discrete", "num_outputs": 3, "alpha": 2.0}, "expected 0 to 1"),
    ],
)
def test_settings_that_do_not_go_together(task, message):
    with pytest.raises(ConfigError, match=message):
        build_config({"name": "x", "data": {"shards": "y"}, "model": {"name": "ABMIL"}, "task": task})


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (TaskConfig(pos_weight="balanced"), [0, 0, 1]),
        (TaskConfig(type="multiclass", num_outputs=2, class_weights="balanced"), [0, 0, 1]),
        (TaskConfig(type="survival_discrete", num_outputs=2), [[1, 1], [2, 1]]),
    ],
)
def test_a_saved_model_keeps_its_criterion(tmp_path, task, labels):
    fitted, model_config = fit_task(task, labels), ModelConfig(name="ABMIL", att_dim=4)
    model = build_model(model_config, (3,), fitted)
    save_model(tmp_path, model.state_dict(), model_config, (3,), fitted)
    loaded = load_model(tmp_path)
    logits = torch.randn(3, 2) if fitted.num_outputs == 2 else torch.randn(3)
    loss = model.bag_loss(logits, torch.tensor(labels))
    assert torch.equal(loaded.bag_loss(logits, torch.tensor(labels)), loss)
    if task.type != "survival_discrete":
        plain = build_model(model_config, (3,), task.model_copy(update={"pos_weight": None, "class_weights": None}))
        assert plain.bag_loss(logits, torch.tensor(labels)) != loss
