"""Every key of a record has one description, and docs/metrics.md says the same."""

import pathlib

import pytest

from pgrpo_jax import metric_table

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "metrics.md"


def test_the_table_of_the_documentation_is_the_table():
    text = DOCS.read_text(encoding="utf-8")
    head, _, rest = text.partition("| key | unit | healthy | meaning |\n|---|---|---|---|\n")
    rows = rest.partition("\n\n")[0].splitlines()
    bar = "\\|"  # how a table of Markdown writes it
    assert head and rows == [f"| `{m.name}` | {m.unit} | {m.healthy} | {m.meaning.replace('|', bar)} |" for m in metric_table.METRICS]


def test_names_are_unique_and_nothing_is_left_out():
    names = [metric.name for metric in metric_table.METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.unit and metric.healthy and metric.meaning for metric in metric_table.METRICS)


def test_describe():
    assert metric_table.describe("preference_group/12/bias").name == "preference_group/{p}/bias"
    assert metric_table.describe("kl").unit == "nats/token" and metric_table.describe("preference_group/0/kl").meaning.startswith("kl of its")
    assert metric_table.describe("gradient_cosine/min").option == "metrics.gradients_every" and metric_table.describe("kl").option == ""
    with pytest.raises(ValueError, match="no description"):
        metric_table.describe("preference_group/x/bias")
