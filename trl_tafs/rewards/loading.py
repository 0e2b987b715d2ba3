"""Find rewards by name, by path or by address, and make them with their options."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_tafs.options import decode_dict
from trl_tafs.output.errors import did_you_mean, first_line
from trl_tafs.output.secrets import hide, without_userinfo
from trl_tafs.rewards.scoring import RewardFunction
from trl_tafs.rewards.web import parse_address

REWARDS = {
    "aesthetic": "trl_tafs.rewards.aesthetic:Aesthetic",
    "clip_score": "trl_tafs.rewards.clip_score:ClipScore",
    "edit_reward": "trl_tafs.rewards.edit_reward:EditReward",
    "geneval": "trl_tafs.rewards.geneval:GenEval",
    "geneval2": "trl_tafs.rewards.geneval2:GenEval2",
    "hps_v2": "trl_tafs.rewards.hps_v2:HPSv2",
    "hps_v3": "trl_tafs.rewards.hps_v3:HPSv3",
    "image_reward": "trl_tafs.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "trl_tafs.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "trl_tafs.rewards.jpeg:jpeg_incompressibility",
    "ocr": "trl_tafs.rewards.ocr:OCR",
    "pickscore": "trl_tafs.rewards.pickscore:PickScore",
    "pixel_faithfulness": "trl_tafs.rewards.pixel_faithfulness:PixelFaithfulness",
    "remote": "trl_tafs.rewards.remote:RemoteReward",
    "unified_reward": "trl_tafs.rewards.unified_reward:UnifiedReward",
    "vqa_score": "trl_tafs.rewards.vqa_score:VQAScore",
}
WEB = ("http://", "https://")


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """Make a reward, found by its name in `REWARDS`, by the path of your own one, or by the address of a served one.

    Args:
        name: a name; `package.module:name`, `package.module.name` or `folder/file.py:name`; or `http://host:port` of
            `trl-tafs serve-reward`, several with commas between.
        options: arguments of the class that makes the reward.

    Raises:
        ValueError: there is no such reward, or it takes no such options.
    """
    options = decode_dict(f"options of {without_userinfo(name)}", options)
    if name.startswith(WEB):
        name, options = "remote", {"endpoints": name.split(",")} | options
    made = _find(name)
    if not isinstance(made, type):
        if options:
            raise ValueError(f"reward {name!r} is a function, which takes no options, given {', '.join(options)}")
        return made
    known = _options_of(made)
    if known is not None and not options.keys() <= known:
        unknown = sorted(options.keys() - known)
        raise ValueError(
            f"reward {name!r} has no option {', '.join(unknown)}; its options are {', '.join(sorted(known))}"
            f"{did_you_mean(unknown[0], known)}"
        )
    try:
        return made(**options)
    except (ValueError, ImportError):  # says what is wrong
        raise
    except Exception as error:  # of the reward's own code, or the network's
        raise ValueError(f"reward {without_userinfo(name)!r} can't be made: {first_line(error)}") from error


def evaluation_options(name: str) -> dict[str, Any]:
    """Return the options with which a reward is evaluated unless others are given: what its class says, or none."""
    return {} if name.startswith(WEB) else dict(getattr(_find(name), "evaluation_options", {}))


def planned_bytes(specifications: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the bytes of the weights that rewards will keep on the GPU, by what their classes say; none is made.

    Args:
        specifications: as `parse_rewards` takes them.
        options: each reward's options by its name: `dtype`, `offload` and `device` count.
    """
    total = 0
    for item in specifications:
        name, given = split_weight(item)[0], options.get(reward_label(item), {})
        if name.startswith(WEB) or given.get("offload") or str(given.get("device", "cuda")).startswith("cpu"):
            continue
        width = {"float32": 4}.get(str(given.get("dtype", "float32")), 2)
        total += getattr(_find(name), "parameters", 0) * width
    return total


