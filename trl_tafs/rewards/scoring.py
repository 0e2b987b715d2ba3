"""Calling rewards: names, weights, checks, retries; and finding them by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

RewardFunction = Callable[[Tensor, Sequence[str], Sequence[dict[str, Any]]], Any]

REWARDS = {
    "aesthetic": "trl_tafs.rewards.aesthetic:Aesthetic",
    "clip_score": "trl_tafs.rewards.clip_score:ClipScore",
    "geneval": "trl_tafs.rewards.geneval:GenEval",
    "hps_v2": "trl_tafs.rewards.hps_v2:HPSv2",
    "image_reward": "trl_tafs.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "trl_tafs.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "trl_tafs.rewards.jpeg:jpeg_incompressibility",
    "ocr": "trl_tafs.rewards.ocr:OCR",
    "pickscore": "trl_tafs.rewards.pickscore:PickScore",
    "remote": "trl_tafs.rewards.remote:RemoteReward",
    "unified_reward": "trl_tafs.rewards.unified_reward:UnifiedReward",
}


class RewardError(RuntimeError):
    """A reward that raised or returned what can't be used; says which one, on which prompts."""


class RewardRefused(RewardError):
    """A reward that can't answer what it was asked: another try changes nothing, and a mask would hide the cause."""


@dataclass(frozen=True)
class Scores:
    """What one call of all rewards gave."""

    values: Tensor  # (B, R) float32, NaN where there is no verdict
    metadata: Any  # of a single reward what it returned, of several a dict by name


class RewardSet:
    """One or several rewards with names and weights.

    Args:
        rewards: a callable, a list of them, or a dict of name to callable or (callable, weight).
        weights: one a reward, in order; overrides those in the dict.
        max_retries: calls after the first one that raises; none after a `RewardError`, with which a reward gives up.
        retry_delay: seconds before the first retry, doubled each time.
        on_failure: what becomes of images whose reward still raises then: "error", or "mask", no verdict (NaN);
            always an error after a `RewardRefused`.
    """

    def __init__(
        self,
        rewards: Any,
        weights: Sequence[float] | None = None,
        *,
        max_retries: int = 0,
        retry_delay: float = 1.0,
        on_failure: str = "error",
    ) -> None:
        if on_failure not in ("error", "mask"):
            raise ValueError(f"on_failure is {on_failure!r}; use error or mask")
        named = _named(rewards)
        self.names = tuple(named)
        self.functions = tuple(function for function, _ in named.values())
        if weights is not None and len(weights) != len(named):
            raise ValueError(
                f"{len(weights)} reward_weights for {len(named)} rewards ({', '.join(named)}); give one each"
            )
        chosen = [weight for _, weight in named.values()] if weights is None else list(weights)
        self.weights = torch.tensor(chosen, dtype=torch.float32)
        self.max_retries, self.retry_delay, self.on_failure = max_retries, retry_delay, on_failure

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        """Score B images (B, 3, H, W) by every reward.

        Raises:
            RewardError: a reward raised `max_retries` + 1 times, or returned the wrong number of values.
        """
        columns, extra = [], {}
        for name, function in zip(self.names, self.functions, strict=True):
            result = self._call(name, function, images, prompts, metadata)
            values, extra[name] = result if _is_pair(result) else (result, {})
            columns.append(as_rewards(name, values, len(prompts)))
        return Scores(torch.stack(columns, dim=1), extra if len(extra) > 1 else extra[self.names[0]])

    def _call(self, name: str, function: RewardFunction, images: Tensor, prompts: Any, metadata: Any) -> Any:
        for attempt in range(self.max_retries + 1):
            try:
                return function(images, prompts, metadata)
            except Exception as error:  # a reward is the user's code: whatever it raises is retried, then reported
                refused = isinstance(error, RewardRefused)
                last = attempt == self.max_retries or isinstance(error, RewardError)
                if last and self.on_failure == "mask" and not refused:
                    warnings.warn(
                        f"reward {name!r} raised {type(error).__name__}: {error} ({attempt + 1} calls); its "
                        f"{len(prompts)} images get no verdict",
                        stacklevel=2,
                    )
                    return [None] * len(prompts)
                if last:
                    shown = ", ".join(repr(prompt) for prompt in dict.fromkeys(prompts))[:300]
                    raise (RewardRefused if refused else RewardError)(
                        f"reward {name!r} raised {type(error).__name__}: {error} ({attempt + 1} calls; {len(prompts)} "
                        f"images of the prompts {shown})"
                    ) from error
                warnings.warn(f"reward {name!r} raised {type(error).__name__}: {error}; it is retried", stacklevel=2)
                time.sleep(self.retry_delay * 2**attempt)


def _is_pair(result: Any) -> bool:
    """(rewards, reward_metadata), and not two rewards in a tuple."""
    return isinstance(result, tuple) and len(result) == 2 and not isinstance(result[0], (int, float, type(None)))


