"""What the model card of an adapter says."""

import importlib.util
import re

import pytest
import yaml
from digits_components import build_pipeline
from published import LEVELS, PRIVATE, SIZES, facts, on_a_private_machine

from trl_tafs import AutoTAFSPipeline, TAFSGRPOConfig
from trl_tafs.algorithm import build_algorithm
from trl_tafs.hub.card import create_model_card, usage_code, write_model_card
from trl_tafs.hub.facts import base_model_facts
from trl_tafs.hub.publisher import evaluation_columns
from trl_tafs.method.allocation import GroupBounds
from trl_tafs.method.credit import CREDITS, SumCredit
from trl_tafs.method.kernels import FlowSde, Ode
from trl_tafs.method.levels import uniform_levels, with_zero
from trl_tafs.method.objectives import ClippedObjective
from trl_tafs.method.papers import Paper


@pytest.fixture
def elsewhere(monkeypatch):
    on_a_private_machine(monkeypatch)


def test_card_metadata(elsewhere):
    made = create_model_card(
        facts(
            base_model="stabilityai/stable-diffusion-3.5-medium",
            base_license="other",
            base_license_name="stabilityai-ai-community",
            base_license_link="https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
        )
    )
    metadata = yaml.safe_load(str(made).split("---\n")[1])
    assert metadata["library_name"] == "diffusers" and metadata["pipeline_tag"] == "text-to-image"
    assert metadata["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert metadata["base_model_relation"] == "adapter"
    assert (metadata["license"], metadata["license_name"]) == ("other", "stabilityai-ai-community")
    assert {"text-to-image", "lora", "diffusers", "trl", "tafs-grpo", "sd3"} <= set(metadata["tags"])
    assert metadata["widget"] == [{"text": "a handwritten seven", "output": {"url": "images/after_0.png"}}]
    text = str(made)
    for part in (
        "| 2 | 0.75 | 0.9 |",
        "| 4 annealed steps | 0.19 | 0.845 |",
        "| legible | 1 |",
        "2602.01591",
    ):
        assert part in text
    assert [part for part in PRIVATE if part in text] == []


def test_card_of_a_base_that_is_not_on_the_hub():
    made = create_model_card(facts(base_license="bsd-3-clause", prompts=['the "7"\nof | Ann'], pictures=()))
    metadata = yaml.safe_load(str(made).split("---\n")[1])
    assert "base_model" not in metadata and "widget" not in metadata
    assert metadata["license"] == "bsd-3-clause"
    compile(usage_code(facts(prompts=['the "7"\nof'])), "card", "exec")
    assert 'from_pretrained("digits-base")  # the folder' in made.text
    bare = create_model_card(facts(training={}, rewards={}, reward_curve=(), metrics={}, repo_id=None))
    assert not re.search(r"## Results|<details>|reward_curve|None|\n\n\n", bare.text)


def test_the_card_says_how_it_was_trained_and_is_to_be_sampled():
    def text(**settings):
        return create_model_card(facts(**settings)).text

    ours = text()
    assert "scheduler anneals" in ours and "the final images are scored" in ours and "re-noising follows" in ours
    steps = text(moved=ClippedObjective.description, credited=SumCredit.description, scores_every_step=True)
    assert (
        "every step's clean images are scored" in steps
        and "answers for all of them" in steps
        and "clipped policy gradient" in steps
    )
    ode = text(drawn=Ode.description, anneals=False)
    assert "solves the ODE" in ode and "are drawn by the ODE" in ode and "noise" not in ode.split("## Noise levels")[0]
    assert "are drawn by Flow-GRPO's SDE" in text(drawn=FlowSde.description, anneals=False)


def test_card_facts_are_checked():
    with pytest.raises(ValueError, match="4 steps need as many levels.*levels has 4, levels_unshifted 5"):
        facts(levels_unshifted=[*LEVELS, 0.0])
    with pytest.raises(ValueError, match="'/tmp/after.png' isn't relative"):
        facts(pictures=[("a seven", None, "/tmp/after.png")])


def test_reward_curve_is_a_table_without_matplotlib(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))
    curve = [(epoch, epoch / 100) for epoch in range(48)]
    text = write_model_card(facts(reward_curve=curve), tmp_path).read_text()
    assert len(re.findall(r"^\| \d+ \| 0\.\d+ \|$|^\| 0 \| 0 \|$", text, re.MULTILINE)) == 10
    assert "| 47 | 0.47 |" in text and not (tmp_path / "images").exists()


