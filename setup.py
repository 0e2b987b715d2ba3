"""All is in setup.cfg, but for one thing: the wheel has a copy of examples/digits, for `trl-tafs quickstart`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE, PLACE = Path("examples/digits"), Path("trl_tafs/embedded/digits")
LEFT_OUT = {"train_judges.py", "README.md", "pretraining.jsonl"}


class BuildWithDigits(build_py):
    """Copies the example into what is built; an editable install finds it in the checkout."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        for source, target in self._digits():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name what was copied, too."""
        return super().get_outputs(include_bytecode) + [str(target) for _, target in self._digits()]

    def _digits(self) -> list[tuple[Path, Path]]:
        if getattr(self, "editable_mode", False):
            return []
        files = (path for path in sorted(SOURCE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
        target = Path(self.build_lib) / PLACE
        return [(path, target / path.relative_to(SOURCE)) for path in files if path.name not in LEFT_OUT]


setup(cmdclass={"build_py": BuildWithDigits})
