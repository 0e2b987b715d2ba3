"""Three judges of generated digits, and two figures about the whole set: fidelity and diversity.

`DigitReward` is what RL is trained on, `HeldOutJudge` is another architecture trained on other digits,
`OCRJudge` is a text recogniser that nobody here trained. The first two have an eleventh class, "garbage":
blur, averages, mixtures, noise. Each is a reward function, `judge(images, prompts, metadata) -> values, {}`,
images (B, 3, H, W) float32 in [0, 1]; `judge.accuracy(images, prompts)` is the share read as asked.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from digits_components import IMAGE_SIZE
from digits_data import digit_of, load_split
from safetensors.torch import load_file
from torch import Tensor, nn

GARBAGE = 10
NUM_FEATURES = 24
WEIGHTS = Path(__file__).with_name("judges.safetensors")


class ConvNet(nn.Sequential):
    """The rewarding classifier: a small convolutional network, (B, 1, 8, 8) -> 11 logits."""

    def __init__(self, width: int = 24, dropout: float = 0.3):
        """Random weights."""
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * width, 64),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(64, GARBAGE + 1),
        )


class PatchNet(nn.Module):
    """The held-out classifier: overlapping 4x4 patches, dense layers on top, 24 features, 11 logits."""

    def __init__(self, width: int = 32, hidden: int = 96, dropout: float = 0.2):
        """Random weights."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 4),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 2),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8 * width, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, NUM_FEATURES),
        )
        self.head = nn.Linear(NUM_FEATURES, GARBAGE + 1)

    def forward(self, gray: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 11) logits."""
        return self.head(F.silu(self.features(gray)))


def to_gray(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 1, 8, 8) float32 on the CPU."""
    gray = images.detach().float().cpu().mean(1, keepdim=True).clamp(0, 1)
    return gray if gray.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE) else F.adaptive_avg_pool2d(gray, IMAGE_SIZE)


def _load(name: str, model: nn.Module, weights: str | Path) -> nn.Module:
    prefix = name + "."
    state = {k.removeprefix(prefix): v for k, v in load_file(weights).items() if k.startswith(prefix)}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _asked(prompts: list[str]) -> Tensor:
    return torch.tensor([digit_of(prompt) for prompt in prompts])


class _ClassifierJudge:
    """Value = the classifier's probability of the digit that the prompt asks for."""

    name: str
    network: type[nn.Module]

    def __init__(self, weights: str | Path = WEIGHTS):
        self.model = _load(self.name, self.network(), weights)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, 11): the ten digits and garbage."""
        return self.model(to_gray(images)).softmax(-1)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None):
        return self.probabilities(images).gather(1, _asked(prompts)[:, None])[:, 0], {}

    def hits(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,): 1 where the most probable class is the asked digit, else 0; garbage counts as wrong."""
        return (self.probabilities(images).argmax(-1) == _asked(prompts)).float()

    def accuracy(self, images: Tensor, prompts: list[str]) -> float:
        """The share of `hits`."""
        return self.hits(images, prompts).mean().item()


class DigitReward(_ClassifierJudge):
    """The reward of the training."""

    name, network = "reward", ConvNet
    __name__ = "digit_reward"


class HeldOutJudge(_ClassifierJudge):
    """The judge that RL never sees."""

    name, network = "held_out", PatchNet
    __name__ = "held_out"


