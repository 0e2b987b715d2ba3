"""Named sets of options: what a method sets apart from the defaults, with its source beside each value.

One trainer runs every method, so that a comparison swaps one thing at a time. What the sources leave to the model or
the hardware (batch sizes, prompts an epoch, resolution) is left to you. Where a source takes another optimizer or a
full fine-tune, a preset keeps this trainer's LoRA and AdamW. Public configurations are named by repository and file.
"""

from __future__ import annotations

from typing import Any

from trl_tafs.output.errors import did_you_mean, shown

# TAFS-GRPO's own: Yue et al. 2026, arXiv 2602.01591. N = 4, groups of 48, LoRA 32 / 64 and AdamW 3e-4 / 1e-4 are the
# defaults already.
_TAFS = {
    "objective": "clipped",  # Eq. 10
    "sample_kernel": "annealed",  # Eq. 5 and 7; the action is the next noisy state (docs/algorithm.md)
    "step_credit": "step",  # Eq. 10 credits step n with A^n
    "beta": 0.0,  # Eq. 10 has no KL
}
# Eq. 10 with the next clean image as the action of the state before it (docs/algorithm.md, "Matched")
_MATCHED = {
    "objective": "matched",
    "sample_kernel": "annealed",
    "step_credit": "step",  # Eq. 10 credits step n with A^n
    "beta": 0.1,  # docs/learning.md
}
# GRPO on the SDE of Flow-GRPO: Liu et al. 2025, arXiv 2505.05470; flow_grpo, config/grpo.py, general_ocr_sd3.
_FLOW_GRPO = {
    "objective": "clipped",  # section 4.1
    "sample_kernel": "flow_sde",  # Eq. 9
    "sample_eta": 0.7,  # a, section 5
    "sample_num_steps": 10,  # sample.num_steps
    "sample_levels": "scheduler",  # sd3_pipeline_with_logprob: set_timesteps(N)
    "num_generations": 24,  # sample.num_image_per_prompt
    "train_updates_per_epoch": 2,  # train.gradient_accumulation_steps, half of sample.num_batches_per_epoch
    "step_credit": "terminal",  # one reward a trajectory
    "scale_rewards": "batch",  # sample.global_std
    "train_level_weighting": "gaussian",  # the density as it is
    "train_log_prob_reduction": "mean",  # sd3_sde_with_logprob; the clip range at 512 px is then train.clip_range, 1e-4
    "beta": 0.04,  # train.beta
    "train_kl_weighting": "diffusion",  # train_sd3: the KL is divided by 2 std_dev_t^2, without dt
}
# Its fast configurations: train.clip_range 1e-5 of a mean over 65,536 elements, 512 px, as one that holds at any size
_FAST_CLIP = {"train_log_prob_reduction": "sqrt", "train_clip_range": 0.0026}
# DanceGRPO's and MixGRPO's --clip_range, 1e-4 of a mean over 129,600 elements, 720 px
_FLUX_CLIP = {"train_log_prob_reduction": "sqrt", "train_clip_range": 0.036}
_SD3_GUIDANCE = {"sample_guidance_scale": 4.5, "train_cfg": True}  # general_ocr_sd3: sample.guidance_scale, train.cfg

