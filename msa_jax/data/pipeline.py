"""The input pipeline (grain): a source's questions, shuffled for ever, in packed batches of static shape."""

import grain
import numpy as np

from msa_jax.data.batch import Batch, pack_parts, pack_questions, rows_needed
from msa_jax.data.episodes import SampleForm, render_episode
from msa_jax.data.samples import LossWeights, Renderer
from msa_jax.data.sources import Source
from msa_jax.data.splits import stable_hash
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError


def make_dataset(
    source: Source,
    tokenizer: Tokenizer,
    *,
    num_documents: int,
    num_questions: int,
    chunk_size: int,
    row_len: int,
    question_len: int,
    seed: int,
    document_len: int | None = None,
    num_rows: int | None = None,
    parts: int = 1,
    loss_weights: LossWeights | None = None,
    samples: SampleForm = "chain",
    unanswerable: float = 0.0,
    label_fraction: float = 1.0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset:
    """An endless dataset of `Batch`es, every one of the same shapes, numpy arrays throughout.

    `num_documents` N and `num_questions` B are what this process gets in a batch; its questions share its
    documents. Documents longer than `document_len` tokens (default: a row) have their text cut. `num_rows` R
    defaults to what N documents of `document_len` tokens may need at worst; a smaller one saves padding when
    most are shorter. Documents are packed in `parts` equal parts, which devices may share (`pack_parts`).
    `samples`, `unanswerable` and `label_fraction` as in `render_episode`.
    The same arguments give the same batches; processes get different questions, documents and numbers. The
    iterator's `get_state` and `set_state` keep and restore its position.
    Raises DataError on arguments that do not fit each other or the source's first batch.
    """
    if len(source) == 0:
        raise DataError("the source has no question in this split; give it more data or another eval_fraction")
    if min(num_documents, num_questions, question_len) < 1:
        raise DataError("num_documents, num_questions and question_len must be at least 1")
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index must be in 0..process_count - 1, got {process_index} of {process_count}")
    if len(source) < process_count:
        raise DataError(f"{len(source)} questions cannot be shared by {process_count} processes; give more data")
    document_len = row_len if document_len is None else document_len
    if num_documents % parts:
        raise DataError(f"{num_documents} documents cannot be packed in {parts} equal parts; change num_documents")
    rows = parts * rows_needed(num_documents // parts, document_len, chunk_size, row_len)
    rows = rows if num_rows is None else num_rows
    renderer = Renderer(tokenizer, document_len, loss_weights)
    id_digits = tokenizer.template.id_digits

    def assemble(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        episode = source.episode(indices.tolist(), num_documents, rng, id_digits)
        rendered = render_episode(
            renderer, episode, rng, samples=samples, unanswerable=unanswerable, label_fraction=label_fraction
        )
        return Batch(
            documents=pack_parts(
                rendered.documents,
                parts,
                chunk_size=chunk_size,
                row_len=row_len,
                num_rows=rows,
                pad_id=tokenizer.pad_id,
            ),
            questions=pack_questions(
                rendered.samples,
                question_len=question_len,
                visible=rendered.visible,
                relevant=rendered.relevant,
                pad_id=tokenizer.pad_id,
            ),
            identities=np.array([stable_hash(d.id) % 2**31 for d in episode.documents], np.int32),
        )

    questions = grain.MapDataset.range(len(source)).seed(_seed(seed)).shuffle().repeat()
    mine = questions[process_index::process_count].batch(num_questions, drop_remainder=True)
    # Processes share the order of questions, not the draws: theirs come from a seed of their own.
    batches = mine.random_map(assemble, seed=_seed(seed, 1 + process_index))
    batches[0]  # so that arguments which do not fit the data fail here, not in a thread later
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return batches.to_iter_dataset(options)


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
