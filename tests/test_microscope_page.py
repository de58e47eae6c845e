"""What the microscope says: the sentences, one page without scripts in which everything of a run is escaped, JSON without NaN."""

import html.parser
import json

import microscope_tables
import numpy as np
import pytest

from pgrpo_jax import microscope, microscope_page
from pgrpo_jax.microscope_measures import measure

OTHERS = ("dr_grpo", "reinforce_pp", "scale_only", "pooled", "placebo")


def made(prompts, **options):
    size = sum(len(p[1]) for p in prompts)
    return microscope_tables.table(prompts, extra={name: np.linspace(-1, 1, size) for name in OTHERS}, **options)


HELD_DOWN = [(0, [0.0, 1.0], [-1.0, 1.0], [-1.0, 1.0])] * 30 + [(1, [0.5, 0.5], [0.0, 0.0], [-1.0, 1.0])] * 10 + [(1, [0.0, 1.0], [-0.1, 0.1], [2, -2])] * 20


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    tags = Tags()
    tags.feed(page)
    return tags.tags, " ".join(tags.text)


def test_a_preference_group_that_is_held_down_is_said():
    measured = measure(made(HELD_DOWN))
    said = microscope_page.findings(measured, ["steps 2 are missing"])
    assert said[0] == "steps 2 are missing" and said[1].startswith("The recorded advantages were not compared: no configuration")
    assert said[2] == "40 of 120 completions (33.3 %) change sign between GRPO and P-GRPO: 20 are rewarded instead of punished, 20 punished instead of rewarded."
    assert said[3].startswith("10 of 60 prompts (17 %) earn one reward throughout") and "gives 10 a signal" in said[3]
    assert "GRPO gives these preference groups a smaller share of its signal than P-GRPO does: 1 (0.10 [" in said[4]


def test_no_difference_is_said_as_such():
    same = [(k, [0.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]) for k in (0, 1)] * 10
    assert "no preference group's share" in microscope_page.findings(measure(made(same)))[-1]
    assert "Every history was cold" in microscope_page.findings(measure(made(same, cold=range(20))))[-1]


@pytest.mark.parametrize("off, word", [(0.0, "are those recomputed"), (1e-3, "DIFFER from those recomputed, first at step 1 ")])
def test_the_check_is_said(off, word):
    table = made(HELD_DOWN)
    table = microscope_tables.table(HELD_DOWN, extra={name: table.advantages[name] for name in OTHERS} | {"own": table.advantages["grpo"]})
    samples = [
        {"step": int(s), "prompt_id": table.prompts[p].prompt_id, "advantage": a + off}
        for s, p, a in zip(table.step, table.prompt, table.advantages["own"])
    ]
    assert word in microscope_page.findings(measure(table, samples))[0]


@pytest.mark.parametrize("case", ["held down", "cold", "no flips"])
def test_the_page_shows_everything_and_lets_nothing_in(case):
    prompts = HELD_DOWN if case != "no flips" else HELD_DOWN[:30]
    table = made(prompts, cold=range(len(prompts)) if case == "cold" else ())
    page = microscope_page.page(table, measure(table, top=4), ["<i>a note</i>"], source="<script>run</script>")
    tags, text = parsed(page)
    assert not {"script", "i", "b"} & set(tags)
    assert "<script>run</script>" in text and "<i>a note</i>" in text
    assert ("Strongest flips" in text) == (case != "no flips") == (microscope_tables.TITLE in text)
    assert tags.count("img") == (3 if case == "cold" else 4)
    assert all(name in text and microscope.MEANINGS[name] in text for name in table.advantages)


def test_lines_for_the_terminal():
    said = microscope_page.lines(measure(made(HELD_DOWN), top=2))
    assert sum(line.strip().startswith(("0 ", "1 ")) for line in said) == 2
    assert said[-3].startswith("strongest flips") and "-0.10" in "".join(said[-2:])
    assert not any(line.startswith("strongest") for line in microscope_page.lines(measure(made(HELD_DOWN[:30]))))


def test_json_is_standard():
    found = json.loads(microscope_page.to_json(measure(made(HELD_DOWN, num_preference_groups=3)), ["a note"]), parse_constant=pytest.fail)
    assert found["notes"] == ["a note"] and found["preference_groups"][2]["scale"] is None
    assert found["preference_groups"][1]["suppression"]["grpo"]["high"] < 1
