"""Sphinx: `pip install ".[docs]" && sphinx-build docs docs/_build`."""

import shutil
from pathlib import Path

import sctraj

project = "sctraj"
author = "The sctraj developers"
release = sctraj.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
]
html_theme = "furo"
html_title = f"sctraj {release}"
exclude_patterns = ["_build"]

# the tutorials are stored executed, and .ci/run executes them anew; sphinx takes pages from its own folder alone
HERE = Path(__file__).parent
shutil.copytree(HERE.parent / "tutorials", HERE / "tutorials", dirs_exist_ok=True)
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "myst.header"]  # links that also work where the files are read as text

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = True
napoleon_preprocess_types = False

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "anndata": ("https://anndata.readthedocs.io/en/stable", None),
    "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
}
