import dataclasses
import json

import pytest
import torch
from transformers import HfArgumentParser
from trl import TrlParser

from trl_tafs import TAFSGRPOConfig
from trl_tafs.method.options import MethodOptions
from trl_tafs.policy.optimizer import make_optimizer
from trl_tafs.policy.options import OptimizerOptions

DDPO_FIELDS = """
exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir num_epochs
save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from push_to_hub sample_num_steps sample_eta
sample_guidance_scale sample_batch_size sample_num_batches_per_epoch negative_prompts train_batch_size
train_use_8bit_adam train_learning_rate train_adam_beta1 train_adam_beta2 train_adam_weight_decay train_adam_epsilon
train_gradient_accumulation_steps train_max_grad_norm train_num_inner_epochs train_cfg train_adv_clip_max
train_clip_range train_timestep_fraction per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size
per_prompt_stat_tracking_min_count async_reward_computation max_workers
""".split()
GRPO_FIELDS = "num_generations beta delta scale_rewards reward_weights multi_objective_aggregation".split()
NAMES = """
exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir num_epochs
save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from preflight_rollout disable_tqdm sample_num_steps
sample_levels sample_eta sample_guidance_scale sample_embedded_guidance_scale sample_batch_size
sample_num_batches_per_epoch sample_kernel sample_window_size sample_window_interval sample_window_order
sample_window_range sample_kappa num_perturbations antithetic_perturbations share_initial_noise clean_baseline
num_generations group_allocation group_bins group_averaging min_generations max_generations group_optimism group_memory
group_tracker_capacity sampler_kwargs height width max_sequence_length negative_prompts offload_text_encoders
model_cpu_offload vae_tiling decode_batch_size tiny_decoder tiny_decoder_steps prompt_cache_dir reward_weights
multi_objective_aggregation scale_rewards
async_reward_computation max_workers reward_max_retries reward_retry_delay reward_on_failure step_credit credit_trace
credit_discount num_advantage_steps reward_range train_adv_clip_max per_prompt_stat_tracking
per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count credit_kwargs objective forward_levels
forward_num_levels forward_images nft_beta dm_weight dm_guidance_scale dm_rows
dm_fake_updates dm_fake_learning_rate dm_level_shift old_policy_decay old_policy_ramp train_batch_size
train_gradient_accumulation_steps train_updates_per_epoch train_num_inner_epochs train_timestep_fraction train_cfg
train_learning_rate train_lr_scheduler_type train_lr_warmup_steps train_adam_beta1 train_adam_beta2
train_adam_weight_decay train_adam_epsilon train_use_8bit_adam train_max_grad_norm train_max_skipped_steps
train_clip_range train_log_prob_reduction train_level_weighting train_clip_weighting beta train_kl_weighting
train_kl_rows train_center_ratio train_kl_limit delta train_negative_weight old_policy_beta objective_kwargs
train_gradient_checkpointing torch_compile torch_compile_backend
attention_backend train_use_ema train_ema_decay full_finetuning lora_rank lora_alpha lora_target_modules
adapter_name_or_path model_adapter_name eval_freq eval_num_steps eval_samplers eval_images_per_prompt eval_batch_size
metric_for_best_model greater_is_better early_stopping_patience sample_grid_freq sample_grid_rows
picture_freq picture_prompts push_to_hub hub_model_id hub_private_repo
""".split()
FIELDS = {field.name: field for field in dataclasses.fields(TAFSGRPOConfig)}


def parse(*arguments, parser=TrlParser):
    if parser is TrlParser:
        (config,) = TrlParser([TAFSGRPOConfig]).parse_args_and_config(list(arguments))
    else:
        (config,) = HfArgumentParser([TAFSGRPOConfig]).parse_args_into_dataclasses(list(arguments))
    return config


def equal(a, b):
    return dataclasses.asdict(a) | {"exp_name": "", "run_name": ""} == dataclasses.asdict(b) | {
        "exp_name": "",
        "run_name": "",
    }


