"""GenEval (Ghosh et al. 2023): objects by transformers' Mask2Former, colours by open_clip, the benchmark's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trl_tafs.rewards.clip_score import open_clip_pixels
from trl_tafs.rewards.geneval_rules import COCO_NAMES, COLORS, TAGS, Detection, check_row, judge, keep
from trl_tafs.rewards.model import ModelReward, load_open_clip
from trl_tafs.rewards.preprocessing import normalize, resize, to_uint8

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = 0x99 / 255  # what hides the surroundings of an object whose colour is asked
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
DETECTIONS = 100  # an image, the most confident (query, class) pairs


def instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], names: Sequence[str]
) -> list[Detection]:
    """Return the objects in Mask2Former's output for one image, as its instance head is evaluated on COCO.

    A pair of query and class is as confident as the class's probability times the mean probability of its mask.

    Args:
        class_logits: (queries, classes + 1), the last one "no object".
        mask_logits: (queries, h, w), of the image without padding.
        size: the image's height and width, to which the masks are enlarged.
        names: of the classes.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(min(DETECTIONS, probabilities.numel()))
    queries, classes = best.indices // probabilities.shape[1], best.indices % probabilities.shape[1]
    logits = F.interpolate(mask_logits.float()[None], size=size, mode="bilinear", align_corners=False)[0][queries]
    masks = logits > 0
    quality = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    confidences = (best.values * quality).tolist()
    found = []
    for confidence, label, mask in zip(confidences, classes.tolist(), masks, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            found.append(Detection(names[label], confidence, tuple(float(edge) for edge in edges), mask))
    return found


def masked_crop(image: Tensor, detection: Detection) -> Tensor:
    """Return the object on grey, cut out by its box: (3, h, w) of an image (3, H, W)."""
    shown = image if detection.mask is None else torch.where(detection.mask.to(image.device), image, GREY)
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return shown[:, top : max(bottom, top + 1), left : max(right, left + 1)]


class GenEval(ModelReward):
    """The benchmark's score on its rows; no score on prompts without GenEval's `tag` and `include`.

    Args:
        graded: True, for training: the share of what was asked for. False, for evaluation: 1 if all of it, else 0.
        detector: a Mask2Former for COCO instances, on the Hub or in a local folder.
        clip: open_clip's architecture for colours.
        clip_pretrained: its weights' tag or a local file.
        shortest_edge: to which images are enlarged for the detector.
        longest_edge: at most.
        options: see `ModelReward`.
    """

    title = "GenEval"
    parameters = 497_000_000
    evaluation_options = {"graded": False}  # the benchmark's own score

    def __init__(
        self,
        graded: bool = True,
        detector: str = DETECTOR,
        clip: str = "ViT-L-14",
        clip_pretrained: str | None = "openai",
        shortest_edge: int = 800,
        longest_edge: int = 1333,
        **options: Any,
    ) -> None:
        super().__init__(**({"batch_size": 8} | options))
        import open_clip
        from transformers import Mask2FormerForUniversalSegmentation

        self.detector = self.adopt(Mask2FormerForUniversalSegmentation.from_pretrained(detector))
        classes = self.detector.config.num_labels
        if classes != len(COCO_NAMES):
            raise ValueError(
                f"{detector} knows {classes} classes; GenEval needs COCO's {len(COCO_NAMES)} in their order"
            )
        self.clip, self.tokenizer = self.adopt(load_open_clip(clip, clip_pretrained)), open_clip.get_tokenizer(clip)
        self.graded, self.edges = graded, (shortest_edge, longest_edge)
        self.color_weights: dict[str, Tensor] = {}

    def applies(self, prompt: str, metadata: Mapping[str, Any]) -> bool:
        """Return whether the prompt is one of GenEval's rows, `tag` and `include` among its metadata."""
        if metadata.get("tag") not in TAGS or not metadata.get("include"):
            return False
        check_row(metadata)
        return True

    def preprocess(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the detector's input, padded to multiples of 32, and the (height, width) without the padding."""
        shortest, longest = min(images.shape[2:]), max(images.shape[2:])
        scale = min(self.edges[0] / shortest, self.edges[1] / longest)
        size = tuple(int(side * scale + 0.5) for side in images.shape[2:])
        pixels = normalize(resize(images, size, mode="bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        padding = (-size[1] % 32, -size[0] % 32)
        return F.pad(pixels, (0, padding[0], 0, padding[1])), size

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """Return the objects in each image (B, 3, H, W)."""
        pixels, size = self.preprocess(images)
        output = self.detector(pixel_values=pixels.to(self.dtype))
        found = []
        for classes, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True):
            masks = F.interpolate(masks[None].float(), size=pixels.shape[2:], mode="bilinear", align_corners=False)[0]
            masks = masks[:, : size[0], : size[1]]
            found.append(instances(classes, masks, tuple(images.shape[2:]), COCO_NAMES))
        return found

    def colors(self, image: Tensor, name: str, objects: Sequence[Detection]) -> list[str]:
        """Return the colour of each object of a class in an image (3, H, W): CLIP's nearest of ten."""
        if name not in self.color_weights:
            self.color_weights[name] = self._color_embeddings(name)
        crops = [open_clip_pixels(masked_crop(image, item)[None], self.clip.visual) for item in objects]
        embeddings = F.normalize(self.clip.encode_image(torch.cat(crops).to(self.dtype)).float(), dim=-1)
        return [COLORS[i] for i in (embeddings @ self.color_weights[name].T).argmax(1).tolist()]

    def _color_embeddings(self, name: str) -> Tensor:
        """Return an embedding of each colour, (10, C): the mean over the templates, normalised before and after."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
        embeddings = self.clip.encode_text(self.tokenizer(texts).to(self.device)).float()
        embeddings = F.normalize(embeddings, dim=-1).unflatten(0, (len(COLORS), len(COLOR_TEMPLATES)))
        return F.normalize(embeddings.mean(1), dim=-1)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores (B,), in [0, 1]."""
        images = (to_uint8(images).to(images.device).permute(0, 3, 1, 2).float() / 255).contiguous()
        scores = []
        for image, detections, row in zip(images, self.detect(images), metadata, strict=True):
            found = keep(detections, row["tag"])
            strict, graded = judge(row, found, lambda name, objects, image=image: self.colors(image, name, objects))
            scores.append(graded if self.graded else strict)
        return torch.tensor(scores)
