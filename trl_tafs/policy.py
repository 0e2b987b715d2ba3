"""The policy: a pipeline's denoiser with a trained LoRA, its reference, its optimizer and its average."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.hub import check_adapter_fits, lora_metadata, read_adapter
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.rollout import noise_seed

DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepare_base(pipeline: TAFSPipelineMixin, config: TAFSGRPOConfig, device: torch.device) -> None:
    """Freeze the base, put it on the device, and cast it to the dtype of `mixed_precision`.

    What waits on the CPU is cast, too. The VAE keeps its dtype: several decode to black in float16. A quantized module
    keeps its own, and one of bitsandbytes its place.

    Raises:
        ValueError: models that are on the move already, or can't be moved.
    """
    dtype = DTYPES[config.mixed_precision]
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    for name, module in modules.items():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"the pipeline's {name} has a hook of Accelerate, as enable_model_cpu_offload or device_map leave one; "
                "call pipeline.remove_all_hooks() and use model_cpu_offload=True"
            )
        module.requires_grad_(False)
        module.eval()  # rollout and replay alike: no dropout anywhere
        waits = config.model_cpu_offload and module is not pipeline.denoiser
        waits = waits or (config.offload_text_encoders and name.startswith("text_encoder"))
        if not is_bitsandbytes(module):
            module.to("cpu" if waits else device)
        trained = config.full_finetuning and module is pipeline.denoiser
        if dtype is not None and name != "vae" and not trained and not is_quantized(module):
            cast(module, dtype)
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    if config.model_cpu_offload:
        if is_quantized(pipeline.denoiser):
            raise ValueError(
                f"model_cpu_offload can't move a quantized {type(pipeline.denoiser).__name__}, which is small already; "
                "use offload_text_encoders=True"
            )
        turns = Turns(pipeline.denoiser, device)
        encoders = [module for name, module in modules.items() if name.startswith("text_encoder")]
        pipeline.encoding = partial(turns, [module for module in encoders if not is_bitsandbytes(module)])
        pipeline.decoding = partial(turns, [pipeline.vae])
    if config.train_gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module as `from_pretrained(torch_dtype=dtype)` would: parts that overflow in a short dtype keep theirs.

    Transformers' `_keep_in_fp32_modules` are those under float16 (T5's `wo`), its `_strict` ones and diffusers' always.
    """
    from diffusers import ModelMixin

    names = list(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or isinstance(module, ModelMixin):
        names += getattr(module, "_keep_in_fp32_modules", None) or ()
    pattern = re.compile(rf"(^|\.)({'|'.join(names)})(\.|$)") if names else None
    kept = [(p, p.data) for name, p in module.named_parameters() if pattern is not None and pattern.search(name)]
    module.to(dtype)
    for parameter, data in kept:
        parameter.data = data


def is_quantized(module: nn.Module) -> bool:
    """Whether diffusers or transformers loaded it with a `quantization_config`."""
    return getattr(module, "hf_quantizer", None) is not None or bool(getattr(module, "is_quantized", False))


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether its weights are bitsandbytes', which stay where they were loaded."""
    return bool(getattr(module, "is_loaded_in_4bit", False) or getattr(module, "is_loaded_in_8bit", False))


class Turns:
    """The models of a pipeline take turns on the device: while there are guests, the denoiser is away.

    Its trained parameters stay: the optimizer and DDP know where they are.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device) -> None:
        self.denoiser, self.device, self.away = denoiser, device, torch.device("cpu")
        self.guests: list[nn.Module] = []

    @contextmanager
    def __call__(self, modules: list[nn.Module]) -> Iterator[None]:
        """A context in which `modules` are on the device; it may be entered within itself."""
        arriving = [module for module in modules if module not in self.guests]
        if arriving and not self.guests:
            move_frozen(self.denoiser, self.away)
        for module in arriving:
            self.guests.append(module.to(self.device))
        try:
            yield
        finally:
            for module in arriving:
                self.guests.remove(module.to(self.away))
            if arriving and not self.guests:
                move_frozen(self.denoiser, self.device)


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """All of a module but its trained parameters."""
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad]


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Move them, in place."""
    for tensor in frozen_tensors(module):
        tensor.data = tensor.data.to(device)


def free_denoiser(pipeline: TAFSPipelineMixin, lora_config: Any | None) -> None:
    """Train the whole denoiser, in float32, instead of a LoRA on it."""
    denoiser = pipeline.denoiser
    if lora_config is not None or getattr(denoiser, "peft_config", None):
        raise ValueError("full_finetuning trains no LoRA; leave out the LoraConfig, and fuse or unload adapters")
    if is_quantized(denoiser):
        raise ValueError("full_finetuning can't train a quantized denoiser; load it without a quantization_config")
    denoiser.float().requires_grad_(True)


def attach_lora(pipeline: TAFSPipelineMixin, config: TAFSGRPOConfig, lora_config: Any | None) -> tuple[str, Any]:
    """Put the trained LoRA on the denoiser; returns the adapter's name and its `LoraConfig`.

    It is, in this order: the one adapter that the pipeline came with; `config.adapter_name_or_path`; the user's
    `lora_config`; or a new one of `lora_rank` on the family's default modules.
    """
    denoiser = pipeline.denoiser
    attached = dict(getattr(denoiser, "peft_config", {}))
    if attached:
        if len(attached) > 1 or lora_config is not None or config.adapter_name_or_path:
            raise ValueError(
                f"the pipeline already carries the adapters {', '.join(attached)}; fuse or unload them, or bring "
                "exactly one and neither a LoraConfig nor adapter_name_or_path, to train that one on"
            )
        name, lora_config = next(iter(attached.items()))
        _check_dropout(lora_config)
        denoiser.set_adapter(name)
    else:
        name = "default"
        lora_config = _add_lora(pipeline, config, lora_config)
    lora_metadata(lora_config)  # refuses what diffusers' format can't hold, while nothing is trained yet
    denoiser.eval()
    for parameter_name, parameter in denoiser.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name and f".{name}." in f"{parameter_name}.")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return name, lora_config