class OCRJudge:
    """Value = 1 where rapidocr's text recogniser reads the asked digit, else 0.

    The image is inverted (black ink on white), enlarged and put on a white page of the model's height. The
    recogniser is PaddleOCR's (Apache-2.0, in rapidocr's wheel); only its ten digits' columns are compared.
    """

    __name__ = "ocr"
    HEIGHT, WIDTH, DIGIT = 48, 48, 32

    def __init__(self, batch_size: int = 16, threads: int | None = None):
        """Open the recogniser; `threads` are torch's unless given."""
        import onnxruntime
        import rapidocr

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        path = next((Path(rapidocr.__file__).parent / "models").glob("*rec*.onnx"))
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # the CTC head's classes: blank first, then the listed characters
        characters = ["", *self.session.get_modelmeta().custom_metadata_map["character"].splitlines()]
        self.columns = [characters.index(str(digit)) for digit in range(10)]
        self.batch_size = batch_size

    def page(self, images: Tensor) -> np.ndarray:
        """(B, 3, 48, WIDTH) in [-1, 1], black on white."""
        ink = F.interpolate(to_gray(images), size=self.DIGIT, mode="bicubic", antialias=False).clamp(0, 1)
        x, y = self.WIDTH - self.DIGIT, self.HEIGHT - self.DIGIT
        page = F.pad(ink, (x // 2, x - x // 2, y // 2, y - y // 2))
        return (1 - 2 * page).expand(-1, 3, -1, -1).contiguous().numpy()

    def read(self, images: Tensor) -> Tensor:
        """The digit read in each image, (B,)."""
        name, pages = self.session.get_inputs()[0].name, self.page(images)
        starts = range(0, len(pages), self.batch_size)
        scores = [self.session.run(None, {name: pages[i : i + self.batch_size]})[0] for i in starts]
        return torch.as_tensor(np.concatenate(scores)[:, :, self.columns].max(1).argmax(-1))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None):
        """1 where the digit read is the digit asked."""
        return (self.read(images) == _asked(prompts)).float(), {}

    def accuracy(self, images: Tensor, prompts: list[str]) -> float:
        """The share of images read as the asked digit."""
        return self(images, prompts)[0].mean().item()


@lru_cache
def _held_out_model(weights: Path = WEIGHTS) -> nn.Module:
    return _load("held_out", PatchNet(), weights)


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """The held-out classifier's 24 penultimate features, (B, 24) float64."""
    return _held_out_model().features(to_gray(images)).double()


@lru_cache
def _reference() -> tuple[Tensor, Tensor]:
    images, labels = load_split("reference")
    return features(images), labels


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of two sets of features (B, F)."""
    difference = (first.mean(0) - second.mean(0)).square().sum()
    one, two = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(one)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return (difference + one.trace() + two.trace() - 2 * cross).item()


def fidelity(images: Tensor, labels: Tensor) -> float:
    """Frechet distance (0 is best) to real digits of the same labels in the held-out classifier's features.

    The real digits are repeated to the labels' frequencies, so that asking for other shares of the ten digits
    than the reference has costs nothing.
    """
    real, real_labels = _reference()
    rows = [torch.nonzero(real_labels == digit).flatten() for digit in range(10)]
    counts = torch.bincount(labels, minlength=10)
    total = 100 * len(real) // len(labels) * counts
    picked = [row.repeat(-(-int(n) // len(row)))[:n] for row, n in zip(rows, total, strict=True)]
    return frechet_distance(features(images), real[torch.cat(picked)])


def diversity(images: Tensor, labels: Tensor) -> float:
    """How differently the asked digit is written: standard deviation within a class, 1 is as diverse as real.

    Only images that the held-out judge reads as asked count, else wrong digits would pass for variety; a
    class with fewer than two of them counts 0.
    """
    ratios = []
    for digit in labels.unique():
        made, real = (_read_as(*pair, digit) for pair in ((images, labels), load_split("reference")))
        ratios.append((made.var(0).sum() / real.var(0).sum()).sqrt() if len(made) > 1 else torch.zeros(()))
    return torch.stack([ratio.double() for ratio in ratios]).mean().item()


def _read_as(images: Tensor, labels: Tensor, digit: Tensor) -> Tensor:
    """Features of the images that were asked to be `digit` and are."""
    found = features(images[labels == digit])
    return found[_held_out_model().head(F.silu(found.float())).argmax(-1) == digit]
