"""torchmil's trainer on torchmil's kind of loaders."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from bigbag.data import collate_fn
from bigbag.models import ABMIL, MILModel
from bigbag.utils import LinearAnnealingScheduler, Trainer

SCRIPT = """
import torch
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, AUROC
from torchmil.data import collate_fn
from torchmil.models import ABMIL
from torchmil.utils import Trainer

torch.manual_seed(0)


def make_bag(label):
    size = int(torch.randint(5, 15, ()))
    y_inst = torch.zeros(size)
    y_inst[: 3 * label] = 1
    X = torch.randn(size, 8) + 2 * y_inst[:, None]
    return {"X": X, "Y": torch.tensor(float(label)), "y_inst": y_inst}


bags = [make_bag(i % 2) for i in range(48)]
train = DataLoader(bags[:32], batch_size=4, shuffle=True, collate_fn=collate_fn)
val = DataLoader(bags[32:], batch_size=4, collate_fn=collate_fn)
model = ABMIL(in_shape=(8,), att_dim=16)
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=1e-2),
    metrics_dict={"accuracy": Accuracy(task="binary"), "auroc": AUROC(task="binary")},
    obj_metric="auroc",
    device="cpu",
    disable_pbar=True,
)
trainer.train(12, train, val, val)
best = trainer.get_best_model().eval()
batch = next(iter(val))
Y_pred, att = best.predict(batch["X"], batch["mask"])
print("shapes", tuple(Y_pred.shape), tuple(att.shape) == tuple(batch["mask"].shape))
print("auroc", trainer.best_obj_metric)
"""


def test_a_torchmil_script_runs_after_replacing_one_word():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("torchmil", "bigbag")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("shapes", "auroc")))
    assert lines["shapes"] == "(4,) True" and float(lines["auroc"]) > 0.9


def make_bags(count: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (count,), generator=generator).tolist()
    labels = [float(i % 2) for i in range(count)]
    return [
        {"X": torch.randn(size, 4, generator=generator) + label, "Y": torch.tensor(label)}
        for size, label in zip(sizes, labels)
    ]


class MeanLogit:
    """A metric without torchmetrics: the mean logit."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def reset(self) -> None:
        self.seen = []

    def update(self, Y_pred: torch.Tensor, Y: torch.Tensor) -> None:
        assert not Y_pred.requires_grad and Y_pred.shape == Y.shape
        self.seen.append(Y_pred)

    def compute(self) -> torch.Tensor:
        return torch.cat(self.seen).mean()


class Log(list):
    def log(self, metrics: dict[str, float]) -> None:
        self.append(metrics)


class Watched(ABMIL):
    """Says how it was called."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[bool, bool]] = []
        self.steps = 0

    def compute_loss(self, Y, X, mask=None):
        self.calls.append((self.training, torch.is_grad_enabled()))
        Y_pred, losses = super().compute_loss(Y, X, mask)
        return Y_pred, {**losses, "Extra": (Y_pred**2).mean()}

    def after_step(self) -> None:
        self.steps += 1


def make_trainer(model: torch.nn.Module, **arguments: object) -> Trainer:
    defaults = {"metrics_dict": {"mean": MeanLogit()}, "obj_metric": "loss", "obj_metric_mode": "min", "device": "cpu"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, disable_pbar=True, verbose=False, **{**defaults, **arguments})


def test_validation_is_in_eval_mode_without_gradients():
    model, log = Watched((4,), att_dim=4), Log()
    loader = DataLoader(make_bags(), batch_size=4, collate_fn=collate_fn)
    make_trainer(model, logger=log).train(2, loader, loader, loader)
    assert model.calls == ([(True, True)] * 3 + [(False, False)] * 6) * 2 and model.steps == 6
    names = {"loss", "BCEWithLogitsLoss", "Extra", "mean"}
    assert [set(entry) for entry in log[:3]] == [{f"{mode}/{n}" for n in names} for mode in ("train", "val", "test")]
    assert log[1]["val/loss"] == pytest.approx(log[1]["val/BCEWithLogitsLoss"] + log[1]["val/Extra"])
    assert log[4]["val/loss"] < log[1]["val/loss"] == pytest.approx(log[2]["test/loss"])


def test_masks_reach_a_model_that_only_passes_keywords_on():
    """The base class's compute_loss hands its keywords to forward: padding must not change a loss."""
    model, bags = ABMIL((4,), att_dim=4), make_bags(6)
    log: dict[str, Log] = {"padded": Log(), "alone": Log()}
    for name, batch_size in (("padded", 6), ("alone", 1)):
        loader = DataLoader(bags, batch_size=batch_size, collate_fn=collate_fn)
        trainer = make_trainer(model, logger=log[name])
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer.train(1, loader)
    assert log["padded"][1]["val/loss"] == pytest.approx(log["alone"][1]["val/loss"], abs=1e-6)


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(make_bags(5))


