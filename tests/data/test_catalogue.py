"""What is prepared with the templates of other models is right, and docs/data.md says what is."""

from pathlib import Path

from tests.data import catalogue


def test_catalogue_of_chat_templates_is_what_the_page_says(tmp_path: Path) -> None:
    made = catalogue.table(catalogue.survey(tmp_path))
    written = catalogue.PAGE.read_text(encoding="utf-8")
    assert catalogue.BEGIN + made + catalogue.END in written, (
        "run `python -m tests.data.catalogue` and look at what it changes"
    )
