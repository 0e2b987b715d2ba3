"""Whether the asked text can be read: PaddleOCR's recogniser by rapidocr, edit distance and CTC likelihood."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trl_tafs.output.errors import require
from trl_tafs.rewards.model import ModelReward
from trl_tafs.rewards.preprocessing import to_uint8
from trl_tafs.rewards.scoring import RewardRefused

QUOTED = re.compile(r"[\"“”]([^\"“”]+)[\"“”]|(?<!\w)['‘]([^'‘’]+)['’](?!\w)")
KINDS = ("edit", "ctc")
LINE = 3.0  # width / height from which on an image is taken for a line of text


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str | None:
    """Return the text that an image should show: `metadata["text"]`, else what the prompt quotes first."""
    if metadata.get("text"):
        return str(metadata["text"])
    quoted = QUOTED.search(prompt)
    return (quoted[1] or quoted[2]).strip() or None if quoted else None


def edit_distance(first: str, second: str) -> int:
    """Return Levenshtein's distance: insertions, deletions and substitutions, 1 each."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def text_similarity(found: str, target: str) -> float:
    """Return 1 - edit distance / the longer length, whatever the case and spaces; in [0, 1]."""
    found, target = ("".join(text.lower().split()) for text in (found, target))
    return 1 - edit_distance(found, target) / max(len(found), len(target), 1)


def ctc_log_probability(probabilities: Tensor, texts: Sequence[str], characters: Sequence[str]) -> Tensor:
    """Return the log-probability that a CTC recogniser gives to each text in its image, upper and lower case as one.

    Args:
        probabilities: (B, T, classes), the recogniser's output.
        texts: B, none empty; a character that the recogniser doesn't know is left out.
        characters: of the classes, the blank first.

    Returns:
        (B,) nats a character, at most 0; NaN where no character is known, and where no image could spell the text: it
        has more characters (and blanks between equal ones) than there are steps T, about a step 8 pixels of a line that
        is 48 high.
    """
    index = {character: i for i, character in enumerate(characters)}
    scores, targets = [], []
    for row, text in zip(probabilities, texts, strict=True):
        known = [c for c in text if c.lower() in index or c.upper() in index]
        alphabet = {key: i for i, key in enumerate(dict.fromkeys(c.lower() for c in known))}
        columns = [[index[c] for c in {key, key.upper()} if c in index] for key in alphabet]
        scores.append(torch.stack([row[:, 0], *(row[:, column].sum(1) for column in columns)], dim=1))  # (T, 1 + K)
        targets.append(torch.tensor([1 + alphabet[c.lower()] for c in known], dtype=torch.long))
    width = max(score.shape[1] for score in scores)
    padded = torch.stack([F.pad(score, (0, width - score.shape[1])) for score in scores])
    logs = padded.clamp(min=1e-6).log().transpose(0, 1)  # (T, B, 1 + K)
    lengths = torch.tensor([len(target) for target in targets])
    steps = torch.full((len(texts),), len(logs))
    nll = F.ctc_loss(logs, torch.cat(targets), steps, lengths, reduction="none")
    return torch.where((lengths > 0) & nll.isfinite(), -nll / lengths.clamp(min=1), torch.nan)


