"""`trl-tafs sample`."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trl_tafs.cli.adapters import check_adapter
from trl_tafs.cli.arguments import SAMPLERS, ModelOptions, PromptOptions, check_drawing, load_pipeline
from trl_tafs.cli.command import CommandOptions, make_parser, merged, parse
from trl_tafs.cli.parsing import check_numbers
from trl_tafs.options import check_choice
from trl_tafs.output.errors import one_line
from trl_tafs.output.writable import check_writable


@dataclass
class SampleOptions(CommandOptions):
    """What is drawn, and where it is written."""

    title: ClassVar[str] = "Sampling"
    positional: ClassVar[dict[str, str | None]] = {"adapter": None}
    required: ClassVar[tuple[str, ...]] = ("prompt",)

    adapter: str = field(default="", metadata={"help": "Folder or repository of the adapter; `none`: the base model."})
    prompt: list[str] | None = field(default=None, metadata={"help": "One or more prompts, an image each."})
    image: list[str] | None = field(
        default=None, metadata={"help": "Source pictures, for models that edit: the same for each prompt."}
    )
    output: str = field(default="image.png", metadata={"help": "PNG; several images side by side."})
    num_steps: int = field(default=4, metadata={"help": "Steps."})
    sampler: str = field(default="annealed", metadata={"help": "How.", "choices": SAMPLERS})
    height: int | None = field(default=None, metadata={"help": "Pixels; None: the model's own, at most 512."})
    width: int | None = field(default=None, metadata={"help": "As height."})
    seed: int = field(default=0, metadata={"help": "Of the noise."})
    model_cpu_offload: bool = field(default=False, metadata={"help": "Each model is on the GPU only while it works."})

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "sampler", SAMPLERS)


KINDS = (SampleOptions, ModelOptions, PromptOptions)
SHORT = ("prompt", "output", "num_steps", "seed", "pretrained_model", "guidance_scale", "height", "width", "sampler")


def sample(argv: Sequence[str]) -> Callable[[], None]:
    """Draw images with an adapter, by the sampler that it was trained for."""
    options = Namespace(**merged(parse(KINDS, argv, parser=sampling_parser())))
    check_numbers(options, height=1, width=1)
    check_drawing(options)
    if Path(options.output).suffix.lower() != ".png":
        raise ValueError(f"--output is {options.output!r}; images are written as PNG, so give a name that ends in .png")
    if Path(options.output).is_dir():
        raise ValueError(f"--output can't be written: {options.output} is a folder")
    check_writable(Path(options.output).parent, "the folder of --output")
    check_adapter(options.adapter)
    return partial(_sample, options, load_pipeline(options, options.dtype))


def sampling_parser() -> Any:
    """Return the parser of `trl-tafs sample`."""
    usage = "%(prog)s ADAPTER --pretrained_model MODEL --prompt TEXT ... [options]"
    return make_parser(KINDS, short=SHORT, prog="trl-tafs sample", description=sample.__doc__, usage=usage)


def _sample(options: Namespace, pipeline: Any) -> None:
    import torch

    from trl_tafs.output.files import write_whole
    from trl_tafs.output.pictures import tensor_to_image
    from trl_tafs.policy.denoiser_file import applied

    with applied(pipeline, None if options.adapter == "none" else options.adapter):
        if options.model_cpu_offload:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        images = _draw(pipeline, options)
    picture = tensor_to_image(torch.cat(list(images.cpu()), dim=-1))
    try:
        write_whole(options.output, lambda beside: picture.save(beside, format="PNG"))
    except OSError as error:
        raise ValueError(f"--output {options.output} can't be written: {one_line(error)}") from error
    print(f"{len(images)} image{'s' if len(images) > 1 else ''} in {options.output}")


def _draw(pipeline: Any, options: Namespace) -> Any:
    """Return an image of each prompt, (B, 3, H, W)."""
    import torch

    from trl_tafs.pipelines.finite import check_images

    default = pipeline.default_size()
    height, width = options.height or default[0], options.width or default[1]
    pipeline.check_guidance(options.guidance_scale)
    pipeline.embedded_guidance(options.embedded_guidance_scale)
    pipeline.check_sequence_length(options.max_sequence_length)
    pipeline.check_size(height, width)
    call = pipeline.call_arguments(
        options.num_steps,
        options.guidance_scale,
        options.negative_prompt,
        options.embedded_guidance_scale,
        options.levels,
    )
    if options.sampler == "ode":
        pipeline.scheduler = pipeline.euler_scheduler()  # its own may stretch the levels, or be another solver
    call |= {"height": height, "width": width, "output_type": "pt"} | pipeline.size_arguments(height, width)
    latents: list[Any] = []

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [tensors["latents"]]
        return {}

    taken = inspect.signature(pipeline.stock_class().__call__).parameters
    if "max_sequence_length" in taken:
        call["max_sequence_length"] = options.max_sequence_length or pipeline.default_max_sequence_length()
    if "callback_on_step_end" in taken:
        call["callback_on_step_end"] = keep
    sources = _sources(pipeline, options)
    found = []
    # an editing pipeline's pictures are of one prompt: it draws one after the other
    for i, prompts in enumerate([[prompt] for prompt in options.prompt] if sources else [options.prompt]):
        if "negative_prompt" in call:
            call["negative_prompt"] = [options.negative_prompt or ""] * len(prompts)
        generator = torch.Generator().manual_seed(options.seed + i)
        annealed = options.sampler == "annealed"
        images = pipeline(prompt=prompts, generator=generator, annealed=annealed, **sources, **call).images
        check_images(pipeline, images, latents[0] if latents else images)
        found.append(images)
    return torch.cat(found)


def _sources(pipeline: Any, options: Namespace) -> dict[str, Any]:
    """Return the stock call's argument of the source pictures; none without `--image`."""
    from trl_tafs.pipelines.pictures import Picture, check_pictures

    pictures = [Picture(path) for path in options.image or ()]
    check_pictures(pipeline, pictures, "--image")
    images = [picture.image() for picture in pictures]
    return {} if not images else {"image": images if pipeline.max_pictures > 1 else images[0]}
