"""Sphinx's settings for the site that docs/build.py makes. Nothing in a page is fetched from anywhere."""

import html
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import MathError, tex2mathml

project = "AI Sleep Constructs"
author = "The AI Sleep Constructs developers"
copyright = "2026 onwards, the AI Sleep Constructs developers"
extensions = ["myst_nb"]
exclude_patterns = ["_static"]

nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # a cell with shell lines is still worth showing

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


def _mathml(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show by themselves; one that cannot be converted is shown as it was written."""
    block = isinstance(node, nodes.math_block)
    try:
        self.body.append(tex2mathml(node.astext(), as_block=block))
    except MathError:
        self.body.append(f"<code>{html.escape(node.astext())}</code>")
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(_mathml, None), block_renderers=(_mathml, None))
