"""Call rewards: names, weights, checks, retries."""

from __future__ import annotations

import copy
import inspect
import reprlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.options import typed
from trl_tafs.output.errors import shown
from trl_tafs.output.secrets import hide
from trl_tafs.rewards.model import ModelReward
from trl_tafs.rewards.options import RewardOptions

RewardFunction = Callable[[Tensor, Sequence[str], Sequence[dict[str, Any]]], Any]


class RewardError(RuntimeError):
    """A reward that raised or returned what can't be used; says which one, on which prompts."""


class RewardRefused(RewardError):
    """A reward that can't answer what it was asked: another try changes nothing, and a mask would hide the cause."""


@dataclass(frozen=True)
class Scores:
    """The scores of one call of all rewards."""

    values: Tensor  # (B, R) float64, NaN where there is no score
    metadata: Any  # of a single reward what it returned, of several a dict by name


class RewardSet:
    """One or several rewards with names and weights.

    Each call of a reward, a retry too, gets its own copy of images and metadata: what a reward does to them in place,
    no other reward, no retry and no hook sees.

    Args:
        rewards: a callable, a list of them, or a dict of name to callable or (callable, weight).
        weights: one a reward, in order; not beside weights in the dict.
        max_retries: calls after the first one that raises; none after a `RewardError`, with which a reward gives up.
        retry_delay: seconds before the first retry, doubled each time.
        on_failure: what becomes of images whose reward still raises then: "error", or "mask", no score (NaN);
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
        titles = {name: getattr(function, "title", None) for name, (function, _) in named.items()}
        shared = Counter(titles.values())
        # Names of tables' columns, of the rewards that have one, and no two the same.
        self.titles = {name: title for name, title in titles.items() if title is not None and shared[title] == 1}
        if weights is not None and len(weights) != len(named):
            raise ValueError(
                f"{len(weights)} reward_weights for {len(named)} rewards ({', '.join(named)}); give one each"
            )
        own = [weight for _, weight in named.values()]
        if weights is not None and any(weight != 1.0 for weight in own) and own != list(weights):
            told = ", ".join(f"{name}={weight}" for name, (_, weight) in named.items())
            raise ValueError(f"reward_weights={list(weights)}, and the rewards have weights ({told}); give one set")
        chosen = own if weights is None else list(weights)
        self.weights = torch.tensor(chosen, dtype=torch.float64)
        self.max_retries, self.retry_delay, self.on_failure = max_retries, retry_delay, on_failure

    @property
    def run_in_threads(self) -> bool:
        """Whether each says, by an attribute `runs_in_threads`, that several threads may call it beside the sampler."""
        return all(getattr(function, "runs_in_threads", False) is True for function in self.functions)

    @classmethod
    def of(cls, options: RewardOptions, rewards: Any, weights: Sequence[float] | None = None) -> RewardSet:
        """Make the set of a training run, with its retries."""
        return cls(
            rewards,
            weights,
            max_retries=options.reward_max_retries,
            retry_delay=options.reward_retry_delay,
            on_failure=options.reward_on_failure,
        )

    def check_rows(self, rows: Iterable[tuple[str, Mapping[str, Any]]], where: str = "prompts") -> list[str]:
        """Ask each reward of every row whether it can score it, before anything is drawn.

        A reward says so by a method `applies(prompt, metadata)`, which may raise for a row that is malformed, and by
        `required_metadata`, the keys that every row must have (docs/rewards.md). Those that say neither aren't asked.

        Args:
            rows: (prompt, metadata) each; nothing is copied or changed.
            where: what the rows are, for errors.

        Returns:
            A sentence for each reward that scores some of the rows alone.

        Raises:
            ValueError: a row that a reward can't score, by number; or a reward that scores none.
        """
        every = ModelReward.applies  # without a question: it scores all
        asked = {
            name: function
            for name, function in zip(self.names, self.functions, strict=True)
            if getattr(type(function), "applies", every) is not every or hasattr(function, "required_metadata")
        }
        scored, count = dict.fromkeys(asked, 0), 0
        for number, (prompt, metadata) in enumerate(rows if asked else ()):
            count += 1
            for name, function in asked.items():
                missing = [key for key in getattr(function, "required_metadata", ()) if metadata.get(key) is None]
                if missing:
                    raise ValueError(
                        f"{where}, row {number} ({prompt!r:.80}) has no {', '.join(missing)}, which reward {name!r} "
                        "needs"
                    )
                try:
                    scored[name] += bool(function.applies(prompt, metadata)) if hasattr(function, "applies") else 1
                except Exception as error:  # whatever a reward finds wrong with the row
                    raise ValueError(f"{where}, row {number} ({prompt!r:.80}): reward {name!r} says {error}") from error
        for name, number in scored.items():
            if count and not number:
                raise ValueError(
                    f"reward {name!r} scores none of the {count} {where}: they lack the columns, or the form, that it "
                    "goes by (docs/rewards.md)"
                )
        return [f"reward {name!r} scores {n} of {count} {where}" for name, n in scored.items() if n < count]

    def try_once(self, prompt: str, metadata: dict[str, Any], images: Tensor) -> Scores:
        """Call each reward on images (B, 3, H, W) of one prompt, before anything is spent on it.

        Raises:
            RewardError: one raises, or returns what can't be used.
        """
        return self(images, [prompt] * len(images), [metadata] * len(images))

    def combined(self, batches: Sequence[tuple], workers: int = 1) -> list[tuple[Tensor, Any]]:
        """Score `(images, prompts, metadata, ...)` batches: the weighted sum of all rewards (B,), and the metadata."""

        def score(batch: tuple) -> tuple[Tensor, Any]:
            scores = self(*batch[:3])
            return (scores.values * self.weights).sum(1), scores.metadata

        with ThreadPoolExecutor(workers) as executor:
            return list(executor.map(score, batches))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        """Score B images (B, 3, H, W) by every reward.

        Raises:
            RewardError: a reward raised `max_retries` + 1 times, or returned the wrong number of values.
        """
        columns, extra = [], {}
        prompts = [str(prompt) for prompt in prompts]  # without source pictures, which are in the metadata
        for name, function in zip(self.names, self.functions, strict=True):
            result = self._call(name, function, images, prompts, metadata)
            values, extra[name] = result if _is_pair(result) else (result, {})
            columns.append(as_rewards(name, values, len(prompts)))
        return Scores(torch.stack(columns, dim=1), extra if len(extra) > 1 else extra[self.names[0]])

    def _call(self, name: str, function: RewardFunction, images: Tensor, prompts: Any, metadata: Any) -> Any:
        for attempt in range(self.max_retries + 1):
            own = images.clone(), list(prompts), [copy_metadata(entry) for entry in metadata]
            try:
                return function(*own)
            except Exception as error:  # a reward is the user's code: whatever it raises is retried, then reported
                told = f"raised {type(error).__name__}: {hide(str(error))}"
                refused = isinstance(error, RewardRefused)
                last = attempt == self.max_retries or isinstance(error, RewardError)
                if last and self.on_failure == "mask" and not refused:
                    warnings.warn(
                        f"reward {name!r} {told} ({attempt + 1} calls); its {len(prompts)} images get no score",
                        stacklevel=2,
                    )
                    return [None] * len(prompts)
                if last:
                    shown = ", ".join(repr(prompt) for prompt in dict.fromkeys(prompts))[:300]
                    raise (RewardRefused if refused else RewardError)(
                        f"reward {name!r} {told} ({attempt + 1} calls; {len(prompts)} images of the prompts {shown})"
                    ) from error
                warnings.warn(f"reward {name!r} {told}; it is retried", stacklevel=2)
                time.sleep(self.retry_delay * 2**attempt)


def _is_pair(result: Any) -> bool:
    """Return whether this is (rewards, reward_metadata), and not two rewards in a tuple."""
    return isinstance(result, tuple) and len(result) == 2 and not isinstance(result[0], (int, float, type(None)))


def as_rewards(name: str, values: Any, expected: int) -> Tensor:
    """Return what a reward returned as (B,) float64 on the CPU; None becomes NaN.

    Raises:
        RewardError: it isn't `expected` real, finite numbers.
    """
    try:
        rewards = _as_tensor(values)
    except Exception as error:  # a reward returns the user's objects, whose conversion may raise anything
        raise RewardError(
            f"reward {name!r} returned {type(values).__name__} {reprlib.repr(values)[:80]!r}; it must return "
            f"{expected} numbers"
        ) from error
    if rewards.shape == (expected, 1):
        rewards = rewards[:, 0]
    if rewards.shape != (expected,):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(rewards.shape)} for {expected} images; it must return one number "
            "an image (None or NaN for no score)"
        )
    if (rewards.abs() > torch.finfo(torch.float32).max).any():
        raise RewardError(
            f"reward {name!r} returned an infinite value, or one beyond float32's 3.4e38; bound it, or return None for "
            "no score"
        )
    return rewards


def _as_tensor(values: Any) -> Tensor:
    """Return numbers of any kind as float64 on the CPU; raise TypeError for complex ones."""
    if isinstance(values, Tensor):
        tensor = values.detach()
        if tensor.is_complex():
            raise TypeError("complex numbers")
        return tensor.cpu().double()
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    return torch.tensor([float("nan") if v is None else v for v in items], dtype=torch.float64)


def copy_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that shares nothing with the original but what can't be copied, such as open files."""
    try:
        return copy.deepcopy(dict(metadata))
    except Exception:  # some value's own code can't: each by itself
        return {key: _copy_or_share(value) for key, value in metadata.items()}


