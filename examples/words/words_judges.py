"""What words are judged by: two text recognisers that nobody here trained, and the pixels themselves.

`OCRReward` is rapidocr's recogniser (PP-OCRv6, in the wheel of `rapidocr`), the reward; `OCRJudge` an older one
(PP-OCRv4, in the wheel of `rapidocr-onnxruntime`) that training never sees. Both are PaddleOCR's, Apache-2.0.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from words_data import COLOURS, INKS, LAYOUTS, LETTERS, WORD_LENGTH, atlas, parse


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions, 1 each."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


class _Recogniser:
    """A CTC text recogniser of PaddleOCR's, by its ONNX file.

    Images are enlarged to 32 pixels' height and put on a page of 48 that continues their borders.
    """

    package = ""
    HEIGHT, TEXT = 48, 32

    def __init__(self, kind: str = "edit", batch_size: int = 32, threads: int | None = None):
        """Open it. `kind`: "edit" is 1 - normalised edit distance to the asked word, "ctc" the probability a letter."""
        import onnxruntime

        if kind not in ("edit", "ctc"):
            raise ValueError(f"kind is 'edit' or 'ctc', not {kind!r}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        folder = Path(find_spec(self.package).origin).parent / "models"
        path = next(folder.glob("*rec*.onnx"))
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # the CTC head's classes: blank first, then the listed characters, a space last
        self.characters = ["", *self.session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
        self.kind, self.batch_size = kind, batch_size

    def page(self, images: Tensor) -> Tensor:
        """(B, 3, 48, W') in [-1, 1]."""
        height, width = images.shape[2:]
        size = (self.TEXT, round(width * self.TEXT / height))
        text = F.interpolate(images, size=size, mode="bicubic", antialias=False).clamp(0, 1)
        border = (self.HEIGHT - self.TEXT) // 2
        return 2 * F.pad(text, (border,) * 4, mode="replicate") - 1

    def probabilities(self, images: Tensor) -> np.ndarray:
        """(B, T, classes)."""
        name, pages = self.session.get_inputs()[0].name, self.page(images.float()).contiguous().numpy()
        starts = range(0, len(pages), self.batch_size)
        return np.concatenate([self.session.run(None, {name: pages[i : i + self.batch_size]})[0] for i in starts])

    def read(self, images: Tensor) -> list[str]:
        """The text in each image, lower-case."""
        words = []
        for best in self.probabilities(images).argmax(-1):
            changes = np.append(True, best[1:] != best[:-1])
            words.append("".join(self.characters[i] for i in best[changes & (best > 0)]).strip().lower())
        return words

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> list[float]:
        """1 where the asked word is read, less the more is wrong; in [0, 1]."""
        words = [parse(prompt)[0] for prompt in prompts]
        if self.kind == "ctc":
            return self._likelihood(images, words)
        found = self.read(images)
        pairs = zip(found, words, strict=True)
        return [1 - edit_distance(text, word) / max(len(text), len(word)) for text, word in pairs]

    def _likelihood(self, images: Tensor, words: list[str]) -> list[float]:
        scores = torch.from_numpy(self.probabilities(images))
        columns = [[self.characters.index(c) for c in (letter, letter.upper())] for letter in LETTERS]
        letters = scores[..., torch.tensor(columns)].sum(-1)  # (B, T, 26)
        logs = torch.cat([scores[..., :1], letters], -1).clamp(min=1e-6).log().transpose(0, 1)
        targets = torch.tensor([[1 + LETTERS.index(c) for c in word] for word in words])
        sizes = torch.full((len(words),), len(logs)), torch.full((len(words),), targets.shape[1])
        nll = F.ctc_loss(logs, targets, *sizes, reduction="none")
        return (-nll / targets.shape[1]).exp().tolist()


class OCRReward(_Recogniser):
    """The reward: PP-OCRv6."""

    __name__, package = "ocr", "rapidocr"


class OCRJudge(_Recogniser):
    """The judge: PP-OCRv4."""

    __name__, package = "second_ocr", "rapidocr_onnxruntime"


class ColourJudge:
    """Pixel statistics: the share of ink pixels whose nearest colour is the asked one.

    Ink is what lies well below the ground's brightness, the image's 90th percentile. An image without ink gets 0.
    """

    __name__ = "colour"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        """(B,) in [0, 1]; true renderings reach .97 on average: soft edges lie between colours."""
        ground = images.flatten(2).quantile(0.9, dim=2)  # (B, 3)
        ink = images.mean(1) < 0.5 * ground.mean(1)[:, None, None]  # (B, H, W)
        distance = (images[:, None] - INKS[None, :, :, None, None]).square().sum(2)  # (B, 6, H, W)
        asked = torch.tensor([list(COLOURS).index(parse(prompt)[1]) for prompt in prompts])
        right = (distance.argmin(1) == asked[:, None, None]) & ink
        return right.sum((1, 2)) / ink.sum((1, 2)).clamp(min=1)


class PrintJudge:
    """Pixel statistics: how closely the image follows the font, 1 - RMS distance / RMS contrast, at least 0.

    Each cell is compared with the nearest letter of the atlas, whichever, drawn in the asked colour on the image's
    own ground: a word that is wrong but cleanly printed scores 1, blur and noise don't.
    """

    __name__ = "print"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        """(B,) in [0, 1]; 1 for a true rendering."""
        size = next(name for name, layout in LAYOUTS.items() if layout.height == images.shape[2])
        layout = LAYOUTS[size]
        ground = images.flatten(2).quantile(0.9, dim=2)
        ink = INKS[[list(COLOURS).index(parse(prompt)[1]) for prompt in prompts]]
        word = images[..., layout.margin : layout.width - layout.margin]
        cells = word.unflatten(3, (WORD_LENGTH, layout.cell)).movedim(3, 1)  # (B, 4, 3, H, cell)
        contrast = (ink - ground)[:, None, :, None, None]
        letters = ground[:, None, :, None, None] + atlas(size)[None, :, None] * contrast  # (B, 26, 3, H, cell)
        error = (cells[:, :, None] - letters[:, None]).square().mean((3, 4, 5)).amin(2).mean(1)
        return (1 - (error / contrast.square().mean((1, 2, 3, 4))).sqrt()).clamp(min=0)
