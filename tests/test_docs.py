"""The documents say what the code does: the tutorial runs, the reference is up to date."""

import re
from pathlib import Path

from helpers import script

DOCS = Path(__file__).parent.parent / "docs"


def test_the_tutorial_runs():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    scope = {}
    for block in blocks:
        exec(compile(block, "tutorial.md", "exec"), scope)


def test_the_protocol_reference_is_what_the_code_says():
    """Docstrings, signatures, messages; and every docstring's cost is that of its trace."""
    assert script("protocol_reference").document() == (DOCS / "protocols.md").read_text()


def test_links_between_documents_lead_somewhere():
    for document in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
