"""Write the documentation of this Python and of all installed packages as a folder of documents, for larger banks.

    python -m benchmarks.quality.documentation --out runs/documentation --max_chars 12000000
    python -m benchmarks.quality.questions --workdir runs/wiki_10M --beside runs/documentation

Other packages give other text: what a bank holds is only the same on a machine with the same packages.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from msa_jax.data import PythonDocsSource
from msa_jax.errors import DataError
from msa_jax.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--sources", action="store_true", help="the code of functions too")
    parser.add_argument("--max_chars", type=int, help="stop reading packages here; default: all of them")
    options = parser.parse_args()
    path = options.out / "documents.jsonl"
    if path.exists():
        parser.error(f"{path} exists; remove it, or name another folder")
    try:
        source = PythonDocsSource(packages=None, include_sources=options.sources, max_chars=options.max_chars)
    except DataError as error:
        parser.error(str(error))
    rows = [{"id": f"documentation:{d.id}", "title": d.title, "text": d.text} for d in source.documents]
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows):,} documents, {sum(len(row['text']) for row in rows):,} characters")


if __name__ == "__main__":
    main()
