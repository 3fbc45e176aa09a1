"""Sources -> documents and questions -> tokens -> packed batches. Knows no model."""

import importlib

_HOMES = {
    "batch": ("Batch", "DocumentBatch", "QuestionBatch", "pack_documents", "pack_questions"),
    "chunker": ("split_text",),
    "config": ("DataConfig", "TokenizerConfig"),
    "corpora.corpus": ("CorpusSource",),
    "corpora.cutting": ("cut_documents", "fitting_questions"),
    "haystacks.keys": ("frequent_words",),
    "haystacks.ruler_tasks": ("ruler_texts",),
    "pipeline": ("make_dataset",),
    "records": ("Document", "Episode", "Question"),
    "samples": ("LossWeights", "Renderer"),
    "sources": ("Source", "SourceSettings"),
    "sources.babi": ("BabiSource",),
    "sources.jsonl": ("JsonlSource",),
    "sources.needles": ("NeedleSource", "training_texts"),
    "sources.python_docs": ("PythonDocsSource",),
    "sources.ruler": ("RulerSource",),
    "templates": ("Template",),
    "tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str):
    # Each when it is asked for: the input pipeline takes a second to import, and most uses need none.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