def test_base_model_facts(tmp_path):
    pipeline = build_pipeline(0, **SIZES)

    def of(source):
        pipeline.register_to_config(_name_or_path=str(source))
        return base_model_facts(pipeline)

    assert of("")["base_name"] == "StableDiffusion3Pipeline"
    folder = tmp_path / "alicesmith" / "digits-base"
    folder.mkdir(parents=True)
    expected = {"base_model": None, "base_name": "digits-base", "base_license": None}
    assert of(folder).items() >= expected.items()
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\nText\n")
    expected = {**expected, "base_license": "other", "base_license_name": "mine", "base_license_link": None}
    assert of(folder) == {**expected, "base_revision": None, "base_llama": None, "base_fused": ()}
    snapshot = tmp_path / "models--org--sd3-tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text((folder / "README.md").read_text())
    assert of(snapshot)["base_model"] == "org/sd3-tiny"
    assert of(snapshot)["base_license_link"] == "https://huggingface.co/org/sd3-tiny/blob/main/LICENSE"


def test_the_card_s_code_loads_the_revision_that_was_trained_on(tmp_path):
    build_pipeline(0, **SIZES).save_pretrained(tmp_path / "base")
    pipeline = AutoTAFSPipeline.from_pretrained(tmp_path / "base", revision="fp16")
    named = type(pipeline).from_pretrained(pretrained_model_name_or_path=tmp_path / "base")  # as the parent names it
    assert named.base_revision is None
    assert pipeline.base_revision == "fp16" and base_model_facts(pipeline)["base_revision"] is None
    snapshot = tmp_path / "models--org--sd3-tiny" / "snapshots"
    (tmp_path / "models--org--sd3-tiny").mkdir()
    (tmp_path / "base").rename(snapshot)
    pipeline.register_to_config(_name_or_path=str(snapshot))
    code = usage_code(facts(**base_model_facts(pipeline)))
    assert 'from_pretrained("org/sd3-tiny", revision="fp16")' in code
    assert "revision" not in usage_code(facts(**base_model_facts(pipeline)), base="here")
    pipeline.base_revision = None
    assert 'from_pretrained("org/sd3-tiny")' in usage_code(facts(**base_model_facts(pipeline)))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"objective": "clipped"}, []),
        ({"objective": "forward"}, ["DiffusionNFT"]),
        ({"objective": "awm"}, ["AWM"]),
        ({"objective": "clipped", "sample_kernel": "flow_sde"}, ["Flow-GRPO"]),
        ({"objective": "clipped", "sample_kernel": "dance_sde", "step_credit": "trace"}, ["DanceGRPO"]),
        ({"objective": "clipped", "sample_kernel": "cps", "sample_window_size": 2}, ["Flow-CPS", "MixGRPO"]),
        ({"objective": "forward", "group_allocation": "variance"}, ["DiffusionNFT"]),
        (
            {"objective": "forward", "group_allocation": "superflow", "scale_rewards": "batch"},
            ["SuperFlow", "DiffusionNFT"],
        ),
        ({}, []),
    ],
)
def test_a_card_cites_what_the_run_used(settings, names):
    algorithm = build_algorithm(
        TAFSGRPOConfig(**settings), GroupBounds(8, 2, 32), with_zero(uniform_levels(4)), (1, 8, 8)
    )
    papers = algorithm.papers()
    assert [paper.name for paper in papers] == ["TAFS-GRPO", *names]
    text = create_model_card(facts(papers=papers)).text
    assert text.count("@misc{") == len(papers) and all(paper.bibtex() in text for paper in papers)
    assert ("Parts of it come from [" in text) == bool(names)


def test_a_part_from_outside_is_cited_too():
    paper = Paper("Tapered", "doe2026", "Tapered noise", ("Jane Doe", "John Roe"), 2026, "2601.00001")

    def rule(per_step):
        return per_step

    rule.paper = paper
    CREDITS["tapered"] = rule
    try:
        config = TAFSGRPOConfig(objective="clipped", step_credit="tapered")
        made = build_algorithm(config, GroupBounds(8, 8, 8), with_zero(uniform_levels(4)), (1, 8, 8))
    finally:
        del CREDITS["tapered"]
    assert made.papers()[1:] == [paper]
    assert "author        = {Jane Doe and John Roe}" in paper.bibtex()


def test_each_number_of_the_results_has_its_epoch():
    evaluations = [{"epoch": epoch, "eval/annealed_4/bright": epoch / 10} for epoch in (0, 3, 5)]
    columns = evaluation_columns(evaluations)
    assert columns == {"eval/annealed_4/bright": {"before training": 0.0, "after epoch 5": 0.5}}
    assert evaluation_columns(evaluations[1:2]) == {"eval/annealed_4/bright": {"after epoch 3": 0.3}}
    assert evaluation_columns([]) == {}
    text = create_model_card(facts(metrics=columns, epochs=6)).text
    assert "| | before training | after epoch 5 |" in text.replace("|  |", "| |") and "for 6 epochs: " in text
