"""`TAFSGRPOTrainer`: owns the objects of a run and the order in which they act. No formula inside."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from torch import Tensor
from tqdm.auto import tqdm

from trl_tafs.algorithm import build_algorithm
from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.evaluation.held_out import Evaluator
from trl_tafs.hub.push import prepare_repo, push_folder
from trl_tafs.method.advantages import combine_rewards, group_mean_std
from trl_tafs.method.losses import clipped_surrogate
from trl_tafs.method.rollout import Velocity
from trl_tafs.method.types import Conditioning, LossOutput, PromptBatch, RewardTable
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.policy.adapter_file import check_adapter_fits, read_adapter, save_adapter
from trl_tafs.policy.base import prepare_base
from trl_tafs.policy.copies import AdapterAverage, HeldWeights, OldPolicy
from trl_tafs.policy.denoiser_file import load_denoiser, save_denoiser
from trl_tafs.policy.lora import adapter_disabled, attach_lora, free_denoiser, trainable_parameters
from trl_tafs.policy.optimizer import apply_settings, make_lr_scheduler, make_optimizer
from trl_tafs.processes import any_process
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.prompts.source import PromptSource, expand_groups
from trl_tafs.rewards.scoring import RewardError, RewardSet
from trl_tafs.training.checkpoint import (
    checkpoints,
    drop_pending,
    find_checkpoint,
    load_pending,
    read_state,
    save_pending,
    set_aside,
    set_aside_after,
    write_checkpoint,
    write_state,
)
from trl_tafs.training.collector import Collector, Part, Wave
from trl_tafs.training.logs import MeanMetrics
from trl_tafs.training.plan import plan_epoch
from trl_tafs.training.report import RunReport
from trl_tafs.training.trackers import LocalTracker
from trl_tafs.training.updater import Updater


def make_accelerator(config: TAFSGRPOConfig, accumulation: Callable[[int], int]) -> tuple[Accelerator, LocalTracker]:
    """The `Accelerator` of a run, with the local log beside the trackers asked for."""
    ours = ("automatic_checkpoint_naming", "total_limit")  # checkpoints are named and limited here
    project = {k: v for k, v in config.project_kwargs.items() if k not in ours}
    project = {"logging_dir": config.project_dir, **project, "project_dir": config.project_dir}
    local = LocalTracker(config.project_dir)
    accelerator = Accelerator(
        log_with=[local] if config.log_with is None else [local, config.log_with],
        mixed_precision=config.mixed_precision,
        project_config=ProjectConfiguration(**project),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        **config.accelerator_kwargs,
    )
    accelerator.gradient_accumulation_steps = accumulation(accelerator.num_processes)
    return accelerator, local


class TAFSGRPOTrainer:
    """TAFS-GRPO on a flow-matching pipeline, by the conventions of TRL's DDPOTrainer.

    Args:
        config: see [`TAFSGRPOConfig`].
        reward_function: `(images, prompts, prompt_metadata) -> (rewards, reward_metadata)` or rewards alone, images
            (B, 3, H, W) float32 in [0, 1]; or a list of such callables, or a dict of name to callable or (callable,
            weight). None or NaN means "no verdict".
        prompt_function: `() -> (prompt, metadata)`, called once a group; or a dataset with a `prompt` column.
        sd_pipeline: a TAFS pipeline, such as `TAFSStableDiffusion3Pipeline.from_pretrained(...)`.
        image_samples_hook: `([[images, prompts, prompt_metadata, rewards, reward_metadata], ...], global_step,
            tracker)`, called each epoch on the main process; what it raises becomes a warning.
        peft_config: a `LoraConfig` instead of the default one.
        eval_prompts: held-out prompts, for `eval_freq`.
        eval_reward_function: held-out rewards, as `reward_function`; by default the training ones.
    """

    _tag_names = ("trl", "tafs-grpo")

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
        if not isinstance(sd_pipeline, TAFSPipelineMixin):
            raise TypeError(
                f"sd_pipeline is a {type(sd_pipeline).__name__}, without rollout hooks; load it as a TAFS pipeline, "
                "such as TAFSStableDiffusion3Pipeline.from_pretrained(...)"
            )
        self.config, self.sd_pipeline, self.image_samples_callback = config, sd_pipeline, image_samples_hook
        default_height, default_width = sd_pipeline.default_size()
        self.height, self.width = config.height or default_height, config.width or default_width
        sd_pipeline.check_size(self.height, self.width)
        sd_pipeline.check_guidance(config.sample_guidance_scale)
        sd_pipeline.check_sequence_length(config.max_sequence_length)
        sd_pipeline.embedded_guidance(config.sample_embedded_guidance_scale)
        self.prompts = PromptSource(prompt_function, config.seed)
        self.rewards = self._reward_set(reward_function, config.reward_weights)
        self.evaluator = self._make_evaluator(eval_prompts, eval_reward_function)

        self.accelerator, self.local_tracker = make_accelerator(
            config, lambda world: plan_epoch(config, world).micro_batches_per_update
        )
        self.plan = plan_epoch(config, self.accelerator.num_processes)
        set_seed(config.seed, device_specific=True)
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self._make_policy(peft_config)
        algorithm = build_algorithm(config, self.plan, sd_pipeline, self.height, self.width, self.accelerator.device)
        self.algorithm, self.kernel, self.objective = algorithm, algorithm.kernel, algorithm.objective
        for tracker in (algorithm.stat_tracker, algorithm.prompt_tracker):
            if tracker is not None:
                self.accelerator.register_for_checkpointing(tracker)
        self.report = RunReport(self)
        self.first_epoch, self.global_step = 0, 0
        self.best_metric: float | None = None
        self.evaluations_without_gain = 0
        self.collector, self.updater = self._make_collector(), self._make_updater()
        trackers = {**config.tracker_kwargs}
        for tracker in ("wandb", "trackio"):
            if config.log_with in (tracker, "all"):
                trackers.setdefault(tracker, {}).setdefault("name", config.run_name)
        self.accelerator.init_trackers(config.tracker_project_name, config=self.report.settings(), init_kwargs=trackers)
        if config.resume_from:
            self._resume()
        else:
            self._set_aside()

    # Making the parts -----------------------------------------------------------------------------------------

    def _reward_set(self, rewards: Any, weights: Sequence[float] | None = None) -> RewardSet:
        retries, delay = self.config.reward_max_retries, self.config.reward_retry_delay
        failure = self.config.reward_on_failure
        return RewardSet(rewards, weights, max_retries=retries, retry_delay=delay, on_failure=failure)

    def _make_evaluator(self, prompts: Any, rewards: Any) -> Evaluator | None:
        if prompts is None:
            if self.config.eval_freq:
                raise ValueError(f"eval_freq is {self.config.eval_freq}, and there are no eval_prompts to evaluate on")
            return None
        judges = self.rewards if rewards is None else self._reward_set(rewards)
        return Evaluator(prompts, judges, self.config.eval_images_per_prompt)

    def _make_policy(self, peft_config: Any | None) -> None:
        """LoRA, optimizer, learning-rate schedule and average, on the device."""
        config, pipeline = self.config, self.sd_pipeline
        prepare_base(pipeline, config, self.accelerator.device)
        self.adapter_name, self.lora_config = None, None
        if config.full_finetuning:
            free_denoiser(pipeline, peft_config)
        else:
            self.adapter_name, self.lora_config = attach_lora(pipeline, config, peft_config)
        self.storage_dtype = pipeline.storage_dtype
        parameters = trainable_parameters(pipeline.denoiser)
        optimizer = make_optimizer(parameters, config)
        self.accelerator.unwrap_model(pipeline.denoiser, keep_fp32_wrapper=False)  # an earlier trainer's autocast
        updates = config.num_epochs * config.train_num_inner_epochs * self.plan.updates_per_inner_epoch
        self.lr_scheduler = make_lr_scheduler(optimizer, config, updates)
        self.model, self.optimizer = self.accelerator.prepare(pipeline.denoiser, optimizer)
        self.parameters = parameters
        self.base = HeldWeights(parameters) if config.full_finetuning else None
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        self.average = AdapterAverage(parameters, config.train_ema_decay) if config.train_use_ema else None
        if self.average is not None:
            self.accelerator.register_for_checkpointing(self.average)
        self.old_policy = None
        if config.old_policy_decay:
            self.old_policy = OldPolicy(parameters, config.old_policy_decay, config.old_policy_ramp)
            self.accelerator.register_for_checkpointing(self.old_policy)
        self.accelerator.register_save_state_pre_hook(self._save_adapter_hook)
        self.accelerator.register_load_state_pre_hook(self._load_adapter_hook)
        self.encode = PromptEncoder(
            pipeline,
            self.accelerator.device,
            guidance_scale=config.sample_guidance_scale,
            embedded_guidance_scale=config.sample_embedded_guidance_scale,
            negative_prompt=config.negative_prompts,
            max_sequence_length=config.max_sequence_length,
            offload=config.offload_text_encoders and not config.model_cpu_offload,
            cache_dir=config.prompt_cache_dir,
        )

    def _make_collector(self) -> Collector:
        config, algorithm = self.config, self.algorithm
        return Collector(
            pipeline=self.sd_pipeline,
            kernel_at=algorithm.kernel_at,
            encode=self.encode,
            rewards=self.rewards,
            velocity=self.velocity,
            levels=algorithm.levels,
            latent_shape=algorithm.latent_shape,
            scored_steps_at=algorithm.scored_steps_at,
            reduction=config.train_log_prob_reduction,
            storage_dtype=self.storage_dtype,
            decode_batch_size=config.decode_size,
            share_initial_noise=config.share_initial_noise,
            keep_images=self.image_samples_callback is not None and self.accelerator.is_main_process,
            reward_threads=config.max_workers if config.async_reward_computation else 0,
            take_turns=config.model_cpu_offload,
            stopwatch=self.report.stopwatch,
        )

    def _make_updater(self) -> Updater:
        return Updater(
            config=self.config,
            plan=self.plan,
            accelerator=self.accelerator,
            model=self.model,
            parameters=self.parameters,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            average=self.average,
            old_policy=self.old_policy,
            objective=self.objective,
            encode=self.encode,
            velocity=self.velocity,
            loss=lambda rows, conditioning: self.compute_loss(rows, conditioning),
        )

    # The policy -----------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """The present policy, through the prepared (DDP) model, in rollout and replay alike."""
        return self.sd_pipeline.velocity(x, level, conditioning, self.model)

    def reference_velocity(self, x: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """The base without what was trained."""
        with self.base.applied() if self.base else adapter_disabled(self.sd_pipeline.denoiser):
            return self.sd_pipeline.velocity(x, level, conditioning)

    # Algorithm 1 ----------------------------------------------------------------------------------------------

    def train(self, epochs: int | None = None) -> None:
        """Train until `epochs` (by default `config.num_epochs`) epochs are done, counted from the run's beginning."""
        last = self.config.num_epochs if epochs is None else epochs
        self._preflight()
        if self.config.eval_freq and self.first_epoch == 0:
            self.evaluate(epoch=0)
        remaining = range(self.first_epoch, self.first_epoch if self._out_of_patience() else last)
        for epoch in tqdm(remaining, desc="epochs", disable=self._silent()):
            self.global_step = self.step(epoch, self.global_step)
            self.first_epoch = epoch + 1
            enough = (
                bool(self.config.eval_freq) and (epoch + 1) % self.config.eval_freq == 0 and self.evaluate(epoch + 1)
            )
            if self.config.save_freq and (epoch + 1) % self.config.save_freq == 0:
                self.save_checkpoint()
            if enough:
                break
        self._finish()

    def step(self, epoch: int, global_step: int) -> int:
        """One iteration of Algorithm 1: prompts, rollouts, rewards, advantages, updates.

        Returns:
            The number of optimizer steps done so far.
        """
        waves = self._sample(epoch, global_step)
        prompts, parts = PromptBatch.cat([wave.prompts for wave in waves]), [p for wave in waves for p in wave.parts]
        table = RewardTable.cat([wave.table for wave in waves])
        combined = combine_rewards(table, prompts.group_ids)
        self._log_rewards(table, combined, prompts, epoch, global_step)
        self._show_samples(parts, self._local(combined, waves), epoch, global_step)
        scored = self.algorithm.levels[list(self.algorithm.scored_steps_at(epoch))]
        trained = self.config.num_trained_steps
        advantages = self.algorithm.advantages(table, prompts.group_ids, prompts.prompts, trained, scored)
        self.algorithm.groups.update(prompts.prompts, combined.mean(2), epoch)
        global_step = self._update(parts, self._local(advantages, waves), epoch, global_step)
        self.report.log_timing(epoch, global_step)
        if self.accelerator.is_main_process:
            drop_pending(self.config.project_dir)
        return global_step

    def _sample(self, epoch: int, global_step: int) -> list[Wave]:
        """An epoch's images, scored: in one wave, or in two where the second depends on the first one's rewards."""
        allocation, waves = self.algorithm.groups, []
        groups = self._same_everywhere(self.prompts.groups(epoch, self.plan.num_groups))
        sizes = allocation.first([prompt for prompt, _ in groups], epoch)
        while sizes is not None:
            prompts = expand_groups(groups, sizes, sum(len(wave.prompts) for wave in waves))
            parts = self._collect(prompts, epoch, global_step, waves)
            waves.append(Wave(prompts, parts, self._gather_rewards(parts)))
            final = combine_rewards(waves[0].table, waves[0].prompts.group_ids)[:, -1].mean(1)
            sizes = allocation.rest(final, waves[0].prompts.group_ids) if len(waves) == 1 else None
        return waves

    def _same_everywhere(self, groups: list) -> list:
        """The main process's prompts: a prompt function with randomness of its own would split the groups."""
        return broadcast_object_list([groups])[0] if self.accelerator.num_processes > 1 else groups

    def _share(self, rows: Any) -> Any:
        """This process's slice of a wave's images."""
        count = len(rows) // self.accelerator.num_processes
        start = self.accelerator.process_index * count
        return rows[start : start + count]

    def _local(self, rows: Tensor, waves: Sequence[Wave]) -> Tensor:
        """This process's rows of what belongs to all images of all waves."""
        return torch.cat([self._share(part) for part in rows.split([len(wave.prompts) for wave in waves])])

    def _batches(self, prompts: PromptBatch) -> list[PromptBatch]:
        size = self.config.sample_batch_size
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def _collect(self, prompts: PromptBatch, epoch: int, global_step: int, earlier: Sequence[Wave]) -> list[Part]:
        """Roll out and score this process's images; on a fault all processes keep theirs and stop together."""
        rank, folder, mine = self.accelerator.process_index, self.config.project_dir, self._share(prompts)
        identity = self._identity(mine, epoch, global_step)
        kept = (load_pending(folder, epoch, rank) or [])[len(earlier) : len(earlier) + 1]
        kept = kept[0]["parts"] if kept and kept[0]["identity"] == identity else ()
        batches = self._batches(mine)
        bar = partial(tqdm, total=len(batches), leave=False, position=1, disable=self._silent())
        bars = {"rollout": bar(desc="rollout"), "reward": bar(desc="reward")}
        with nullcontext() if self.old_policy is None else self.old_policy.applied():
            parts, fault = self.collector.collect(
                batches, self.config.seed, epoch, kept, lambda stage: bars[stage].update()
            )
        for progress in bars.values():
            progress.close()
        if not any_process(self.accelerator, fault is not None):
            return parts
        done = [(self._identity(self._share(wave.prompts), epoch, global_step), wave.parts) for wave in earlier]
        payload = [{"identity": who, "parts": [part.payload() for part in p]} for who, p in (*done, (identity, parts))]
        try:
            path = save_pending(folder, epoch, rank, payload)
            kept = f"The epoch's {len(parts)} rollouts are kept in {path}; resume_from='latest' goes on from them"
        except Exception as error:  # the other processes wait in save_checkpoint
            kept = f"The epoch's rollouts could not be kept ({error}); resume_from='latest' draws them again"
        self.save_checkpoint()
        reason = fault or "a reward failed on another process"
        raise RewardError(f"epoch {epoch}, step {global_step}: {reason}. {kept}") from fault

    def _identity(self, prompts: PromptBatch, epoch: int, global_step: int) -> dict[str, Any]:
        """What kept rollouts must have been drawn for to be used."""
        return {
            "epoch": epoch,
            "global_step": global_step,
            "prompts": list(prompts.prompts),
            "settings": self.report.lasting_settings(),
            "rewards": len(self.rewards.names),
        }

    def _gather_rewards(self, parts: Sequence[Part]) -> RewardTable:
        """All processes' rewards, (B, Q, K, R), in the order of the sample ids."""
        local = torch.cat([part.scores for part in parts]).to(self.accelerator.device)
        values = self.accelerator.gather(local).cpu()
        if values.isnan().all():
            self.save_checkpoint()  # the epochs before this one
            raise RewardError(
                f"the rewards ({', '.join(self.rewards.names)}) gave no verdict (None or NaN) for any of the epoch's "
                f"{values[..., 0].numel()} images; check them on one image first"
            )
        for name, column in zip(self.rewards.names, values.unbind(-1), strict=True):
            if column.isnan().all() and self.accelerator.is_main_process:
                warnings.warn(f"reward {name} gave no verdict for any image of an epoch; it has no say", stacklevel=2)
        return RewardTable(values, self.rewards.names, self.rewards.weights)

    def _log_rewards(
        self, table: RewardTable, combined: Tensor, prompts: PromptBatch, epoch: int, global_step: int
    ) -> None:
        group_std = group_mean_std(combined, prompts.group_ids)[1]
        scored_steps = self.algorithm.scored_steps_at(epoch)
        self.report.log_rewards(table, combined, group_std, scored_steps, epoch, global_step)
        if self.algorithm.prompt_tracker is not None:
            self.report.log_groups(prompts.group_ids, group_std[:, -1, 0], epoch, global_step)

    def _update(self, parts: Sequence[Part], advantages: Tensor, epoch: int, global_step: int) -> int:
        """Inner epochs over the rollouts: replay, loss, backward, optimizer steps; a log line each."""

        def on_step(metrics: MeanMetrics, inner_epoch: int) -> None:
            nonlocal global_step
            self.report.log_update(metrics, epoch, inner_epoch, global_step)
            global_step += 1

        plan = self.plan
        total = self.config.train_num_inner_epochs * plan.updates_per_inner_epoch * plan.micro_batches_per_update
        with (
            tqdm(total=total, desc="update", leave=False, position=1, disable=self._silent()) as bar,
            self.report.stopwatch("update"),
        ):
            self.updater.run(parts, advantages, epoch, on_step, bar.update)
        if self.old_policy is not None:
            self.old_policy.update()
        return global_step

    # DDPOTrainer's hooks --------------------------------------------------------------------------------------

    def compute_rewards(self, prompt_image_pairs: Sequence[tuple], is_async: bool = False) -> list[tuple[Tensor, Any]]:
        """Score `(images, prompts, prompt_metadata)` batches: a (rewards, reward_metadata) each.

        Rewards are the weighted sum of all reward functions, (B,).
        """

        def score(pair: tuple) -> tuple[Tensor, Any]:
            scores = self.rewards(*pair[:3])
            return (scores.values * self.rewards.weights).sum(1), scores.metadata

        if is_async:
            with ThreadPoolExecutor(self.config.max_workers) as executor:
                return list(executor.map(score, prompt_image_pairs))
        return [score(pair) for pair in prompt_image_pairs]

    def compute_loss(self, rows: Any, conditioning: Conditioning) -> LossOutput:
        """The objective on one micro-batch."""
        return self.objective(self.velocity, rows, conditioning, self.reference_velocity)

    def calculate_loss(self, rows: Any, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        """As DDPOTrainer's: `(loss, approx_kl, clipfrac)` of one micro-batch; NaN where an objective has no ratio."""
        output = self.compute_loss(rows, conditioning)
        none = torch.full_like(output.loss.detach(), float("nan"))
        return output.loss, output.metrics.get("approx_kl", none), output.metrics.get("clipfrac", none)

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        """DDPOTrainer's formula, by the same function that trains."""
        return clipped_surrogate(ratio.log(), torch.zeros_like(ratio), advantages, clip_range).loss

    # Looking on -----------------------------------------------------------------------------------------------

    def evaluate(self, epoch: int) -> bool:
        """Evaluate on the held-out prompts, log, keep the best; returns whether it is time to stop."""
        if self.evaluator is None:
            raise ValueError("there are no eval_prompts to evaluate on; pass them to the trainer")
        try:
            with self.report.stopwatch("evaluate"), self.averaged_adapter(), torch.no_grad():
                samplers, step_counts = self.config.eval_samplers, self.config.eval_num_steps
                specs = [self.draw_spec(sampler, steps) for sampler in samplers for steps in step_counts]
                results = self.evaluator(self.drawer(self.velocity), specs, self.accelerator)
        except RewardError:
            self.save_checkpoint()  # a judge that fails costs its judgement, not the epochs before it
            raise
        self.accelerator.log(results | {"epoch": epoch}, step=self.global_step)
        self.report.evaluations.append({"epoch": epoch} | results)
        return self._keep_best(results, epoch)

    def drawer(self, velocity: Velocity) -> Drawer:
        """Return what draws images for evaluation and card, by this velocity."""
        return Drawer(
            self.sd_pipeline,
            self.encode,
            velocity,
            self.config.eval_batch_size or self.config.sample_batch_size,
            self.config.seed,
            self.accelerator.device,
            self.storage_dtype,
            self.config.decode_size,
        )

    def draw_spec(self, sampler: str, num_steps: int) -> DrawSpec:
        """Return a way of drawing at the size and guidance of training."""
        guidance, embedded = self.config.sample_guidance_scale, self.config.sample_embedded_guidance_scale
        return DrawSpec(sampler, num_steps, self.height, self.width, guidance, embedded)

    def _keep_best(self, results: dict[str, float], epoch: int) -> bool:
        name = self.config.metric_for_best_model
        if name is None:
            return False
        if name not in results:
            raise ValueError(f"metric_for_best_model is {name!r}; evaluated are {', '.join(results)}")
        if math.isnan(results[name]):
            warnings.warn(f"{name} is NaN at epoch {epoch}, no verdict; the best so far stays", stacklevel=3)
            return self._out_of_patience()
        sign = 1.0 if self.config.greater_is_better else -1.0
        none = self.best_metric is None or math.isnan(self.best_metric)
        if none or sign * results[name] > sign * self.best_metric:
            self.best_metric, self.evaluations_without_gain = results[name], 0
            self.report.save_best(epoch, name, results[name])
        else:
            self.evaluations_without_gain += 1
        return self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.evaluations_without_gain >= patience

    def _show_samples(self, parts: Sequence[Part], combined: Tensor, epoch: int, global_step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        self.report.save_grid(parts, epoch)
        if self.image_samples_callback is None:
            return
        final, rows, start = combined[:, -1, 0], [], 0
        for part in parts:
            rewards = final[start : start + len(part.batch)]
            rows.append([part.images, part.batch.prompts, part.batch.metadata, rewards, part.metadata])
            start += len(part.batch)
        trackers = [t for t in self.accelerator.trackers if t is not self.local_tracker]
        try:
            self.image_samples_callback(rows, global_step, trackers[0] if trackers else self.local_tracker)
        except Exception as error:  # scored rollouts are worth more than a picture, and other processes wait
            warnings.warn(
                f"image_samples_hook failed ({type(error).__name__}: {error}); training goes on", stacklevel=2
            )

    def _silent(self) -> bool:
        return self.config.disable_tqdm or not self.accelerator.is_local_main_process

    def _preflight(self) -> None:
        """One prompt, one call of each reward and the right to push, before anything is spent."""
        if self.config.push_to_hub:
            self._prepare_repo(None, self.config.hub_private_repo)
        prompt, metadata = self.prompts.groups(self.first_epoch, 1)[0]
        if self.config.prompt_cache_dir is not None:
            self.encode.prepare(self.prompts.known())
        self.report.print_memory_plan(self.encode([prompt]))
        images = torch.rand(2, 3, self.height, self.width, generator=torch.Generator().manual_seed(0))
        self.rewards(images, [prompt] * 2, [metadata] * 2)
        if self.config.eval_freq:
            prompt, metadata = self.evaluator.items[0]
            self.evaluator.rewards(images, [prompt] * 2, [metadata] * 2)
        if self.first_epoch == 0 and self.config.eval_freq == 0 and self.evaluator is not None:
            warnings.warn("eval_prompts were given, and eval_freq is 0: nothing will be evaluated", stacklevel=3)

    # Saving ---------------------------------------------------------------------------------------------------

    @property
    def checkpoint_dir(self) -> Path:
        """Where checkpoints lie."""
        return Path(self.config.project_dir) / "checkpoints"

    def averaged_adapter(self) -> Any:
        """A context in which the denoiser carries what is evaluated and saved: the EMA, where there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint of everything that moves, at the end of an epoch; None where the disk failed."""

        def write(path: Path) -> None:
            self.accelerator.save_state(str(path))
            if self.accelerator.is_main_process:
                write_state(path, self.report.state())

        limit = self.config.project_kwargs.get("total_limit") or self.config.num_checkpoint_limit
        with self.report.stopwatch("save"):
            return write_checkpoint(self.checkpoint_dir, self.first_epoch, self.accelerator, write, limit)

    def write_weights(self, folder: str | os.PathLike, *, fold_alpha: bool = False) -> None:
        """The adapter, or the whole denoiser where that is trained, and the scheduler that samples it."""
        if self.config.full_finetuning:
            save_denoiser(self.sd_pipeline, folder, annealed=self.config.anneals)
            return
        options = {"lora_config": self.lora_config, "adapter_name": self.adapter_name, "fold_alpha": fold_alpha}
        save_adapter(self.sd_pipeline, folder, annealed=self.config.anneals, **options)

    def _save_adapter_hook(self, models: list, weights: list, output_dir: str) -> None:
        if self.accelerator.is_main_process:
            self.write_weights(output_dir)
        weights.clear()

    def _load_adapter_hook(self, models: list, input_dir: str) -> None:
        from peft import set_peft_model_state_dict

        if self.config.full_finetuning:
            load_denoiser(self.sd_pipeline, input_dir)
        else:
            weights, _ = read_adapter(input_dir, denoiser=self.sd_pipeline.denoiser_name)
            check_adapter_fits(weights, self.sd_pipeline.denoiser)
            set_peft_model_state_dict(self.sd_pipeline.denoiser, weights, adapter_name=self.adapter_name)
        models.clear()

    def _set_aside(self) -> None:
        if self.accelerator.is_main_process:
            earlier = set_aside(self.config.project_dir)
            if earlier is not None:
                warnings.warn(
                    f"{self.config.project_dir} holds an earlier run, resume_from is empty; moved to {earlier}",
                    stacklevel=3,
                )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        path = find_checkpoint(self.config.resume_from, self.checkpoint_dir)
        self.accelerator.load_state(str(path))
        apply_settings(self.optimizer, self.lr_scheduler, self.config)
        self.report.load_state(read_state(path))
        if self.accelerator.is_main_process:
            set_aside_after(self.config.project_dir, self.first_epoch)
            self.local_tracker.rewind(self.first_epoch)
        self.accelerator.print(f"resumed from {path}: epoch {self.first_epoch}, step {self.global_step}")

    def save_pretrained(self, save_directory: str | os.PathLike | None = None, *, repo_id: str | None = None) -> Path:
        """Write the adapter as plain diffusers loads it, with scheduler, model card and pictures.

        By default to `<run>/adapter`. Every process may call it; the main one writes.
        """
        folder = Path(save_directory or Path(self.config.project_dir) / "adapter")
        if self.accelerator.is_main_process:
            with self.averaged_adapter():
                self.write_weights(folder, fold_alpha=self.config.lora_fold_alpha)
                self.report.draw_card_pictures(folder)
            self.report.write_card(folder, repo_id)
        self.accelerator.wait_for_everyone()
        return folder

    save_model = save_pretrained

    def create_model_card(self, path: str | os.PathLike | None = None, repo_id: str | None = None) -> Path | None:
        """Write README.md, training settings and pictures into `path`, by default `<run>/adapter`."""
        folder = Path(path or Path(self.config.project_dir) / "adapter")
        return self.report.write_card(folder, repo_id) if self.accelerator.is_main_process else None

    def push_to_hub(self, repo_id: str | None = None, *, token: str | None = None, **kwargs: Any) -> Any:
        """Save, then push the adapter to `repo_id` (by default `hub_model_id`, or the run's name below your user's)."""
        private = kwargs.pop("private", self.config.hub_private_repo)
        repo_id = self._prepare_repo(repo_id, private, token)
        folder = self.save_pretrained(repo_id=repo_id)
        if not self.accelerator.is_main_process:
            return None
        return push_folder(folder, repo_id, private=private, token=token, **kwargs)

    def _prepare_repo(self, repo_id: str | None, private: bool | None, token: str | None = None) -> str:
        """Make the repository where it is missing: without a token that may write, the error comes here."""
        repo_id = repo_id or self.config.hub_model_id or self.config.run_name
        return prepare_repo(repo_id, private=private, token=token) if self.accelerator.is_main_process else repo_id

    def _finish(self) -> None:
        """The last checkpoint, the adapter, the push."""
        done = checkpoints(self.checkpoint_dir)
        if not done or int(done[-1].name.rpartition("_")[2]) != self.first_epoch:
            self.save_checkpoint()
        self.save_pretrained()
        if self.config.push_to_hub:
            self.push_to_hub()
        self.accelerator.wait_for_everyone()
