"""What the scripts of the gallery are called with when the site is built."""

import tempfile
from pathlib import Path

FIGURES = Path(tempfile.gettempdir()) / "fxcurv-gallery"  # beside those of the site
SHORT = {
    "demo": ["--epochs", "4"],
    "diag_ggn_optimizer": ["--steps", "60", "--batch-size", "64", "--step-size", "0.02", "0.1", "--style", "compile"],
    "gradient_of_variance": ["--samples", "8"],
}


def arguments(gallery: dict, script: dict) -> list[str]:
    """For a script: short training, and a figure that is saved elsewhere than in examples/."""
    path = Path(script["src_file"])
    FIGURES.mkdir(exist_ok=True)
    saves = "--figure" in path.read_text(encoding="utf-8")
    return [*(["--figure", str(FIGURES / f"{path.stem}.png")] if saves else []), *SHORT.get(path.stem, [])]
