"""Guide, and API from the docstrings: `sphinx-build -W -n docs docs/build`. Formulas are MathML."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import featkd

project = "featkd"
author = "The featkd authors"
copyright = author
version = release = featkd.__version__
html_theme = "furo"
html_title = f"featkd {version}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
exclude_patterns = ["build"]
myst_heading_anchors = 3
nitpick_ignore_regex = [("py:.*", r"(torch|collections|hypothesis)\..*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Shape", ("Returns (forward)", "returns_style")]
default_role = "code"  # the docstrings' single backquotes


def inline_math(html: HTML5Translator, node: nodes.math) -> None:
    html.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(html: HTML5Translator, node: nodes.math_block) -> None:
    # The theme's box around it cuts off what a browser lets stand out above or below.
    formula = tex2mathml(node.astext(), as_block=True)
    html.body.append(formula.replace("<math ", '<math style="padding-block: 0.6em" ', 1))
    raise nodes.SkipNode


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """A link to Markdown outside the guide is one to a file; no line ends inside `1.0 ± 0.1`."""
    text = re.sub(r"\]\((\.\./[^)#]*\.md)[^)]*\)", r"](path:\1)", source[0])
    source[0] = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
