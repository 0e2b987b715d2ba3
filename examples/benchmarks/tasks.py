"""The embedded tasks of the benchmark: what is trained, on which prompts, and who judges it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.prompts.encoder import PromptEncoder

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES / name) for name in ("digits", "words", "scenes")] + [str(EXAMPLES)]

NOISE, CHOICE_NOISE = 1000, 2000  # seeds: of what is reported, and of what rates and scales are chosen by


def cells_distance(images: Tensor, real: Tensor, cells: tuple[int, int]) -> float:
    """Frechet distance of the mean colours of so many cells, times 100."""
    from digits_judges import frechet_distance

    means = [torch.nn.functional.adaptive_avg_pool2d(item, cells).flatten(1) for item in (images, real)]
    return 100 * frechet_distance(*means)


class Task(ABC):
    """One embedded pipeline with its reward, prompts and judges."""

    name: str
    height: int
    width: int
    seconds: float  # of CPU time, each run's
    options: dict[str, Any]  # of TAFSGRPOConfig: sizes that are the same for every method
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # learning rates that are tried for every method alike
    guidance: tuple[float, ...] = (1.5, 2.0, 3.0, 4.5, 7.0)  # scales that are tried for the base
    points: int = 4  # of the curve of rewards
    prompts: list[str]  # judged
    choice_prompts: list[str]  # by which a learning rate is chosen
    train_prompts: list[tuple[str, dict]]
    metadata: dict[str, dict] = {}  # of prompts, for the reward

    @abstractmethod
    def pipeline(self) -> Any:
        """The pre-trained pipeline, anew."""

    @abstractmethod
    def rewards(self) -> dict[str, Any]:
        """What is trained on."""

    @abstractmethod
    def judge(self, images: Tensor) -> dict[str, float]:
        """All judges on images of `prompts`; `reward` first."""

    @abstractmethod
    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The rewarding metric of each image of these prompts, (B,)."""

    def quick(self, images: Tensor, prompts: list[str] | None = None) -> float:
        """The rewarding metric's mean, by default on images of `prompts`."""
        return self.values(images, self.prompts if prompts is None else prompts).mean().item()

    @abstractmethod
    def real(self) -> Tensor:
        """True images of `prompts`, several of each."""

    @abstractmethod
    def frechet(self, images: Tensor) -> float:
        """Frechet distance of images of `prompts` to true ones."""

    def saturated(self, images: Tensor) -> float:
        """How much larger the share of values at 0 or 1 is than in true images."""
        share = [((item - 0.5).abs() >= 0.495).float().mean().item() for item in (images, self.real())]
        return share[0] - share[1]

    def images(
        self,
        pipeline: Any,
        sampler: str,
        num_steps: int,
        guidance: float = 1.0,
        *,
        prompts: list[str] | None = None,
        seed: int = NOISE,
    ) -> Tensor:
        """(B, 3, H, W) of `prompts`, by default the judged ones, with noise that is the same for every method."""
        prompts = self.prompts if prompts is None else prompts
        device = torch.device("cpu")
        length = self.options["max_sequence_length"]
        encode = PromptEncoder(pipeline, device, guidance_scale=guidance, max_sequence_length=length)
        velocity, dtype = pipeline.velocity, torch.float32
        drawer = Drawer(pipeline, encode, velocity, batch_size=100, seed=seed, device=device, storage_dtype=dtype)
        spec = DrawSpec(sampler, num_steps, self.height, self.width, guidance)
        return drawer.images(spec, prompts, range(len(prompts)))


