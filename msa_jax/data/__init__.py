"""Sources -> documents and questions -> tokens -> packed batches. Knows no model."""

from msa_jax.importing import lazy

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
_MODULES = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}
_EXTRAS = dict.fromkeys(_MODULES.values(), "bank") | {f"{__name__}.pipeline": "train"}

__all__ = sorted(_MODULES)  # noqa: PLE0605
__getattr__, __dir__ = lazy(__name__, _MODULES, _EXTRAS)
