"""A pre-training run from a configuration to a trained encoder."""

from __future__ import annotations

import logging
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sacl_fast import _version
from sacl_fast.config import Config, to_dict
from sacl_fast.data.images.given import Given, given_alone
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.open import open_view_loader
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.encoders.file import encode_encoder
from sacl_fast.engine import run_folder as files
from sacl_fast.engine.agreement import check_same_settings, passes_of_all
from sacl_fast.engine.best import Best
from sacl_fast.engine.checkpoint import checkpoint_path, mark_best, random_state, save_checkpoint
from sacl_fast.engine.clock import Clock
from sacl_fast.engine.console import RunConsole
from sacl_fast.engine.convolutions import tried_algorithms
from sacl_fast.engine.description import describe
from sacl_fast.engine.determinism import deterministic
from sacl_fast.engine.distributed import Ranks, process_group
from sacl_fast.engine.encoder_files import EncoderFiles
from sacl_fast.engine.environment import environment
from sacl_fast.engine.evaluator import Evaluator
from sacl_fast.engine.memory import keep_freed_memory
from sacl_fast.engine.method import build_method, build_networks
from sacl_fast.engine.metrics import MetricWriter
from sacl_fast.engine.monitor import Monitor
from sacl_fast.engine.pictures import Pictures
from sacl_fast.engine.plan import take_plan
from sacl_fast.engine.preflight import check_run, remarks
from sacl_fast.engine.profiling import Profile
from sacl_fast.engine.result import RunResult
from sacl_fast.engine.resume import (
    Continuation,
    data_record,
    find_continuation,
    restore,
    resume_candidates,
    set_aside,
)
from sacl_fast.engine.signals import StopRequest
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import Stopped, UserError

logger = logging.getLogger(__name__)

_LOST = 255  # in place of a signal's number: the run folder vanished
_AGREEING = 20.0  # seconds for several processes to come to a step that all can stop at


def train(
    config: Config, *, source: Any = None, val: Any = None, profile: bool = False
) -> RunResult:
    """Pre-train an encoder as configured; under ``torchrun``, with the other ranks.

    Args:
        source: images in place of those that ``config.data`` names: any indexable of images, or of
            tuples or mappings of an image and its label; see ``sacl_fast.data.images.given``.
        val: images to validate with, likewise.
        profile: write a trace of some steps into the run folder, and log what it says.

    Raises:
        UserError: what is asked for cannot be done; the sentence says what can.
        OtherRankFailed: another process of the run failed or was killed.
        Stopped: by a signal, but not at a step that all processes could stop at.
    """
    check_run(config)
    given = Given(source, val)
    config = replace(config, data=given_alone(config.data, given))
    with deterministic(config.deterministic), process_group(config.device) as ranks:
        check_same_settings(config, ranks)
        with tried_algorithms(ranks.device), files.claimed_run_folder(config, ranks) as claim:
            run = Run(config, ranks, claim, profile, given)
            try:
                return run.train()
            finally:
                run.close()


