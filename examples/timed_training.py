"""Train for a number of epochs or for a time: what the examples with a trainer share."""

import time

from trl_tafs import TAFSGRPOTrainer


def train(trainer: TAFSGRPOTrainer, seconds: float | None) -> tuple[float, float]:
    """Train the set number of epochs, or whole epochs until `seconds` of CPU time are spent; (wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    if seconds is None:
        trainer.train()
    while seconds is not None and time.process_time() - cpu < seconds:
        trainer.progress.global_step = trainer.step(trainer.progress.epoch, trainer.progress.global_step)
        trainer.progress.epoch += 1
    spent = time.perf_counter() - wall, time.process_time() - cpu
    if seconds is not None:
        trainer.save_pretrained()
    return spent
