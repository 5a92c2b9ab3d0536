"""The training loop.

A *global step* is ``batch_bags`` bags, cut by the plan into packs that the ranks share; its loss is the sum over its
bags divided by their number, which every rank knows from the plan. So neither the number of ranks nor the packing
changes what is learned.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bigbag.config import Config, ConfigError
from bigbag.data import BagStore, EpochPlan, StepPlan, count_draws
from bigbag.engine.annealing import build_schedulers
from bigbag.engine.backend import Backend
from bigbag.engine.bag_settings import bag_settings
from bigbag.engine.checkpoint import Progress, load_checkpoint, save_checkpoint
from bigbag.engine.evaluate import predict_bags, score
from bigbag.engine.feed import TrainingFeed
from bigbag.engine.live import write_attention, write_curves
from bigbag.engine.log import RunLog, progress
from bigbag.engine.losses import PendingLosses, StepLoss
from bigbag.engine.memory_cost import Recomputation
from bigbag.engine.memory_plan import cheaper
from bigbag.engine.metrics import headline
from bigbag.engine.nonfinite import Skipping
from bigbag.engine.optim import learning_rate
from bigbag.engine.precision import multiplies_bfloat16
from bigbag.engine.preemption import Preempted, asked_to_leave
from bigbag.engine.step import Packs, accumulate
from bigbag.engine.world import World
from bigbag.memory import is_out_of_memory, resident_bytes, return_freed, trim_heap
from bigbag.models import MILModel, save_model

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model on the training bags of a store, validating after every epoch.

    Args:
        config: the run's settings.
        store: the bags.
        splits: split name to bag numbers: "train", and "val" where there is one.
        model: the model, already wrapped by ``backend``.
        backend: what carries the steps.
        world: the ranks.
        most_bytes: on CPU, what the process may hold between steps: after one that leaves more with it, what is free
            goes back to the system. None: any number.
    """

    def __init__(
        self,
        config: Config,
        store: BagStore,
        splits: Mapping[str, Sequence[int]],
        model: MILModel,
        backend: Backend,
        world: World,
        most_bytes: int | None = None,
    ) -> None:
        self.most_bytes = most_bytes if world.device.type == "cpu" else None
        self.config, self.store, self.splits = config, store, splits
        self.model, self.backend, self.world = model, backend, world
        self.feed = TrainingFeed(config, store, splits["train"], world)
        self.checkpoints = config.run_dir / "checkpoints"
        self.steps_per_epoch = self.feed.steps_per_epoch
        self.pending = PendingLosses(world)
        self.skips_nonfinite = config.train.nonfinite == "skip"
        if self.skips_nonfinite and getattr(model.criterion, "spans_step", False):
            raise ConfigError(
                f"train.nonfinite is skip, but {type(model.criterion).__name__} compares all bags of a step with each "
                "other, so that none has a loss of its own: set it to stop, or choose task.type=survival_discrete"
            )

    @property
    def best_folder(self) -> Path:
        return self.checkpoints / "best"

    def fit(self) -> Progress:
        """Train to the end, from the latest checkpoint if there is one."""
        done = load_checkpoint(self.checkpoints, self.backend, self.world) or Progress()
        self.start(done)
        try:
            while not done.finished:
                self.train_epoch(done)
                try:
                    self._finish_epoch(done)
                except Preempted:  # in validation, which a resume from the end of the epoch's steps repeats
                    self._save(done)
                    raise
                self._save(done)
        except Preempted:
            raise
        except Exception as error:
            rank, size = self.world.rank, self.world.size
            logger.error(
                "rank %d of %d failed in epoch %d, step %d: %s", rank, size, done.epoch + 1, done.step + 1, error
            )
            raise
        finally:
            self.log.close()
        return done

    def start(self, done: Progress) -> None:
        """Make ready for the steps from ``done`` on: the annealing of losses, and the log, to be closed afterwards."""
        self.annealing = build_schedulers(self.config.train.loss_coefficients, self._global_step(done))
        self.log = RunLog(self.config, self.world, done.log_position, self._global_step(done))

    def _save(self, done: Progress) -> None:
        self._look_at_losses(done)
        done.log_position = self.log.position
        save_checkpoint(self.checkpoints, self.backend, done, self.world)

    def _global_step(self, done: Progress) -> int:
        return done.epoch * self.steps_per_epoch + done.step

    def train_epoch(self, done: Progress) -> None:
        """The steps that are left of an epoch, without validation; :meth:`start` comes first."""
        plan = self.feed.plan(done.epoch)
        self.backend.train(True)
        self.looked_at = time.perf_counter()
        bar = progress(
            self.steps_per_epoch, done.step, f"epoch {done.epoch + 1}/{self.config.train.epochs}", self.world
        )
        while done.step < self.steps_per_epoch:
            self._train_steps(done, plan, bar)
        self._look_at_losses(done)
        bar.close()

    def _train_steps(self, done: Progress, plan: EpochPlan, bar: Any) -> None:
        """The steps of an epoch that are left; or those up to one for which memory did not suffice, that are to be
        tried again, taking less."""
        every = self.config.train.checkpoint_every_steps
        packs = self.feed.packs(plan, done.epoch, start_step=done.step)
        for step, group in groupby(packs, key=lambda item: item[0]):
            if not self._step(done, group, plan.steps[step]):
                return
            done.step = step + 1
            bar.update()
            if done.num_bags:
                bar.set_postfix(loss=f"{done.loss_sum / done.num_bags:.4f}")
            # Steps of ever other sizes leave holes that none of them fills; returning them costs time.
            if self.most_bytes is not None and (resident_bytes() or 0) > self.most_bytes:
                trim_heap()
            leaving = asked_to_leave(self.world)
            if leaving or (every and done.step % every == 0 and done.step < self.steps_per_epoch):
                self._save(done)
            if leaving:
                raise Preempted

    def _step(self, done: Progress, packs: Packs, plan: StepPlan) -> bool:
        """One optimiser step.

        Returns:
            False where this rank ran out of memory: then nothing has changed but how much it will take.
        """
        coefficients = {name: scheduler() for name, scheduler in self.annealing.items()}
        try:
            sums = accumulate(packs, plan, self.model, self.backend, self.world, coefficients, self._skipping(done))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            remedy: str | None = self._take_less(error)
            message = f"rank {self.world.rank}: {str(error).splitlines()[0]}"
        else:
            remedy = None
        if remedy is not None:  # and the error, with all tensors that its frames held, is gone
            return_freed()
            logger.warning("%s; epoch %d, step %d again with %s", message, done.epoch + 1, done.step + 1, remedy)
            return False
        self.pending.add(done.step, plan, sums, coefficients)
        global_step = self._global_step(done)
        # Before the weights change. A loss that is looked at later stops the run before they are saved.
        logs = global_step % self.config.train.log_every_steps == 0
        started, seen = self.looked_at, self._look_at_losses(done) if logs else []
        lr = learning_rate(self.config.optim, global_step, self.steps_per_epoch, self.config.train.epochs)
        self.backend.step(lr)
        with torch.no_grad():
            self.model.after_step()
        for scheduler in self.annealing.values():
            scheduler.step()
        if logs:
            rate = sum(loss.num_instances for loss in seen) / (self.looked_at - started)
            self._log_step(done, seen[-1], lr, rate)
        return True

    def _log_step(self, done: Progress, seen: StepLoss, lr: float, instances_per_s: float) -> None:
        step = self._global_step(done)
        values: dict[str, Any] = {"epoch": done.epoch, "step": step, "loss": seen.total, "losses": seen.losses}
        values |= {"lr": lr, "instances_per_s": instances_per_s}
        values |= {"coefficients": dict(seen.coefficients)} if seen.coefficients else {}
        self.log.write("train", step, values)

    def _look_at_losses(self, done: Progress) -> list[StepLoss]:
        """The losses of the steps since the last time, added to ``done``. All ranks call it; waits for the device.

        Raises:
            ValueError: one of them is not finite; it names the bags.
        """
        found = self.pending.read()
        for seen in found:
            if not math.isfinite(seen.total):
                self._refuse_loss(seen, done)
            if seen.sums.skipped:
                self._note_skipped(seen, done)
            done.loss_sum += seen.total * seen.num_bags
            done.num_bags += seen.num_bags
        self.looked_at = time.perf_counter()
        return found

    def _take_less(self, error: BaseException) -> str:
        """Recompute more, in smaller chunks, and forget the gradient so far; returns what was changed.

        Raises:
            MemoryError: there is no way that takes less, or this rank alone can't repeat a step.
        """
        model, shape = self.model, self.store.feature_shape
        now = Recomputation(model.activation_checkpointing, model.chunk_instances)
        # Ranks that skip bags ask each other after every pack, so that none can go back by itself.
        by_itself = self.world.size == 1 or not self.skips_nonfinite
        can_repeat = self.backend.discard_gradient() and by_itself
        way = cheaper(now, model, shape, self.world.device) if can_repeat else None
        if way is None:
            narrow = "train.precision=bf16, " if multiplies_bfloat16(self.world.device.type) else ""
            raise MemoryError(
                f"rank {self.world.rank} is out of memory: {error}\nSet a smaller train.chunk_instances (now "
                f"{now.chunk_instances}), train.activation_checkpointing=true (now {now.active}), "
                f"{narrow}or more ranks for each bag (parallel.bag); bigbag plan tells what each takes"
            ) from None
        way.apply(model)
        if way.chunk_instances is None:
            return "activations recomputed"
        return f"activations recomputed in chunks of {way.chunk_instances} instances"

    def _skipping(self, done: Progress) -> Skipping | None:
        return Skipping(self.feed, done.epoch, self.model, self.world) if self.skips_nonfinite else None

    def _note_skipped(self, seen: StepLoss, done: Progress) -> None:
        """Count, log and say which bags a step went without."""
        keys = seen.sums.skipped
        for key in keys:
            done.skipped[key] = done.skipped.get(key, 0) + 1
        step = done.epoch * self.steps_per_epoch + seen.step
        self.log.write("skipped", step, {"epoch": done.epoch, "step": step, "bags": list(keys)})
        if self.world.is_main:
            names = ", ".join(keys)
            logger.warning("epoch %d, step %d without %s: no finite loss", done.epoch + 1, seen.step + 1, names)

    def _refuse_loss(self, seen: StepLoss, done: Progress) -> None:
        """Stop all ranks, naming the packs whose loss is not finite."""
        everywhere = sorted({name for part in self.world.gather(seen.bags_not_finite()) for name in part})
        raise ValueError(
            f"the training loss is not finite in epoch {done.epoch}, step {seen.step}, with the bags {everywhere}: "
            "look for NaN or very large features in them, lower optim.lr, or go without such bags "
            "(train.nonfinite=skip); the last checkpoint is untouched"
        )

    def _finish_epoch(self, done: Progress) -> None:
        """Validate, keep the best model, and decide whether to go on; advances ``done`` to the next epoch."""
        train = self.config.train
        if done.num_bags == 0:
            raise ValueError(f"no training bag had a finite loss in epoch {done.epoch}: look at {sorted(done.skipped)}")
        values: dict[str, Any] = {
            "epoch": done.epoch,
            "step": self._global_step(done),
            "train_loss": done.loss_sum / done.num_bags,
        }
        if self.config.data.sampling is not None:
            values["sampling"] = count_draws(self.feed.bags_of(done.epoch))
        better = True
        if self.splits.get("val"):
            self.backend.train(False)
            predictions = predict_bags(self.backend, self.store, self.splits["val"], self.config, self.world)
            values["val"] = score(predictions, self.store, self.model, self.config)
            better = self._is_better(values["val"], done)
            step = self._global_step(done)
            write_curves(self.log, predictions, self.store, self.config, step)
            write_attention(self.log, self.backend, self.store, self.splits["val"], self.config, self.world, step)
        self.log.write("epoch", self._global_step(done), values)
        done.stale_epochs += 1
        if better:
            state = self.backend.model_state()
            if self.world.is_main:
                made = bag_settings(self.config, self.store).to_json()
                shape, task = self.store.feature_shape, self.config.task
                save_model(self.best_folder, state, self.config.model, shape, task, made)
            done.best_epoch, done.stale_epochs = done.epoch, 0
        if self.world.is_main:
            print(_epoch_line(values, train.epochs, self.config.monitor, better), flush=True)
        out_of_patience = train.patience is not None and done.stale_epochs >= train.patience
        done.finished = done.epoch + 1 >= train.epochs or out_of_patience
        done.epoch, done.step, done.loss_sum, done.num_bags = done.epoch + 1, 0, 0.0, 0

    def _is_better(self, val: dict, done: Progress) -> bool:
        """Whether this validation beats the best so far; ties go to the lower loss."""
        monitor = self.config.monitor
        if val.get(monitor) is None:
            raise ValueError(f"train.monitor {monitor!r} is not among the validation metrics {sorted(val)}")
        sign = 1.0 if self.config.monitor_mode == "max" else -1.0
        value, loss = float(val[monitor]), float(val["loss"])
        first = done.best_value is None or done.best_loss is None
        if not first and (sign * value, -loss) <= (sign * done.best_value, -done.best_loss):  # type: ignore[operator]
            return False
        done.best_value, done.best_loss = value, loss
        return True


def _epoch_line(values: dict, epochs: int, monitor: str, better: bool) -> str:
    of_val = {f"val {name}": value for name, value in headline(values.get("val", {}), monitor).items()}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in {"train loss": values["train_loss"], **of_val}.items())
    return f"epoch {values['epoch'] + 1}/{epochs}  {shown}" + ("  *" if better else "")