def test_names_and_their_order_are_pinned():
    assert list(FIELDS) == NAMES


def test_fields_of_ddpo_and_grpo_are_there():
    assert not {*DDPO_FIELDS, *GRPO_FIELDS} - FIELDS.keys()


def test_every_field_has_help_and_a_default():
    helps = {name: field.metadata.get("help", "") for name, field in FIELDS.items()}
    assert not [name for name, text in helps.items() if len(text) <= 10 or not text.endswith((".", ")"))]
    assert not [name for name, text in helps.items() if "%" in text], "argparse would format it"
    missing = dataclasses.MISSING
    assert not [name for name, field in FIELDS.items() if field.default is missing and field.default_factory is missing]


def test_defaults_are_the_papers_with_the_matched_reading_of_its_equation_10():
    config = TAFSGRPOConfig()
    assert (config.objective, config.beta, config.level_weighting) == ("matched", 0.1, "adaptive")
    forward = TAFSGRPOConfig(objective="forward")
    assert (forward.forward_levels, forward.forward_images) == ("trajectory", "final")
    assert (forward.beta, forward.level_weighting) == (0.2, "adaptive")
    assert (config.sample_num_steps, config.num_generations) == (4, None)
    assert (config.lora_rank, config.lora_alpha) == (32, 64)
    assert (config.train_learning_rate, config.train_adam_weight_decay) == (3e-4, 1e-4)
    assert (config.scale_rewards, config.step_credit) == ("group", "step")
    clipped = TAFSGRPOConfig(objective="clipped")
    assert (clipped.beta, clipped.level_weighting) == (0.0, "balanced")
    assert (config.sample_guidance_scale, config.train_cfg) == (1.0, False)
    assert (config.height, config.width) == (None, None)
    assert config.sample_kernel == "annealed"
    assert config.sample_eta == 1.0


@pytest.mark.parametrize("parser", [TrlParser, HfArgumentParser])
def test_no_arguments_are_the_defaults(parser):
    assert equal(parse(parser=parser), TAFSGRPOConfig())


@pytest.mark.parametrize("parser", [TrlParser, HfArgumentParser])
def test_the_command_line_is_read_in_every_type(parser):
    config = parse(
        *("--train_learning_rate", "1e-3", "--sample_num_steps", "8", "--num_generations", "16", "--height", "256"),
        *("--reward_weights", "1.0", "0.5", "--eval_num_steps", "2", "4", "8", "--lora_target_modules", "to_q", "to_k"),
        *(
            "--project_kwargs",
            '{"project_dir": "out", "total_limit": 3}',
            "--tracker_kwargs",
            '{"wandb": {"tags": ["a"]}}',
        ),
        *("--no_allow_tf32", "--objective", "clipped", "--train_clip_range", "0.1"),
        *("--push_to_hub", "--hub_private_repo", "true"),
        *("--train_gradient_accumulation_steps", "2", "--log_with", "tensorboard", "--train_use_ema", "True"),
        parser=parser,
    )
    assert config.train_learning_rate == 1e-3
    assert (config.sample_num_steps, config.num_generations, config.height, config.width) == (8, 16, 256, None)
    assert config.reward_weights == [1.0, 0.5]
    assert config.eval_num_steps == [2, 4, 8]
    assert config.lora_target_modules == ["to_q", "to_k"]
    assert config.project_kwargs == {"project_dir": "out", "total_limit": 3}
    assert config.tracker_kwargs == {"wandb": {"tags": ["a"]}}
    assert config.accelerator_kwargs == {}
    assert (config.allow_tf32, config.push_to_hub, config.hub_private_repo, config.train_use_ema) == (
        False,
        True,
        True,
        True,
    )
    assert (config.train_clip_range, config.train_gradient_accumulation_steps) == (0.1, 2)
    assert config.log_with == "tensorboard"


