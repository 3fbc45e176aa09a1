"""The documentation: its links resolve, every page leads to the glossary, and no page or picture is left unlinked."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples/README.md"]
GLOSSARY = ROOT / "docs/glossary.md"


def prose(page: pathlib.Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: pathlib.Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}: no such heading"


def test_every_page_of_docs_links_the_glossary():
    pages = [page for page in PAGES if (ROOT / "docs") in page.parents and page != GLOSSARY]
    assert len(pages) > 10
    without = [page.name for page in pages if GLOSSARY not in {(page.parent / link).resolve() for link in links(page)}]
    assert not without


def test_every_page_and_picture_is_linked():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    there = {*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/images/*")}
    assert not there - linked
