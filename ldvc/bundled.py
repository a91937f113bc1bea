"""Where the bundled weights and example photos are."""

from pathlib import Path

_IN_WHEEL = Path(__file__).parent / "assets"  # an installed wheel holds them inside the package (pyproject.toml)
ASSETS = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[1] / "assets"
