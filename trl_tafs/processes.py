"""What several processes of one run do together: agree, share, gather."""

from __future__ import annotations

from typing import Any

import torch


def any_process(accelerator: Any, flag: bool) -> bool:
    """Whether the flag is up on any process."""
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(total.item() > 0)