def as_rewards(name: str, values: Any, expected: int) -> Tensor:
    """What a reward returned as (B,) float32 on the CPU; None becomes NaN. Any other length is an error."""
    if isinstance(values, Tensor):
        rewards = values.detach().float().cpu()
    else:
        try:
            items = values.tolist() if hasattr(values, "tolist") else list(values)
            rewards = torch.tensor([float("nan") if v is None else v for v in items], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward {name!r} returned {type(values).__name__} {str(values)[:80]!r}; it must return {expected} "
                "numbers"
            ) from error
    if rewards.shape == (expected, 1):
        rewards = rewards[:, 0]
    if rewards.shape != (expected,):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(rewards.shape)} for {expected} images; it must return one number "
            "an image (None or NaN for no verdict)"
        )
    if rewards.isinf().any():
        raise RewardError(f"reward {name!r} returned an infinite value; bound it, or return None for no verdict")
    return rewards


def _named(rewards: Any) -> dict[str, tuple[RewardFunction, float]]:
    if isinstance(rewards, Mapping):
        pairs = {n: r if isinstance(r, tuple) else (r, 1.0) for n, r in rewards.items()}
    else:
        pairs = {}
        for function in rewards if isinstance(rewards, (list, tuple)) else [rewards]:
            name = base = getattr(function, "__name__", type(function).__name__).strip("<>_") or "reward"
            while name in pairs:
                name = f"{base}_{int(name[len(base) + 1 :] or 1) + 1}"
            pairs[name] = (function, 1.0)
    if not pairs:
        raise ValueError("no reward given; pass a callable, a list or a dict of them")
    for name, (function, _) in pairs.items():
        if not callable(function):
            raise ValueError(f"reward {name!r} is {function!r}, not a callable (images, prompts, prompt_metadata)")
    return pairs


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """A reward by its name in `REWARDS`, or one's own by its path, or a served one by its address.

    Args:
        name: a name; `package.module:name`, `package.module.name` or `folder/file.py:name`; or `http://host:port` of
            `trl-tafs serve-reward`, several with commas between.
        options: arguments of the class that makes the reward.

    Raises:
        ValueError: there is no such reward, or it takes no such options.
    """
    options = dict(options or {})
    if name.startswith(("http://", "https://")):
        name, options = "remote", {"endpoints": name.split(",")} | options
    made = _find(name)
    if not isinstance(made, type):
        if options:
            raise ValueError(f"reward {name!r} is a function, which takes no options, given {', '.join(options)}")
        return made
    known = _options_of(made)
    if known is not None and not options.keys() <= known:
        unknown = ", ".join(sorted(options.keys() - known))
        raise ValueError(f"reward {name!r} has no option {unknown}; its options are {', '.join(sorted(known))}")
    return made(**options)


def _find(name: str) -> Any:
    path = REWARDS.get(name, name)
    module_name, colon, attribute = path.rpartition(":" if ":" in path else ".")
    if not module_name or not colon:
        raise ValueError(
            f"no reward {name!r}; use one of {', '.join(REWARDS)}, or your own as 'module:name' or 'file.py:name'"
        )
    file = Path(module_name).resolve() if module_name.endswith(".py") else None
    folder = Path.cwd() if file is None else file.parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return getattr(importlib.import_module(module_name) if file is None else _module_of(file), attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"reward {name!r} can't be imported: {error}") from error


def _module_of(file: Path) -> ModuleType:
    """A file's module, known by its whole path: files of one name are several, and none is a library of that name."""
    name = f"{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # there before it runs: dataclasses ask
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _options_of(made: type) -> set[str] | None:
    """Names of a class's arguments, those of its bases too where it hands on `**options`; None: it takes any."""
    names: set[str] = set()
    for base in made.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _split(item: str) -> tuple[str, str]:
    name, equals, weight = item.rpartition("=")
    return (name, weight) if equals else (item, "")


def reward_label(item: str) -> str:
    """What a reward of the command line, NAME or NAME=WEIGHT, is called in logs and options."""
    name = _split(item)[0]
    if name.startswith(("http://", "https://")):
        return urlsplit(name.partition(",")[0]).netloc
    return name.rpartition(":" if ":" in name else ".")[2]


def parse_rewards(
    specifications: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, tuple[RewardFunction, float]]:
    """`["pickscore=1.0", "my_module:sharpness=0.5"]` to a dict of name to (reward, weight).

    Args:
        specifications: NAME or NAME=WEIGHT each, NAME as `load_reward` takes it.
        options: each reward's options by its name.
    """
    chosen = {}
    for item in [specifications] if isinstance(specifications, str) else specifications:
        name, weight = _split(item)
        try:
            value = float(weight) if weight else 1.0
        except ValueError as error:
            raise ValueError(f"--reward {item!r}: {weight!r} is no number; write NAME=WEIGHT") from error
        if not math.isfinite(value):
            raise ValueError(f"--reward {item!r}: a weight must be finite")
        label = reward_label(name)
        if label in chosen:
            raise ValueError(f"--reward names {label!r} twice; give it one weight, or two rewards two names")
        chosen[label] = (name, value)
    options = dict(options or {})
    if not options.keys() <= chosen.keys():
        unknown = ", ".join(sorted(options.keys() - chosen.keys()))
        raise ValueError(f"options are given for {unknown}, and the rewards are {', '.join(chosen)}")
    return {label: (load_reward(name, options.get(label)), value) for label, (name, value) in chosen.items()}
