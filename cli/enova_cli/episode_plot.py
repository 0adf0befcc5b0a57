"""The evidence of an episode as a picture: what was measured of its worst member, as SVG or PNG. Needs `plot`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enova_cli.output import short
from enova_cli.picture import new_figure, save
from enova_common.errors import InvalidField

WIDTH_INCHES, ROW_INCHES = 8.0, 1.6


def plot_episode(episode: Mapping[str, Any], path: Path) -> None:
    """Draw an episode as the API gives it. Raises FatalError without matplotlib, InvalidField for a bad path."""
    series = episode["series"]
    if not series:
        raise InvalidField(f"nothing was measured of {episode['name']}", field="--plot")
    figure = new_figure(WIDTH_INCHES, 0.8 + ROW_INCHES * len(series))
    rows = figure.subplots(len(series), 1, sharex=True, squeeze=False)
    thresholds = {each["feature"]: each["threshold"] for each in episode["evidence"]}
    end_s = max(each["start_s"] + each["step_s"] * len(each["values"]) for each in series)
    since_s = episode["since_model_s"] - end_s
    for axes, each in zip(rows[:, 0], series, strict=True):
        stamps = [each["start_s"] + each["step_s"] * (index + 1) - end_s for index in range(len(each["values"]))]
        values = [math.nan if value is None else value for value in each["values"]]
        axes.plot(stamps, values, drawstyle="steps-post", color="tab:blue", linewidth=1.2)
        axes.set_ylabel(each["feature"], fontsize=7)
        axes.margins(y=0.15)
        threshold = thresholds.get(each["feature"])
        if threshold is not None and math.isfinite(threshold):
            axes.axhline(threshold, linestyle="--", color="tab:orange", linewidth=1)
        if stamps[0] <= since_s <= 0:
            axes.axvline(since_s, linestyle=":", color="tab:red", linewidth=1)
    rows[-1, 0].set_xlabel("seconds of model time before the newest step")
    causes = ", ".join(episode["causes"]) or "cause unknown"
    figure.suptitle(f"{short(episode['object'])}: {episode['kind']} ({causes})", fontsize=10)
    save(figure, path)
