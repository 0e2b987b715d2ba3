"""A family's facts stand on its class, and a base model is known the same way everywhere."""

import inspect

import families as tiny_families
import pytest
from tiny import ROOT

import trl_tafs
from trl_tafs import pipelines
from trl_tafs.pipelines import families
from trl_tafs.pipelines.components import denoiser_name, is_text_encoder
from trl_tafs.pipelines.identity import base_identity, cached_repository
from trl_tafs.policy.adapter_file import guess_family

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"/home/a/.cache/hub/models--org--sd3-tiny/snapshots/{COMMIT}/vae", ("org/sd3-tiny", COMMIT)),
        (f"C:\\hub\\models--a.b--c_d\\snapshots\\{COMMIT}", ("a.b/c_d", COMMIT)),
        ("hub/models--org--name--more/snapshots/abc", ("org/name--more", "abc")),
        ("hub/models--org--name/snapshots", ("org/name", None)),
        ("hub/models--org--name/refs/main", (None, None)),
        ("org/name", (None, None)),
    ],
)
def test_a_path_in_the_cache_tells_repository_and_commit(path, found):
    assert cached_repository(path) == found


def test_a_base_is_known_by_where_it_came_from(pipeline, pipeline_folder, tmp_path):
    base = base_identity(pipeline)
    assert (base.folder, base.name, base.repo_id) == (pipeline_folder.resolve(), pipeline_folder.name, None)
    assert (base.location, base.dtype, base.quantization) == (str(pipeline_folder.resolve()), "float32", False)
    pipeline.register_to_config(_name_or_path="org/name")
    pipeline.vae.register_to_config(_name_or_path=f"hub/models--org--name/snapshots/{COMMIT}/vae")
    pipeline.base_revision = "main"
    base = base_identity(pipeline)
    assert (base.repo_id, base.name, base.location, base.folder) == ("org/name", "org/name", "org/name", None)
    assert (base.revision, base.commit) == ("main", COMMIT)
    pipeline.register_to_config(_name_or_path="")
    assert base_identity(pipeline).name == "StableDiffusion3Pipeline"


def test_a_pipeline_names_its_text_encoders_and_its_denoiser(pipeline):
    assert list(pipeline.text_encoders()) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    pipeline.text_encoder_3 = None
    assert list(pipeline.text_encoders()) == ["text_encoder", "text_encoder_2"]
    assert pipeline.missing_text_encoders() == ["text_encoder_3"]
    assert pipeline.text_encoders()["text_encoder"] is pipeline.text_encoder
    assert denoiser_name(object()) == "transformer" and not is_text_encoder("tokenizer")
    pipeline.denoiser_name = "vae"
    assert denoiser_name(pipeline) == "vae" and pipeline.denoiser is pipeline.vae


def test_the_list_of_families_is_all_that_the_package_and_the_factory_know():
    classes = {name: getattr(trl_tafs, name) for name in families.FAMILIES}
    assert list(pipelines.FAMILIES.values()) == list(classes.values())
    source = inspect.getsource(families)
    for name, family in classes.items():
        assert getattr(pipelines, name) is family
        assert f"import {name} as {name}\n" in source, "type checkers have the same list"
        assert family.card_tags and family.lora_key_marks
    naming = [path for path in (ROOT / "trl_tafs").rglob("*.py") if "TAFSHiDreamPipeline" in path.read_text()]
    assert {path.name for path in naming} == {"hidream.py", "families.py"}


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_a_family_is_recognised_by_its_own_lora(name):
    pipeline = tiny_families.ours(tiny_families.stock(name), name)
    denoiser = pipeline.denoiser
    names = [n for n, _ in denoiser.named_modules() if n.endswith(pipeline.lora_target_modules)]
    assert type(pipeline).lora_family in guess_family(f"transformer.{n}.lora_A.weight" for n in names)


def test_loras_of_other_kinds_are_named():
    assert "kohya" in guess_family(["lora_unet_down_blocks_0.lora_down.weight"])
    single = guess_family(["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"])
    assert single == "FLUX.1 or FLUX.2 or Chroma or Ovis-Image or LongCat-Image"
    assert guess_family(["transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight"]) == "Qwen-Image"
    assert guess_family(["transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"]) == "SD3 or Qwen-Image"
    assert guess_family(["transformer.transformer_blocks.0.ff.lora_A.weight"]) == "a diffusers transformer"
    assert guess_family(["a.lora_A.weight"]) == "an unknown family"
