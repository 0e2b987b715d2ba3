"""`TAFSGRPOConfig`: DDPOConfig's fields with DDPOTrainer's meaning, GRPOConfig's names, and what TAFS adds."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any, Self

from trl_tafs.method.credit import CREDITS
from trl_tafs.method.kernels import KERNELS, REDUCTIONS
from trl_tafs.method.losses import FORWARD_WEIGHTINGS, LEVEL_WEIGHTINGS
from trl_tafs.method.objectives import OBJECTIVES
from trl_tafs.options import decode_dict, option
from trl_tafs.presets import preset

_DICT_FIELDS = ("tracker_kwargs", "accelerator_kwargs", "project_kwargs")


_DEFAULT_ETA = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}


_DEFAULT_BETA = {"forward": 0.2}


_DEFAULT_WEIGHTING = {"awm": "velocity"}


def _default_exp_name() -> str:
    return os.path.splitext(os.path.basename(sys.argv[0] or "tafs"))[0] or "tafs"


@dataclass
class TAFSGRPOConfig:
    r"""Configuration of [`TAFSGRPOTrainer`]; read from the command line and YAML by `trl.TrlParser`.

    Defaults are the paper's where it gives them (N = 4 steps, groups of 48, AdamW 3e-4 / 1e-4, LoRA 32 / 64,
    512 px), but for the objective: its Eq. 10 learns slowly where the latent space is large (docs/learning.md), and is
    `from_preset("paper")`. See `docs/configuration.md` for the whole list with the reasons.
    """

    # Run ------------------------------------------------------------------------------------------------------
    exp_name: str = field(
        default_factory=_default_exp_name,
        metadata={"help": "Name of the experiment (by default the script's): the run's folder and the tracker's run."},
    )
    run_name: str = option("", "Name of this run; empty: `exp_name`. Everything is written to `logdir/run_name`.")
    seed: int = option(0, "Seed of all noise, prompts, shuffles and of the LoRA's initial weights.")
    log_with: str | None = option(None, "Tracker of Accelerate: tensorboard, wandb, trackio or all.")
    tracker_kwargs: dict | str | None = option(None, "Keyword arguments of the tracker's init, by tracker (JSON).")
    accelerator_kwargs: dict | str | None = option(None, "Keyword arguments of `Accelerator` (JSON).")
    project_kwargs: dict | str | None = option(
        None, "Keyword arguments of Accelerate's ProjectConfiguration (JSON): project_dir, logging_dir, total_limit."
    )
    tracker_project_name: str = option("trl", "Project name that the tracker shows.")
    logdir: str = option("logs", "Folder below which a run's folder lies, unless project_kwargs names a project_dir.")
    num_epochs: int = option(100, "Epochs; one is one iteration of Algorithm 1. The paper trains 1500.")
    save_freq: int = option(1, "Epochs between checkpoints; 0: only at the end.")
    num_checkpoint_limit: int = option(5, "Checkpoints kept; the oldest goes first. The best one is kept apart.")
    mixed_precision: str = option("bf16", "no, fp16 or bf16. Trained LoRA weights are float32 always.")
    allow_tf32: bool = option(True, "TF32 matrix products on Ampere and later.")
    resume_from: str = option("", "Checkpoint to continue from, or `latest` for the newest of this run.")
    disable_tqdm: bool = option(False, "No progress bars.")

    # Sampling -------------------------------------------------------------------------------------------------
    sample_num_steps: int = option(4, "N, denoising steps of a rollout (paper: 4).")
    sample_eta: float | None = option(
        None,
        "How much noise a step draws afresh; towards 0 every kernel is the Euler ODE. annealed, cps: in (0, 1], 1 is "
        "annealing; flow_sde: Flow-GRPO's a; dance_sde: the diffusion itself. None: 1 for annealed, .8 for cps, .7 for "
        "flow_sde, .3 for dance_sde, those of their authors.",
    )
    sample_guidance_scale: float = option(
        1.0, "Classifier-free guidance in rollout and training alike; 1 (off): a few-step policy needs half the work."
    )
    sample_embedded_guidance_scale: float | None = option(
        None,
        "Guidance that a distilled model takes as an input (FLUX.1-dev, FLUX.2-dev, SanaSprint), which costs no second "
        "evaluation. None: the stock pipeline's default; an error for a model that takes none.",
    )
    sample_batch_size: int = option(8, "Images a process draws at once.")
    sample_num_batches_per_epoch: int = option(12, "Batches a process draws each epoch: 96 images, two groups of 48.")
    sample_kernel: str = option(
        "annealed",
        "The sampler, and what an action is: annealed (the paper's; the next noisy state), clean (the explored clean "
        "image), flow_sde (Flow-GRPO's), dance_sde (DanceGRPO's), cps (Flow-CPS: annealed with a part of the old "
        "noise), or ode (no action: for the forward objectives).",
    )
    sample_window_size: int | None = option(
        None, "Only so many steps in a row are explored and trained, the others are the ODE's (MixGRPO: 4). None: all."
    )
    sample_window_interval: int = option(25, "Epochs between two moves of the window (MixGRPO: 25).")
    sample_window_order: str = option(
        "progressive", "How the window moves: progressive, a step onwards, or random, the same place on all processes."
    )
    sample_window_range: int | None = option(
        None, "The window stays within the first so many steps (Flow-GRPO-Fast: half of them). None: all that train."
    )
    sample_kappa: float = option(0.5, "Clean kernel: exploration of the clean image, std = kappa x level.")
    num_perturbations: int = option(
        1,
        "M, actions of one state, each other's baseline. Clean kernel: explorations, which cost decodes and rewards "
        "and no denoiser evaluation. Annealed kernel: re-noisings, which cost one evaluation each besides.",
    )
    antithetic_perturbations: bool = option(
        False, "The second half of a state's actions has the noise of the first, negated; M must be even."
    )
    share_initial_noise: bool = option(
        False, "All images of a group start from the same noise, so that only their actions tell them apart."
    )
    clean_baseline: str = option("state", "Clean kernel: state (the state's own value is the baseline) or group.")
    num_generations: int | None = option(
        None, "G, images of a prompt (paper: 48). None: 48, or the largest divisor of the epoch's images below it."
    )
    group_allocation: str = option(
        "fixed",
        "How an epoch's images are shared among its prompts: fixed, num_generations each; variance (SuperFlow), more "
        "where a prompt's rewards varied before; streaming, min_generations each, then the rest where these varied.",
    )
    min_generations: int | None = option(
        None, "Least images of a prompt, where group sizes vary. None: a quarter of num_generations, at least 2."
    )
    max_generations: int | None = option(None, "Most images of a prompt. None: four times num_generations.")
    group_optimism: float = option(
        0.5, "How much more a prompt is thought to vary that little is known of, in units of the mean deviation."
    )
    group_memory: float = option(0.9, "Share of what is known of a prompt that an epoch keeps.")
    group_tracker_capacity: int = option(1_000_000, "Prompts that are remembered; the one seen longest ago goes first.")
    height: int | None = option(None, "Pixels. None: 512 (paper), or the model's own size where that is smaller.")
    width: int | None = option(None, "Pixels, as height.")
    max_sequence_length: int | None = option(None, "Tokens of a prompt. None: the family's default.")
    negative_prompts: str | None = option("", "Negative prompt, where guidance is on.")
    offload_text_encoders: bool = option(
        False, "Keep text encoders on the CPU except while they encode: 11 GB less for SD3.5's three in bf16."
    )
    model_cpu_offload: bool = option(
        False,
        "Each model is on the GPU only in the phase that uses it, as with diffusers' enable_model_cpu_offload: text "
        "encoders while they encode, the denoiser in rollout and update, the VAE while it decodes and rewards score.",
    )
    vae_tiling: bool = option(False, "The VAE decodes large images in tiles, whose seams are blended.")
    decode_batch_size: int | None = option(None, "Images that the VAE decodes at once. None: sample_batch_size.")
    prompt_cache_dir: str | None = option(
        None,
        "Folder for encoded prompts. A list or dataset of prompts is encoded before training, and what is found there "
        "needs no text encoder: a pipeline loaded with text_encoder=None (and _2, ...) will do.",
    )

    # Rewards --------------------------------------------------------------------------------------------------
    reward_weights: list[float] | None = option(None, "Weight of each reward; None: 1 each.")
    multi_objective_aggregation: str = option(
        "sum_then_normalize", "sum_then_normalize, or normalize_then_sum (each reward by itself first; GDPO)."
    )
    scale_rewards: str = option(
        "group", "Divide by the deviation of the group (paper, Eq. 9), of the whole batch, or by none."
    )
    async_reward_computation: bool = option(False, "Score in threads while the next batch is drawn.")
    max_workers: int = option(2, "Threads of async_reward_computation.")
    reward_max_retries: int = option(2, "How often a reward that raises is called again before the run stops.")
    reward_retry_delay: float = option(1.0, "Seconds before the first retry; doubled each time.")
    reward_on_failure: str = option(
        "error", "When a reward still raises then: error (keep the rollouts, stop), or mask (no verdict on its images)."
    )

    # Credit ---------------------------------------------------------------------------------------------------
    step_credit: str = option(
        "step",
        "Which rewards an action answers for, where every step is scored (objective=clipped or forward_images=every): "
        "step (Eq. 10), sum (Alg. 1, line 18), reward_to_go, gain, trace (SuperFlow: increments, weighted in "
        "continuous time), or terminal (w/o Step Adv.).",
    )
    credit_trace: float = option(
        0.0, "trace: how fast later increments fade, per unit of level; 0: all count, a large one: gain."
    )
    credit_discount: float = option(0.0, "trace: how fast later value fades, per unit of level.")
    num_advantage_steps: int | None = option(
        None, "Only the last so many steps' rewards are used (Table 5), where every step is scored."
    )
    train_adv_clip_max: float = option(5.0, "Advantages are clipped to +- this.")
    per_prompt_stat_tracking: bool = option(False, "DDPO's running statistics of a prompt instead of the group's.")
    per_prompt_stat_tracking_buffer_size: int = option(16, "Rewards kept a prompt, or an epoch's if these are more.")
    per_prompt_stat_tracking_min_count: int = option(16, "Rewards needed before a prompt's own statistics are used.")

    # Training -------------------------------------------------------------------------------------------------
    objective: str = option(
        "forward",
        "forward: DiffusionNFT's, which needs clean images and no likelihood, and learns where D is large; clipped: "
        "GRPO's surrogate, the paper's Eq. 10; awm: advantage-weighted matching, forward's simpler sibling.",
    )
    forward_levels: str = option(
        "trajectory",
        "Forward objectives, states that an image is matched from: trajectory (those of its own rollout), sampler "
        "(noised to the sampler's levels), or random (to random ones, as in DiffusionNFT).",
    )
    forward_num_levels: int = option(4, "Random levels of one image.")
    forward_images: str = option(
        "final", "Forward objectives: the final image only, or every scored step's with its own advantage."
    )
    nft_beta: float = option(
        1.0, "Forward objective: how far the implicit positive and negative policies lie from the old one."
    )
    old_policy_decay: float = option(
        0.0, "Share of the old policy, which draws the rollouts, that an epoch keeps; 0: it is the present one."
    )
    old_policy_ramp: float = option(
        0.001, "The decay grows by this an epoch up to old_policy_decay (DiffusionNFT: .001 up to .5)."
    )
    train_batch_size: int = option(
        8, "Rows (image, step) of one forward and backward pass. It must divide a process's images."
    )
    train_gradient_accumulation_steps: int | None = option(
        None,
        "An optimizer step takes so many times train_batch_size images, with all their steps; None: all of the "
        "epoch's, one optimizer step an inner epoch.",
    )
    train_num_inner_epochs: int = option(1, "Passes over an epoch's rollouts.")
    train_timestep_fraction: float = option(1.0, "Share of the trained steps of each image, drawn at random.")
    train_cfg: bool = option(False, "Guidance in training: must be on if and only if sample_guidance_scale > 1.")
    train_learning_rate: float = option(3e-4, "AdamW's (paper: 3e-4).")
    train_lr_scheduler_type: str = option("constant", "Any name of diffusers' or transformers' get_scheduler.")
    train_lr_warmup_steps: int = option(0, "Optimizer steps of warm-up.")
    train_adam_beta1: float = option(0.9, "AdamW's beta1.")
    train_adam_beta2: float = option(0.999, "AdamW's beta2.")
    train_adam_weight_decay: float = option(1e-4, "AdamW's weight decay (paper: 1e-4).")
    train_adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    train_use_8bit_adam: bool = option(False, "bitsandbytes' 8-bit AdamW.")
    train_max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    train_clip_range: float | None = option(
        None,
        "Clip range of the ratio, in the units of train_log_prob_reduction. None: .025 in sqrt units at any "
        "resolution (.2 in sum units at D = 64).",
    )
    train_log_prob_reduction: str = option(
        "sqrt", "Log-probabilities are the mean over latent elements (DDPO), their sum, or the sum over sqrt(D)."
    )
    train_level_weighting: str | None = option(
        None,
        "clipped: balanced (default), every level moves the velocity equally; gaussian, the density as it is (Eq. 10); "
        "uniform, without its 1/(2 sigma^2). forward, awm: adaptive (forward's default), velocity (awm's), or clean, "
        "the error of the clean image.",
    )
    beta: float | None = option(
        None,
        "Weight of the KL to the base without the adapter; the forward objectives': half the squared distance of the "
        "velocities. A mean over latent elements: beside a policy term in sqrt units (train_log_prob_reduction) it "
        "weighs sqrt(D) times less than beside public code's mean. None: .2 for forward, which costs it a seventh of "
        "the epochs and keeps what the reward doesn't see (docs/learning.md); 0 for the others (paper: none).",
    )
    train_gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.")
    train_use_ema: bool = option(False, "Evaluate and save an exponential average of the adapter.")
    train_ema_decay: float = option(0.99, "Its decay an optimizer step.")

    full_finetuning: bool = option(
        False,
        "Train the whole denoiser in float32 instead of a LoRA on it; give it a far smaller train_learning_rate "
        "(1e-5). It takes 20 bytes a parameter: weights, gradient, two moments, and the base for the KL.",
    )

    # LoRA -----------------------------------------------------------------------------------------------------
    lora_rank: int = option(32, "Rank (paper: 32).")
    lora_alpha: int = option(64, "Alpha (paper: 64).")
    lora_target_modules: list[str] | None = option(None, "None: the family's attention projections.")
    lora_fold_alpha: bool = option(
        False,
        "Publish the adapter with alpha / r multiplied into its weights and alpha = r: the same images in diffusers, "
        "and the right strength in tools that ignore the file's metadata (ComfyUI).",
    )
    adapter_name_or_path: str | None = option(None, "A LoRA in diffusers' format, local or on the Hub, to continue.")

    # Evaluation and pictures ----------------------------------------------------------------------------------
    eval_freq: int = option(0, "Epochs between evaluations on the held-out prompts, and before the first; 0: none.")
    eval_num_steps: list[int] = option([4, 8], "Step counts to evaluate.")
    eval_samplers: list[str] = option(["annealed", "ode"], "Samplers to evaluate: annealed, ode.")
    eval_images_per_prompt: int = option(1, "Images of each held-out prompt; their noise is the same each time.")
    eval_batch_size: int | None = option(None, "Images drawn at once; None: sample_batch_size.")
    metric_for_best_model: str | None = option(
        None, "Evaluated metric by which the best checkpoint is kept, e.g. eval/annealed_4/pickscore."
    )
    greater_is_better: bool = option(True, "Direction of metric_for_best_model.")
    early_stopping_patience: int | None = option(None, "Stop after so many evaluations without a better one.")
    sample_grid_freq: int = option(10, "Epochs between sample grids (PNG: a row a prompt, a column a step); 0: none.")
    sample_grid_rows: int = option(6, "Images in a sample grid.")

    # Hub ------------------------------------------------------------------------------------------------------
    push_to_hub: bool = option(False, "Push the adapter when training ends.")
    hub_model_id: str | None = option(None, "Repository to push to; None: `run_name` below your user name.")
    hub_private_repo: bool | None = option(None, "Create it as a private one.")

    def __post_init__(self) -> None:
        for name in _DICT_FIELDS:
            setattr(self, name, decode_dict(name, getattr(self, name)))
        self.run_name = self.run_name or self.exp_name
        if self.sample_eta is None:
            self.sample_eta = _DEFAULT_ETA.get(self.sample_kernel, 1.0)
        if self.beta is None:
            self.beta = _DEFAULT_BETA.get(self.objective, 0.0)
        self._check_choices()
        self._check_ranges()
        self._check_fractions()
        self._check_combinations()

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """A configuration with a preset's options (`trl_tafs.presets`), and `options` on top of them."""
        return cls(**preset(name) | options)

    @property
    def project_dir(self) -> str:
        """Where the run writes everything."""
        return self.project_kwargs.get("project_dir") or os.path.join(self.logdir, self.run_name)

    @property
    def anneals(self) -> bool:
        """Whether what is trained is to be sampled by annealing; by the ODE otherwise, as SDE methods' authors do."""
        return self.sample_kernel in ("annealed", "clean")

    @property
    def num_trained_steps(self) -> int:
        """S, the steps of an image that carry an action: N - 1 for all kernels, or the window's."""
        return self.sample_window_size or self.sample_num_steps - 1

    @property
    def decode_size(self) -> int:
        """Images that the VAE decodes at once."""
        return self.decode_batch_size or self.sample_batch_size

    @property
    def rows_per_image(self) -> int:
        """Rows that the objective makes of one image."""
        if self.from_actions or self.forward_levels == "trajectory":
            return self.num_trained_steps
        levels = {"sampler": self.sample_num_steps, "random": self.forward_num_levels}[self.forward_levels]
        return levels * (1 if self.credits_final_image else self.num_trained_steps)

    @property
    def num_replayed_rows(self) -> int:
        """Of these, how many are replayed: `train_timestep_fraction` of them, at least one."""
        return max(1, int(self.rows_per_image * self.train_timestep_fraction + 1e-9))

    @property
    def credits_final_image(self) -> bool:
        """Whether only the final image is scored, whatever the credit."""
        return not self.from_actions and self.forward_images == "final"

    @property
    def from_actions(self) -> bool:
        """Whether the objective learns from actions, and so needs a kernel with a density."""
        return OBJECTIVES[self.objective].from_actions

    @property
    def level_weighting(self) -> str:
        """`train_level_weighting`, or the objective's default."""
        usual = "balanced" if self.from_actions else "adaptive"
        return self.train_level_weighting or _DEFAULT_WEIGHTING.get(self.objective, usual)

    def _check_choices(self) -> None:
        choices = {
            "mixed_precision": ("no", "fp16", "bf16"),
            "sample_kernel": tuple(KERNELS),
            "clean_baseline": ("state", "group"),
            "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
            "scale_rewards": ("group", "batch", "none"),
            "group_allocation": ("fixed", "variance", "streaming"),
            "sample_window_order": ("progressive", "random"),
            "reward_on_failure": ("error", "mask"),
            "step_credit": tuple(CREDITS),
            "objective": tuple(OBJECTIVES),
            "forward_levels": ("sampler", "random", "trajectory"),
            "forward_images": ("final", "every"),
            "train_log_prob_reduction": tuple(REDUCTIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        weightings = LEVEL_WEIGHTINGS if self.from_actions else FORWARD_WEIGHTINGS
        if self.level_weighting not in weightings:
            raise ValueError(
                f"train_level_weighting is {self.train_level_weighting!r}; use one of {', '.join(weightings)} with "
                f"objective={self.objective!r}, or None for its default"
            )
        for sampler in [self.eval_samplers] if isinstance(self.eval_samplers, str) else self.eval_samplers:
            if isinstance(self.eval_samplers, str) or sampler not in ("annealed", "ode"):
                raise ValueError(f"eval_samplers is {self.eval_samplers!r}; use a list of annealed and ode")

    def _check_ranges(self) -> None:
        at_least = {
            "sample_num_steps": 2,
            "sample_batch_size": 1,
            "sample_num_batches_per_epoch": 1,
            "num_perturbations": 1,
            "forward_num_levels": 1,
            "train_batch_size": 1,
            "train_num_inner_epochs": 1,
            "num_epochs": 0,
            "save_freq": 0,
            "eval_freq": 0,
            "num_checkpoint_limit": 1,
            "reward_max_retries": 0,
            "max_workers": 1,
            "lora_rank": 1,
            "lora_alpha": 1,
            "seed": 0,
            "sample_grid_freq": 0,
            "sample_guidance_scale": 0,
            "eval_images_per_prompt": 1,
            "sample_grid_rows": 1,
            "reward_retry_delay": 0,
            "sample_window_interval": 1,
            "credit_trace": 0,
            "credit_discount": 0,
            "group_optimism": 0,
            "group_tracker_capacity": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        self._check_optional_ranges()

    def _check_optional_ranges(self) -> None:
        for name in (
            "train_gradient_accumulation_steps",
            "eval_batch_size",
            "decode_batch_size",
            "early_stopping_patience",
            "max_sequence_length",
            "sample_window_size",
            "min_generations",
            "height",
            "width",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, or None")
        if not self.eval_num_steps or any(steps < 1 for steps in self.eval_num_steps):
            raise ValueError(f"eval_num_steps is {self.eval_num_steps}; give step counts of at least 1")
        for name in ("train_ema_decay", "old_policy_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.old_policy_decay and not self.old_policy_ramp > 0:
            raise ValueError(f"old_policy_ramp is {self.old_policy_ramp}; it must be above 0 for old_policy_decay")
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} is never reached with "
                f"per_prompt_stat_tracking_buffer_size={self.per_prompt_stat_tracking_buffer_size}"
            )

    def _check_fractions(self) -> None:
        positive = ("sample_kappa", "train_learning_rate", "train_adv_clip_max", "train_max_grad_norm", "nft_beta")
        for name in (*positive, *(("train_clip_range",) if self.train_clip_range is not None else ())):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.train_timestep_fraction <= 1:
            raise ValueError(f"train_timestep_fraction is {self.train_timestep_fraction}; it must lie in (0, 1]")
        most = 1.0 if self.sample_kernel in ("annealed", "cps") else float("inf")
        if not 0 < self.sample_eta <= most:
            raise ValueError(
                f"sample_eta is {self.sample_eta}; with sample_kernel={self.sample_kernel!r} it must lie in "
                f"(0, {most:g}] (at 0 the sampler is an ODE, without a density to train)"
            )
        if not 0 < self.group_memory <= 1:
            raise ValueError(f"group_memory is {self.group_memory}; it must lie in (0, 1]")
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; the KL's weight can't be negative")
        if self.num_advantage_steps is not None and not 1 <= self.num_advantage_steps <= self.num_trained_steps:
            raise ValueError(
                f"num_advantage_steps is {self.num_advantage_steps}; with sample_num_steps={self.sample_num_steps} "
                f"it can be 1 to {self.num_trained_steps}"
            )

    def _check_combinations(self) -> None:
        if (self.sample_guidance_scale > 1) != self.train_cfg:
            raise ValueError(
                f"sample_guidance_scale={self.sample_guidance_scale} with train_cfg={self.train_cfg}: rollout and "
                "training must use the same guidance, or the ratio isn't 1 on policy; use sample_guidance_scale=1 "
                "with train_cfg=False, or a scale above 1 with train_cfg=True"
            )
        if self.antithetic_perturbations and self.num_perturbations % 2:
            raise ValueError(
                f"antithetic_perturbations needs an even num_perturbations, not {self.num_perturbations}; use "
                f"{self.num_perturbations + 1}"
            )
        self._check_sampler()
        self._check_groups()
        self._check_credit()
        if self.full_finetuning:
            wrong = ("model_cpu_offload", "adapter_name_or_path", "lora_target_modules", "lora_fold_alpha")
            if given := [name for name in wrong if getattr(self, name)]:
                raise ValueError(f"full_finetuning trains no LoRA, and moves no weights; leave out {', '.join(given)}")
        if self.model_cpu_offload and self.async_reward_computation:
            raise ValueError(
                "model_cpu_offload takes the denoiser off the GPU while rewards score, and async_reward_computation "
                "scores while the denoiser samples; use one of them"
            )
        if self.early_stopping_patience is not None and not (self.eval_freq and self.metric_for_best_model):
            raise ValueError("early_stopping_patience needs eval_freq above 0 and a metric_for_best_model")
        if self.metric_for_best_model is not None and not self.eval_freq:
            raise ValueError("metric_for_best_model needs eval_freq above 0")

    def _check_credit(self) -> None:
        if not self.from_actions and (self.sample_kernel == "clean" or self.num_perturbations > 1):
            raise ValueError(
                f"objective={self.objective!r} learns from images, not from actions; sample_kernel="
                f"{self.sample_kernel!r} with num_perturbations={self.num_perturbations} needs objective='clipped'"
            )
        says_more = self.step_credit not in ("step", "terminal") or self.num_advantage_steps not in (None, 1)
        if self.credits_final_image and says_more:
            raise ValueError(
                f"step_credit={self.step_credit!r} with num_advantage_steps={self.num_advantage_steps}: objective="
                f"{self.objective!r} with forward_images='final' scores the final image alone; use "
                "forward_images='every' or objective='clipped', or leave both out"
            )
        own_baseline = self.num_perturbations > 1 or (self.sample_kernel == "clean" and self.clean_baseline == "state")
        if self.per_prompt_stat_tracking and self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} says nothing to per_prompt_stat_tracking, which divides by a "
                "prompt's own deviation; leave one of them out"
            )
        if self.objective == "forward" and self.train_clip_range is not None:
            raise ValueError(
                f"train_clip_range={self.train_clip_range} clips a ratio, and objective='forward' has none; leave it "
                "out (its own brakes are beta, nft_beta and train_adv_clip_max)"
            )
        if own_baseline and self.per_prompt_stat_tracking:
            raise ValueError(
                "per_prompt_stat_tracking replaces the baseline; use it with num_perturbations=1 and the annealed "
                "kernel or clean_baseline='group'"
            )
        if own_baseline and (
            self.step_credit != "step" or self.num_advantage_steps not in (None, self.num_trained_steps)
        ):
            raise ValueError(
                f"step_credit={self.step_credit!r} with num_advantage_steps={self.num_advantage_steps}: a state's own "
                "baseline takes all that earlier actions did out of a reward, and leaves them none; use "
                "step_credit='step' and num_advantage_steps=None, or clean_baseline='group' with num_perturbations=1"
            )

    def _check_sampler(self) -> None:
        if self.from_actions and self.sample_kernel == "ode":
            raise ValueError(
                f"sample_kernel='ode' has no density, and objective={self.objective!r} needs one; use annealed, "
                "flow_sde, dance_sde or cps, or objective='forward'"
            )
        if self.sample_kernel in ("clean", "ode") and self.sample_eta != 1.0:
            raise ValueError(
                f"sample_eta={self.sample_eta} says nothing to sample_kernel={self.sample_kernel!r}; leave it out "
                "(clean has sample_kappa)"
            )
        if self.sample_window_size is None:
            if self.sample_window_range is not None:
                raise ValueError(f"sample_window_range={self.sample_window_range} needs a sample_window_size")
            return
        covered = self.sample_num_steps - 1 if self.sample_window_range is None else self.sample_window_range
        if not self.sample_window_size <= covered < self.sample_num_steps:
            raise ValueError(
                f"a window of sample_window_size={self.sample_window_size} steps doesn't lie within the first "
                f"{covered} of {self.sample_num_steps}, the last of which never trains; use a range of "
                f"{self.sample_window_size} to {self.sample_num_steps - 1}"
            )
        if self.sample_kernel in ("clean", "ode"):
            raise ValueError(f"a window of explored steps needs a stochastic kernel, not {self.sample_kernel!r}")

    def _check_groups(self) -> None:
        if self.group_allocation == "fixed":
            if self.min_generations is not None or self.max_generations is not None:
                raise ValueError("min_generations and max_generations need group_allocation='variance' or 'streaming'")
            return
        if self.per_prompt_stat_tracking:
            raise ValueError(
                f"per_prompt_stat_tracking replaces the groups' statistics, which group_allocation="
                f"{self.group_allocation!r} is for; use one of them"
            )
        if self.min_generations == 1 and self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "min_generations=1 takes a prompt's expected reward as the baseline, which is known of the sum of the "
                "rewards: use multi_objective_aggregation='sum_then_normalize', or min_generations=2"
            )
        if self.min_generations == 1 and self.group_allocation == "streaming":
            raise ValueError(
                "group_allocation='streaming' looks at how the first draws vary; use min_generations=2 or more"
            )
