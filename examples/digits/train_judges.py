"""Train the rewarding and the held-out classifier: `python examples/digits/train_judges.py`.

Both learn ten digits and a garbage class. Without it an image classifier gives its highest marks to averages,
which is what a generator makes in one step. Deterministic at a given number of threads.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from digits_components import IMAGE_SIZE
from digits_data import load_split, prompt_for
from digits_judges import GARBAGE, WEIGHTS, ConvNet, DigitReward, HeldOutJudge, OCRJudge, PatchNet, to_gray
from safetensors.torch import save_file
from torch import Tensor, nn

GARBAGE_SHARE = 0.3
Rng = torch.Generator


def uniform(shape: tuple[int, ...], low: float, high: float, rng: Rng) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=rng)


def augment(gray: Tensor, rng: Rng) -> Tensor:
    """Small rotations, stretches and shifts at four times the resolution, edges stay sharp; some noise."""
    n = len(gray)
    angle, shear = uniform((n,), -0.17, 0.17, rng), uniform((n,), -0.15, 0.15, rng)
    wide, high = uniform((n,), 0.9, 1.12, rng), uniform((n,), 0.93, 1.08, rng)
    shift = uniform((n, 2), -0.2, 0.2, rng)
    theta = torch.stack(
        [
            torch.stack([wide * angle.cos(), shear - angle.sin(), shift[:, 0]], -1),
            torch.stack([angle.sin(), high * angle.cos(), 0.4 * shift[:, 1]], -1),
        ],
        1,
    )
    large = F.interpolate(gray, scale_factor=4, mode="bicubic")
    grid = F.affine_grid(theta, [n, 1, 4 * IMAGE_SIZE, 4 * IMAGE_SIZE], align_corners=False)
    warped = F.grid_sample(large, grid, mode="bilinear", align_corners=False)
    sharp = F.avg_pool2d((2.0 * (warped - 0.5) + 0.5).clamp(0, 1), 4)
    keep = torch.rand((n, 1, 1, 1), generator=rng) < 0.35
    clean = torch.where(keep, gray, sharp)
    noise = uniform((n, 1, 1, 1), -0.08, 0.08, rng).clamp(min=0) * torch.randn(gray.shape, generator=rng)
    return (clean * uniform((n, 1, 1, 1), 0.9, 1.05, rng) + noise).clamp(0, 1)


def average(gray: Tensor, labels: Tensor, size: int, same: bool, count: int, rng: Rng) -> Tensor:
    """Means of `count` groups of `size` digits, of one class or of any."""
    index = torch.randint(len(gray), (count, size), generator=rng)
    if same:
        order = torch.argsort(labels, stable=True)
        counts = torch.bincount(labels, minlength=10)
        digit = torch.randint(10, (count, 1), generator=rng)
        offset = (uniform((count, size), 0, 1, rng) * counts[digit]).long()
        index = order[(counts.cumsum(0) - counts)[digit] + offset]
    return gray[index].mean(1)


def blur(gray: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, a sigma (in pixels) for each image."""
    distance = torch.arange(-3, 4.0)
    kernel = torch.exp(-(distance**2) / (2 * sigma[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    rows = F.conv2d(gray.transpose(0, 1), kernel[:, None, :, None], padding=(3, 0), groups=len(gray))
    return F.conv2d(rows, kernel[:, None, None, :], padding=(0, 3), groups=len(gray)).transpose(0, 1)


def garbage(gray: Tensor, labels: Tensor, count: int, rng: Rng) -> Tensor:
    """What is no digit, about `count` images: averages, mixtures, blur, noise, weak and broken ink."""
    n = max(2, count // 12)

    def draw() -> tuple[Tensor, Tensor]:
        index = torch.randint(len(gray), (n,), generator=rng)
        return gray[index], labels[index]

    one, first = draw()
    two, second = draw()
    other = (first != second).view(-1, 1, 1, 1)
    two = torch.where(other, two, one.flip(-1).roll(1, -2))
    column = (n, 1, 1, 1)
    mean = average(gray, labels, 32, True, n, rng)
    part = uniform(column, 0.3, 0.7, rng)
    cut = int(torch.randint(3, 6, (1,), generator=rng))
    top, left = torch.cat([one[:, :, :cut], two[:, :, cut:]], 2), torch.cat([one[..., :4], two[..., 4:]], 3)
    halves = top if cut % 2 else left
    size = int(torch.randint(4, 12, (1,), generator=rng))
    pieces = [
        average(gray, labels, size, True, n, rng),
        mean * uniform(column, 0.8, 1.3, rng),
        average(gray, labels, int(torch.randint(2, 12, (1,), generator=rng)), False, n, rng),
        part * one + (1 - part) * two,
        torch.maximum(one, two),
        halves,
        mean + uniform(column, 0.0, 0.45, rng) * (one - mean),
        blur(one, uniform((n,), 1.0, 2.5, rng)),
        one * uniform(column, 0.0, 0.55, rng),
        one + uniform(column, 0.35, 0.8, rng) * torch.randn(one.shape, generator=rng),
        uniform(column, 0.0, 1.0, rng) * torch.rand(one.shape, generator=rng),
        one.flatten(1)[:, torch.randperm(IMAGE_SIZE**2, generator=rng)].view_as(one),
    ]
    return torch.cat(pieces).clamp(0, 1)


def train(model: nn.Module, split: str, steps: int, seed: int, batch: int = 128, rate: float = 2e-3) -> None:
    """Cross-entropy on augmented digits and fresh garbage, AdamW with cosine decay."""
    images, labels = load_split(split)
    gray, rng = to_gray(images), Rng().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    model.train()
    for _ in range(steps):
        index = torch.randint(len(gray), (batch,), generator=rng)
        bad = garbage(gray, labels, round(batch * GARBAGE_SHARE / (1 - GARBAGE_SHARE)), rng)
        inputs = torch.cat([augment(gray[index], rng), bad])
        targets = torch.cat([labels[index], torch.full((len(bad),), GARBAGE)])
        loss = F.cross_entropy(model(inputs), targets, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def rejected(judge: DigitReward | HeldOutJudge, gray: Tensor) -> tuple[float, float]:
    """The share called garbage, and the mean of the highest digit probability, which a reward could pay."""
    p = judge.probabilities(gray.expand(-1, 3, -1, -1))
    return (p.argmax(-1) == GARBAGE).float().mean().item(), p[:, :GARBAGE].amax(-1).mean().item()


def report(judge: DigitReward | HeldOutJudge, unseen: list[str]) -> None:
    """Accuracy on real digits that the judge was not trained on, and on averages and blur of those."""
    parts = [load_split(name) for name in unseen]
    images, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    gray, rng = to_gray(images), Rng().manual_seed(7)
    prompts = [prompt_for(int(label)) for label in labels]
    accuracy, refused = judge.accuracy(images, prompts), rejected(judge, gray)[0]
    print(f"{judge.name}: accuracy on {len(labels)} unseen real digits {accuracy:.3f}, garbage {refused:.3f}")
    means = torch.stack([gray[labels == digit].mean(0) for digit in range(10)])
    kinds = {"class means": means, "class means, contrast x1.3": (1.3 * means).clamp(0, 1)}
    for size in (2, 3, 4, 8):
        kinds[f"means of {size} of a class"] = average(gray, labels, size, True, 1000, rng)
        kinds[f"means of {size} of any"] = average(gray, labels, size, False, 1000, rng)
    for sigma in (0.7, 1.0, 1.5):
        kinds[f"blur {sigma} px"] = blur(gray, torch.full((len(gray),), sigma))
    kinds["noise"] = torch.rand((1000, 1, 8, 8), generator=rng)
    kinds["digit + noise .15"] = (gray + 0.15 * torch.randn(gray.shape, generator=rng)).clamp(0, 1)
    kinds["digit + noise .4"] = (gray + 0.4 * torch.randn(gray.shape, generator=rng)).clamp(0, 1)
    for name, kind in kinds.items():
        share, best = rejected(judge, kind)
        print(f"  {name:28s} called garbage {share:.3f}   best digit's probability {best:.3f}")


def main() -> None:
    """Train, save and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(WEIGHTS))
    parser.add_argument("--report_only", action="store_true", help="only print what the shipped judges do")
    args = parser.parse_args()
    if not args.report_only:
        start, state = time.perf_counter(), {}
        for name, network, seed in (("reward", ConvNet, args.seed), ("held_out", PatchNet, args.seed + 1)):
            torch.manual_seed(seed)
            model = network()
            train(model, name, args.steps, seed)
            state |= {f"{name}.{key}": value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, args.output)
        print(f"trained in {time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads")
    report(DigitReward(args.output), ["base", "held_out"])
    report(HeldOutJudge(args.output), ["base", "reward"])
    images, labels = load_split("all")
    accuracy = OCRJudge().accuracy(images, [prompt_for(int(label)) for label in labels])
    print(f"ocr: reads {accuracy:.3f} of all {len(labels)} real digits")


if __name__ == "__main__":
    main()
