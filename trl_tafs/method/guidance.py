"""When classifier-free guidance is on."""


def is_guided(scale: float) -> bool:
    """Return whether classifier-free guidance of `scale` w does anything: `u + w (c - u)` is `c` at w = 1."""
    return scale > 1.0
