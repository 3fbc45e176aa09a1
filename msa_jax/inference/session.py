"""`Session`: a model, a bank and its documents, asked by any number of threads."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax

from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.ingest import Report
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import DEFAULT_NAMESPACE, BankDocument
from msa_jax.data.records import Document
from msa_jax.data.samples import Renderer
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import BankError
from msa_jax.inference.answer import Answer, StreamEvent
from msa_jax.inference.corpus import FixedCorpus, StoredCorpus
from msa_jax.inference.engine import Engine
from msa_jax.inference.explanation import Explanation, explanation_of
from msa_jax.inference.request import Listener, Request
from msa_jax.inference.settings import AskConfig, EngineConfig
from msa_jax.inference.worker import Worker
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.runs.open import open_model, reconfigured
from msa_jax.sharding import Shardings, check_model, placed


@dataclasses.dataclass(frozen=True)
class Stats:
    """A session in numbers.

    Attributes:
      waiting, running: questions now. slots: how many can run.
      questions: that were answered or given up so far.
      prompt_tokens, completion_tokens: of those.
      documents: that can be read now; version: of the bank on disk, 0 of one in memory.
    """

    waiting: int
    running: int
    slots: int
    questions: int
    prompt_tokens: int
    completion_tokens: int
    documents: int
    version: int


class Session:
    """Questions to a memory. All methods may be called from any thread, at the same time.

    A thread of its own computes; questions that are asked together are computed together. Use as a context manager,
    or `close` it.
    """

    def __init__(
        self,
        model: MSATransformer,
        tokenizer: Tokenizer,
        bank: MemoryStore | MemoryBank | None,
        *,
        documents: Mapping[int, Document] | None = None,
        engine: EngineConfig = EngineConfig(),  # noqa: B008
        defaults: AskConfig = AskConfig(),  # noqa: B008
        encoder: DocumentEncoder | None = None,
        loading: Mapping[str, Any] | None = None,
    ):
        """Load the bank and begin.

        Args:
          model: that encoded the bank.
          tokenizer: that it was trained with, and its template.
          bank: on disk, open for writing if documents are to be added, the session's to close; in memory; or None.
          documents: of a bank in memory, by number, in the order of the bank.
          engine: shapes.
          defaults: how questions are asked that do not say so.
          encoder: of documents that are added; default one with rows of 4,096 tokens.
          loading: options of `msa_jax.bank.load` for a bank on disk; over its `mesh` the model is spread too.

        Raises:
          BankError: the bank is another model's or cannot be read.
          ValueError: a bank in memory without its documents.
        """
        self._store, self._encoder = None, encoder
        self._mesh = (loading or {}).get("mesh")
        self._renderer = renderer = Renderer(tokenizer)
        if isinstance(bank, MemoryStore):
            self._encoder = encoder or DocumentEncoder(model, tokenizer, row_len=4096)
            bank.spec.require_same(self._encoder.spec, str(bank.path))
            self._store = bank
            self._corpus = StoredCorpus(bank.path, **(loading or {}))
        else:
            self._corpus = FixedCorpus(bank, documents or {})
        self.defaults = defaults
        with self._on_mesh():
            if self._mesh is not None:
                check_model(model.config, self._mesh)
                model = placed(model, self._mesh, (loading or {}).get("shardings", Shardings.inference()))
            self._model = model
            self._engine = Engine(model, renderer, self._corpus, engine)
        self._totals = (0, 0, 0)
        self._writing = threading.Lock()
        follow = None if self._store is None else lambda idle: self._corpus.follow(idle=idle)
        self._worker = Worker(self._engine, follow, self._on_mesh)

    @classmethod
    def open(
        cls,
        bank: str | pathlib.Path,
        *,
        workdir: str | pathlib.Path = "",
        checkpoint: str | pathlib.Path = "",
        writable: bool = False,
        row_len: int | None = None,
        changes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Session:
        """A session of a bank on disk and the model that made it.

        Args:
          bank: its place.
          workdir: of the trained run, or
          checkpoint: a folder in the published layout, its tokenizer within.
          writable: documents can be added, and no one else can add any meanwhile.
          row_len: tokens of the longest document that can be added; default as trained, or 4,096.
          changes: settings of the model that are others than in training (`RuntimeConfig`).
          options: of the constructor.

        Raises:
          BankError, CheckpointError, ConfigError, DataError: what is not there or does not fit.
        """
        store = MemoryStore(bank, writable=writable)
        try:
            model, tokenizer, trained_len = open_model(workdir=workdir, checkpoint=checkpoint)
            if changes:
                model = reconfigured(model, **changes)
            encoder = DocumentEncoder(model, tokenizer, row_len=row_len or trained_len)
            return cls(model, tokenizer, store, encoder=encoder, **options)
        except BaseException:
            store.close()
            raise

    # Asking

    def submit(
        self,
        question: str,
        *,
        namespaces: Sequence[str] | None = None,
        config: AskConfig | None = None,
        listener: Listener | None = None,
    ) -> Request:
        """Hand a question in and go on.

        Args:
          namespaces: that it may read; None all, empty none.
          config: how it is asked; default the session's `defaults`.
          listener: called with every `StreamEvent` in the session's thread; it must not wait for anything.

        Raises:
          QuestionError: it is empty or too long, or there is no such namespace.
          RuntimeError: the session is closed.
        """
        self._worker.need_open()
        request = self._engine.submit(
            question, namespaces=namespaces, config=config or self.defaults, listener=self._counting(listener)
        )
        self._worker.wake()
        return request

    def ask(
        self, question: str, *, namespaces: Sequence[str] | None = None, config: AskConfig | None = None
    ) -> Answer:
        """The answer to a question; see `submit`."""
        return self.submit(question, namespaces=namespaces, config=config).result()

    def ask_many(
        self, questions: Iterable[str], *, namespaces: Sequence[str] | None = None, config: AskConfig | None = None
    ) -> list[Answer]:
        """Answers to questions, in their order, computed together; see `submit`."""
        request: list[Request] = []
        try:
            for question in questions:
                request.append(self.submit(question, namespaces=namespaces, config=config))
            return [one.result() for one in request]
        except BaseException:
            for one in request:
                one.cancel()
            raise

    def stream(
        self, question: str, *, namespaces: Sequence[str] | None = None, config: AskConfig | None = None
    ) -> Iterator[StreamEvent]:
        """What happens to a question, as it happens; closing the iterator gives the question up. See `submit`."""
        events: queue.SimpleQueue[StreamEvent] = queue.SimpleQueue()
        request = self.submit(question, namespaces=namespaces, config=config, listener=events.put)
        return self._events(request, events)

    @staticmethod
    def _events(request: Request, events: queue.SimpleQueue) -> Iterator[StreamEvent]:
        try:
            while True:
                event = events.get()
                if event.error is not None:
                    raise event.error
                yield event
                if event.answer is not None:
                    return
        finally:
            request.cancel()

    def explain(
        self, question: str, *, namespaces: Sequence[str] | None = None, documents: int = 5
    ) -> Explanation:
        """Which `documents` the router finds best for a question, and why: scores and passages by layer.

        Raises:
          QuestionError: it is empty, or there is no such namespace, or no bank.
        """
        self._worker.need_open()
        with self._worker.reading, self._on_mesh():
            view = self._corpus.view(namespaces)
            return explanation_of(
                self._model, self._renderer, self._corpus, view, question, documents=documents
            )

    # Documents

    def add(self, documents: Iterable[BankDocument]) -> Report:
        """Add documents; questions that begin from the return on see them, those in progress do not.

        Raises:
          BankError: what `MemoryStore.add` refuses; or this session cannot write.
        """
        return self._change(lambda store: store.add(documents, self._encoder))

    def update(self, documents: Iterable[BankDocument]) -> Report:
        """Give documents new texts. Questions in progress see neither text from then on. See `add`."""
        return self._change(lambda store: store.update(documents, self._encoder))

    def delete(self, ids: Iterable[str], namespace: str = DEFAULT_NAMESPACE) -> int:
        """Delete documents; no question routes to them or reads them from the return on. Raises BankError."""
        return self._change(lambda store: store.delete(ids, namespace))

    def _change(self, change: Callable[[MemoryStore], Any]) -> Any:
        self._worker.need_open()
        if self._store is None:
            raise BankError("this session's bank is in memory: documents can be added to one on disk.")
        with self._writing:
            self._worker.need_open()
            try:
                return change(self._store)
            finally:
                self.refresh()

    def refresh(self) -> None:
        """Follow the bank on disk, which others may have written to. Raises BankError when it cannot be read."""
        self._worker.follow()

    def get(self, identity: str, namespace: str = DEFAULT_NAMESPACE) -> BankDocument:
        """The document of an id. Raises KeyError, and BankError for a bank in memory."""
        self._worker.need_open()
        with self._worker.reading:
            return self._stored().get(identity, namespace)

    def list(self, namespace: str | None = None, prefix: str = "") -> Iterator[tuple[str, str]]:
        """(namespace, id) of documents, in the order they were added; raises BankError for a bank in memory."""
        self._worker.need_open()
        with self._worker.reading:
            return iter([*self._stored().search(prefix, namespace)])

    def _stored(self) -> StoredCorpus:
        if self._store is None:
            raise BankError("this session's bank is in memory: give it one on disk.")
        return self._corpus

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Names of the namespaces that a question may name."""
        return self._corpus.names

    # The rest

    def _on_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _counting(self, listener: Listener | None) -> Listener:
        def hear(event: StreamEvent) -> None:
            if event.answer is not None:
                new = (1, event.answer.prompt_tokens, event.answer.completion_tokens)
                self._totals = tuple(a + b for a, b in zip(self._totals, new, strict=True))
            if listener is not None:
                listener(event)

        return hear

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile every shape there is, so that no question waits for it."""
        self._worker.do(lambda: self._engine.warm_up(progress=progress))

    def stats(self) -> Stats:
        """Numbers of this moment."""
        questions, prompt, completion = self._totals
        on_disk = self._store is not None
        return Stats(
            waiting=self._engine.waiting,
            running=self._engine.running,
            slots=self._engine.config.slots,
            questions=questions,
            prompt_tokens=prompt,
            completion_tokens=completion,
            documents=len(self._corpus),
            version=self._corpus.version if on_disk else 0,
        )

    def close(self) -> None:
        """Give up all questions, and end the thread; the bank on disk is closed too."""
        if self._worker.close() and self._store is not None:
            with self._writing:  # what is being added is added whole
                self._corpus.close()
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()
