"""`trl-tafs sample`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trl_tafs.cli.arguments import (
    add_model_options,
    add_prompt_options,
    check_negative_prompt,
    load_pipeline,
    quantization_config,
)


def sample(argv: Sequence[str]) -> Callable[[], None]:
    """Draw images with an adapter, by the sampler that it was trained for."""
    parser = argparse.ArgumentParser(prog="trl-tafs sample", description=sample.__doc__)
    parser.add_argument("adapter", help="folder or repository of the adapter; `none` for the base model")
    add_model_options(parser, "its base model")
    parser.add_argument("--model_cpu_offload", action="store_true", help="each model is on the GPU only while it works")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts, an image each")
    parser.add_argument("--output", default="image.png", help="PNG; several images side by side (default: image.png)")
    parser.add_argument("--num_steps", type=int, default=4, help="steps (default: 4)")
    parser.add_argument("--sampler", choices=["annealed", "ode"], default="annealed")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance (default: 1, off)")
    add_prompt_options(parser)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(list(argv))
    quantization_config(options.quantization, options.quantized_components)
    check_negative_prompt(options)
    return partial(_sample, options)


def _sample(options: argparse.Namespace) -> None:
    import torch

    from trl_tafs.output.pictures import save_png, tensor_to_image
    from trl_tafs.policy.denoiser_file import applied

    pipeline = load_pipeline(options, options.dtype)
    with applied(pipeline, None if options.adapter == "none" else options.adapter):
        if options.model_cpu_offload:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        images = _draw(pipeline, options)
    save_png(tensor_to_image(torch.cat(list(images.cpu()), dim=-1)), options.output)
    print(f"{len(images)} image{'s' if len(images) > 1 else ''} in {options.output}")


def _draw(pipeline: Any, options: argparse.Namespace) -> Any:
    """Return an image of each prompt, (B, 3, H, W)."""
    import torch

    from trl_tafs.pipelines.finite import check_images

    default = pipeline.default_size()
    call = pipeline.call_arguments(
        options.num_steps, options.guidance_scale, options.negative_prompt, options.embedded_guidance_scale
    )
    if options.sampler == "ode":
        pipeline.scheduler = pipeline.euler_scheduler()  # its own may stretch the levels, or be another solver
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(options.prompt)
    latents: list[Any] = []

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [tensors["latents"]]
        return {}

    images = pipeline(
        prompt=options.prompt,
        height=options.height or default[0],
        width=options.width or default[1],
        generator=torch.Generator().manual_seed(options.seed),
        annealed=options.sampler == "annealed",
        max_sequence_length=options.max_sequence_length or pipeline.default_max_sequence_length(),
        output_type="pt",
        callback_on_step_end=keep,
        **call,
    ).images
    check_images(pipeline, images, latents[0])
    return images