class Recognizer:
    """A CTC text recogniser of PaddleOCR's, by the ONNX file in an installed package.

    Args:
        package: that holds it: `rapidocr`, or `rapidocr_onnxruntime` for an older one.
        batch_size: images at once.
        threads: of onnxruntime; by default torch's number.
    """

    HEIGHT = 48

    def __init__(self, package: str = "rapidocr", batch_size: int = 32, threads: int | None = None) -> None:
        onnxruntime = require("onnxruntime", "the reward ocr", "ocr")
        spec = find_spec(package)
        if spec is None:
            raise ValueError(_missing(package))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        path = next((Path(spec.origin).parent / "models").glob("*rec*.onnx"))
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # the CTC head's classes: blank first, then the listed characters, a space last
        self.characters = ["", *self.session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
        self.batch_size = batch_size

    def page(self, images: Tensor) -> Tensor:
        """Turn images of one line (B, 3, H, W) in [0, 1] into the recogniser's input (B, 3, 48, W') in [-1, 1], BGR."""
        width = max(1, -(-self.HEIGHT * images.shape[3] // images.shape[2]))
        line = F.interpolate(images, size=(self.HEIGHT, width), mode="bilinear", antialias=False)
        return 2 * line.flip(1) - 1

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the log-probabilities, (B, T, classes)."""
        name, pages = self.session.get_inputs()[0].name, self.page(images.float()).contiguous().numpy()
        starts = range(0, len(pages), self.batch_size)
        parts = [self.session.run(None, {name: pages[i : i + self.batch_size]})[0] for i in starts]
        return torch.from_numpy(np.concatenate(parts))

    def read(self, images: Tensor) -> list[str]:
        """Return the text in each image, by the most probable class at every place."""
        words = []
        for best in self.probabilities(images).argmax(-1).numpy():
            changes = np.append(True, best[1:] != best[:-1])
            words.append("".join(self.characters[i] for i in best[changes & (best > 0)]).strip())
        return words


def crop(image: Tensor, box: Sequence[float]) -> Tensor:
    """Return the part of an image (3, H, W) in a box (left, top, right, bottom), in shares of its size."""
    height, width = image.shape[1:]
    left, right = (round(share * width) for share in (box[0], box[2]))
    top, bottom = (round(share * height) for share in (box[1], box[3]))
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


class OCR(ModelReward):
    """How well the asked text is read; no score on prompts that ask for none.

    The text is `metadata["text"]`, else what the prompt quotes. It is sought in `metadata["box"]` (left, top, right,
    bottom, in shares of the image), else in the whole image as one line where it is at least three times as wide as
    high, else wherever lines of text are found; the best of each line and all of them together counts.

    Args:
        kind: "edit", similarity in [0, 1]: 1 - edit distance / longer length; "ctc", the recogniser's log-probability
            of the text in nats a character, which still differs where nothing can be read yet; of one line, and no
            score where that is too short for the text.
        detect: find the lines of text first (slow; for scenes): None, where there is no box and no line's shape;
            True, always; False, never.
        package: that holds the recogniser, and detection: `rapidocr`, or `rapidocr_onnxruntime` for an older one.
        batch_size: images at once.
        threads: of onnxruntime.
    """

    def __init__(
        self,
        kind: str = "edit",
        detect: bool | None = None,
        package: str = "rapidocr",
        batch_size: int = 32,
        threads: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"ocr's kind is {kind!r}; use one of {', '.join(KINDS)}")
        if kind == "ctc" and detect:
            raise ValueError("ocr's kind ctc is a likelihood of one line; use detect=False, with a box where it lies")
        super().__init__("cpu", batch_size=batch_size)
        self.kind, self.detect, self.package, self.threads = kind, detect, package, threads
        self.recognizer = None if detect else Recognizer(package, batch_size, threads)
        self._detector, self._making = _detector(threads, package) if detect else None, threading.Lock()

    @property
    def detector(self) -> Any:
        """Made at its first use, since most runs on lines have none."""
        with self._making:
            if self._detector is None:
                self._detector = _detector(self.threads, self.package)
        return self._detector

    def applies(self, prompt: str, metadata: Mapping[str, Any]) -> bool:
        """Return whether the prompt asks for text."""
        return target_text(prompt, metadata) is not None

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        targets = [target_text(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        boxes = [row.get("box") for row in metadata]
        if not self.detect and not any(boxes) and not self._sought(images):
            return self._lines(images, targets)
        pairs = zip(images, boxes, targets, strict=True)
        return torch.cat([self._score_one(image[None], box, target) for image, box, target in pairs])

    def _sought(self, images: Tensor) -> bool:
        """Return whether the text's place is to be found in images without a box."""
        height, width = images.shape[2:]
        sought = self.detect or (self.detect is None and width < LINE * height)
        if sought and self.kind == "ctc":
            raise RewardRefused(
                f"ocr's kind ctc is a likelihood of one line, and the images are {height} x {width}: say where it "
                'lies by metadata["box"], use kind="edit", or detect=False to take the whole image for a line'
            )
        return sought

    def _score_one(self, image: Tensor, box: Sequence[float] | None, target: str) -> Tensor:
        if box and not self.detect:
            return self._lines(crop(image[0], box)[None], [target])
        if not self._sought(image):
            return self._lines(image, [target])
        return torch.tensor([self._best_line(to_uint8(image).numpy()[0], target)])

    def _lines(self, images: Tensor, targets: list[str]) -> Tensor:
        if self.kind == "ctc":
            return ctc_log_probability(self.recognizer.probabilities(images), targets, self.recognizer.characters)
        pairs = zip(self.recognizer.read(images), targets, strict=True)
        return torch.tensor([text_similarity(found, target) for found, target in pairs])

    def _best_line(self, image: np.ndarray, target: str) -> float:
        found = self.detector(image[:, :, ::-1])
        lines = [row[1] for row in found[0] or ()] if isinstance(found, tuple) else list(found.txts or ())
        return max((text_similarity(text, target) for text in [*lines, " ".join(lines)]), default=0.0)


def _missing(package: str) -> str:
    extra = "ocr" if package == "rapidocr" else "quickstart"
    return f'the package {package} isn\'t installed; pip install "trl_tafs[{extra}]"'


def _detector(threads: int | None, package: str = "rapidocr") -> Any:
    """Rapidocr's whole pipeline, detection included."""
    if find_spec(package) is None:
        raise ValueError(_missing(package))
    engine, number = import_module(package).RapidOCR, threads or torch.get_num_threads()
    if package != "rapidocr":  # the older ones
        return engine(use_cls=False, intra_op_num_threads=number)
    quiet = {"Global.log_level": "error", "Global.use_cls": False}
    return engine(params=quiet | {"EngineConfig.onnxruntime.intra_op_num_threads": number})