def _copy_or_share(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # it is handed out as it is, an open file for instance
        return value


def _named(rewards: Any) -> dict[str, tuple[RewardFunction, float]]:
    if isinstance(rewards, Mapping):
        # a name is written everywhere, and an address may be one
        pairs = {hide(str(n)): r if isinstance(r, tuple) else (r, 1.0) for n, r in rewards.items()}
        if len(pairs) < len(rewards):
            raise ValueError(f"two rewards have one name once what is secret is left out: {', '.join(pairs)}")
    else:
        pairs = {}
        for function in rewards if isinstance(rewards, (list, tuple)) else [rewards]:
            name = base = getattr(function, "__name__", type(function).__name__).strip("<>_") or "reward"
            while name in pairs:
                name = f"{base}_{int(name[len(base) + 1 :] or 1) + 1}"
            pairs[name] = (function, 1.0)
    if not pairs:
        raise ValueError("no reward given; pass a callable, a list or a dict of them")
    for name, pair in pairs.items():
        if len(pair) != 2 or not callable(pair[0]):
            told = shown(pair[0] if len(pair) == 2 else pair)
            raise ValueError(
                f"reward {name!r} is {told}, not a callable (images, prompts, prompt_metadata), nor one with a weight"
            )
        check_signature(pair[0], f"reward {name!r}", "images, prompts, prompt_metadata")
        pairs[name] = (pair[0], typed(f"the weight of reward {name!r}", pair[1], float))
    return pairs


def check_signature(function: Any, what: str, arguments: str) -> None:
    """Raise ValueError if a function of the user's can't be called with these arguments, by position.

    Args:
        function: a callable; one that doesn't say what it takes is taken.
        what: its name in the error.
        arguments: their names, with commas between; "" for none.
    """
    names = arguments.split(", ") if arguments else []
    if isinstance(function, type):
        raise ValueError(f"{what} is the class {function.__name__}; give an instance of it")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C, for instance
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise ValueError(f"{what} takes {signature}, and is called with ({arguments}): {error}") from error
