"""The documentation as a site: every page is in it, Python names have docstrings, and it builds without a warning."""

import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest
import yaml
from tiny import ROOT

import trl_tafs
from trl_tafs.method import papers
from trl_tafs.presets import PRESETS

DOCS = ROOT / "docs"


class Loader(yaml.SafeLoader):
    """MkDocs' tags are let be."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def pages(nav):
    """The files that a navigation names."""
    for item in nav:
        for target in item.values():
            yield from pages(target) if isinstance(target, list) else [target]


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages(SITE["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))


def test_links_stay_within_the_site():
    """A link out of the folder leads somewhere in the repository, and nowhere on the site."""
    found = {
        path.name: re.findall(r"\]\((\.\./[^)]*)\)", path.read_text(encoding="utf-8")) for path in DOCS.glob("*.md")
    }
    assert not {name: links for name, links in found.items() if links}


def referenced():
    """The objects that docs/api.md names."""
    for path in re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE):
        module, _, name = path.rpartition(".")
        yield path, getattr(importlib.import_module(module), name)


def without_docstring(name, item):
    """Of an object and its public methods, the names of those that say nothing of themselves."""
    if not (inspect.getdoc(item) if inspect.isroutine(item) else item.__doc__):
        yield name
    if isinstance(item, type):
        for member, value in vars(item).items():
            own = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if member[0] != "_" and (inspect.isfunction(own) or isinstance(own, property)) and not own.__doc__:
                yield f"{name}.{member}"


def test_public_names_have_docstrings_and_are_in_the_reference():
    exported = {name: getattr(trl_tafs, name) for name in trl_tafs.__all__ if name != "__version__"}
    objects = dict(referenced())
    assert len(objects) > 15
    offenders = [told for name, item in (objects | exported).items() for told in without_docstring(name, item)]
    assert not [name for name in offenders if name != "REWARDS"]  # a dictionary
    families = {name for name, item in exported.items() if isinstance(item, type) and name.endswith("Pipeline")}
    text = (DOCS / "api.md").read_text() + (DOCS / "families.md").read_text()
    assert families and not [name for name in exported if f"{name}" not in text and name != "REWARDS"]


def test_a_name_without_a_docstring_is_found():
    class Silent:
        def speak(self):
            pass

    assert list(without_docstring("Silent", Silent)) == ["Silent", "Silent.speak"]


def test_every_paper_and_every_preset_is_explained():
    known = [value for value in vars(papers).values() if isinstance(value, papers.Paper)]
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    assert known and not [paper.name for paper in known if paper.url not in text]
    told = text + (DOCS / "methods.md").read_text(encoding="utf-8")
    assert not [name for name in PRESETS if f"`{name}`" not in told and "_without_" not in name]


# ComfyUI ------------------------------------------------------------------------------------------------------

# What nodes of ComfyUI take and give, of those that the workflow has: inputs by name and kind, outputs in order.
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "TripleCLIPLoader": ({"clip_name1": str, "clip_name2": str, "clip_name3": str}, ("CLIP",)),
    "LoraLoaderModelOnly": ({"lora_name": str, "strength_model": float, "model": "MODEL"}, ("MODEL",)),
    "ModelSamplingSD3": ({"shift": float, "model": "MODEL"}, ("MODEL",)),
    "CLIPTextEncode": ({"text": str, "clip": "CLIP"}, ("CONDITIONING",)),
    "EmptySD3LatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "KSampler": (
        {"seed": int, "steps": int, "cfg": float, "sampler_name": str, "scheduler": str, "denoise": float}
        | {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"filename_prefix": str, "images": "IMAGE"}, ()),
}


@pytest.fixture
def workflow():
    return json.loads((ROOT / "examples" / "comfyui" / "sd35_medium.json").read_text(encoding="utf-8"))


def test_the_workflow_connects_what_fits(workflow):
    for node in workflow.values():
        taken, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == taken.keys()
        for name, kind in taken.items():
            value = node["inputs"][name]
            if isinstance(kind, type):
                assert type(value) is kind, (node["class_type"], name)
                continue
            source, place = value
            assert NODES[workflow[source]["class_type"]][1][place] == kind, (node["class_type"], name)


def test_the_workflow_draws_as_the_adapter_was_trained(workflow):
    (sampler,) = [node["inputs"] for node in workflow.values() if node["class_type"] == "KSampler"]
    assert {sampler[name] for name in ("sampler_name", "scheduler", "cfg", "denoise")} == {"lcm", "simple", 1.0}
    assert sampler["steps"] == 4
    (lora,) = [number for number, node in workflow.items() if node["class_type"] == "LoraLoaderModelOnly"]
    assert workflow[sampler["model"][0]]["inputs"] == {"shift": 3.0, "model": [lora, 0]}
    assert workflow[lora]["inputs"]["lora_name"] == "pytorch_lora_weights.safetensors"
    assert workflow[lora]["inputs"]["strength_model"] == 1.0  # the strength is in the published weights
    saved = [node for node in workflow.values() if node["class_type"] == "SaveImage"]
    reached, front = set(), [saved[0]["inputs"]["images"][0]]
    while front:
        number = front.pop()
        reached.add(number)
        front += [value[0] for value in workflow[number]["inputs"].values() if isinstance(value, list)]
    assert len(saved) == 1 and len(reached) == len(workflow) - 1  # nothing is left over


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "trl_tafs.trainer.TAFSGRPOTrainer" in reference and "Held-out prompts" in reference.replace(
        "held-out", "Held-out"
    )
    changes = (tmp_path / "site" / "changelog" / "index.html").read_text(encoding="utf-8")
    assert "0.1.0" in changes
    assert json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())["docs"]
