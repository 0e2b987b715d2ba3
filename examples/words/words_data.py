"""Words to write, colours to write them in, and true renderings of both.

A word has four letters, each in a cell of its own. Images are (3, H, W) in [0, 1]: an ink of one of six colours on a
light, slightly tinted ground. Nothing is stored: letters are drawn from matplotlib's DejaVu Sans Mono once a process.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_LENGTH = 4
COLOURS = {
    "red": (0.80, 0.05, 0.05),
    "green": (0.00, 0.50, 0.10),
    "blue": (0.05, 0.15, 0.85),
    "black": (0.05, 0.05, 0.05),
    "purple": (0.55, 0.05, 0.65),
    "brown": (0.50, 0.28, 0.02),
}
INKS = torch.tensor(list(COLOURS.values()))  # (6, 3)

TRAIN_WORDS = tuple(
    """
    able acid aged also area army away baby back ball band bank base bath bear beat been beer bell belt best bill bird
    blow blue boat body bone book born both bowl bulk burn bush busy cake call calm came camp card care case cash cast
    cell chat chip city club coal coat code cold come cook cool copy core cost crew crop dark data date dawn days deal
    dear debt deep deny desk dial diet disc dish does done door dose down draw drew drop dual duke dust duty each earn
    ease east easy edge else even ever evil exit face fact fail fair fall farm fast fate fear feed feel feet fell felt
    file fill film find fine fire firm fish five flat flow food foot ford form fort four free from fuel full fund gain
    game gate gave gear gene gift girl give glad goal goes gold golf gone good gray grew grid grow gulf hair half hall
    hand hang hard harm have head hear heat held help here hero high hill hire hold hole holy home hope host hour huge
    hunt idea inch into iron item join jump jury just keen keep kept kick kind king knee knew know lack lady laid lake
    land lane last late lead left less life lift like line link list live load loan lock logo long look lord lose loss
    lost love luck made mail main make male many mark mass meal mean meat meet menu mere mile milk mind mine miss mode
    mood moon more most move much must name navy near neck need news next nice nine none nose note okay once only onto
    open oral over pace pack page paid pain pair palm park part pass past path peak pick pink pipe plan play plot plug
    plus poll pool poor port post pull pure push quit quiz race rail rain rank rare rate read real rear rely rent rest
    rice rich ride ring rise risk road rock role roll roof room root rose rule rush safe said sail sale salt same sand
    save seat seed seek seem seen self sell send sent sept ship shop shot show shut sick side sign site size skin slip
    slow snow soft soil sold sole some song soon sort soul spot star stay step stop such suit sure take tale talk tall
    """.split()
)
HELD_OUT_WORDS = tuple(
    """
    tank tape task team tech tell tend term test text than that them then they thin this thus till time tiny told toll
    tone took tool tour town tree trip true tube tune turn twin type unit upon used user vary vast very vice view vote
    wage wait wake walk wall want ward warm wash wave ways weak wear week well went were west what when whom wide wife
    wild will wind wine wing wire wise wish with wood word wore work yard yeah year your zero zone jazz axis fizz onyx
    """.split()
)


def random_strings(count: int, seed: int = 0) -> tuple[str, ...]:
    """Different strings of four letters, no held-out word among them; sorted, the same for a seed always."""
    rng, strings = np.random.default_rng(seed), set()
    while len(strings) < count:
        string = "".join(LETTERS[i] for i in rng.integers(26, size=WORD_LENGTH))
        if string not in HELD_OUT_WORDS:
            strings.add(string)
    return tuple(sorted(strings))


def prompt_for(word: str, colour: str) -> str:
    """The caption: cake, red -> cake in red."""
    return f"{word} in {colour}"


def parse(prompt: str) -> tuple[str, str]:
    """The word and the colour that a caption asks for."""
    word, _, colour = prompt.partition(" in ")
    if len(word) != WORD_LENGTH or colour not in COLOURS:
        raise ValueError(f"a prompt is '<four letters> in <{'|'.join(COLOURS)}>', not {prompt!r}")
    return word, colour


@dataclass(frozen=True)
class Layout:
    """Where the letters of a word lie, in pixels; cells are aligned with the transformer's patches."""

    height: int
    width: int
    cell: int  # width of a letter's cell
    margin: int  # left and right of the word
    patch: int
    font_size: float


LAYOUTS = {
    "small": Layout(height=16, width=32, cell=8, margin=0, patch=4, font_size=13.0),
    "large": Layout(height=24, width=60, cell=12, margin=6, patch=6, font_size=19.5),
}


@cache
def atlas(size: str) -> Tensor:
    """The 26 capital letters as coverage masks (26, H, cell) in [0, 1], drawn at four times the size."""
    layout, scale = LAYOUTS[size], 4
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono-Bold.ttf"
    font = ImageFont.truetype(str(path), layout.font_size * scale)
    masks = []
    for letter in LETTERS.upper():
        image = Image.new("L", (layout.cell * scale, layout.height * scale))
        middle = (layout.cell * scale / 2, layout.height * scale / 2)
        ImageDraw.Draw(image).text(middle, letter, fill=255, font=font, anchor="mm")
        small = image.resize((layout.cell, layout.height), Image.Resampling.BOX)
        masks.append(torch.from_numpy(np.array(small, dtype=np.float32) / 255))
    return torch.stack(masks)


def spell(words: list[str]) -> Tensor:
    """Words to letter numbers (B, 4)."""
    return torch.tensor([[LETTERS.index(letter) for letter in word] for word in words])


def coverage(letters: Tensor, size: str) -> Tensor:
    """Letter numbers (B, 4) to the ink's coverage (B, H, W)."""
    margin = LAYOUTS[size].margin
    cells = atlas(size)[letters]  # (B, 4, H, cell)
    return torch.nn.functional.pad(cells.permute(0, 2, 1, 3).flatten(2), (margin, margin))


def render(letters: Tensor, colours: Tensor, ground: Tensor, size: str) -> Tensor:
    """True images (B, 3, H, W) of letters (B, 4) in colours (B,) on a ground (B, 3)."""
    alpha = coverage(letters, size)[:, None]
    return alpha * INKS[colours][:, :, None, None] + (1 - alpha) * ground[:, :, None, None]


def random_ground(count: int, rng: torch.Generator) -> Tensor:
    """Light tints, (B, 3) in [.86, 1]."""
    return 0.86 + 0.14 * torch.rand((count, 3), generator=rng)


def training_letters(count: int, rng: torch.Generator) -> Tensor:
    """(B, 4): random strings, every third a training word; never a held-out word."""
    strings = torch.randint(26, (count, WORD_LENGTH), generator=rng)
    words = spell(list(TRAIN_WORDS))[torch.randint(len(TRAIN_WORDS), (count,), generator=rng)]
    letters = torch.where(torch.rand((count, 1), generator=rng) < 1 / 3, words, strings)
    held_out = (letters[:, None] == spell(list(HELD_OUT_WORDS))[None]).all(2).any(1)
    return torch.where(held_out[:, None], words, letters)
