"""What `pyproject.toml` cannot say: the README as PyPI shows it, with absolute links."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
HOME = re.search(r'^Homepage = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def absolute(link: "re.Match[str]") -> str:
    """A link of the README with the project's home in front."""
    is_picture, text, target = link.groups()
    return f"{is_picture}[{text}]({HOME}/{'raw' if is_picture else 'blob'}/main/{target})"


readme = re.sub(
    r"(!?)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8")
)
setup(long_description=readme, long_description_content_type="text/markdown")
