"""Digests of source: what decides a number is in them, and nothing else."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbench.core import packages, provenance
from effbench.core.packages import module_file
from effbench.core.paths import PACKAGE
from effbench.core.provenance import digest_source, follow_imports, strip_prose

CODE = '''\
"""What this is."""

import os  # an import


def double(x):
    """Twice x."""
    # a comment
    text = "# no comment"
    return f"{x}#{2 * x}", text


class Empty:
    """Nothing else."""
'''
BARE = 'import os\ndef double(x):\n    text = "# no comment"\n    return f"{x}#{2 * x}", text\nclass Empty:'


def test_comments_docstrings_and_blank_lines_are_left_out():
    assert strip_prose(CODE) == BARE


@pytest.mark.parametrize(
    ("code", "bare"),
    [
        ('def f(): "doc"; return 1\n', "def f(): ; return 1"),
        ('def f():\n    """é é"""; return 1\n', "    ; return 1"),
        ('x = """\n# kept\n"""\n', 'x = """\n# kept\n"""'),
        ('def f():\n    x = 1\n    "no docstring"\n', '    "no docstring"'),
        ("x = 1  # one\ny = 2\n", "x = 1\ny = 2"),
    ],
)
def test_only_prose_is_cut(code, bare):
    assert strip_prose(code).endswith(bare)


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), max_size=40))
def test_no_comment_changes_the_text(comment):
    assert strip_prose(CODE.replace("a comment", comment)) == BARE


@pytest.mark.parametrize("old", ["2 * x", "# no comment", "os", "Empty", "double"])
def test_every_change_of_code_changes_the_text(old):
    assert strip_prose(CODE.replace(old, "other")) != BARE


def test_what_is_left_of_our_own_files_means_the_same():
    """Stripped text parses to the tree without docstrings (a body of nothing else is filled in again)."""

    class Bare(ast.NodeTransformer):
        def visit(self, node):
            self.generic_visit(node)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and provenance._docstring(node):
                node.body = node.body[1:]
            return node

    for path in sorted((PACKAGE / "nn").rglob("*.py")):
        content = path.read_text(encoding="utf-8")
        tree = Bare().visit(ast.parse(content))
        if all(node.body for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))):
            assert ast.dump(ast.parse(strip_prose(content))) == ast.dump(tree), path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `effbench` of a few files in place of the real one; returns a function that writes files."""
    monkeypatch.setattr(packages, "PACKAGE", tmp_path / "effbench")

    def write(**files):
        for name, content in files.items():
            path = tmp_path / "effbench" / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            provenance._digest_source.cache_clear()

    write(__init__="__version__ = '1'", **{"a.__init__": "", "a.b": "x = 1", "a.c": "y = 2", "d": "z = 3"})
    return write


def followed(package_text, package):
    package(**{"a.start": package_text})
    return set(follow_imports(["effbench.a.start"])) - {"effbench.a", "effbench.a.start"}


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("from effbench.a import b", {"effbench.a.b"}),
        ("from effbench.a.b import x", {"effbench.a.b"}),
        ("import effbench.a.c", {"effbench.a.c"}),
        ("from . import b", {"effbench.a.b"}),
        ("from .b import x", {"effbench.a.b"}),
        ("from ..d import z", {"effbench.d"}),
        ("from .. import d", {"effbench.d"}),
        ("def f():\n    from effbench.a import b", {"effbench.a.b"}),
        ('BACKENDS = {"fast": "effbench.a.c:run"}', {"effbench.a.c"}),
        ("if TYPE_CHECKING:\n    from effbench.a import b", set()),
        ("if typing.TYPE_CHECKING:\n    import effbench.d\nelse:\n    from effbench.a import b", {"effbench.a.b"}),
        ('"""See effbench.a.b: it does."""\nimport os', set()),
    ],
)
def test_imports_are_followed(text, modules, package):
    assert followed(text, package) == modules


def test_imports_of_imports_count_and_packages_too(package):
    package(**{"a.start": "from effbench.a import b", "a.b": "from effbench import d"})
    before = digest_source("effbench.a.start")
    package(d="z = 4")
    after = digest_source("effbench.a.start")
    package(**{"a.__init__": "import os"})
    assert len({before, after, digest_source("effbench.a.start")}) == 3


def test_a_release_and_prose_change_nothing(package):
    package(**{"a.start": "from effbench import d"})
    before = digest_source("effbench.a.start")
    package(__init__="__version__ = '2'", d='"""What."""\n\nz = 3  # three\n')
    assert digest_source("effbench.a.start") == before


def test_what_is_not_ours_is_no_module():
    assert module_file("torch") is None and module_file("effbench.kernels") is None
    with pytest.raises(ValueError, match=r"effbench.nowhere is no module"):
        digest_source("effbench.nowhere")
