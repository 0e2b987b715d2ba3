"""`TAFSGRPOTrainer`: makes the objects of a run, and the order in which they act. No formula inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from trl_tafs.algorithm import build_algorithm
from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.evaluation.fixed_pictures import FixedPictures
from trl_tafs.evaluation.held_out import Evaluator, held_out_metrics, prompts_to_show
from trl_tafs.hub.closing import ClosingLines
from trl_tafs.hub.publisher import Publisher
from trl_tafs.options import own_copy
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.identity import base_identity
from trl_tafs.policy.base import image_size, normal_mode
from trl_tafs.policy.carried import frozen_settings
from trl_tafs.policy.policy import Policy
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.prompts.source import PromptSource
from trl_tafs.report.write import report_of_run
from trl_tafs.rewards.scoring import RewardSet
from trl_tafs.training.advice import announce_plan
from trl_tafs.training.checkpoint import Checkpoints
from trl_tafs.training.collector import Collector
from trl_tafs.training.doctor import Doctor
from trl_tafs.training.experience import Experience
from trl_tafs.training.hooks import DDPOHooks
from trl_tafs.training.launch import check_launch
from trl_tafs.training.logs import EpochLog, Meter, Stopwatch, warn_main
from trl_tafs.training.matching import Matching
from trl_tafs.training.narrator import Narrator
from trl_tafs.training.notes import run_notes
from trl_tafs.training.plan import plan_epoch
from trl_tafs.training.preflight import Preflight
from trl_tafs.training.progress import Progress
from trl_tafs.training.rollback import Rollback
from trl_tafs.training.run_folder import RunFolder
from trl_tafs.training.samples import SampleViewer
from trl_tafs.training.sampling import RolloutSampler
from trl_tafs.training.settings import lasting, resolved_settings
from trl_tafs.training.simulation import Simulation
from trl_tafs.training.stopping import Stopper
from trl_tafs.training.trackers import make_accelerator, show_pictures, start_trackers
from trl_tafs.training.updater import Updater


class TAFSGRPOTrainer(DDPOHooks, ClosingLines):
    """TAFS-GRPO on a flow-matching pipeline, by the conventions of TRL's DDPOTrainer.

    Args:
        config: see [`TAFSGRPOConfig`].
        reward_function: `(images, prompts, prompt_metadata) -> (rewards, reward_metadata)` or rewards alone, images
            (B, 3, H, W) float32 in [0, 1]; or a list of such callables, or a dict of name to callable or (callable,
            weight). None or NaN means "no score".
        prompt_function: `() -> (prompt, metadata)`, called once a group; or a dataset with a `prompt` column.
        sd_pipeline: a TAFS pipeline, such as `TAFSStableDiffusion3Pipeline.from_pretrained(...)`.
        image_samples_hook: `([[images, prompts, prompt_metadata, rewards, reward_metadata], ...], global_step,
            tracker)`, called each epoch on the main process; what it raises becomes a warning.
        peft_config: a `LoraConfig` instead of the default one.
        eval_prompts: held-out prompts, for `eval_freq`.
        eval_reward_function: held-out rewards, as `reward_function`; by default the training ones.
    """

    def __init__(
        self,
        config: TAFSGRPOConfig,
        reward_function: Any,
        prompt_function: Any,
        sd_pipeline: TAFSPipelineMixin,
        image_samples_hook: Callable[..., Any] | None = None,
        *,
        peft_config: Any | None = None,
        eval_prompts: Any | None = None,
        eval_reward_function: Any | None = None,
    ) -> None:
        config = own_copy(config)  # the caller's may be another trainer's, too
        self.config, self.sd_pipeline, self.image_samples_callback = config, sd_pipeline, image_samples_hook
        check_launch(config, image_samples_hook)
        self.height, self.width = image_size(sd_pipeline, config, peft_config)
        self.prompts = PromptSource(prompt_function, config.seed)
        self.reward_functions = RewardSet.of(config, reward_function, config.reward_weights)
        self.rewards = self.training_rewards()
        self.evaluator = Evaluator.of(config, eval_prompts, self.reward_functions, eval_reward_function)
        self.accelerator, self.local_tracker = make_accelerator(config)
        self.run_folder, self.stopper = RunFolder(config.project_dir, self.accelerator), Stopper(self.accelerator)
        self.plan = plan_epoch(config, self.accelerator.num_processes)
        held_out = None if self.evaluator is None else (self.evaluator.prompts, self.evaluator.rewards)
        drawn, size = (self.prompts, self.rewards), (self.height, self.width)
        for note in run_notes(config, self.plan, sd_pipeline, size, drawn, held_out):
            warn_main(self.accelerator, note)
        set_seed(config.seed, device_specific=True)
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        judges = self.reward_functions.functions + (() if held_out is None else held_out[1].functions)
        simulation = Simulation(sd_pipeline, self.height, self.width, peft_config)
        self.memory_plan = announce_plan(simulation, config, self.plan, self.accelerator, judges)
        updates = config.num_epochs * config.train_num_inner_epochs * self.plan.updates_per_inner_epoch
        self.policy = Policy(sd_pipeline, config, self.accelerator, updates, peft_config)
        levels = sd_pipeline.rollout_levels(config.sample_num_steps, self.height, self.width, config.sample_levels)
        latent_shape = sd_pipeline.latent_shape(self.height, self.width)
        self.algorithm = build_algorithm(
            config, self.plan.group_bounds, levels.to(self.accelerator.device), latent_shape
        )
        self.encode = PromptEncoder.of(sd_pipeline, config, self.policy.devices)
        self.settings = resolved_settings(config, self.plan, self.algorithm, self.height, self.width)
        self.settings |= frozen_settings(self.policy.frozen)
        self.progress, self.stopwatch = Progress(), Stopwatch()
        self._make_stages()
        start_trackers(self.accelerator, config, self.settings)
        self.checkpoints.begin()

    def _make_stages(self) -> None:
        """Make what acts in an epoch: collection, update, logs, pictures, checkpoints, publication."""
        config, accelerator, policy, algorithm = self.config, self.accelerator, self.policy, self.algorithm
        hook = self.image_samples_callback
        states, log, stop, watch = algorithm.states(), self.local_tracker, self.stopper, self.stopwatch
        saved = (config, accelerator, policy, self.progress, states, self.settings, log, watch, stop)
        self.checkpoints = Checkpoints(*saved)
        self.rollback = Rollback(self.checkpoints)
        keep_images = hook is not None and accelerator.is_main_process
        drawn = (config, policy, algorithm, self.encode, self.rewards, keep_images, watch)
        sampler = RolloutSampler(*drawn, stop=lambda: stop.requested)
        self.collector = Collector(config, accelerator, sampler, self.prompts, self.plan, lasting(self.settings))
        trained = (config, self.plan, policy, algorithm.objective, self.encode)
        after = (watch, self.progress, self.rollback.may_stop)
        matching = Matching.of(config, policy, algorithm.distribution, self.encode)
        # a lambda, so that a compute_loss that is overridden later is found
        self.updater = Updater(*trained, lambda *b: self.compute_loss(*b), *after, matching)
        self.logs = EpochLog(accelerator, algorithm, self.progress, self.memory_plan)
        self.meter = Meter(policy, self.plan.local_images * config.num_replayed_rows * config.train_num_inner_epochs)
        self.viewer = SampleViewer(config, accelerator, self.local_tracker, sampler.decode, algorithm.levels, hook)
        self.drawer = Drawer.of(config, policy, self.encode)
        spec = self.draw_spec("annealed" if config.anneals else "ode", config.sample_num_steps)
        levels, papers = algorithm.levels[:-1].tolist(), algorithm.papers()
        prompts = partial(prompts_to_show, self.prompts, self.evaluator)
        self.publisher = Publisher(
            policy, config, self.settings, levels, self.rewards, self.progress, prompts, self.drawer, spec, papers
        )
        tried = (config, accelerator, policy, self.encode, self.prompts, self.rewards, self.plan, sampler)
        push = partial(self.publisher.prepare_repo, None, config.hub_private_repo)
        self.pictures = FixedPictures.of(config, policy, self.drawer, spec, prompts, show_pictures, watch)
        said = (base_identity(self.sd_pipeline).source, held_out_metrics(config, self.evaluator), self.logs.latest)
        self.narrator = Narrator(config, accelerator, self.plan, self.progress, *said)
        self.preflight = Preflight(*tried, (self.height, self.width), self.logs, self.evaluator, push)
        self.doctor = Doctor(self.preflight, self.collector, self.updater, self.progress)

    # Algorithm 1 ----------------------------------------------------------------------------------------------

    @normal_mode()
    def train(self, epochs: int | None = None) -> None:
        """Train until `epochs` (by default `config.num_epochs`) epochs are done, counted from the run's beginning.

        SIGINT and SIGTERM stop it within a batch, where nothing is lost (docs/reliability.md).
        """
        with self.run_folder.held(), self.stopper.listening():
            self._train(self.config.num_epochs if epochs is None else epochs)

    def _train(self, last: int) -> None:
        config, progress = self.config, self.progress
        self.narrator.opening(progress.epoch, last)
        self.preflight(progress.epoch)
        self.pictures(progress.epoch, last, progress.global_step)
        if config.eval_freq and progress.epoch % config.eval_freq == 0 and not progress.evaluated(progress.epoch):
            self.evaluate(progress.epoch)
        enough = progress.out_of_patience(config.early_stopping_patience)
        remaining = range(progress.epoch, progress.epoch if enough else last)
        for epoch in self.narrator.epochs(remaining):
            progress.global_step = self.step(epoch, progress.global_step)
            progress.epoch = epoch + 1
            enough = config.evaluates_at(epoch + 1, last) and self.evaluate(epoch + 1)
            self.pictures(epoch + 1, epoch + 1 if enough else last, progress.global_step)
            if self.checkpoints.due(epoch + 1):
                self.save_checkpoint()
            if enough:
                break
        self._finish()

    def step(self, epoch: int, global_step: int) -> int:
        """One iteration of Algorithm 1: prompts, rollouts, rewards, advantages, updates.

        Returns:
            The number of optimizer steps done so far.
        """
        self.meter.begin()
        with self.checkpoints.saved_on_failure():
            experience = self.collector.collect(epoch, global_step)
        self.meter.sampled()
        with self.rollback.on_stop(partial(self.collector.keep, epoch)):
            return self._learn(experience, epoch, global_step)

    def _learn(self, experience: Experience, epoch: int, global_step: int) -> int:
        prompts = experience.prompts
        credit = self.algorithm.credit(experience.rewards, prompts, epoch)
        steps = self.algorithm.scored_steps_at(epoch)
        reward = self.logs.experience(experience, credit, steps, epoch, global_step)
        self.progress.reward_curve.append((epoch, reward))
        self.viewer.show(experience, credit.combined, epoch, global_step)
        self.algorithm.groups.update(prompts.prompts, credit.combined.mean(2), epoch)
        for metrics in self.updater.update(experience, credit.advantages, epoch):
            rate = self.policy.lr_scheduler.get_last_lr()[0]
            self.logs.update(metrics.values, metrics.inner_epoch, rate, epoch, global_step)
            global_step += 1
        self.policy.after_epoch()
        self.logs.timing(self.stopwatch, len(prompts), self.meter.work(), epoch, global_step)
        self.collector.forget()
        return global_step

    # Looking on -----------------------------------------------------------------------------------------------

    def evaluate(self, epoch: int) -> bool:
        """Evaluate on the held-out prompts, log, keep the best; return whether it is time to stop."""
        if self.evaluator is None:
            raise ValueError("there are no eval_prompts to evaluate on; pass them to the trainer")
        config, progress = self.config, self.progress
        saved = self.checkpoints.saved_on_failure(repeated=True)
        with saved, self.stopwatch("evaluate"), self.policy.averaged(), torch.no_grad():
            specs = [self.draw_spec(name, steps) for name in config.eval_samplers for steps in config.eval_num_steps]
            drawer = replace(self.drawer, before_batch=self.stopper.check_alone)
            results = self.evaluator(drawer, specs, self.accelerator, ranges=not progress.evaluations)
        self.accelerator.log(results | {"epoch": epoch}, step=progress.global_step)
        metric = config.metric_for_best_model
        if progress.add_evaluation(epoch, results, metric, config.greater_is_better):
            self.checkpoints.save_best(epoch, metric, results[metric])
        self.narrator.evaluated(epoch, self.stopwatch.seconds["evaluate"])
        return progress.out_of_patience(config.early_stopping_patience)

    def draw_spec(self, sampler: str, num_steps: int) -> DrawSpec:
        """Return a way of drawing at the size and guidance of training."""
        guidance, embedded = self.config.sample_guidance_scale, self.config.sample_embedded_guidance_scale
        return DrawSpec(sampler, num_steps, self.height, self.width, guidance, embedded, self.config.sample_levels)

    # Saving ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint of everything that moves, at the end of an epoch; None where the disk failed."""
        return self.checkpoints.save()

    def _finish(self) -> None:
        """The last checkpoint, the adapter, the report, the push."""
        self.checkpoints.save_last()
        adapter, repository = self.save_pretrained(), self.publisher.default_repo
        report = report_of_run(self.config.project_dir) if self.accelerator.is_main_process else None
        self.narrator.closing(adapter, repository, report, self.publisher.card_prompts())
        if self.config.push_to_hub:
            self.push_to_hub()
        self.accelerator.wait_for_everyone()