PRESETS: dict[str, dict[str, Any]] = {
    # Eq. 10 to the letter
    "paper": {**_TAFS, "train_level_weighting": "gaussian", "num_perturbations": 1},
    # the defaults: Eq. 10 with the next clean image as the action of the state before it (docs/algorithm.md, "Matched")
    "tafs": _MATCHED,
    # the same with distribution matching beside the reward (docs/distribution_matching.md)
    "tafs_dm": {**_MATCHED, "dm_weight": 1.0, "dm_rows": "final", "train_updates_per_epoch": 4},
    # Eq. 10 on the next noisy state, with the level weights that learn where D is large (docs/learning.md)
    "tafs_annealed": {**_TAFS, "train_level_weighting": "balanced"},
    # the clean image itself is the action, explored explicitly (docs/algorithm.md)
    "tafs_clean": {
        **_TAFS,
        "sample_kernel": "clean",
        "sample_kappa": 0.5,  # docs/algorithm.md
        "num_perturbations": 4,  # explorations of one mean cost no evaluation of the denoiser
        "train_level_weighting": "gaussian",
    },
    # DiffusionNFT's objective on annealed few-step rollouts, from the final image's reward
    "tafs_nft": {"objective": "forward", "forward_levels": "trajectory", "forward_images": "final", "beta": 0.2},
    # the same with every step's clean image and its own reward
    "tafs_nft_stepwise": {
        "objective": "forward",
        "forward_levels": "trajectory",
        "forward_images": "every",
        "step_credit": "step",
        "beta": 0.2,
    },
    # group sizes by the rewards' variance, step-level advantages in continuous time: both ours
    "tafs_trace": {
        **_TAFS,
        "train_level_weighting": "balanced",
        "group_allocation": "variance",
        "step_credit": "trace",
        "credit_trace": 1.0,
        "credit_discount": 0.0,
    },
    "flow_grpo": {**_FLOW_GRPO, **_SD3_GUIDANCE},
    # flow_grpo, config/grpo.py, pickscore_sd3_fast: two SDE steps, elsewhere the ODE, at a place drawn anew each epoch
    "flow_grpo_fast": {
        **_FLOW_GRPO,
        **_SD3_GUIDANCE,
        **_FAST_CLIP,
        "sample_eta": 0.8,  # sample.noise_level
        "sample_window_size": 2,  # sample.train_num_steps
        "sample_window_range": 5,  # sample.sde_window_range = (0, num_steps // 2), of the later configurations
        "sample_window_order": "random",
        "sample_window_interval": 1,
        "beta": 0.0,  # train.beta
        "train_kl_weighting": "gaussian",
    },
    # Chen et al. 2025, arXiv 2512.17951, on its Flow-GRPO base. Its formulas are those of three study notes of the full
    # text; its code isn't published. The law of rho (group_memory an epoch), eps, the prior and K are ours
    # (method/superflow.py), as is that the sizes add up to an epoch's images.
    "superflow": {
        **_FLOW_GRPO,
        **_SD3_GUIDANCE,
        "group_allocation": "superflow",  # Beta tracker, prompts by weight, bins, the tracker as the baseline
        "group_bins": 4,
        "train_level_weighting": "diffusion",  # A_t = eta sigma_t A; eta goes into the learning rate
    },
    # Xue et al. 2025, arXiv 2505.07818; DanceGRPO, scripts/finetune/finetune_flux_grpo_8gpus_lora.sh
    "dance_grpo": {
        "objective": "clipped",
        "sample_kernel": "dance_sde",
        "sample_eta": 0.3,  # --eta
        "sample_num_steps": 12,  # --sampling_steps
        "num_generations": 12,  # --num_generations
        "share_initial_noise": True,  # --init_same_noise
        "train_timestep_fraction": 0.6,  # --timestep_fraction
        "train_updates_per_epoch": 2,  # 2 prompts a process, --gradient_accumulation_steps of 12 images
        **_FLUX_CLIP,
        "step_credit": "terminal",
        "train_level_weighting": "gaussian",
        "beta": 0.0,
    },
    # Li et al. 2025, arXiv 2507.21802; MixGRPO, scripts/finetune/finetune_flux_grpo_MixGRPO.sh
    "mix_grpo": {
        "objective": "clipped",
        "sample_kernel": "flow_sde",  # --flow_grpo_sampling
        "sample_eta": 0.7,  # --eta
        "sample_num_steps": 25,  # --sampling_steps
        "sample_window_size": 4,  # --group_size, of steps
        "sample_window_range": 23,  # max_timesteps of GRPOTrainingStates, --sampling_steps - 2
        "sample_window_interval": 25,  # --iters_per_group
        "sample_window_order": "progressive",  # --sample_strategy, with --roll_back
        "num_generations": 12,  # --num_generations
        "share_initial_noise": True,  # --init_same_noise
        "train_updates_per_epoch": 4,  # a prompt a process, --gradient_accumulation_steps of 3 of its images
        **_FLUX_CLIP,
        "step_credit": "terminal",
        "train_level_weighting": "gaussian",
        "multi_objective_aggregation": "sum_of_normalized",  # --multi_reward_mix advantage_aggr
        "beta": 0.0,  # --kl_coeff
    },
    # Wang and Yu 2025, arXiv 2509.05952; its step is that of FlowCPS, sd3_sde_with_logprob.py; the rest
    # flow_grpo, config/grpo.py, geneval_sd3_fast_nocfg, without its window
    "flow_cps": {
        **_FLOW_GRPO,
        **_FAST_CLIP,
        "sample_kernel": "cps",
        "sample_eta": 0.8,
        "train_level_weighting": "uniform",  # sd3_sde_with_logprob: -(x - mean)^2, without 1 / (2 std^2),
        "train_clip_weighting": "ratio",  # in the ratio itself
        "train_kl_weighting": "gaussian",
        "beta": 0.0,
    },
    # Zheng et al. 2025, arXiv 2509.16117; DiffusionNFT, config/nft.py; its solver of second order is the Euler ODE here
    "diffusion_nft": {
        "objective": "forward",
        "sample_kernel": "ode",  # sample.deterministic
        "sample_num_steps": 10,  # sample.num_steps
        "sample_levels": "scheduler",  # pipeline_with_logprob: set_timesteps(N)
        "num_generations": 24,  # sample.num_image_per_prompt
        "scale_rewards": "batch",  # sample.global_std
        "forward_levels": "sampler",  # train_nft_sd3: the sampler's own timesteps, shuffled
        "train_timestep_fraction": 0.99,  # train.timestep_fraction: 9 of the 10
        "nft_beta": 1.0,  # beta
        "old_policy_decay": 0.5,  # decay_type 1: min(.001 epoch, .5)
        "old_policy_ramp": 0.001,
        "beta": 2e-4,  # train.beta, 1e-4, of the squared distance, which is halved here
    },
    # Xue et al. 2025, arXiv 2509.25050; advantage_weighted_matching, config/dgx_awm.py, ocr_sd3_no_cfg_1node
    "awm": {
        "objective": "awm",
        "sample_kernel": "ode",  # sample.sde_frac = 0, a solver of its own
        "sample_num_steps": 14,  # sample.num_steps
        "sample_levels": "scheduler",  # sd3_pipeline_with_logprob: set_timesteps(N)
        "num_generations": 24,  # sample.num_image_per_prompt
        "scale_rewards": "batch",  # sample.global_std
        "forward_levels": "sampler",  # time_type, discrete_wo_init
        "train_timestep_fraction": 0.43,  # train.train_timesteps, 6 of the 14
        "train_adv_clip_max": 5.0,  # train.adv_clip_max; there divided by 5 (advantage_max)
        "train_log_prob_reduction": "mean",  # of the matching losses
        "train_clip_range": 0.35,  # train.clip_range, 1: a ratio of at most 2, of squares that are halved here
        "train_level_weighting": "velocity",  # Eq. 6's weight; its public configuration has a robust one
        "beta": 0.015,  # train.beta, .003, times 5 as the advantages; both its squares are whole, both here halved
    },
    # the paper's Table 3, "w/o TAFS": the same number of SDE steps; an SDE's few-step estimates are scored as TAFS's
    "tafs_without_annealing": {**_MATCHED, "sample_kernel": "flow_sde"},
    # the paper's Table 3, "w/o Step Adv."
    "tafs_without_step_advantage": {**_MATCHED, "step_credit": "terminal"},
}