def test_yaml_is_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "sample_num_steps: 8\n"
        "train_learning_rate: 3e-3\n"  # PyYAML reads this as a string
        "num_generations: 12\n"
        "height: 64\n"
        "allow_tf32: false\n"
        "reward_weights: [1.0, 0.25]\n"
        "eval_samplers: [ode]\n"
        "project_kwargs: {project_dir: out, total_limit: 2}\n"
        'tracker_kwargs: \'{"trackio": {"space_id": "x"}}\'\n'
        "step_credit: reward_to_go\n"
        "objective: clipped\n"
    )
    config = parse("--config", str(path), "--num_generations", "24")
    assert (config.sample_num_steps, config.num_generations, config.height) == (8, 24, 64)
    assert config.train_learning_rate == 3e-3
    assert config.allow_tf32 is False
    assert config.reward_weights == [1.0, 0.25]
    assert config.eval_samplers == ["ode"]
    assert config.project_kwargs == {"project_dir": "out", "total_limit": 2}
    assert config.tracker_kwargs == {"trackio": {"space_id": "x"}}
    assert config.step_credit == "reward_to_go"


def test_an_unknown_field_is_an_error_on_the_command_line_and_in_yaml(tmp_path):
    with pytest.raises((SystemExit, ValueError)):
        parse("--sample_steps", "4")
    path = tmp_path / "config.yaml"
    path.write_text("sample_steps: 4\n")
    with pytest.raises((SystemExit, ValueError)):
        parse("--config", str(path))
    with pytest.raises(TypeError, match="sample_steps"):
        TAFSGRPOConfig(sample_steps=4)


def test_what_was_read_can_be_written_and_read_again(tmp_path):
    config = TAFSGRPOConfig(num_generations=6, project_kwargs={"project_dir": "x"}, reward_weights=[0.5], height=64)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(dataclasses.asdict(config)))  # JSON is YAML
    assert equal(parse("--config", str(path)), config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("project_kwargs", {"total_limit": 3}),
        ("tracker_kwargs", {"a": {"b": 1}}),
        ("accelerator_kwargs", {"a": {"b": 1}}),
    ],
)
def test_dictionaries_are_json_mappings_or_an_error_that_names_the_field(name, value):
    assert getattr(TAFSGRPOConfig(**{name: json.dumps(value)}), name) == value
    assert getattr(TAFSGRPOConfig(**{name: value}), name) == value
    assert getattr(TAFSGRPOConfig(**{name: ""}), name) == getattr(TAFSGRPOConfig(), name) == {}
    with pytest.raises(ValueError, match=f"{name} isn't JSON"):
        TAFSGRPOConfig(**{name: "a=1"})
    with pytest.raises(ValueError, match=f"{name} must be a mapping"):
        TAFSGRPOConfig(**{name: "[1]"})


@pytest.mark.parametrize("name", ["sampler_kwargs", "credit_kwargs", "objective_kwargs"])
def test_options_of_a_parts_own_are_a_mapping_of_those_it_has(name):
    assert getattr(TAFSGRPOConfig(), name) == getattr(TAFSGRPOConfig(**{name: "{}"}), name) == {}
    with pytest.raises(ValueError, match=f"{name} isn't JSON"):
        TAFSGRPOConfig(**{name: "a=1"})
    with pytest.raises(ValueError, match=f"{name} has 'a', which .* doesn't take: it has no options of its own"):
        TAFSGRPOConfig(**{name: '{"a": 1}'})


def test_a_group_is_checked_by_itself_and_the_config_is_one():
    with pytest.raises(ValueError, match="train_learning_rate is 0"):
        OptimizerOptions(train_learning_rate=0)
    config = TAFSGRPOConfig(train_learning_rate=0.5)
    assert isinstance(config, OptimizerOptions) and isinstance(config, MethodOptions)
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerOptions(train_learning_rate=0.5))
    assert optimizer.defaults == make_optimizer([torch.nn.Parameter(torch.zeros(1))], config).defaults


def test_list_defaults_are_each_instances_own():
    TAFSGRPOConfig().eval_num_steps.append(99)
    assert 99 not in TAFSGRPOConfig().eval_num_steps