def find_object(path: str, what: str) -> Any:
    """Return what `module:name` or `file.py:name` names.

    Args:
        path: of it.
        what: it is for, at the beginning of an error.

    Raises:
        ValueError: there is none, or its module raises.
    """
    module_name, colon, attribute = path.rpartition(":" if ":" in path else ".")
    if not module_name or not colon or not attribute:
        raise ValueError(f"{what} can't be imported: write 'module:name' or 'file.py:name'")
    module = import_module_or_file(module_name, what)
    if not hasattr(module, attribute):
        known = did_you_mean(attribute, vars(module))
        raise ValueError(f"{what} can't be imported: {module_name} has no {attribute!r}{known}")
    return getattr(module, attribute)


def _find(name: str) -> Any:
    path = REWARDS.get(name, name)
    if ":" not in path and "." not in path:
        raise ValueError(
            f"no reward {name!r}; use one of {', '.join(REWARDS)}, or your own as 'module:name' or 'file.py:name'"
            f"{did_you_mean(name, REWARDS)}"
        )
    return find_object(path, f"reward {name!r}")


def import_module_or_file(name: str, what: str) -> ModuleType:
    """Import a module by its dotted name, also one of the working directory, or a file by its path.

    Args:
        name: `package.module` or `folder/file.py`; imported once, whatever it is imported for.
        what: it is for, at the beginning of an error.

    Raises:
        ValueError: there is none, or it raises; says in which line.
    """
    file = Path(name).resolve() if name.endswith(".py") else None
    if file is not None and not file.is_file():
        raise ValueError(f"{what} can't be imported: there is no file {name}")
    folder = Path.cwd() if file is None else file.parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name) if file is None else _module_of(file)
    except (Exception, SystemExit) as error:  # the user's code, which may raise anything, or leave
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{what} can't be imported: {first_line(error)}{where}") from error


def _module_of(file: Path) -> ModuleType:
    """Import a file under a name made of its whole path: several files may have one name, or that of a library."""
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
    """Return the names of a class's arguments, with its bases' if it hands on `**options`; None if it takes any."""
    names: set[str] = set()
    for base in made.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return names
    return None


def split_weight(item: str) -> tuple[str, str]:
    """Return NAME and WEIGHT of NAME=WEIGHT; "" for no weight."""
    if item.startswith(WEB) and "@" in item.rpartition("=")[2]:  # the equals sign is one of a password
        return item, ""
    name, equals, weight = item.rpartition("=")
    return (name, weight) if equals else (item, "")


def reward_label(item: str) -> str:
    """Return what a reward of the command line, NAME or NAME=WEIGHT, is called in logs and options."""
    name = split_weight(item)[0]
    if name.startswith(WEB):
        return parse_address(name.partition(",")[0]).label  # of a user's name and password nothing is shown
    return name.rpartition(":" if ":" in name else ".")[2]


def parse_rewards(
    specifications: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, tuple[RewardFunction, float]]:
    """Turn `["pickscore=1.0", "my_module:sharpness=0.5"]` into a dict of name to (reward, weight).

    Args:
        specifications: NAME or NAME=WEIGHT each, NAME as `load_reward` takes it.
        options: each reward's options by its name.
    """
    chosen = {}
    for item in [specifications] if isinstance(specifications, str) else specifications:
        name, weight = split_weight(item)
        shown = without_userinfo(item)
        try:
            value = float(weight) if weight else 1.0
        except ValueError as error:
            raise ValueError(f"--reward {shown!r}: {hide(weight)!r} is no number; write NAME=WEIGHT") from error
        if not math.isfinite(value):
            raise ValueError(f"--reward {shown!r}: a weight must be finite")
        label = reward_label(name)
        if label in chosen:
            raise ValueError(f"--reward names {label!r} twice; give it one weight, or two rewards two names")
        chosen[label] = (name, value)
    options = dict(options or {})
    if not options.keys() <= chosen.keys():
        unknown = ", ".join(sorted(options.keys() - chosen.keys()))
        raise ValueError(f"options are given for {unknown}, and the rewards are {', '.join(chosen)}")
    return {label: (load_reward(name, options.get(label)), value) for label, (name, value) in chosen.items()}