@pytest.mark.parametrize("plain", [False, True])
def test_loaders_without_a_length_and_plain_dicts(plain):
    collate = (lambda bags: dict(collate_fn(bags).items())) if plain else collate_fn
    model, log = ABMIL((4,), att_dim=4), Log()
    loader = DataLoader(Endless(), batch_size=2, collate_fn=collate)
    with pytest.raises(TypeError):
        len(loader)
    make_trainer(model, logger=log).train(3, loader)
    assert log[-1]["val/loss"] < log[1]["val/loss"]


def test_annealing_weighs_the_losses():
    model, log = Watched((4,), att_dim=4), Log()
    loader = DataLoader(make_bags(), batch_size=6, collate_fn=collate_fn)
    scheduler = LinearAnnealingScheduler(0.0, 1.0, 4)
    make_trainer(model, logger=log, annealing_scheduler_dict={"Extra": scheduler}).train(2, loader)
    assert scheduler() == 1.0
    for entry, coefficient in ((log[1], 0.5), (log[3], 1.0)):
        expected = entry["val/BCEWithLogitsLoss"] + coefficient * entry["val/Extra"]
        assert entry["val/loss"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="no loss 'Exta'"):
        make_trainer(model, annealing_scheduler_dict={"Exta": scheduler}).train(1, loader)


def test_metrics_are_not_shared_and_the_default_is_accuracy():
    pytest.importorskip("torchmetrics")
    model, metric = ABMIL((4,), att_dim=4), MeanLogit()
    first, second = (make_trainer(model, metrics_dict={"mean": metric}) for _ in range(2))
    assert first.metrics_dict["mean"] is not second.metrics_dict["mean"] is not metric
    default = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    assert default.obj_metric_name == "accuracy" and set(default.metrics_dict) == {"accuracy"}


def test_early_stopping_and_the_best_weights():
    class Wandering(MILModel):
        """Its loss is 3, 1, 2, 2, ... : the second epoch is the best."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.epoch = 0

        def compute_loss(self, Y, X, mask=None):
            self.epoch += self.training
            loss = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0][self.epoch - 1]) + 0.0 * self.weight
            with torch.no_grad():
                self.weight.fill_(self.epoch)
            return self.weight.expand(len(Y)), {"Loss": loss}

    model = Wandering()
    trainer = make_trainer(model, early_stop_patience=3)
    assert trainer.get_best_model_state_dict() is None
    trainer.train(6, DataLoader(make_bags(2), batch_size=2, collate_fn=collate_fn))
    assert model.epoch == 5 and trainer.best_obj_metric == 1.0
    assert trainer.get_best_model() is model and model.weight.item() == 2


def test_a_metric_that_is_not_a_number_is_never_the_best():
    values = iter([0, math.nan, 0, 0.3, 0, math.nan])  # of training and of validation, in turn
    score = SimpleNamespace(reset=lambda: None, update=lambda *_: None, compute=lambda: next(values))
    model, loader = ABMIL((4,), att_dim=4), DataLoader(make_bags(2), batch_size=2, collate_fn=collate_fn)
    trainer = make_trainer(model, metrics_dict={"score": score}, obj_metric="score", obj_metric_mode="max")
    trainer.train(3, loader)
    assert trainer.best_obj_metric == 0.3


def test_mistakes_are_named():
    model = ABMIL((4,), att_dim=4)
    loader = DataLoader(make_bags(2), batch_size=2, collate_fn=collate_fn)
    with pytest.raises(ValueError, match="'higher', expected 'max' or 'min'"):
        make_trainer(model, obj_metric_mode="higher")
    with pytest.raises(ValueError, match="'f1', expected one of loss, BCEWithLogitsLoss, mean"):
        make_trainer(model, obj_metric="f1").train(1, loader)
    with pytest.raises(ValueError, match="train loader gave no batch"):
        make_trainer(model).train(1, [])


def test_the_loss_curve_and_what_is_printed_are_torchmils(capsys):
    torchmil_utils = pytest.importorskip("torchmil.utils")
    torchmil_models = pytest.importorskip("torchmil.models")
    torch.manual_seed(0)
    own = ABMIL((4,), att_dim=4)
    theirs = torchmil_models.ABMIL((4,), att_dim=4)
    theirs.load_state_dict(own.state_dict())
    logs, printed = [], []
    for model, cls in ((own, Trainer), (theirs, torchmil_utils.Trainer)):
        log, loader = Log(), DataLoader(make_bags(), batch_size=4, collate_fn=collate_fn)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        options = {"device": "cpu", "disable_pbar": True, "early_stop_patience": 3}
        cls(model, optimizer, logger=log, **options).train(30, loader)
        logs.append(log)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "Best accuracy: -inf" in printed[0] and "Early stopping count: 3\nReached" in printed[0]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
