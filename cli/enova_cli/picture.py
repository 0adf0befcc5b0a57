"""A picture for a file, as SVG or PNG, the same bytes each time. Needs the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from enova_common.errors import FatalError, InvalidField

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty picture. Raises FatalError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "pip install 'enova[plot]'"
        raise FatalError("drawing needs matplotlib", reason="NOT_INSTALLED", field="--plot", remedy=remedy) from error
    mpl.rcParams["svg.hashsalt"] = "enova"  # else each run names its elements anew
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write the picture. Raises InvalidField for a path that does not do."""
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        remedy = "FILE.svg or FILE.png, in a folder that there is"
        raise InvalidField(f"{path} cannot be written: {why}", field="--plot", remedy=remedy) from error
