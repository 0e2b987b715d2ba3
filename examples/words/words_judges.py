"""What words are judged by: two text recognisers that nobody here trained, and the pixels themselves.

`OCRReward` is rapidocr's recogniser (PP-OCRv6, in the wheel of `rapidocr`), the reward; `OCRJudge` an older one
(PP-OCRv4, in the wheel of `rapidocr-onnxruntime`) that training never sees. Both are PaddleOCR's, Apache-2.0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from words_data import COLOURS, INKS, LAYOUTS, WORD_LENGTH, atlas, parse

from trl_tafs.rewards.ocr import Recognizer, ctc_log_probability, edit_distance


class _Recogniser(Recognizer):
    """The library's recogniser; images are enlarged to 32 pixels' height, on a page that continues their borders."""

    package = ""
    TEXT = 32

    def __init__(self, kind: str = "edit", batch_size: int = 32, threads: int | None = None):
        """Open it. `kind`: "edit" is 1 - normalised edit distance to the asked word, "ctc" the probability a letter."""
        if kind not in ("edit", "ctc"):
            raise ValueError(f"kind is {kind!r}; use 'edit' or 'ctc'")
        super().__init__(self.package, batch_size, threads)
        self.kind = kind

    def page(self, images: Tensor) -> Tensor:
        """(B, 3, 48, W') in [-1, 1]."""
        height, width = images.shape[2:]
        size = (self.TEXT, round(width * self.TEXT / height))
        text = F.interpolate(images, size=size, mode="bicubic", antialias=False).clamp(0, 1)
        border = (self.HEIGHT - self.TEXT) // 2
        return 2 * F.pad(text, (border,) * 4, mode="replicate") - 1

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> list[float]:
        """1 where the asked word is read, less the more is wrong; in [0, 1]."""
        words = [parse(prompt)[0] for prompt in prompts]
        if self.kind == "ctc":
            return ctc_log_probability(self.probabilities(images), words, self.characters).exp().tolist()
        pairs = zip((text.lower() for text in self.read(images)), words, strict=True)
        return [1 - edit_distance(text, word) / max(len(text), len(word)) for text, word in pairs]


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
