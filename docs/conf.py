"""How Sphinx builds the site: `make docs`."""

from __future__ import annotations

import crosskd_assign

project = "crosskd_assign"
author = "the authors of crosskd_assign"
copyright = author  # noqa: A001  # Sphinx's own name
version = release = crosskd_assign.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

# Pages, in Markdown. A link to a heading is what GitHub makes of it.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = True
nb_execution_mode = "off"  # a test runs the notebook; its outputs are stored
suppress_warnings = ["myst.header"]

# The reference, from docstrings. Names in single backticks are links where they are public.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"crosskd_assign {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
