"""API reference from the docstrings: `sphinx-build -W -n docs docs/build` (formulas are MathML)."""

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


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
