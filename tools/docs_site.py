"""Hooks of the site (``mkdocs.yml``): pages that stand elsewhere, formulas, docstrings.

Nothing is written twice: README, CONTRIBUTING, CHANGELOG, SECURITY, the recorded benchmarks and the
notebook are pages of the site as they are. A page that the nav names and that is not there is left
out.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Files of the repository that are pages of the site, and where.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "tools/ptx/README.md": "tools/ptx/README.md",
    "tools/triton/README.md": "tools/triton/README.md",
    **{
        str(path.relative_to(ROOT)): str(path.relative_to(ROOT))
        for path in sorted(ROOT.glob("benchmarks/results/*.md"))
    },
}
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]*)`")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Leave out of the nav what does not exist."""
    config["nav"] = _existing(config["nav"])
    return config


def _existing(nav: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            kept.append({title: _existing(value)})
        elif value in PAGES.values() or any(_source(value, ending) for ending in (".md", ".ipynb")):
            kept.append(entry)
    return kept


def _source(page: str, ending: str) -> bool:
    return (ROOT / "docs" / page).with_suffix(ending).exists()


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of docs/, and the notebooks."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, source, page)))
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        text = notebook_page(json.loads(path.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of docs/ to files outside of it into links to their pages."""
    source = page.file.src_uri
    return markdown if page.file.generated_by else _relinked(markdown, f"docs/{source}", source)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return _FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    text = found[2].strip()
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, character)
    display = "block" if found[1] == "div" else "inline"
    return str(convert(text[2:-2].strip(), display=display))


def _relinked(text: str, source: str, page: str) -> str:
    """Links between files of the repository as links between pages of the site."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        if target in PAGES:
            there = PAGES[target]
        elif target.startswith("docs/"):
            there = re.sub(r"\.ipynb$", ".md", target.removeprefix("docs/"))
        elif target == "benchmarks/results":
            there = "measured.md"
        else:
            return found[0]
        start = posixpath.dirname(page) or "."
        return f"{found[1]}{os.path.relpath(there, start)}{found[3] or ''}{found[4]}"

    return _LINK.sub(link, text)


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its texts, its code, and what that printed."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            shown = output.get("text") or output.get("data", {}).get("text/plain") or []
            parts.append("```text\n" + "".join(shown).rstrip("\n") + "\n```")
    return "\n\n".join(parts) + "\n"


class Docstrings(griffe.Extension):
    """Docstrings as their readers at run time have them, and as Markdown.

    What :func:`tta_ext.ops._documentation.documented` fills in is filled in here from the same
    texts, since nothing of the package is imported; roles of reStructuredText become code.
    """

    def __init__(self) -> None:
        path = ROOT / "tta_ext" / "ops" / "_documentation.py"
        spec = importlib.util.spec_from_file_location("documentation", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.shared: dict[str, str] = module.SHARED

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if obj.is_function and obj.path.startswith("tta_ext.ops."):
            text = re.sub(
                r"^( *)\{(\w+)\}", lambda found: self._filled(found, obj), text, flags=re.MULTILINE
            )
        obj.docstring.value = _ROLE.sub(r"`\1`", text)

    def _filled(self, found: re.Match[str], obj: griffe.Object) -> str:
        indent, name = found.groups()
        block = self.shared.get(name)
        if block is None:
            docstring = obj.module[name].docstring
            assert docstring is not None
            listed = inspect.cleandoc(docstring.value)
            block = textwrap.dedent(listed.partition("Attributes:\n")[2])
        return textwrap.indent(block, indent)
