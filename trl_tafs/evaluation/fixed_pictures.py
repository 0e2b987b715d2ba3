"""Pictures of a few fixed prompts on the same noise, every few epochs: how a run changes what is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.output.files import tolerating_disk_faults, write_whole
from trl_tafs.output.pictures import save_png, tensor_to_image
from trl_tafs.output.speech import warn
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.pipelines.identity import base_identity
from trl_tafs.policy.policy import Policy
from trl_tafs.policy.sharding import is_sharded

FOLDER = "pictures"
PROMPTS = "prompts.json"
COUNT = 4  # prompts, where none are named


@dataclass
class FixedPictures:
    """Draws a picture of each prompt as training samples, to `pictures/epoch_<n>/<i>.png` and to the trackers.

    Every process calls it; the main one draws, or all together where the denoiser is sharded.
    """

    policy: Policy
    drawer: Drawer
    spec: DrawSpec
    prompts: Sequence[str]
    folder: Path  # the run's
    frequency: int  # epochs; 0: none
    show: Callable[[Any, dict[str, Any], int], None]  # to the trackers of an accelerator, pictures by title at a step
    timed: Callable[[str], AbstractContextManager]  # times what is inside, by name

    @classmethod
    def of(
        cls, config: Any, policy: Policy, drawer: Drawer, spec: DrawSpec, prompts: Callable, show: Any, timed: Any
    ) -> FixedPictures:
        """Make what draws as a configuration asks; `prompts` are those to choose from where it names none.

        Raises:
            ValueError: prompts are named, and the model edits pictures, which they lack.
        """
        named = config.picture_prompts
        if named and drawer.pipeline.needs_pictures:
            raise ValueError(
                f"picture_prompts are text, and a {type(drawer.pipeline).__name__} edits pictures; leave them out, and "
                "the first held-out prompts are drawn"
            )
        chosen = [] if not config.picture_freq else named or list(dict.fromkeys(prompts()))[:COUNT]
        small = replace(drawer, batch_size=min(drawer.batch_size, max(len(chosen), 1)))
        return cls(policy, small, spec, chosen, Path(config.project_dir), config.picture_freq, show, timed)

    def due(self, epoch: int, last: int) -> bool:
        """Return whether there are pictures once `epoch` epochs are done."""
        return bool(self.frequency) and (epoch % self.frequency == 0 or epoch == last)

    def __call__(self, epoch: int, last: int, step: int) -> None:
        """Draw, write and show, once `epoch` of `last` epochs are done, where that is due.

        What can't be drawn or written costs a warning.
        """
        if self.due(epoch, last):
            with self.timed("pictures"):
                self._draw(epoch, step)

    def _draw(self, epoch: int, step: int) -> None:
        main = self.policy.accelerator.is_main_process
        if not (main or is_sharded(self.policy.accelerator)):
            return
        try:
            with self.policy.averaged():
                images = self.drawer.images(self.spec, self.prompts, range(len(self.prompts)))
        except NonFiniteError as error:  # training will say so itself, on all processes
            warn(f"no pictures after epoch {epoch}: {error}")
            return
        if not main:
            return
        pictures = [tensor_to_image(image) for image in images]
        place = self.folder / FOLDER
        for i, picture in enumerate(pictures):
            save_png(picture, place / f"epoch_{epoch:06d}" / f"{i}.png")
        with tolerating_disk_faults(place / PROMPTS):
            base = base_identity(self.drawer.pipeline).name
            drawn = {"prompts": [str(prompt) for prompt in self.prompts], "spec": self.spec.described(), "base": base}
            write_whole(place / PROMPTS, json.dumps(drawn, indent=1, ensure_ascii=False))
        titles = [f"pictures/{i} {prompt[:60]}" for i, prompt in enumerate(self.prompts)]
        self.show(
            self.policy.accelerator, {title: [picture] for title, picture in zip(titles, pictures, strict=True)}, step
        )