def _add_lora(pipeline: TAFSPipelineMixin, config: TAFSGRPOConfig, lora_config: Any | None) -> Any:
    from peft import LoraConfig, set_peft_model_state_dict

    denoiser, weights = pipeline.denoiser, None
    if config.adapter_name_or_path:
        if lora_config is not None:
            raise ValueError("give either a LoraConfig or adapter_name_or_path, whose own configuration is used")
        weights, lora_config = read_adapter(config.adapter_name_or_path, denoiser=pipeline.denoiser_name)
        check_adapter_fits(weights, denoiser)
    elif lora_config is None:
        lora_config = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            init_lora_weights="gaussian",
            target_modules=list(config.lora_target_modules or pipeline.lora_target_modules),
            exclude_modules=None if config.lora_target_modules else pipeline.lora_excluded_modules or None,
        )
    _check_dropout(lora_config)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(
        noise_seed(config.seed, "lora")
    )  # the same on every process, whatever came before
    try:
        denoiser.add_adapter(lora_config)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"the LoRA can't be attached to {type(denoiser).__name__}: {error} Its linear layers end in: "
            f"{', '.join(names)}"
        ) from error
    finally:
        torch.set_rng_state(state)
    if weights is not None:
        set_peft_model_state_dict(denoiser, weights, adapter_name="default")
    return lora_config


def _check_dropout(lora_config: Any) -> None:
    if getattr(lora_config, "lora_dropout", 0.0):
        raise ValueError(
            f"lora_dropout is {lora_config.lora_dropout}: rollout and training must be the same policy, or the ratio "
            "isn't 1 on policy; use lora_dropout=0.0"
        )


@contextmanager
def adapter_disabled(denoiser: nn.Module) -> Iterator[None]:
    """The base policy inside: the reference of the KL, at no memory of its own."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def trainable_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """The LoRA's, in order."""
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def adapter_state_dict(denoiser: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The LoRA's weights as PEFT names them, copied to the CPU."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def make_optimizer(parameters: list[nn.Parameter], config: TAFSGRPOConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with 8-bit state."""
    if config.train_use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("train_use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        optimizer_class = torch.optim.AdamW
    return optimizer_class(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
    )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, config: TAFSGRPOConfig, total_steps: int) -> Any:
    """Diffusers' `get_scheduler`, over `total_steps` optimizer steps."""
    from diffusers.optimization import get_scheduler

    if config.train_lr_warmup_steps > total_steps > 0:
        warnings.warn(
            f"train_lr_warmup_steps is {config.train_lr_warmup_steps}, and the run has {total_steps} optimizer steps",
            stacklevel=2,
        )
    return get_scheduler(
        config.train_lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=config.train_lr_warmup_steps,
        num_training_steps=total_steps,
    )


def apply_settings(optimizer: Any, lr_scheduler: Any, config: TAFSGRPOConfig) -> None:
    """Make the configuration's optimizer settings hold after a resume, which restores the checkpoint's."""
    lr_scheduler.base_lrs = [config.train_learning_rate] * len(lr_scheduler.base_lrs)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.train_learning_rate
        group["betas"] = (config.train_adam_beta1, config.train_adam_beta2)
        group["weight_decay"], group["eps"] = config.train_adam_weight_decay, config.train_adam_epsilon
    rates = [
        rate * factor(lr_scheduler.last_epoch)
        for rate, factor in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates


class AdapterAverage:
    """An exponential moving average of the trained parameters, by diffusers' EMAModel."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = parameters
        self.ema = EMAModel(parameters, decay=decay)

    def update(self) -> None:
        """After an optimizer step."""
        self.ema.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The denoiser carries the average inside."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.ema.load_state_dict(state)
        self.ema.to(self.parameters[0].device)


class HeldWeights:
    """A copy of the trained parameters at one moment, which the denoiser can carry for a while."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.weights = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The denoiser carries these weights inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.weights[i] = self.weights[i], parameter.data


class OldPolicy(HeldWeights):
    """The lagging policy that draws the rollouts (DiffusionNFT, arXiv 2509.16117).

    After each epoch it becomes `d old + (1 - d) present`, `d = min(ramp * epochs, decay)`.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, ramp: float) -> None:
        super().__init__(parameters)
        self.decay, self.ramp, self.epochs = decay, ramp, 0

    @torch.no_grad()
    def update(self) -> None:
        """After an epoch."""
        self.epochs += 1
        share = 1.0 - min(self.ramp * self.epochs, self.decay)
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in self.parameters], share)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"weights": self.weights, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.epochs = state["epochs"]
        for weight, value in zip(self.weights, state["weights"], strict=True):
            weight.copy_(value)
