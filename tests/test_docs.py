"""The documentation: its links resolve, every page leads to the glossary, and no page or picture is left unlinked."""

import csv
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


def mean(file: str, column: str, **where: str) -> float:
    """The mean of a column over the rows of a results file that `where` names."""
    rows = csv.DictReader((ROOT / "benchmarks/results" / file).read_text(encoding="utf-8").splitlines())
    chosen = [float(row[column]) for row in rows if all(row[name] == value for name, value in where.items())]
    assert chosen, f"{file} has no row of {where}"
    return sum(chosen) / len(chosen)


def cells(page: str, first: str) -> list[list[str]]:
    """The rows of a page's tables whose first cell is `first`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0] == first]


def curve(size: int, run: str = "curve", k: int = 16, column: str = "exact_match") -> float:
    return mean("curve.csv", column, run=run, top_k=str(k), memory_tokens=str(size))


def ruler(size: int, mode: str = "constrained", run: str = "ruler_sharper") -> float:
    return mean("ruler.csv", "string_match", run=run, mode=mode, memory_tokens=str(size))


def recall(questions: str, retriever: str) -> float:
    where = {"run": "questions", "bank": "all", "set": questions, "retriever": retriever}
    return mean("questions.csv", "recall@16", **where)


def babi(way: str, task: int = 2) -> float:
    return mean("babi.csv", "answer", task=str(task), way=way)


SIZES = (32768, 131072, 1048576, 10_000_000, 100_000_000)
FUSED = "bm25 + router, fused"


def readme_rows():
    demo = [mean("demo_seeds.csv", "exact_match", memory_tokens=str(size)) for size in (2**20, 2**14)]
    yield "needles, three seeds", *demo
    yield "needles, hard keys", curve(100_000_000), curve(2**14)
    chunks = "the same, chunks of 64 tokens: a quarter of the bank"
    yield (
        chunks,
        curve(100_000_000, "curve_64_0_bias_2"),
        curve(100_000_000, "curve_64_0"),
        curve(2**14, "curve_64_0_bias_2"),
    )
    yield "RULER, eight needle tasks, mode `constrained`, router bias doubled", ruler(10**8), ruler(2**15)
    yield "the same, mode `generate`", ruler(10**8, "generate"), ruler(2**15, "generate")
    yield "bAbI task 2, two retrievals, three seeds", babi("interleave"), babi("one_routing")
    yield "HotpotQA, evidence among the first 16", recall("hotpotqa", "router"), recall("hotpotqa", "bm25")
    yield "2WikiMultihopQA, the same", recall("2wikimultihopqa", "router"), recall("2wikimultihopqa", "bm25")


def result_rows():
    for name, tokens in {"16K": 2**14, "1M": 2**20, "16M": 2**24, "100M": 10**8}.items():
        yield name, curve(tokens, k=1), curve(tokens), curve(tokens, column="id_exact_match")
    for bias, run in {"doubled": "ruler_sharper", "as trained": "ruler"}.items():
        for mode in ("constrained", "generate"):
            yield f"`{mode}`, {bias}", *[ruler(size, mode, run) for size in SIZES[: 5 if bias == "doubled" else 4]]
    for name, questions in {"HotpotQA": 204, "2WikiMultihopQA": 251, "MuSiQue": 47}.items():
        yield f"{name} ({questions})", *[recall(name.lower(), retriever) for retriever in ("bm25", "router", FUSED)]
    for task, name in {1: "1, one statement", 2: "2, two statements"}.items():
        yield name, babi("interleave", task), babi("one_routing", task)


def demo_rows():
    for size in (2**14, 2**16, 2**18, 2**20):
        columns = ("exact_match", "f1", "id_exact_match")
        yield f"{size:,}", *[mean("demo.csv", column, memory_tokens=str(size)) for column in columns]


TABLES = [("README.md", *row) for row in readme_rows()] + [("docs/results.md", *row) for row in result_rows()]
TABLES += [("docs/results/demo.md", *row) for row in demo_rows()]


@pytest.mark.parametrize("page, first, scores", [(page, first, scores) for page, first, *scores in TABLES])
def test_scores_are_those_of_the_files(page, first, scores):
    row = " ".join(cells(page, first)[0][1:])
    printed = [float(score) for score in re.findall(r"\b[01]\.\d{3}\b", row)]
    assert printed[: len(scores)] == pytest.approx(scores, abs=0.00055), (
        f"{page}: the row {first!r} has {printed}, the files have {scores}"
    )