# What public code does otherwise, where an option doesn't bring it here.
DIFFERENCES: dict[str, str] = {
    "flow_grpo": (
        "noise in the last step, too, which isn't trained there either (a deviation of .006, from .0089 to 0); "
        "deviations are biased there; bounds 1 -+ eps, not e^(-+eps); what is evaluated is an average "
        "of weights (decay .9, every 8 steps)"
    ),
    "flow_grpo_fast": "as flow_grpo; an epoch's window is one for all images here, there each batch draws its own",
    "superflow": "its code isn't public; as flow_grpo, and what method/superflow.py marks as ours",
    "dance_grpo": (
        "levels are shifted by 3 there, whatever the size, and not as FLUX's scheduler shifts them; LoRA of rank 128; "
        "advantages are divided by std + 1e-8; bounds 1 -+ eps"
    ),
    "mix_grpo": (
        "after the window's last place there, it stays for 25 epochs each on the last 3, 2, 1 and 0 of its steps; "
        "levels, std + 1e-8 and bounds as dance_grpo; full fine-tuning"
    ),
    "flow_cps": (
        "all steps are explored and trained here; in geneval_sd3_fast_nocfg a window of 3 of the first 5 "
        "(sample_window_size=3, sample_window_range=5, sample_window_order='random', sample_window_interval=1); "
        "deviations are biased there; bounds 1 -+ eps"
    ),
    "diffusion_nft": ("a solver of second order, whose denoiser is told whole timesteps; deviations are biased there"),
    "awm": (
        "levels 2 to 12 of 14 there, one of each sixth; a robust weight of the error (its power 1/4, times the level); "
        "a KL of weight 1 to a lagging average; a solver of its own, whose last level is half of the one before; "
        "deviations are biased there; ratios have no lower bound; log-probabilities aren't halved: the same gradient, "
        "2.5 times here"
    ),
}


def preset(name: str) -> dict[str, Any]:
    """Return the options of a preset.

    Raises:
        ValueError: there is none of that name; says which there are.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"there is no preset {shown(name)}; use one of {', '.join(PRESETS)}{did_you_mean(str(name), PRESETS)}"
        )
    return dict(PRESETS[name])