CHOICES = [
    "mixed_precision", "sample_kernel", "clean_baseline", "multi_objective_aggregation", "scale_rewards", "step_credit",
    "objective", "train_level_weighting", "sample_levels", "train_clip_weighting",
]  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_does_not_exist_is_an_error_that_names_those_that_do(name):
    with pytest.raises(ValueError, match=f"{name} is 'typo'; use one of") as caught:
        TAFSGRPOConfig(**{name: "typo"})
    assert str(getattr(TAFSGRPOConfig(), name)) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eval_samplers": ["ddim"]}, "eval_samplers is .'ddim'.; use a list of annealed and ode"),
        ({"sample_num_steps": 1}, "sample_num_steps is 1; it must be at least 2"),
        ({"sample_batch_size": 0}, "sample_batch_size is 0; it must be at least 1"),
        ({"sample_num_batches_per_epoch": 0}, "sample_num_batches_per_epoch is 0"),
        ({"num_perturbations": 0}, "num_perturbations is 0"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"train_num_inner_epochs": 0}, "train_num_inner_epochs is 0"),
        ({"num_epochs": -1}, "num_epochs is -1"),
        ({"save_freq": -1}, "save_freq is -1"),
        ({"eval_freq": -1}, "eval_freq is -1"),
        ({"num_checkpoint_limit": 0}, "num_checkpoint_limit is 0"),
        ({"reward_max_retries": -1}, "reward_max_retries is -1"),
        ({"max_workers": 0}, "max_workers is 0"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"sample_kappa": 0.0}, "sample_kappa is 0.0; it must be above 0"),
        ({"train_learning_rate": 0.0}, "train_learning_rate is 0.0; it must be above 0"),
        ({"train_learning_rate": float("nan")}, "train_learning_rate is nan"),
        ({"train_adv_clip_max": -1.0}, "train_adv_clip_max is -1.0"),
        ({"train_max_grad_norm": 0.0}, "train_max_grad_norm is 0.0"),
        ({"train_clip_range": 0.0}, "train_clip_range is 0.0"),
        ({"sample_eta": 0.0}, r"sample_eta is 0.0; .* it must lie in \(0, 1\] \(at 0 the sampler is an ODE"),
        ({"sample_eta": 1.5}, "sample_eta is 1.5"),
        ({"train_timestep_fraction": 0.0}, r"train_timestep_fraction is 0.0; it must lie in \(0, 1\]$"),
        ({"train_timestep_fraction": 1.1}, "train_timestep_fraction is 1.1"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"num_advantage_steps": 4}, "num_advantage_steps is 4; with sample_num_steps=4 it can be 1 to 3"),
        ({"num_advantage_steps": 0}, "num_advantage_steps is 0"),
        (
            {"objective": "forward", "step_credit": "sum"},
            "step_credit='sum' .* scores the final image alone; use forward_images='every'",
        ),
        ({"objective": "awm", "num_advantage_steps": 2}, "num_advantage_steps=2: objective='awm'"),
        (
            {"objective": "forward", "train_clip_range": 0.1},
            "train_clip_range=0.1 has no effect with .*='forward', which reads forward_levels",
        ),
        (
            {"per_prompt_stat_tracking": True, "scale_rewards": "none"},
            "scale_rewards='none' has no effect",
        ),
        ({"sample_guidance_scale": 4.5}, "sample_guidance_scale=4.5 with train_cfg=False: .* same guidance"),
        ({"train_cfg": True}, "sample_guidance_scale=1.0 with train_cfg=True"),
        ({"num_perturbations": 3, "antithetic_perturbations": True}, "even num_perturbations, not 3; use 4"),
        ({"objective": "clipped", "num_perturbations": 2, "step_credit": "terminal"}, "a state's own baseline"),
        ({"objective": "forward", "sample_kernel": "clean"}, "learns from images, .* needs objective='clipped'"),
        ({"objective": "awm", "num_perturbations": 2}, "objective='awm' learns from images"),
        (
            {"objective": "forward", "train_level_weighting": "gaussian"},
            "use one of adaptive, velocity, clean with objec",
        ),
        (
            {"objective": "clipped", "train_level_weighting": "adaptive"},
            "use one of gaussian, uniform, balanced, std, diffusion with objective='clipped'",
        ),
        ({"objective": "forward", "forward_levels": "all"}, "forward_levels is 'all'; use one of sampler, random, tr"),
        ({"objective": "forward", "forward_images": "first"}, "forward_images is 'first'; use one of final, every"),
        ({"nft_beta": 0.0}, "nft_beta is 0.0"),
        (
            {"objective": "awm", "nft_beta": 0.5},
            "nft_beta=0.5 has no effect with objective='awm', which reads",
        ),
        ({"objective": "clipped", "forward_images": "every"}, "forward_images=every has no effect with .*='clipped'"),
        (
            {"objective": "forward", "train_log_prob_reduction": "mean"},
            "train_log_prob_reduction=mean has no effect with objective='forward'",
        ),
        ({"forward_num_levels": 0}, "forward_num_levels is 0"),
        ({"old_policy_decay": 1.0}, "old_policy_decay is 1.0"),
        ({"old_policy_decay": 0.5, "old_policy_ramp": 0.0}, "old_policy_ramp is 0.0"),
        (
            {"objective": "clipped", "sample_kernel": "clean", "per_prompt_stat_tracking": True},
            "clean_baseline='group'",
        ),
        (
            {"objective": "clipped", "sample_kernel": "clean", "num_perturbations": 4, "step_credit": "reward_to_go"},
            "step_credit='reward_to_go' .* use step_credit='step'",
        ),
        ({"sample_kernel": "flow_sde", "sample_eta": -1.0}, "sample_eta is -1.0; .* in .0, inf"),
        ({"sample_kernel": "cps", "sample_eta": 1.5}, "sample_kernel='cps' it must lie in .0, 1"),
        (
            {"sample_kernel": "clean", "objective": "clipped", "sample_eta": 0.5},
            "has no effect with sample_kernel='clean'",
        ),
        ({"sample_kernel": "ode", "objective": "clipped"}, "sample_kernel='ode' has no density"),
        ({"sample_window_range": 2}, "needs a sample_window_size"),
        ({"sample_window_size": 4}, "sample_window_size=4 .* first 3 of 4, .* use a range of 4 to 3"),
        ({"sample_window_size": 2, "sample_window_range": 4}, "first 4 of 4, the last of which never trains"),
        ({"sample_window_size": 2, "sample_kernel": "ode"}, "needs a stochastic kernel, not 'ode'"),
        ({"sample_window_size": 2, "sample_window_order": "up"}, "sample_window_order is 'up'; use one of progressive"),
        ({"group_allocation": "neyman"}, "group_allocation is 'neyman'; use one of fixed, variance, streaming"),
        ({"min_generations": 2}, "min_generations and max_generations need group_allocation"),
        (
            {"group_allocation": "variance", "per_prompt_stat_tracking": True},
            "per_prompt_stat_tracking replaces the gro",
        ),
        ({"group_allocation": "streaming", "min_generations": 1}, "how the first draws vary; use min_generations=2"),
        (
            {
                "group_allocation": "variance",
                "min_generations": 1,
                "multi_objective_aggregation": "normalize_then_sum",
            },
            "min_generations=1 .* use multi_objective_aggregation='sum_then_normalize'",
        ),
        (
            {
                "group_allocation": "variance",
                "min_generations": 1,
                "multi_objective_aggregation": "sum_of_normalized",
            },
            "min_generations=1 .* use multi_objective_aggregation='sum_then_normalize'",
        ),
        (
            {"objective": "clipped", "train_clip_weighting": "ratio", "train_level_weighting": "gaussian"},
            "'ratio' has no effect with train_level_weighting='gaussian', whose weights are 1",
        ),
        ({"train_clip_weighting": "ratio"}, "train_clip_weighting=ratio has no effect with objective='matched'"),
        ({"train_updates_per_epoch": 0}, "train_updates_per_epoch is 0; it must be at least 1, or None"),
        ({"group_memory": 0.0}, "group_memory is 0.0"),
        ({"credit_trace": -1.0}, "credit_trace is -1.0; it must be at least 0"),
        ({"early_stopping_patience": 3}, "early_stopping_patience needs eval_freq"),
        ({"early_stopping_patience": 3, "eval_freq": 2}, "early_stopping_patience needs .* metric_for_best_model"),
        ({"metric_for_best_model": "eval/annealed_4/a"}, "metric_for_best_model needs eval_freq"),
        ({"hub_model_id": "a/b/c"}, "hub_model_id is 'a/b/c', which is no name on the Hub"),
        ({"push_to_hub": True, "run_name": "my run"}, "run_name, .* is 'my run', which is no name on the Hub"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_an_error_that_says_the_numbers(changes, told):
    with pytest.raises(ValueError, match=told):
        TAFSGRPOConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"negative_prompts": "blurry"}, "negative_prompts='blurry' needs sample_guidance_scale above 1"),
        ({"train_ema_decay": 0.9}, "train_ema_decay=0.9 needs train_use_ema=True"),
        ({"train_lr_warmup_steps": 5}, "train_lr_warmup_steps=5 needs 'constant_with_warmup'"),
        ({"sample_window_interval": 3}, "sample_window_interval=3 needs a sample_window_size"),
        (
            {"group_memory": 0.5, "group_optimism": 1.0},
            "group_optimism=1.0 .*; group_memory=0.5 needs group_allocation",
        ),
        ({"per_prompt_stat_tracking_buffer_size": 32}, "buffer_size=32 needs per_prompt_stat_tracking=True"),
        ({"objective": "forward", "forward_num_levels": 6}, "forward_num_levels=6 needs forward_levels='random'"),
        ({"old_policy_ramp": 0.5}, "old_policy_ramp=0.5 needs old_policy_decay above 0"),
        ({"full_finetuning": True, "lora_rank": 64}, "lora_rank=64 needs full_finetuning=False"),
        ({"greater_is_better": False}, "greater_is_better=False needs a metric_for_best_model"),
        ({"sample_grid_rows": 3, "sample_grid_freq": 0}, "sample_grid_rows=3 needs sample_grid_freq above 0"),
        ({"sample_kappa": 0.2}, "sample_kappa=0.2 needs another sample_kernel"),
        ({"objective": "clipped", "credit_trace": 1.0}, "credit_trace=1.0 needs another step_credit"),
        ({"train_timestep_fraction": 0.5, "sample_num_steps": 2}, "train_timestep_fraction=0.5 needs an objective"),
        ({"project_kwargs": {"total_limit": 2}, "num_checkpoint_limit": 3}, "total_limit=2, and num_checkpoint_limit"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_an_option_that_nothing_reads_is_an_error_that_says_what_would(changes, told):
    with pytest.raises(ValueError, match=told):
        TAFSGRPOConfig(**changes)


def test_options_that_are_read_or_left_alone_are_taken():
    TAFSGRPOConfig(negative_prompts="blurry", sample_guidance_scale=2.0, train_cfg=True, train_ema_decay=0.99)
    TAFSGRPOConfig(train_use_ema=True, train_ema_decay=0.9, old_policy_decay=0.5, old_policy_ramp=0.1)
    TAFSGRPOConfig(objective="clipped", step_credit="trace", credit_trace=1.0, sample_kernel="clean", sample_kappa=0.2,
                   clean_baseline="group")  # fmt: skip
    TAFSGRPOConfig(negative_prompts=None, project_kwargs={"total_limit": 5}, num_checkpoint_limit=5)


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_guidance_scale": 4.5, "train_cfg": True},
        {"objective": "clipped", "sample_kernel": "clean", "num_perturbations": 8},
        {"objective": "clipped", "num_perturbations": 4, "antithetic_perturbations": True},
        {"objective": "forward", "train_level_weighting": "velocity", "forward_levels": "trajectory"},
        {"objective": "awm", "forward_images": "every", "step_credit": "gain"},
        {
            "objective": "clipped",
            "train_level_weighting": "balanced",
            "share_initial_noise": True,
            "old_policy_decay": 0.9,
        },
        {"objective": "clipped", "sample_kernel": "clean", "clean_baseline": "group", "per_prompt_stat_tracking": True},
        {"early_stopping_patience": 3, "eval_freq": 2, "metric_for_best_model": "eval/annealed_4/a"},
        {"objective": "clipped", "num_advantage_steps": 3},
        {"objective": "forward", "forward_images": "every", "num_advantage_steps": 2, "step_credit": "sum"},
        {"sample_num_steps": 2, "num_advantage_steps": 1},
        {"sample_eta": 0.3},
        {"num_epochs": 0, "save_freq": 0},
    ],
    ids=lambda value: ",".join(value),
)
def test_what_can_work_is_taken(changes):
    config = TAFSGRPOConfig(**changes)
    assert all(getattr(config, name) == value for name, value in changes.items())


