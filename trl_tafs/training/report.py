"""What a run says of itself: log lines, grids, the best adapter, counters for the checkpoint, the model card."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl_tafs.hub.card import write_model_card
from trl_tafs.hub.facts import CardFacts, base_model_facts
from trl_tafs.method.levels import uniform_levels
from trl_tafs.method.types import Conditioning, RewardTable
from trl_tafs.output.files import tolerating_disk_faults, write_whole
from trl_tafs.output.pictures import sample_grid, save_png, tensor_to_image
from trl_tafs.training.collector import Part
from trl_tafs.training.logs import MeanMetrics, Stopwatch
from trl_tafs.training.memory import GIB, MemoryPlan, measure_footprint, plan_memory

if TYPE_CHECKING:
    from trl_tafs.trainer import TAFSGRPOTrainer


CLIPPED_WARNING = 0.3


CARD_PICTURES = 4


HARMLESS = {  # settings that may differ between a checkpoint and the run that resumes it
    *("resume_from", "num_epochs", "exp_name", "run_name", "logdir", "project_kwargs", "disable_tqdm", "save_freq"),
    *("log_with", "tracker_kwargs", "tracker_project_name", "num_checkpoint_limit", "sample_grid_freq", "max_workers"),
    *("async_reward_computation", "reward_max_retries", "reward_retry_delay", "push_to_hub", "hub_model_id"),
    *("reward_on_failure", "prompt_cache_dir", "lora_fold_alpha", "model_cpu_offload", "decode_batch_size"),
}


class RunReport:
    """Reads a trainer, never moves it."""

    def __init__(self, trainer: TAFSGRPOTrainer) -> None:
        self.trainer = trainer
        self.stopwatch = Stopwatch()
        self.reward_curve: list[tuple[int, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.plan: MemoryPlan | None = None
        self._warned = False

    def settings(self) -> dict[str, Any]:
        """The configuration with what was resolved, as plain values that a tracker can store."""
        trainer = self.trainer
        resolved = {
            "num_generations": trainer.plan.group_size,
            "train_clip_range": trainer.algorithm.clip_range,
            "height": trainer.height,
            "width": trainer.width,
            "num_processes": trainer.plan.world_size,
            "levels": [round(level, 6) for level in trainer.algorithm.levels.tolist()],
        }
        values = dataclasses.asdict(trainer.config) | resolved
        return {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in values.items()}

    def log_rewards(
        self,
        table: RewardTable,
        combined: Tensor,
        group_std: Tensor,
        scored_steps: range,
        epoch: int,
        global_step: int,
    ) -> None:
        """Rewards of an epoch: `combined` and `group_std` (B, Q, K), steps named as in the paper, from 1."""
        actions = slice(0, self.trainer.kernel.num_actions)
        final = combined[:, -1, actions]
        valid = final[~final.isnan()]
        mean, std = valid.mean().item(), valid.std(unbiased=False).item()
        values = {"epoch": epoch, "reward": mean, "reward_mean": mean, "reward_std": std}
        for q, n in enumerate(scored_steps):
            values[f"reward/step_{n + 1}"] = combined[:, q, actions].nanmean().item()
        values["reward/group_std"] = group_std[:, -1, actions].mean().item()
        values["frac_reward_zero_std"] = (group_std[..., actions] == 0).float().mean().item()
        values["frac_no_verdict"] = combined.isnan().float().mean().item()
        for r, name in enumerate(table.names):
            column = table.values[:, -1, actions, r]
            column = column[~column.isnan()]
            if column.numel() == 0:
                continue
            values[f"rewards/{name}/mean"] = column.mean().item()
            values[f"rewards/{name}/std"] = column.std(unbiased=False).item()
        self.reward_curve.append((epoch, mean))
        self.trainer.accelerator.log(values, step=global_step)

    def log_groups(self, group_ids: Tensor, group_std: Tensor, epoch: int, global_step: int) -> None:
        """How an epoch's images were shared: sizes, and the correlation of a prompt's size with its deviation, (B,)."""
        sizes = torch.bincount(group_ids)
        deviations = torch.zeros(len(sizes)).index_copy(0, group_ids, group_std)
        values = {"groups/size_min": sizes.min().item(), "groups/size_max": sizes.max().item(), "epoch": epoch}
        if len(sizes) > 1 and sizes.float().std() > 0 and deviations.std() > 0:
            values["groups/size_std_correlation"] = torch.corrcoef(torch.stack([sizes.float(), deviations]))[
                0, 1
            ].item()
        self.trainer.accelerator.log(values, step=global_step)

    def log_update(self, metrics: MeanMetrics, epoch: int, inner_epoch: int, global_step: int) -> None:
        """One optimizer step: its metrics, reduced over processes at once."""
        accelerator = self.trainer.accelerator
        means = metrics.pop()
        names = sorted(means)
        reduced = accelerator.reduce(torch.stack([means[name].float() for name in names]), reduction="mean")
        values: dict[str, Any] = dict(zip(names, reduced.tolist(), strict=True))
        values |= {"epoch": epoch, "inner_epoch": inner_epoch}
        values["learning_rate"] = self.trainer.lr_scheduler.get_last_lr()[0]
        accelerator.log(values, step=global_step)
        if values.get("clipfrac", 0.0) > CLIPPED_WARNING and not self._warned and accelerator.is_main_process:
            self._warned = True
            warnings.warn(
                f"epoch {epoch}: {values['clipfrac']:.0%} of the ratios are clipped at train_clip_range="
                f"{self.trainer.algorithm.clip_range:.3g} ({self.trainer.config.train_log_prob_reduction}), which "
                "throttles training; raise the range, or lower train_learning_rate or the number of updates an epoch",
                stacklevel=2,
            )

    def log_timing(self, epoch: int, global_step: int) -> None:
        """Seconds of rollout, decoding, reward and update; on a GPU its peak memory so far beside the planned one."""
        values = self.stopwatch.pop() | {"epoch": epoch}
        if self.plan is not None and torch.cuda.is_available():
            measured = torch.cuda.max_memory_allocated(self.trainer.accelerator.device)
            values |= {"memory/peak_gib": measured / GIB, "memory/planned_gib": self.plan.peak() / GIB}
        self.trainer.accelerator.log(values, step=global_step)

    def print_memory_plan(self, conditioning: Conditioning) -> None:
        """What the run will hold, before it does; `conditioning` of one prompt."""
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return
        footprint = measure_footprint(trainer.sd_pipeline, conditioning, trainer.height, trainer.width)
        self.plan = plan_memory(footprint, trainer.config, trainer.plan.local_images)
        device = trainer.accelerator.device
        capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        if not trainer.config.disable_tqdm or (capacity is not None and self.plan.peak() > capacity):
            print(self.plan.report(capacity))

    def save_grid(self, parts: Sequence[Part], epoch: int) -> None:
        """`samples/epoch_<n>.png`: an image of each of the first prompts, its clean estimate at every step."""
        trainer = self.trainer
        frequency = trainer.config.sample_grid_freq
        if not frequency or epoch % frequency:
            return
        chosen, seen = [], set()
        for part in parts:
            for i, group in enumerate(part.batch.group_ids.tolist()):
                if group not in seen and len(chosen) < trainer.config.sample_grid_rows:
                    seen.add(group)
                    chosen.append((part, i))
        clean = torch.stack([part.rollout.clean[i] for part, i in chosen])  # (P, N, *)
        images = trainer.collector.decode(clean.flatten(0, 1)).unflatten(0, clean.shape[:2])
        columns = [f"{n + 1}: s={s:.2f}" for n, s in enumerate(trainer.algorithm.levels[:-1].tolist())]
        labels = [part.batch.prompts[i] for part, i in chosen]
        path = Path(trainer.config.project_dir) / "samples" / f"epoch_{epoch:06d}.png"
        save_png(sample_grid(images, labels, columns, f"clean estimates, epoch {epoch}"), path)

    def save_best(self, epoch: int, name: str, value: float) -> None:
        """Keep the adapter of the best evaluation apart, in `best/`."""
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return
        folder = Path(trainer.config.project_dir) / "best"
        with tolerating_disk_faults(f"the best adapter, {folder},"):
            with trainer.averaged_adapter():
                trainer.write_weights(folder)
            write_whole(folder / "best.json", json.dumps({"epoch": epoch, "metric": name, "value": value}))

    # The checkpoint -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """`trainer_state.json`: counters and curves."""
        trainer = self.trainer
        return {
            "epoch": trainer.first_epoch,
            "global_step": trainer.global_step,
            "best_metric": trainer.best_metric,
            "evaluations_without_gain": trainer.evaluations_without_gain,
            "reward_curve": self.reward_curve,
            "evaluations": self.evaluations,
            "settings": self.settings(),
        }

    def lasting_settings(self) -> dict[str, Any]:
        """Those settings that make what a run computes."""
        return {name: value for name, value in self.settings().items() if name not in HARMLESS}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`; says which settings differ from those of the checkpoint."""
        trainer = self.trainer
        trainer.first_epoch, trainer.global_step = state["epoch"], state["global_step"]
        trainer.best_metric = state["best_metric"]
        trainer.evaluations_without_gain = state["evaluations_without_gain"]
        self.reward_curve = [tuple(point) for point in state["reward_curve"]]
        self.evaluations = state["evaluations"]
        changed = [
            f"{name} {state['settings'].get(name)} -> {value}"
            for name, value in self.settings().items()
            if name not in HARMLESS and state["settings"].get(name) != value
        ]
        if changed:
            warnings.warn(f"resumed with other settings than the checkpoint's: {'; '.join(changed)}", stacklevel=3)

    # The card -------------------------------------------------------------------------------------------------

    def card_prompts(self) -> list[str]:
        """A few prompts to show: held-out ones, or those of the first epoch."""
        trainer = self.trainer
        if trainer.evaluator is not None:
            prompts = [prompt for prompt, _ in trainer.evaluator.items]
        else:
            prompts = [prompt for prompt, _ in trainer.prompts.groups(0, 4 * CARD_PICTURES)]
        return list(dict.fromkeys(prompts))[:CARD_PICTURES]

    @torch.no_grad()
    def draw_card_pictures(self, folder: Path) -> None:
        """`images/before_<i>.png` and `after_<i>.png`: the same prompts and noise by the base and by the policy."""
        trainer, prompts = self.trainer, self.card_prompts()
        policy = trainer.sd_pipeline.velocity
        spec = trainer.draw_spec("annealed" if trainer.config.anneals else "ode", trainer.config.sample_num_steps)
        for name, velocity in (("before", trainer.reference_velocity), ("after", policy)):
            images = trainer.drawer(velocity).images(spec, prompts, range(len(prompts)))
            for i, image in enumerate(images):
                save_png(tensor_to_image(image), folder / "images" / f"{name}_{i}.png")

    def facts(self, folder: Path, repo_id: str | None) -> CardFacts:
        """Everything that the model card says."""
        trainer, config = self.trainer, self.trainer.config
        prompts = self.card_prompts()
        pictures = [(p, f"images/before_{i}.png", f"images/after_{i}.png") for i, p in enumerate(prompts)]
        last = self.evaluations[-1] if self.evaluations else {}
        first = self.evaluations[0] if self.evaluations else {}
        metrics = {name: {"before": first[name], "after": last[name]} for name in last if name.startswith("eval/")}
        return CardFacts(
            pipeline_class=type(trainer.sd_pipeline).stock_class().__name__,
            num_steps=config.sample_num_steps,
            levels_unshifted=uniform_levels(config.sample_num_steps).tolist(),
            levels=trainer.algorithm.levels[:-1].tolist(),
            height=trainer.height,
            width=trainer.width,
            guidance_scale=config.sample_guidance_scale,
            call=trainer.sd_pipeline.call_arguments(
                config.sample_num_steps,
                config.sample_guidance_scale,
                config.negative_prompts,
                config.sample_embedded_guidance_scale,
            ),
            card_tags=trainer.sd_pipeline.card_tags,
            denoiser_name=trainer.sd_pipeline.denoiser_name,
            renoises_from_generator=trainer.sd_pipeline.renoises_from_generator,
            whole_denoiser=type(trainer.sd_pipeline.denoiser).__name__ if config.full_finetuning else None,
            scheduler_class=type(trainer.sd_pipeline.annealed_scheduler()).__name__,
            sample_kernel=config.sample_kernel,
            anneals=config.anneals,
            objective=config.objective,
            scores_every_step=not config.credits_final_image and config.step_credit != "terminal",
            max_sequence_length=self.card_sequence_length(),
            torch_dtype=str(trainer.sd_pipeline.model_dtype).removeprefix("torch."),
            **base_model_facts(trainer.sd_pipeline),
            repo_id=repo_id,
            prompts=prompts,
            training={k: v for k, v in self.settings().items() if v not in ("", "null")},
            rewards=dict(zip(trainer.rewards.names, trainer.rewards.weights.tolist(), strict=True)),
            reward_curve=self.reward_curve,
            metrics=metrics,
            pictures=[picture for picture in pictures if (folder / picture[2]).exists()],
        )

    def card_sequence_length(self) -> int | None:
        """Tokens of a prompt in training, where diffusers' own default is another."""
        pipeline = self.trainer.sd_pipeline
        length = self.trainer.config.max_sequence_length or pipeline.default_max_sequence_length()
        return None if length == pipeline.stock_max_sequence_length() else length

    def write_card(self, folder: Path, repo_id: str | None) -> Path:
        """README.md and training settings beside the adapter."""
        folder.mkdir(parents=True, exist_ok=True)
        return write_model_card(self.facts(folder, repo_id), folder)
