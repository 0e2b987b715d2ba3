"""Train SD3.5-medium (or any SD3 pipeline) with TAFS-GRPO, on prompts from a file, for any rewards.

One GPU of 24 GB:

    accelerate launch examples/train_sd3.py \
        --pretrained_model stabilityai/stable-diffusion-3.5-medium \
        --prompts prompts.txt --reward clip_score=1.0 \
        --sample_batch_size 4 --sample_num_batches_per_epoch 24 --train_batch_size 4 \
        --train_gradient_checkpointing True --offload_text_encoders True \
        --logdir runs --run_name sd35m-clip

Eight GPUs, the settings in a file:

    accelerate launch --num_processes 8 examples/train_sd3.py \
        --config examples/configs/sd35_medium_8x80gb.yaml --prompts prompts.txt

The embedded pipeline, on a CPU, in a minute:

    accelerate launch --cpu examples/train_sd3.py --config examples/configs/digits.yaml
"""

from trl_tafs import TAFSGRPOTrainer
from trl_tafs.cli.arguments import load_pipeline, load_rewards, parse_arguments
from trl_tafs.prompts.sets import load_prompts

if __name__ == "__main__":
    script_args, training_args = parse_arguments()

    if script_args.prompts is None:
        raise ValueError("--prompts is needed: a .txt, .jsonl, .json or .csv file, or a dataset on the Hub")
    prompts = load_prompts(script_args.prompts)
    eval_prompts = load_prompts(script_args.eval_prompts) if script_args.eval_prompts else None
    rewards, eval_rewards = load_rewards(script_args)

    trainer = TAFSGRPOTrainer(
        training_args,
        rewards,
        prompts,
        load_pipeline(script_args, training_args.mixed_precision),
        eval_prompts=eval_prompts,
        eval_reward_function=eval_rewards,
    )
    trainer.train()  # saves the adapter, and pushes it with --push_to_hub True --hub_model_id USER/NAME
