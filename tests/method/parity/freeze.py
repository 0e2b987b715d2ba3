"""Write public.json: what the code that the presets cite gives for the cases of public_cases.py.

    python tests/method/parity/freeze.py --sources FOLDER

FOLDER has a clone of each repository of SOURCES, in a folder of its name. Files are read at the commit that stands
there, and of them single functions, or the lines of a training loop, are run as they are: a model's prediction, which
they take, is given.
"""

import argparse
import ast
import json
import math
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import public_cases as cases

SOURCES = {  # repository: commit
    "yifan123/flow_grpo": "ac4c86e8cae021841f1fde853d340e0db67690dd",
    "IamCreateAI/FlowCPS": "b402c7a3d5b2539e6c42fed6c6c042bab9a1be05",
    "Tencent-Hunyuan/MixGRPO": "e5cdd6a427778d8c8b2e7a48ce16972141adbe7c",
    "XueZeyue/DanceGRPO": "15cc71d53cc2e6e18a68ee607d5fb6ba9a99e344",
    "NVlabs/DiffusionNFT": "24af5554898d85e93efa492f42b5e9cdf4156e9b",
    "scxue/advantage_weighted_matching": "be5137232e33a21b449ed65a533211d0deb97ed8",
}
SDE = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
MIX = "fastvideo/train_grpo_flux.py"
DANCE = "fastvideo/train_grpo_flux_lora.py"
AWM = "advantage_weighted_matching/scripts/train_sd3_awm.py"


class Sources:
    """The clones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def text(self, repository: str, file: str) -> str:
        """A file at its commit."""
        clone = self.folder / repository.split("/")[1]
        command = ["git", "-C", str(clone), "show", f"{SOURCES[repository]}:{file}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def define(self, repository: str, file: str, name: str) -> types.SimpleNamespace | object:
        """One function or class of a file, without what the file imports."""
        tree = ast.parse(self.text(repository, file))
        (node,) = [node for node in tree.body if getattr(node, "name", None) == name]
        module = ast.Module([ast.parse("from __future__ import annotations").body[0], node], [])
        names = {"torch": torch, "math": math, "np": np, "dataclass": dataclass}
        exec(compile(module, file, "exec"), names)
        return names[name]

    def lines(self, repository: str, file: str, first: str, last: str, **names: object) -> dict:
        """Run the lines of a file from the first that starts with `first` up to the next with `last`, without that."""
        found = self.text(repository, file).splitlines()
        start = next(i for i, line in enumerate(found) if line.strip().startswith(first))
        end = next(i for i in range(start, len(found)) if found[i].strip().startswith(last))
        scope = {"torch": torch} | names
        exec(textwrap.dedent("\n".join(found[start:end])), scope)
        return scope

    def tracked(self, repository: str, file: str) -> list[float]:
        """The advantages by a file's PerPromptStatTracker."""
        tracker_of = self.define(repository, file, "PerPromptStatTracker")
        return tracker_of(global_std=True).update(cases.PROMPTS, cases.REWARDS).tolist()


def space(**names: object) -> types.SimpleNamespace:
    """A configuration."""
    return types.SimpleNamespace(**names)


def plain(values: dict) -> dict:
    """Tensors as lists."""
    return {k: v.detach().double().flatten().tolist() if torch.is_tensor(v) else v for k, v in values.items()}


