"""`trl-tafs env`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trl_tafs.cli.command import parse


def env(argv: Sequence[str]) -> Callable[[], None]:
    """Print versions and devices, to paste into an issue."""
    parse([], argv, prog="trl-tafs env", description=env.__doc__)
    return _env


def _env() -> None:
    import platform

    import torch

    from trl_tafs.hub.facts import library_versions

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, version in library_versions().items():
        print(f"{name} {version}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(devices) if devices else 'CPU only'}")