class Digits(Task):
    """D = 64: a classifier's reward, a held-out classifier, an OCR model, Frechet distance, diversity."""

    name, height, width = "digits", 8, 8
    seconds = 16.0

    def __init__(self) -> None:
        """300 images, 30 of each digit."""
        from digits_data import prompt_for
        from digits_judges import DigitReward, HeldOutJudge, OCRJudge

        self.labels = torch.arange(10).repeat_interleave(30)
        self.prompts = self.choice_prompts = [prompt_for(label) for label in self.labels.tolist()]
        self.train_prompts = [(prompt_for(digit), {}) for digit in range(10)]
        self.judges = {"reward": DigitReward(), "held_out": HeldOutJudge(), "ocr": OCRJudge()}
        self.options = {"sample_batch_size": 96, "sample_num_batches_per_epoch": 2, "num_generations": 32}
        self.options |= {"train_batch_size": 192, "max_sequence_length": 8}

    def pipeline(self) -> Any:
        """Quickstart's."""
        from quickstart import load

        return load()

    def rewards(self) -> dict[str, Any]:
        """The classifier's probability of the asked digit."""
        return {"reward": self.judges["reward"]}

    def judge(self, images: Tensor) -> dict[str, float]:
        """Accuracies, fidelity (less is better), diversity (1: that of real digits)."""
        from digits_judges import diversity, fidelity

        values = {name: judge.accuracy(images, self.prompts) for name, judge in self.judges.items()}
        return values | {"fidelity": fidelity(images, self.labels), "diversity": diversity(images, self.labels)}

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Whether the rewarding classifier sees the asked digit."""
        return self.judges["reward"].hits(images, prompts)

    def real(self) -> Tensor:
        """Digits of the split that judges."""
        from digits_data import load_split

        return load_split("reference")[0]

    def frechet(self, images: Tensor) -> float:
        """In the held-out classifier's features."""
        from digits_judges import fidelity

        return fidelity(images, self.labels)


class Words(Task):
    """D = 1,536: an OCR engine's reward on random words, judged on held-out ones by it, an older one, and pixels."""

    name, size = "words", "small"
    seconds, rates, points = 30.0, (1e-3, 3e-3, 1e-2), 2

    def __init__(self) -> None:
        """One image of each of 92 held-out words."""
        import words_ocr
        from words_data import LAYOUTS
        from words_judges import ColourJudge, OCRJudge, OCRReward, PrintJudge

        self.height, self.width = LAYOUTS[self.size].height, LAYOUTS[self.size].width
        self.prompts, self.train_prompts = words_ocr.HELD_OUT_PROMPTS, words_ocr.TRAIN_PROMPTS
        self.choice_prompts = words_ocr.CHOICE_PROMPTS
        self.judges = {"reward": OCRReward(), "held_out": OCRJudge(), "colour": ColourJudge(), "fidelity": PrintJudge()}
        sizes = ("sample_batch_size", "sample_num_batches_per_epoch", "num_generations", "train_batch_size")
        self.options = {name: words_ocr.COMMON[name] for name in (*sizes, "max_sequence_length")}

    def pipeline(self) -> Any:
        """That of the size."""
        from words_components import load

        from trl_tafs import TAFSStableDiffusion3Pipeline

        return load(self.size, TAFSStableDiffusion3Pipeline)

    def rewards(self) -> dict[str, Any]:
        """1 - normalised edit distance of what PP-OCRv6 reads."""
        return {"reward": self.judges["reward"]}

    def judge(self, images: Tensor) -> dict[str, float]:
        """Means; fidelity is PrintJudge's (more is better), diversity the spread of the ground's and ink's pixels."""
        values = {n: torch.as_tensor(j(images, self.prompts)).mean().item() for n, j in self.judges.items()}
        return values | {"diversity": images.std(0).mean().item()}

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The rewarding engine's."""
        return torch.as_tensor(self.judges["reward"](images, prompts))

    def real(self) -> Tensor:
        """Eight renderings of each word, on grounds of their own."""
        from words_data import COLOURS, parse, random_ground, render, spell

        pairs = [parse(prompt) for prompt in self.prompts] * 8
        colours = torch.tensor([list(COLOURS).index(colour) for _, colour in pairs])
        ground = random_ground(len(pairs), torch.Generator().manual_seed(0))
        return render(spell([word for word, _ in pairs]), colours, ground, self.size)

    def frechet(self, images: Tensor) -> float:
        """Of the mean colours of 4 x 8 cells, times 100: it sees ink, ground and burnt pictures, no letters."""
        return cells_distance(images, self.real(), (4, 8))