@pytest.mark.parametrize(
    "changes",
    [
        {
            "objective": "clipped",
            "sample_kernel": "clean",
            "step_credit": "gain",
        },  # torch.stack fails in the first rollout
        {
            "objective": "clipped",
            "sample_kernel": "clean",
            "step_credit": "terminal",
        },  # no signal for any step but the last
        {
            "objective": "clipped",
            "sample_kernel": "clean",
            "num_perturbations": 4,
            "step_credit": "terminal",
        },  # likewise
        {"objective": "clipped", "sample_kernel": "clean", "num_advantage_steps": 1},  # likewise
        {"per_prompt_stat_tracking_min_count": 32, "per_prompt_stat_tracking": True},  # above the buffer: never reached
        {"train_gradient_accumulation_steps": 0},
        {"train_gradient_accumulation_steps": -1},
        {"early_stopping_patience": 0, "eval_freq": 1, "metric_for_best_model": "a"},  # stops at the first evaluation
        {"eval_num_steps": [0]},
        {"eval_images_per_prompt": 0},
        {"eval_batch_size": 0},
        {"train_ema_decay": 1.5},
        {"reward_retry_delay": -1.0},
        {"sample_grid_rows": 0},
    ],
    ids=lambda value: ",".join(value),
)
def test_what_cannot_work_and_is_not_yet_checked(changes):
    with pytest.raises(ValueError):
        TAFSGRPOConfig(**changes)


def test_the_run_writes_where_it_is_told(tmp_path):
    config = TAFSGRPOConfig(logdir="logs", run_name="one")
    assert config.project_dir == "logs/one"
    assert TAFSGRPOConfig(exp_name="two", logdir="x").project_dir == "x/two"
    assert TAFSGRPOConfig(project_kwargs={"project_dir": str(tmp_path)}).project_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("steps", "fraction", "replayed"), [(4, 1.0, 3), (4, 0.7, 2), (4, 0.34, 1), (4, 0.1, 1), (3, 0.5, 1), (10, 0.5, 4)]
)
def test_trained_and_replayed_steps(steps, fraction, replayed):
    config = TAFSGRPOConfig(sample_num_steps=steps, train_timestep_fraction=fraction)
    assert config.num_trained_steps == steps - 1
    assert config.num_replayed_rows == replayed


def test_a_run_is_evaluated_every_so_often_and_at_its_end():
    config = TAFSGRPOConfig(eval_freq=2)
    assert [epoch for epoch in range(1, 6) if config.evaluates_at(epoch, 5)] == [2, 4, 5]
    assert not any(TAFSGRPOConfig().evaluates_at(epoch, 5) for epoch in range(1, 6))