def flow_grpo(sources: Sources) -> dict:
    """Step, log-probability, loss and gradient of each trained step, with a KL, and the advantages."""
    step = sources.define("yifan123/flow_grpo", SDE, "sde_step_with_logprob")
    scheduler = space(sigmas=torch.tensor(cases.LEVELS), index_for_timestep=int)
    config = space(train=space(adv_clip_max=5.0, clip_range=1e-4, beta=0.04))
    found = {}
    for n in cases.STEPS:
        v = cases.wave("v").requires_grad_()
        given = {"timestep": [n] * 4, "sample": cases.wave("x"), "noise_level": 0.7, "prev_sample": cases.wave("next")}
        _, log_prob, mean, std = step(scheduler, v, **given)
        _, _, base, _ = step(scheduler, cases.wave("base"), **given)
        sample = {"advantages": torch.tensor(cases.ADVANTAGES)[:, None], "log_probs": log_prob.detach()[:, None]}
        first, last = "advantages = torch.clamp(", 'info["approx_kl"]'
        scope = sources.lines(
            "yifan123/flow_grpo", "scripts/train_sd3.py", first, last, sample=sample, j=0, config=config,
            log_prob=log_prob, prev_sample_mean=mean, prev_sample_mean_ref=base, std_dev_t=std,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(scope["loss"], v)
        found[str(n)] = plain({"mean": mean, "g": std[:, 0, 0, 0], "log_prob": log_prob, "gradient": gradient}) | plain(
            {"loss": scope["loss"], "kl": scope["kl_loss"]}
        )
    return found | {"advantages": sources.tracked("yifan123/flow_grpo", "flow_grpo/stat_tracking.py")}


def flow_cps(sources: Sources) -> dict:
    """Step, log-probability, loss and gradient of each trained step; on policy, and after a step of it by the clip."""
    step = sources.define("IamCreateAI/FlowCPS", SDE, "sde_step_with_logprob")
    scheduler = space(sigmas=torch.tensor(cases.LEVELS), index_for_timestep=int)
    config = space(train=space(adv_clip_max=5.0, clip_range=cases.CPS_CLIP, beta=0.0))
    found = {}
    for n in cases.STEPS:
        v = cases.wave("v").requires_grad_()
        given = {"timestep": [n] * 4, "sample": cases.wave("x"), "noise_level": 0.8, "prev_sample": cases.wave("next")}
        _, log_prob, mean, std = step(scheduler, v, **given)
        found[str(n)] = plain({"mean": mean, "std": std, "log_prob": log_prob})
        for name, old_v in (("on_policy", v.detach()), ("moved", cases.moved())):
            old = step(scheduler, old_v, **given)[1]
            sample = {"advantages": torch.tensor(cases.ADVANTAGES)[:, None], "log_probs": old[:, None]}
            scope = sources.lines(
                "IamCreateAI/FlowCPS", "scripts/train_sd3.py", "advantages = torch.clamp(", 'info["approx_kl"]',
                sample=sample, j=0, config=config, log_prob=log_prob,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(scope["loss"], v, retain_graph=True)
            found[str(n)][name] = plain({"loss": scope["loss"], "gradient": gradient})
    return found | {"advantages": sources.tracked("IamCreateAI/FlowCPS", "flow_grpo/stat_tracking.py")}


def policy_loss(sources: Sources, repository: str, file: str, log_prob: torch.Tensor, v: torch.Tensor) -> dict:
    """Loss and gradient by the lines of DanceGRPO's training loop, which MixGRPO has, too, for one trained step."""
    sample = {"advantages": torch.tensor(cases.ADVANTAGES), "log_probs": log_prob.detach()[:, None]}
    steps = [0] if "MixGRPO" in repository else 1
    scope = sources.lines(
        repository, file, "advantages = torch.clamp(", "loss.backward()",
        sample=sample, adv_clip_max=5.0, clip_range=1e-4, new_log_probs=log_prob, _=0, train_timesteps=steps,
        args=space(gradient_accumulation_steps=1, kl_coeff=0.0),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(scope["loss"], v)
    return plain({"loss": scope["loss"], "gradient": gradient})


def mix_grpo(sources: Sources) -> dict:
    """Flow-GRPO's step, as MixGRPO has it, its loss, the advantages of two rewards, the window's places."""
    repository = "Tencent-Hunyuan/MixGRPO"
    step = sources.define(repository, "fastvideo/utils/sampling_utils.py", "flow_grpo_step")
    found = {}
    for n in cases.STEPS:
        v, levels = cases.wave("v").requires_grad_(), torch.tensor(cases.LEVELS)
        _, _, log_prob, mean, std = step(v, cases.wave("x"), 0.7, levels, n, cases.wave("next"))
        found[str(n)] = plain({"mean": mean, "std": std, "log_prob": log_prob})
        found[str(n)] |= policy_loss(sources, repository, MIX, log_prob, v)
    rewards = {"one": torch.tensor(cases.REWARDS), "two": torch.tensor(cases.OTHER_REWARDS)}
    scope = sources.lines(
        repository, MIX, "model_advantages = {}", "elif args.multi_reward_mix",
        samples={"rewards": rewards}, reward_weights=cases.WEIGHTS, args=space(num_generations=4, trimmed_ratio=0.0),
    )  # fmt: skip
    states = sources.define(repository, "fastvideo/utils/grpo_states.py", "GRPOTrainingStates")(
        iters_per_group=25, group_size=4, max_timesteps=25 - 2, prog_overlap=True, roll_back=True
    )
    window = []
    for _ in range(cases.EPOCHS):
        window.append(states.get_current_timesteps())
        states.update_iteration()
    return found | {"advantages": scope["samples"]["advantages"].tolist(), "window": window[::25]}


def dance_grpo(sources: Sources) -> dict:
    """DanceGRPO's step, loss, gradient and advantages."""
    repository = "XueZeyue/DanceGRPO"
    step = sources.define(repository, DANCE, "flux_step")
    found = {}
    for n in cases.STEPS:
        v, levels = cases.wave("v").requires_grad_(), torch.tensor(cases.LEVELS)
        mean, _ = step(v, cases.wave("x"), 0.3, levels, n, None, False, True)
        _, _, log_prob = step(v, cases.wave("x"), 0.3, levels, n, cases.wave("next"), True, True)
        found[str(n)] = plain({"mean": mean, "log_prob": log_prob})
        found[str(n)] |= policy_loss(sources, repository, DANCE, log_prob, v)
    scope = sources.lines(
        repository, DANCE, "n = len(samples", "else:",
        samples={"rewards": torch.tensor(cases.REWARDS)}, args=space(num_generations=4),
    )  # fmt: skip
    return found | {"advantages": scope["samples"]["advantages"].tolist()}


def diffusion_nft(sources: Sources) -> dict:
    """The loss with its KL, and its gradient, at one level, by beta."""
    found = {}
    for beta in (0.1, 1.0):
        v, t = cases.wave("v").requires_grad_(), torch.full((4, 1, 1, 1), 0.75)
        scope = sources.lines(
            "NVlabs/DiffusionNFT", "scripts/train_nft_sd3.py", "# normalize advantage", "kl_div_loss = torch.mean(",
            advantages_clip=torch.tensor(cases.ADVANTAGES), x0=cases.wave("clean"), xt=cases.wave("x"), t_expanded=t,
            config=space(beta=beta, train=space(adv_clip_max=5.0, beta=1e-4)), forward_prediction=v,
            old_prediction=cases.wave("old"), ref_forward_prediction=cases.wave("base"), loss_terms={},
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(scope["loss"], v)
        found[str(beta)] = plain({"loss": scope["loss"], "gradient": gradient})
    decay = sources.define("NVlabs/DiffusionNFT", "scripts/train_nft_sd3.py", "return_decay")
    found["decay"] = [decay(step, 1) for step in cases.DECAY_STEPS]
    return found | {"advantages": sources.tracked("NVlabs/DiffusionNFT", "flow_grpo/stat_tracking.py")}


def awm(sources: Sources) -> dict:
    """The log-probability without a robust weight, the loss with its KL, and its gradient."""
    log_prob_of = sources.define("scxue/advantage_weighted_matching", AWM, "compute_log_prob_awm")
    level, noise, v = torch.tensor([0.9, 0.75, 0.5, 0.25]), cases.wave("noise"), cases.wave("v").requires_grad_()
    train = {"cfg": False, "adv_clip_max": 5.0, "advantage_max": 1, "loss_type": "exp_first", "clip_range": 1.0}
    train |= {"beta": 0.003, "kl_weight": "Uniform", "ema_beta": 0, "train_timesteps": 1}
    config, wide = space(train=space(**train)), level.reshape(4, 1, 1, 1)

    def call(prediction: torch.Tensor) -> tuple:
        said = {"config": config, "noised_latents": None, "clean_latents": cases.wave("clean"), "random_noise": noise}
        return log_prob_of(lambda **_: (prediction,), None, None, wide, None, None, weighting="Uniform", **said)

    log_prob, output, std = call(v)
    sample = {"log_probs": log_prob[None], "old_log_probs": log_prob.detach()[None], "std_dev_t": std[None]}
    sample |= {"model_output": output[None], "model_output_ref": cases.wave("base").double()[None]}
    sample |= {"advantages": torch.tensor(cases.ADVANTAGES)[:, None]}
    scope = sources.lines(
        "scxue/advantage_weighted_matching", AWM, "# grpo logic", 'info["clipfrac"]',
        sample=sample, config=config, accelerator=space(is_main_process=False),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(scope["loss"], v)
    found = plain({"log_prob": log_prob, "loss": scope["loss"], "gradient": gradient, "kl": scope["kl_loss"]})
    file = "advantage_weighted_matching/flow_grpo/stat_tracking.py"
    return found | {"advantages": sources.tracked("scxue/advantage_weighted_matching", file)}


def main() -> None:
    """Run all, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=cases.FROZEN)
    arguments = parser.parse_args()
    makers = (flow_grpo, flow_cps, mix_grpo, dance_grpo, diffusion_nft, awm)
    found = {maker.__name__: maker(Sources(arguments.sources)) for maker in makers}
    arguments.output.write_text(json.dumps({"sources": SOURCES} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
