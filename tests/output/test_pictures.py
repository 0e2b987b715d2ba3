import math

import numpy as np
import pytest
import torch
from PIL import Image

from trl_tafs.output.pictures import sample_grid, save_png, tensor_to_image


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.warns(UserWarning, match="could not be written"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "a" / "b.png")


def test_pixels_are_rounded_clamped_and_in_order():
    image = torch.zeros(3, 64, 80)
    image[0, 2, 5], image[1, 2, 5], image[2, 2, 5] = 0.5, 1.7, -0.3
    picture = tensor_to_image(image)
    assert picture.size == (80, 64)
    assert picture.getpixel((5, 2)) == (128, 255, 0)


def test_small_images_are_enlarged_pixel_by_pixel():
    image = torch.rand(3, 8, 8)
    picture = tensor_to_image(image)
    assert picture.size == (64, 64)
    colors = np.asarray(picture).reshape(8, 8, 8, 8, 3)
    assert (colors == colors[:, :1, :, :1]).all()


def test_a_grid_has_one_row_a_prompt_and_one_column_a_step():
    images = torch.zeros(2, 4, 3, 64, 64)
    for row in range(2):
        for column in range(4):
            images[row, column, 0] = (1 + row) / 4
            images[row, column, 1] = (1 + column) / 5
    grid = sample_grid(images, ["a cat", "a dog"], ["1", "2", "3", "4"])
    titled = sample_grid(images, ["a cat", "a dog"], ["1", "2", "3", "4"], "epoch 3")
    top, left = 22, grid.width - 4 * 68
    assert grid.size == (left + 4 * 68, top + 2 * 68)
    assert titled.height == grid.height + 18
    for row in range(2):
        for column in range(4):
            pixel = grid.getpixel((left + column * 68 + 32, top + row * 68 + 32))
            assert pixel == (round((1 + row) / 4 * 255), round((1 + column) / 5 * 255), 0)


def test_a_long_prompt_does_not_blow_the_grid_up():
    grid = sample_grid(torch.rand(1, 1, 3, 64, 64), ["a very long prompt " * 100], ["1"])
    assert grid.width < 600
    assert math.isfinite(grid.height)
