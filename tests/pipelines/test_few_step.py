"""Which models are known to draw in few steps already: by class, by configuration, by name."""

import families
import pytest
from families import FAMILIES

from trl_tafs.pipelines.few_step import NAMED, UNDONE, few_step_sign

SIGNS = {  # of the tiny twins, whose names say nothing
    "flux-schnell": "as schnell",
    "flux2-klein-distilled": "distilled FLUX.2-klein",
    "sana-sprint": "SanaSprint",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_known_by_its_class_or_configuration_alone(name):
    sign = few_step_sign(families.ours(families.stock(name), name))
    assert (sign is not None) == (name in SIGNS) and SIGNS.get(name, "") in (sign or "")


@pytest.mark.parametrize(
    "name",
    [
        *("stable-diffusion-3.5-large-turbo", "Z-Image-Turbo", "FLUX.1-schnell", "Sana_Sprint_1.6B_1024px"),
        *("Hyper-SD3-8steps", "Qwen-Image-Lightning", "sd3.5-4step", "Hyper-FLUX.1-dev-8steps-lora", "lcm-lora-sd3"),
        *("dmd2_sd3", "my_few_step_model"),
    ],
)
def test_names_of_few_step_models(name):
    assert NAMED.search(name) and not UNDONE.search(name)


@pytest.mark.parametrize(
    "name",
    [
        *("stable-diffusion-3.5-medium", "FLUX.1-dev", "FLUX.2-klein-base-4B", "Qwen-Image", "Z-Image", "SANA1.5_1.6B"),
        *("flux-18-steps-to-art", "sd3-28steps", "hyperrealism", "dmdesign", "checkpoint-1.4-stepsister"),
    ],
)
def test_names_of_others(name):
    assert not NAMED.search(name)


@pytest.mark.parametrize("name", ["Z-Image-De-Turbo", "FLUX.1-schnell-undistilled", "schnell-dedistill"])
def test_a_name_that_says_that_it_was_undone_counts_more_than_the_configuration(name):
    assert UNDONE.search(name)
    mine = families.ours(families.stock("flux-schnell"), "flux-schnell")
    mine.register_to_config(_name_or_path=f"someone/{name}")
    assert few_step_sign(mine) is None
