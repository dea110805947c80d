# SPDX-License-Identifier: Apache-2.0
"""`pytest --costs`: which files a run spent its time on, and how many programs they compiled."""

import collections

import jax.monitoring
import pytest

SHOWN = 8
COMPILATION = "backend_compile_duration"
compiled: list[float] = []
"""Seconds of each program that XLA has compiled in this process."""


def on_event(event: str, seconds: float, **_) -> None:
    if event.endswith(COMPILATION):
        compiled.append(seconds)


def pytest_addoption(parser):
    parser.addoption("--costs", action="store_true", help="print where the time went")


def pytest_configure():
    jax.monitoring.register_event_duration_secs_listener(on_event)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = len(compiled)
    try:
        return (yield)
    finally:  # what a worker notes here travels with its report
        item.user_properties.append(("programs", len(compiled) - before))
        item.user_properties.append(("compiling", sum(compiled[before:])))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--costs"):
        return
    files: dict = collections.defaultdict(collections.Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                cost = files[report.nodeid.split("::")[0]]
                cost["seconds"] += report.duration
                cost.update(dict(report.user_properties) if report.when == "call" else {})
    total = sum(files.values(), collections.Counter())
    terminalreporter.section("costs: seconds of test time, of them compiling, programs")
    dearest = sorted(files.items(), key=lambda item: -item[1]["seconds"])[:SHOWN]
    for name, cost in [*dearest, (f"all {len(files)} files", total)]:
        numbers = f"{cost['seconds']:7.1f} {cost['compiling']:7.1f} {cost['programs']:6}"
        terminalreporter.write_line(f"{numbers}  {name}")
