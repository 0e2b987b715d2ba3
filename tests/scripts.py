"""Scripts, run in the test's own process: a new interpreter costs as much as many a script."""

import runpy
import sys
from pathlib import Path

import diffusers
import pytest
import transformers
from tiny import ROOT

LOGGING = (diffusers.utils.logging, transformers.utils.logging)


def run_script(path, *arguments, cwd=ROOT):
    """`python path arguments` in the folder `cwd`; what it prints, raises and exits with is the caller's to see."""
    verbosity = [library.get_verbosity() for library in LOGGING]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(str(Path(cwd, path).parent))
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            for library, level in zip(LOGGING, verbosity, strict=True):
                library.set_verbosity(level)
                library.enable_progress_bar()
