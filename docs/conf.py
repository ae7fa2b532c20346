"""The documentation site: `make docs`. Its pages are the Markdown files beside this one, and the scripts of examples/."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "bench")]

import fxcurv  # noqa: E402

project = "fxcurv"
author = copyright = "fxcurv contributors"
version = release = fxcurv.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5"]
html_theme = "pydata_sphinx_theme"
html_title = "fxcurv"
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2}
html_sidebars = {page: [] for page in ("index", "guide", "torch-compile", "from-backpack", "errors", "benchmark")}

# Docstrings say code in single backticks, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]


# These take a minute, or several processes.
SHOWN_ONLY = ("train_compiled", "all_extensions", "train_distributed", "fsdp_kfac")
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": rf"/(?!({'|'.join(SHOWN_ONLY)})\.py)[^/]*\.py$",
    "ignore_pattern": r"data\.py",
    "within_subsection_order": "FileNameSortKey",
    "reset_argv": "gallery_arguments.arguments",
    "download_all_examples": False,
    "parallel": True,  # as many scripts at once as Sphinx has jobs
    "show_memory": False,
    "min_reported_time": 1e9,
    "show_signature": False,
    "abort_on_example_error": True,
}


PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {"examples/README.md": "gallery/index.rst", "bench/README.md": "measuring.md"}
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)


def as_pages(app, docname: str, source: list[str]) -> None:
    """Documents link to each other as files of the repository, some of which the site has under another name."""
    folder = (HERE / docname).parent

    def included(match: re.Match) -> str:
        path = folder / match[1]
        return linked(path.read_text(encoding="utf-8"), path.parent)

    def linked(text: str, folder: Path) -> str:
        return re.sub(r"\[([^]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)", lambda m: link(m[1], folder / m[2], m[3] or ""), text)

    def link(title: str, path: Path, anchor: str) -> str:
        name = path.resolve().relative_to(HERE.parent).as_posix()
        page = PAGES.get(name)
        if name.startswith("docs/"):
            page = name.removeprefix("docs/")
        elif name.startswith("examples/") and name.endswith(".py"):
            page = f"gallery/{path.stem}.rst"
        return f"[{title}]({page}{anchor})" if page else title

    if not docname.startswith("gallery/"):
        source[0] = INCLUDE.sub(included, linked(source[0], folder))


def draw_benchmark(app) -> None:
    """The picture of docs/benchmark.md, from the results that its tables are of."""
    import measure
    import plots

    (name,) = re.findall(r"--write --from (\S+\.csv)", (HERE / "benchmark.md").read_text(encoding="utf-8"))
    plots.ratios(measure.read(HERE.parent / name), "c", HERE / "_generated" / "ratios.png")


def as_plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are prose with formulas, whose stars, bars and underscores are no markup; code is indented or in backticks."""
    text = re.sub(r"^Example:$", "Example::\n", "\n".join(lines), flags=re.MULTILINE)
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"(?<![\\:])([*|])|(?<=\w)(_)(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
    parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app) -> None:
    """Connect these to Sphinx."""
    app.connect("source-read", as_pages)
    app.connect("builder-inited", draw_benchmark)
    app.connect("autodoc-process-docstring", as_plain_text, priority=100)  # before napoleon, which makes markup
