"""A page as one file of HTML that asks for nothing else: its style, its script and plotly stand in it, each once.

Only scripts with the hashes that the page names may run, and nothing may be fetched, so that a name which slipped
through as markup could do nothing. It cannot slip through: the template escapes what it prints, the script writes text
and never markup, and data stand in the page as JSON without angle brackets.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effbench import __version__
from effbench.records.definitions import DEFINITIONS
from effbench.report.folder import MARK
from effbench.report.glossary import select_definitions
from effbench.report.page import Section, list_measured
from effbench.report.text import superscript

WEB = Path(__file__).parent.parent / "web"


def render(title: str, sections: Sequence[Section], data: Mapping[str, Any]) -> bytes:
    """The page of these tables with the data behind them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["superscript"] = superscript
    plotly, script = get_plotlyjs(), (WEB / "page.js").read_text(encoding="utf-8")
    used = select_definitions(list_measured(sections))
    page = environment.get_template("page.html").render(
        title=title,
        mark=f"{MARK}, effbench {__version__}",
        sections=sections,
        counts={"records": len(data["records"]), "tables": len(sections)},
        definitions=[(DEFINITIONS.index(one), one) for one in used],
        places={name: place for name, place in data["metrics"].items() if place is not None},
        style=Markup((WEB / "page.css").read_text(encoding="utf-8")),
        data=Markup(write_data(data)),
        plotly=Markup(plotly),
        script=Markup(script),
        hashes=[hash_script(text) for text in (plotly, script)],
    )
    return page.encode()


def write_data(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element: nothing in it begins or ends an element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def hash_script(text: str) -> str:
    """By what a content security policy allows a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
