"""Builds the documentation: ``make docs``, without network and without executing notebooks."""

import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).parent
INIT = (HERE.parent / "influence_kit" / "__init__.py").read_text()

project = "influence_kit"
author = "the influence_kit authors"
release = version = re.search(r'__version__ = "(.+)"', INIT)[1]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"influence_kit {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = html_show_sourcelink = html_copy_source = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 110
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# formulas as MathML, which browsers draw themselves: pages need nothing from the network
html_math_renderer = "mathml"
myst_update_mathjax = False


def formula(tag, as_block):
    """What writes a formula into a page, as a block of its own or within a line."""

    def visit(writer, node):
        mathml = tex2mathml(node.astext(), as_block=as_block)
        opening = writer.starttag(node, tag, "", CLASS="math notranslate nohighlight")
        writer.body.append(f"{opening}{mathml}</{tag}>")
        raise nodes.SkipNode

    return visit


def copy_tutorials():
    """The notebooks, into a folder that git ignores: Sphinx reads nothing outside of its own."""
    copies = HERE / "tutorials"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    for notebook in (HERE.parent / "tutorials").glob("*.ipynb"):
        shutil.copy2(
            notebook, copies
        )  # with its time, so that it is built again only if it changed


def readable_signature(app, what, name, obj, options, signature, returned):
    """A signature that Sphinx can parse: only then does it print short names of types."""
    if signature is not None:
        signature = re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)'?>", r"\1", signature)
    return signature, returned


def setup(app):
    """Called by Sphinx before anything is read."""
    copy_tutorials()
    app.connect("autodoc-process-signature", readable_signature)
    app.add_html_math_renderer(
        "mathml", (formula("span", False), None), (formula("div", True), None)
    )
