"""The shipped units and sample settings: they load, they verify, and they say what the programs say."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from enova_common.settings import load_settings, settings_from
from enova_testing.sample_settings import FOLDER, LEFT_OUT, SAMPLES, Sample, render

pytestmark = pytest.mark.network

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
PROGRAMS = Path(__file__).parents[2] / ".venv" / "bin"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
# systemd-analyze security, lower is safer; the agent needs devices, its cgroup and what engines need.
EXPOSURE_MAX = {"enova-agent.service": 2.5, "enova-coordinator.service": 1.5, "enova-ingress.service": 1.5}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.file)
def test_a_sample_loads_and_is_what_the_settings_say(sample: Sample) -> None:
    path = FOLDER / sample.file
    assert load_settings(sample.settings, path, {}, sample.prefix)
    remedy = "run python -m enova_testing.sample_settings in tests/"
    assert path.read_text() == render(sample), remedy


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.file)
def test_every_commented_key_is_a_real_one_with_its_real_default(sample: Sample) -> None:
    text = (FOLDER / sample.file).read_text()
    uncommented = re.sub(r"^#(?=[a-z_]+ = (?!\(not set\)))", "", text, flags=re.MULTILINE)
    assert uncommented.count("\n#") < text.count("\n#")
    with_all = settings_from(sample.settings, tomllib.loads(uncommented), {}, sample.prefix)
    assert with_all == load_settings(sample.settings, FOLDER / sample.file, {}, sample.prefix)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.file)
def test_every_setting_is_in_the_sample(sample: Sample) -> None:
    text = (FOLDER / sample.file).read_text()
    for name in set(sample.settings.__dataclass_fields__) - LEFT_OUT:
        assert re.search(rf"^#?(\[#?)?{name}[ \].]", text, re.MULTILINE), name


def here(unit: Path, folder: Path) -> Path:
    """A copy of a unit that starts the programs of this environment."""
    copy = folder / unit.name
    copy.write_text(unit.read_text().replace("/opt/enova/bin", str(PROGRAMS)))
    return copy


if shutil.which("systemd-analyze"):  # where it is not installed these are not collected

    def test_systemd_accepts_the_units(tmp_path: Path) -> None:
        copies = [here(unit, tmp_path) for unit in sorted(UNITS.iterdir())]
        done = subprocess.run(
            ["systemd-analyze", "verify", *map(str, copies)], capture_output=True, text=True, check=False, timeout=60
        )
        # What it says of the host's own units is not ours to mend.
        ours = [line for line in done.stderr.splitlines() if "enova" in line]
        assert ours == []

    def test_a_planted_mistake_is_found(tmp_path: Path) -> None:
        copy = here(UNITS / "enova-agent.service", tmp_path)
        copy.write_text(copy.read_text().replace("WatchdogSec=", "WachdogSec="))
        done = subprocess.run(
            ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False, timeout=60
        )
        assert "WachdogSec" in done.stderr

    @pytest.mark.parametrize("service", sorted(EXPOSURE_MAX))
    def test_a_unit_is_as_closed_as_it_can_be(service: str) -> None:
        words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / service)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
        assert found, done.stdout + done.stderr
        assert float(found[1]) <= EXPOSURE_MAX[service]
