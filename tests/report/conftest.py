"""A run that was trained, evaluated and drawn, for all tests of its report."""

import shutil

import pytest
import tiny
from accelerate.state import AcceleratorState


def judge(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="session")
def hostile():
    """A prompt that would be markup."""
    return 'a </script><img src=x onerror=alert(1)> & "cat"'


@pytest.fixture(scope="session")
def trained(pipeline_folder, tmp_path_factory, hostile):
    """A finished run of three epochs; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"eval_freq": 1, "eval_prompts": ["one", "two"], "eval_num_steps": [2, 4], "eval_samplers": ["annealed"]}
    options |= {"eval_reward_function": {"judge": judge}, "picture_freq": 1, "picture_prompts": ["one", hostile]}
    options |= {"objective": "matched", "run_name": "first", "num_epochs": 3, "train_learning_rate": 0.02}
    tiny.trainer(tiny.load(pipeline_folder), folder, {"bright": tiny.brightness, "judge": judge}, **options).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, which a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")