class LargeWords(Words):
    """D = 4,320: larger letters, and so more pixels."""

    name, size = "large", "large"


class Scenes(Task):
    """D = 3,072: GenEval's graded score of what OpenCV finds; judged strictly on held-out combinations."""

    name, height, width = "scenes", 32, 32
    seconds, points = 90.0, 2
    each = 2  # images of each of 96 prompts

    def __init__(self) -> None:
        """Two images of each held-out prompt; rates are chosen by prompts of training's combinations."""
        from scenes_components import MAX_LENGTH
        from scenes_data import held_out_prompts, training_prompts, true_scenes
        from scenes_judges import Preference, SecondDetector, StrictReward

        judged, choice = held_out_prompts(), training_prompts(16, seed=1)
        self.train_prompts = training_prompts()
        self.metadata = dict(judged) | dict(choice) | dict(self.train_prompts)
        self.prompts = [text for text, _ in judged for _ in range(self.each)]
        self.choice_prompts = [text for text, _ in choice for _ in range(self.each)]
        self.judges = {"reward": StrictReward(), "held_out": SecondDetector(), "preference": Preference()}
        self.true = true_scenes([(text, self.metadata[text]) for text in self.prompts], NOISE)[0]
        self.options = {"sample_batch_size": 48, "sample_num_batches_per_epoch": 4, "num_generations": 12}
        self.options |= {"train_batch_size": 192, "max_sequence_length": MAX_LENGTH}

    def pipeline(self) -> Any:
        """Pre-trained on scenes."""
        from scenes_components import load

        from trl_tafs import TAFSStableDiffusion3Pipeline

        return load(TAFSStableDiffusion3Pipeline)

    def rewards(self) -> dict[str, Any]:
        """The graded score."""
        from scenes_judges import SceneReward

        return {"reward": SceneReward()}

    def judge(self, images: Tensor) -> dict[str, float]:
        """Means by the strict score, the second detector and the preference; distance to true scenes; diversity."""
        rows = [self.metadata[text] for text in self.prompts]
        values = {name: judge(images, self.prompts, rows).float().mean().item() for name, judge in self.judges.items()}
        spread = (images[::2] - images[1::2]).square().mean((1, 2, 3)).sqrt().mean()
        true = (self.true[::2] - self.true[1::2]).square().mean((1, 2, 3)).sqrt().mean()
        return values | {"fidelity": self.frechet(images), "diversity": (spread / true).item()}

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The strict score by contours."""
        return self.judges["reward"](images, prompts, [self.metadata[text] for text in prompts]).float()

    def real(self) -> Tensor:
        """A true scene of each."""
        return self.true

    def frechet(self, images: Tensor) -> float:
        """Of the mean colours of 4 x 4 cells, times 100."""
        return cells_distance(images, self.real(), (4, 4))


class Mixed(Digits):
    """Digits among prompts that teach nothing, as in real prompt sets: ten learnable, ten solved, ten hopeless.

    A solved prompt's reward is 1 whatever is drawn, a hopeless one's 0; only the learnable ones are judged.
    """

    name = "mixed"

    def __init__(self) -> None:
        """Each digit's prompt three times, with its kind in the metadata."""
        super().__init__()
        kinds = ("learnable", "solved", "hopeless")
        spaces = {"learnable": "", "solved": " ", "hopeless": "  "}  # a prompt of its own for the tracker
        self.train_prompts = [(p + spaces[kind], {"kind": kind}) for p, _ in self.train_prompts for kind in kinds]
        self.options |= {"num_generations": 16}

    def rewards(self) -> dict[str, Any]:
        """The classifier's, where the prompt is learnable."""
        constant = {"solved": 1.0, "hopeless": 0.0}

        def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> list[float]:
            values = self.judges["reward"](images, [prompt.strip() for prompt in prompts])[0].tolist()
            return [constant.get(m.get("kind"), value) for value, m in zip(values, metadata, strict=True)]

        return {"reward": reward}


TASKS = {"digits": Digits, "words": Words, "large": LargeWords, "scenes": Scenes, "mixed": Mixed}