class Run:
    """The state of a run, and the loop over it."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        claim: files.RunFolder,
        profile: bool = False,
        given: Given | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.claim = claim
        self.folder: Path = claim.path
        self.stop = StopRequest(patience=0.0 if ranks.world_size == 1 else _AGREEING)
        ranks.stop = self.stop
        if ranks.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        starts = ranks.on_first(lambda: not resume_candidates(config, self.folder))
        # First: what cannot be built needs no data.
        networks = ranks.together(lambda: build_networks(config, pretrained=starts))
        self.splits = open_sources(config.data, config.seed, given=given or Given())
        if ranks.first:
            for remark in remarks(config, len(self.splits.train)):
                logger.warning(remark)
        self.loader = open_view_loader(
            self.splits.train,
            config,
            device=ranks.device,
            rank=ranks.rank,
            world_size=ranks.world_size,
            check=self.stop.check_wait,  # the others go on to the step that all stop at
        )
        steps_per_epoch = self.loader.steps_per_epoch
        passes = passes_of_all(
            config, ranks, steps_per_epoch=steps_per_epoch, encoder=networks.encoder
        )
        self.method = build_method(config, passes, networks)
        self.method.slicer.enabled = config.slim.warmup_epochs == 0
        self.step = TrainingStep(self.method, config, ranks, steps_per_epoch=steps_per_epoch)
        # Drop path differs between ranks. A seed may have 53 bits, torch's has 64.
        torch.manual_seed((config.seed * 65_537 + ranks.rank) % 2**64)
        self.evaluator = Evaluator(self.splits, config, ranks, self.step.amp_dtype)
        self.steps_done = 0
        self.knn: dict[str, float] = {}
        self.knn_before: dict[str, float] = {}
        self.label_free: dict[str, float] = {}
        self.label_free_before: dict[str, float] = {}
        self.best = Best()
        self.knn_due = False  # the epoch is trained, its evaluation was not finished
        self.final_states: dict[str, dict[str, torch.Tensor]] = {}
        self.pictures = Pictures(config, self.folder, self.splits.train, drawn=ranks.first)
        self.encoders = EncoderFiles(config, claim, images=len(self.splits.train))
        self.lost = False
        """Whether the run folder vanished; known to the first rank."""
        self.data = ranks.on_first(lambda: data_record(self.splits.train))
        self.resumed = self._resume()
        self.profile = ranks.together(
            lambda: Profile(config, self.folder, ranks, profile, self.steps_done, steps_per_epoch)
        )
        take_plan(config, self.step, self.resumed and self.resumed.state.get("plan", "eager"))
        self.writer: MetricWriter | None = None
        ranks.on_first(self._open_records)
        self.console = RunConsole(
            config.epochs, steps_per_epoch, config.batch_size, self.steps_done,
            quiet=not ranks.first,
        )  # fmt: skip
        self.monitor = Monitor(
            config, self.folder, self.step, self.console, self.writer, ranks.world_size
        )
        if self.resumed is not None and self.resumed.moved and not self.resumed.finished:
            self._save()  # from here on the step counts epochs of these images
            ranks.on_first(lambda: set_aside(self.folder, after=self.steps_done))

    # The loop

    def train(self) -> RunResult:
        per_epoch = self.loader.steps_per_epoch
        with self.console, self.stop.by_signals(self.console.message):
            try:
                self._start()
                for epoch in range(self.steps_done // per_epoch, self.config.epochs):
                    self._train_epoch(epoch)
                    self._end_epoch(epoch)
                self._finish()
            except Stopped as stopped:
                self._end_stopped(stopped)
                if self.ranks.world_size > 1 and not stopped.everywhere:
                    raise
                return self._result(finished=False, stopped_by=stopped.number)
            except NoBatch as error:
                if self.ranks.world_size > 1 or not self.steps_done:
                    raise
                self._save()
                folder = shlex.quote(str(self.folder))
                raise NoBatch(
                    f"{error}. --resume auto --out {folder} goes on after step {self.steps_done}"
                ) from error
            return self._result(finished=True)

    def _train_epoch(self, epoch: int) -> None:
        """The rest of an epoch."""
        config, per_epoch, slicer = self.config, self.loader.steps_per_epoch, self.method.slicer
        slicer.enabled = epoch >= config.slim.warmup_epochs
        slicer.statistics = None  # of the weights before this epoch
        clock = Clock(config.batch_size, self.ranks.device)
        batches = clock.waiting(self.loader.epoch(epoch, self.steps_done % per_epoch))
        for batch in self.profile.over(batches):
            loss, parts, z1 = self.step(batch.view_a, batch.view_b, self.steps_done)
            self.steps_done += 1
            if config.slim.refresh_steps and self.steps_done % config.slim.refresh_steps == 0:
                slicer.refresh()
            reading = self.steps_done % config.log.every == 0 or self.steps_done % per_epoch == 0
            if reading:
                self.monitor.read(self.steps_done, loss, parts, z1, clock)
            every = config.checkpoint.every_steps
            if every and self.steps_done % every == 0 and self.steps_done % per_epoch:
                self._save()
            # Several ranks must stop at the same step; they agree when they wait anyway.
            if (self.ranks.world_size == 1 or reading) and self.steps_done % per_epoch:
                self._stop_if_asked(look=reading)

    def _stop_if_asked(self, *, look: bool = True) -> None:
        """Raise ``Stopped``, on all ranks at the same step, if one of them got a signal or, where
        it is to ``look``, sees that the run folder vanished."""
        self.lost |= look and self.claim.is_gone()
        if number := self.ranks.largest(_LOST if self.lost else self.stop.number):
            raise Stopped(number, everywhere=True)

    def _start(self) -> None:
        self.console.message(f"run folder {self.folder}")
        for line in describe(self.config, self.ranks, self.step, self.loader.steps_per_epoch):
            self.console.message(line)
        if self.steps_done == 0:
            self.pictures.draw_views()
            self._evaluate(0)
            self.knn_before, self.label_free_before = self.knn, self.label_free
        elif self.knn_due:
            self._close_epoch(self.steps_done // self.loader.steps_per_epoch)

    def _end_epoch(self, epoch: int) -> None:
        if not self.config.slim.refresh_steps:
            self.method.slicer.refresh()
        self.knn_due = True
        self._stop_if_asked()
        self._close_epoch(epoch + 1)

    def _close_epoch(self, done: int) -> None:
        config = self.config
        last = done == config.epochs
        best = False
        if last or (config.eval.every and done % config.eval.every == 0):
            best = self._evaluate(done)
        if last:
            # Before the last checkpoint, which is to have the slim encoder's statistics.
            self.ranks.on_first(
                lambda: self.final_states.update(self.evaluator.final_states(self.method))
            )
        self.knn_due = False
        every = config.checkpoint.every_steps
        due = done % config.checkpoint.every_epochs == 0 or (every and self.steps_done % every == 0)
        if last or best or due:
            self._save(best=best)
        self.pictures.draw_curves()

    def _end_stopped(self, stopped: Stopped) -> None:
        """Save, where all ranks stopped at the same step, and say how to go on."""
        where, goes_on = f"after step {self.steps_done}", "goes on from there"
        if self.steps_done == 0:
            where, goes_on = "before the first step", "begins anew"
        elif self.ranks.world_size > 1 and not stopped.everywhere:
            where += " while the other processes were elsewhere"
            goes_on = "goes on from the last checkpoint"
        else:
            self._save()
            self.pictures.draw_curves()
        if stopped.number == _LOST:
            self.lost = True
            self._say_if_lost()
        self.console.close()  # so that this is the last line
        name, folder = signal.Signals(stopped.number).name, shlex.quote(str(self.folder))
        self.console.message(f"stopped by {name} {where}; --resume auto --out {folder} {goes_on}")

    def _finish(self) -> None:
        if self.resumed is not None and self.resumed.finished:
            self.console.message(f"all epochs ({self.config.epochs}) were done before")
        self.ranks.on_first(self._save_encoders)
        self._say_if_lost()

    def _save_encoders(self) -> None:
        """Those of the best evaluation first: the last one says that the run is finished."""
        method, evaluator = self.method, self.evaluator
        self.encoders.save_best(self.steps_done, method, evaluator)
        self.encoders.save_last(
            self._progress(), method, lambda: self.final_states or evaluator.final_states(method)
        )

    def _say_if_lost(self) -> None:
        if self.lost:
            raise UserError(
                f"run folder {self.folder} was removed or renamed while the run wrote there: its "
                f"metrics and earlier checkpoints are no longer in it. The state after step "
                f"{self.steps_done} is in {self.folder / files.CHECKPOINTS}"
            )

    # What is measured

    def _evaluate(self, epochs_done: int) -> bool:
        """Measure the encoders; whether they are the best so far, the same on every rank."""
        if not self.evaluator.possible:
            return False
        with self.console.doing("evaluating"):
            figures = self.evaluator.evaluate(self.method)
        self.knn = {name: value for name, value in figures.items() if name.startswith("knn")}
        self.label_free = {k: v for k, v in figures.items() if k not in self.knn}
        self.monitor.report_evaluation(self.steps_done, epochs_done, self.knn, self.label_free)
        return self.best.is_met(figures, epochs_done, self.config.warmup_epochs)

    # What is kept

    def _save(self, *, best: bool = False) -> None:
        """Write a checkpoint; all ranks take part, the first one writes."""
        self.monitor.check_finite(self.steps_done)
        random_states = self.ranks.gather(random_state(self.ranks.device))
        path = checkpoint_path(self.folder / files.CHECKPOINTS, self.steps_done)

        def write() -> None:
            self.claim.check()
            save_checkpoint(path, self._state(random_states), keep=self.config.checkpoint.keep)
            if best:
                mark_best(path)

        self.ranks.on_first(write)

    def _state(self, random_states: list[Any]) -> dict[str, Any]:
        return {
            **self._progress(),
            "version": _version.__version__,
            "config": to_dict(self.config),
            "data": self.data,
            "model": self.method.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "random": random_states,
            "plan": self.method.passes.plan,
        }

    def _progress(self) -> dict[str, Any]:
        """How far the run is, and what was measured."""
        return {
            "step": self.steps_done,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "knn": self.knn,
            "knn_due": self.knn_due,
            "knn_before": self.knn_before,
            "label_free": self.label_free,
            "label_free_before": self.label_free_before,
            **self.best.state(),
        }

    def _resume(self) -> Continuation | None:
        """Take up the state of the newest readable checkpoint, where one is asked for."""
        found = find_continuation(
            self.ranks,
            self.config,
            self.folder,
            data=self.data,
            steps_per_epoch=self.loader.steps_per_epoch,
            model=self.method.state_dict(),
        )
        if found is not None:
            self.ranks.together(lambda: restore(found, self.method, self.step, self.ranks))
            self.steps_done = found.step
            self.knn, self.knn_before = found.state["knn"], found.state["knn_before"]
            self.label_free = found.state.get("label_free", {})
            self.label_free_before = found.state.get("label_free_before", {})
            self.best.load(found.state)
            self.knn_due = found.state.get("knn_due", False)
            logger.info("resumed from %s after step %d", found.path, self.steps_done)
        return found

    def _open_records(self) -> None:
        """Try what the run will write, clear the folder of what it supersedes, and open it."""
        encode_encoder(self.method.encoder.state_dict(), self.encoders.metadata(self._progress()))
        found, config = self.resumed, self.config
        if found is None or not found.is_in(self.folder):
            set_aside(self.folder, after=-1)
        elif not found.finished:
            set_aside(self.folder, after=self.steps_done, spare=found.path)
        files.prepare_run_folder(
            self.folder,
            config,
            environment(),
            checkpoint_size=files.size_of_checkpoint(self.method, config.optim.name),
        )
        self.writer = MetricWriter(
            self.folder, config.log, to_dict(config), self.steps_done if found else None
        )

    def _result(self, *, finished: bool, stopped_by: int = 0) -> RunResult:
        return RunResult(
            self.folder, self.steps_done, finished, self.knn, self.knn_before, stopped_by,
            self.label_free, self.label_free_before,
        )  # fmt: skip

    def close(self) -> None:
        for part in (self.loader, self.monitor, self.profile, self.pictures):
            part.close()
