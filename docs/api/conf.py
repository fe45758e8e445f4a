"""The API page, from the docstrings of the public names; `make docs` builds it into build/docs."""

import fused_lars

project = "fused_lars"
version = release = fused_lars.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fused_lars {version}"
html_copy_source = False

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

# Names of this package must be found; those of torch and of Python are on other sites.
nitpick_ignore_regex = [
    (r"py:.*", r"torch\..*|collections\.abc\..*|Tensor|LARS|Loss|fused_lars\._records\.LayerNorms"),
    (r"py:class", r"\"decayed\"|\"int8\"|callable|iterable|optional"),
]
