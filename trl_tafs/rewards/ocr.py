"""Whether the asked text can be read: PaddleOCR's recogniser by rapidocr, edit distance and CTC likelihood."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trl_tafs.rewards.model import ModelReward
from trl_tafs.rewards.preprocessing import to_uint8

QUOTED = re.compile(r"[\"“”]([^\"“”]+)[\"“”]|(?<!\w)['‘]([^'‘’]+)['’](?!\w)")
KINDS = ("edit", "ctc")


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str | None:
    """The text that an image of this prompt should show: `metadata["text"]`, else what the prompt quotes first."""
    if metadata.get("text"):
        return str(metadata["text"])
    quoted = QUOTED.search(prompt)
    return (quoted[1] or quoted[2]).strip() or None if quoted else None


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions, 1 each."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def text_similarity(found: str, target: str) -> float:
    """1 - edit distance / the longer length, without regard to case and spaces; in [0, 1]."""
    found, target = ("".join(text.lower().split()) for text in (found, target))
    return 1 - edit_distance(found, target) / max(len(found), len(target), 1)


def ctc_log_probability(probabilities: Tensor, texts: Sequence[str], characters: Sequence[str]) -> Tensor:
    """The log-probability that a CTC recogniser gives to each text in its image, upper and lower case as one.

    Args:
        probabilities: (B, T, classes), the recogniser's output.
        texts: B, none empty; a character that the recogniser doesn't know is left out.
        characters: of the classes, the blank first.

    Returns:
        (B,) nats a character, at most 0; NaN where no character is known.
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
    return torch.where(lengths > 0, -nll / lengths.clamp(min=1), torch.nan)


class Recognizer:
    """A CTC text recogniser of PaddleOCR's, by the ONNX file in an installed package.

    Args:
        package: that holds it: `rapidocr`, or `rapidocr_onnxruntime` for an older one.
        batch_size: images at once.
        threads: of onnxruntime; by default torch's number.
    """

    HEIGHT = 48

    def __init__(self, package: str = "rapidocr", batch_size: int = 32, threads: int | None = None) -> None:
        import onnxruntime

        spec = find_spec(package)
        if spec is None:
            raise ValueError(f"the package {package} isn't installed; pip install 'trl_tafs[ocr]'")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        path = next((Path(spec.origin).parent / "models").glob("*rec*.onnx"))
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # the CTC head's classes: blank first, then the listed characters, a space last
        self.characters = ["", *self.session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
        self.batch_size = batch_size

    def page(self, images: Tensor) -> Tensor:
        """Images of one line each (B, 3, H, W) in [0, 1] to the recogniser's input (B, 3, 48, W') in [-1, 1], BGR."""
        width = max(1, -(-self.HEIGHT * images.shape[3] // images.shape[2]))
        line = F.interpolate(images, size=(self.HEIGHT, width), mode="bilinear", antialias=False)
        return 2 * line.flip(1) - 1

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, T, classes)."""
        name, pages = self.session.get_inputs()[0].name, self.page(images.float()).contiguous().numpy()
        starts = range(0, len(pages), self.batch_size)
        parts = [self.session.run(None, {name: pages[i : i + self.batch_size]})[0] for i in starts]
        return torch.from_numpy(np.concatenate(parts))

    def read(self, images: Tensor) -> list[str]:
        """The text in each image, by the most probable class at every place."""
        words = []
        for best in self.probabilities(images).argmax(-1).numpy():
            changes = np.append(True, best[1:] != best[:-1])
            words.append("".join(self.characters[i] for i in best[changes & (best > 0)]).strip())
        return words


def crop(image: Tensor, box: Sequence[float]) -> Tensor:
    """The part of an image (3, H, W) that a box (left, top, right, bottom), in shares of its size, holds."""
    height, width = image.shape[1:]
    left, right = (round(share * width) for share in (box[0], box[2]))
    top, bottom = (round(share * height) for share in (box[1], box[3]))
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


class OCR(ModelReward):
    """How well the asked text is read; no verdict on prompts that ask for none.

    The text is `metadata["text"]`, else what the prompt quotes. It is sought in `metadata["box"]` (left, top, right,
    bottom, in shares of the image), else in the whole image as one line, or with `detect` wherever there is text.

    Args:
        kind: "edit", similarity in [0, 1]: 1 - edit distance / longer length; "ctc", the recogniser's log-probability
            of the text in nats a character, which still differs where nothing can be read yet.
        detect: find the lines of text first (slow; for scenes). The best of each line and all of them together counts.
        package: that holds the recogniser.
        batch_size: images at once.
        threads: of onnxruntime.
    """

    def __init__(
        self,
        kind: str = "edit",
        detect: bool = False,
        package: str = "rapidocr",
        batch_size: int = 32,
        threads: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"ocr's kind is {kind!r}; use one of {', '.join(KINDS)}")
        if kind == "ctc" and detect:
            raise ValueError("ocr's kind ctc is a likelihood of one line; use detect=False, with a box where it lies")
        super().__init__("cpu", batch_size=batch_size)
        self.kind = kind
        self.recognizer = None if detect else Recognizer(package, batch_size, threads)
        self.detector = _detector(threads) if detect else None

    def applies(self, prompt: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the prompt asks for text."""
        return target_text(prompt, metadata) is not None

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B,)."""
        targets = [target_text(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        if self.detector is not None:
            pairs = zip(to_uint8(images).numpy(), targets, strict=True)
            return torch.tensor([self._best_line(image, target) for image, target in pairs])
        if not any(row.get("box") for row in metadata):
            return self._lines(images, targets)
        boxes = [row.get("box") or (0, 0, 1, 1) for row in metadata]
        parts = [crop(image, box)[None] for image, box in zip(images, boxes, strict=True)]
        return torch.cat([self._lines(part, [target]) for part, target in zip(parts, targets, strict=True)])

    def _lines(self, images: Tensor, targets: list[str]) -> Tensor:
        if self.kind == "ctc":
            return ctc_log_probability(self.recognizer.probabilities(images), targets, self.recognizer.characters)
        pairs = zip(self.recognizer.read(images), targets, strict=True)
        return torch.tensor([text_similarity(found, target) for found, target in pairs])

    def _best_line(self, image: np.ndarray, target: str) -> float:
        lines = list(self.detector(image[:, :, ::-1]).txts or ())
        return max((text_similarity(text, target) for text in [*lines, " ".join(lines)]), default=0.0)


def _detector(threads: int | None) -> Any:
    """Rapidocr's whole pipeline, detection included."""
    if find_spec("rapidocr") is None:
        raise ValueError("the package rapidocr isn't installed; pip install 'trl_tafs[ocr]'")
    from rapidocr import RapidOCR

    number = threads or torch.get_num_threads()
    quiet = {"Global.log_level": "error", "Global.use_cls": False}
    return RapidOCR(params=quiet | {"EngineConfig.onnxruntime.intra_op_num_threads": number})
