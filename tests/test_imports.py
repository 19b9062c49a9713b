"""Which way imports run: what docs/architecture.md says in one sentence."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import lpgan_jax

PACKAGE = Path(lpgan_jax.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def rooms():
    """The order of the rooms, as the page has it."""
    (sentence,) = re.findall(r"^`(\w+(?: < \w+)+)`", PAGE.read_text(), re.MULTILINE)
    return sentence.split(" < ")


def room_of(parts, order):
    """The room of a module lpgan_jax.X...; None of the package itself."""
    return order.index(parts[1]) if len(parts) > 1 else None


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "lpgan_jax":
                yield from ((f"lpgan_jax.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def wrong_imports(package, order):
    """'file:line: imports module' for each import of a room that lies to the right."""
    found = []
    for file in sorted(package.rglob("*.py")):
        parts = ("lpgan_jax", *file.relative_to(package).with_suffix("").parts)
        if parts[1] == "__init__":
            continue
        own = room_of(parts, order)
        for name, line in imported(ast.parse(file.read_text())):
            other = name.split(".")
            if other[0] == "lpgan_jax" and len(other) > 1 and room_of(other, order) > own:
                found.append(f"{'/'.join(parts[1:])}.py:{line}: imports {name}")
    return found


def test_nothing_imports_to_its_right():
    assert wrong_imports(PACKAGE, rooms()) == []


def test_roles_start_without_what_few_of_them_need():
    """They would take half a second and 70 MB in each."""
    script = "import sys, lpgan_jax.cli, lpgan_jax.cluster.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert not {"dp_accounting", "scipy.stats", "sklearn", "matplotlib"} & set(
        done.stdout.decode().split()
    )


def test_a_wrong_import_is_found(tmp_path):
    """Also one that is inside of a function."""
    (tmp_path / "mpc").mkdir()
    (tmp_path / "mpc" / "party.py").write_text(
        "from lpgan_jax.ring.words import RING64\n\ndef f():\n    from lpgan_jax.gan import lpgan\n"
    )
    assert wrong_imports(tmp_path, rooms()) == ["mpc/party.py:4: imports lpgan_jax.gan"]
