"""Continuous batching: questions come, take their turns together with others at other stages, and go.

Nothing here knows of threads but `submit` and what `Pending` offers; `Session` runs an engine in one.
"""

from __future__ import annotations

import collections
import functools
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from msa_jax.data.samples import Renderer
from msa_jax.errors import QuestionError
from msa_jax.inference import batching
from msa_jax.inference.answer import Answer
from msa_jax.inference.candidates import candidates_of
from msa_jax.inference.conversation import Conversation
from msa_jax.inference.library import Library
from msa_jax.inference.pending import Listener, Pending
from msa_jax.inference.programs import Turn, Written, decode, take_turn
from msa_jax.inference.routed import no_routing, routed_of
from msa_jax.inference.rows import empty_rows, settled
from msa_jax.inference.settings import AskConfig, EngineConfig, Sampling
from msa_jax.memory import tiers
from msa_jax.model import MSATransformer

# Decoding is compiled for these numbers of rows and for all of them: few questions do not pay for empty rows.
_ROW_COUNTS = (1, 4, 16, 64)


class Engine:
    """Answers questions about a library with one model.

    Attributes:
      library: what is asked. Between two steps its bank may be exchanged for one in which every document stays where
        it is (`LoadedBank.refresh`).
      config: shapes.
      admits: whether questions that wait may begin.
      waiting, running: how many questions there are of each.
    """

    def __init__(
        self, model: MSATransformer, renderer: Renderer, library: Library, config: EngineConfig = EngineConfig()  # noqa: B008
    ):
        self.library, self.config, self._renderer = library, config, renderer
        self._graphdef, self._params = nnx.split(model)
        self._model = model
        self._head = len(renderer.prefix)
        prefix = np.asarray([renderer.prefix], np.int32)
        self._template = jax.jit(lambda model: model.encode_template(prefix))(model)
        tokenizer = renderer.tokenizer
        template = tokenizer.template
        self._stops = tuple(
            tokenizer.token_id(t) for t in (template.reference_end, template.end_of_retrieve, template.end)
        )
        most = config.reported_documents * len(model.config.router_layers)
        self._candidates = functools.partial(
            candidates_of, opening=tokenizer.number_ids(0)[0], shape=(most, tokenizer.max_number_len - 1)
        )
        self.admits = True
        self._closed = False
        self._lock = threading.Lock()
        self._waiting: collections.deque[Pending] = collections.deque()
        self._rows: list[Pending | None] = [None] * config.slots
        self._counts = tuple(n for n in _ROW_COUNTS if n < config.slots) + (config.slots,)
        self.renew()

    def renew(self) -> None:
        """Make rows for the library's bank as it is now; no question may be in progress."""
        bank = self.library.bank
        self._device = None  # two of it may be more than there is room for
        rows = empty_rows(
            self._model, self._template, bank, rows=self.config.slots, length=self._head + self.config.context
        )
        self._device = settled(rows, (self._params, bank and bank.layout))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(pending is not None for pending in self._rows)

    def submit(
        self,
        question: str,
        *,
        namespaces: Sequence[str] | None = None,
        config: AskConfig = AskConfig(),  # noqa: B008
        listener: Listener | None = None,
    ) -> Pending:
        """Hand a question in; from any thread.

        Args:
          namespaces: that it may read; None all, empty none.
          listener: called with every `StreamEvent`, by whoever calls `step`; it must not wait for anything.

        Raises:
          QuestionError: it is empty or too long, or there is no such namespace.
          RuntimeError: the engine is closed.
        """
        self.library.view(namespaces)  # whether there are such
        pending = Pending(question, namespaces, config, listener)
        pending._conversation = Conversation(
            question,
            self._renderer,
            functools.partial(pending._find, self.library),
            config,
            context=self.config.context,
            on_read=pending._read,
            on_text=pending._text,
        )
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed.")
            self._waiting.append(pending)
        return pending

    def close(self) -> None:
        """Give up all questions, and take no more."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = list(self._waiting), collections.deque()
        for pending in [*(p for p in self._rows if p is not None), *waiting]:
            pending._conversation.give_up("cancelled")
            pending._finish()
        self._rows = [None] * self.config.slots

    def ask(
        self,
        questions: Iterable[str],
        *,
        namespaces: Sequence[str] | None = None,
        config: AskConfig = AskConfig(),  # noqa: B008
    ) -> Iterator[Answer]:
        """Answers to questions, in their order, with as many in progress as there are slots."""
        ahead: collections.deque[Pending] = collections.deque()
        for question in questions:
            ahead.append(self.submit(question, namespaces=namespaces, config=config))
            while len(ahead) > 2 * self.config.slots:
                self._until(ahead[0])
                yield ahead.popleft().result()
        while ahead:
            self._until(ahead[0])
            yield ahead.popleft().result()

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile every shape there is; no question may be in progress."""
        reads = self.library.bank is not None
        kinds = [(True, reads), (False, False)]
        if reads and not self._model.config.router_bias:
            kinds.append((False, True))
        sizes = sorted({1, self.config.prefill_rows})
        shapes = list(itertools.product(kinds, sizes, self.config.lengths))
        decoding = list(itertools.product(self._counts, self.config.lengths))
        with tqdm(desc="compile", total=len(shapes) + len(decoding), disable=not progress) as bar:
            for (fresh, routes), size, length in shapes:
                turn = batching.no_turn(
                    self.library.view(()), size=size, length=length, head=self._head, nobody=self.config.slots
                )
                self._take_turn(turn, fresh=fresh, routes=routes)
                bar.update()
            for count, length in decoding:
                self._write_on([None] * count, [Sampling()] * count, longest=length)
                bar.update()
        jax.block_until_ready(self._device)

    def _until(self, pending):
        while not pending.done():
            self.step()

    def step(self) -> bool:
        """Let every question in progress take its next turn; False when there is none.

        Raises:
          Exception: whatever goes wrong on the device; all questions in progress then end with it.
        """
        self._admit()
        if not self.running:
            return False
        try:
            with tiers.content_errors():
                self._turns()
                self._decode()
        except BaseException as error:
            self.fail(error)
            raise
        return True

    def fail(self, error: BaseException) -> None:
        """End all questions, in progress and waiting, with an error."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), collections.deque()
        running = [pending for pending in self._rows if pending is not None]
        self._rows = [None] * self.config.slots
        for pending in running + waiting:
            pending._fail(error)
        self.renew()  # the rows before were donated

    def _admit(self) -> None:
        """Free the rows of questions that were given up, and give free ones, the lowest first, to those that wait."""
        for row, pending in enumerate(self._rows):
            if pending is not None and (why := pending._late()):
                pending._conversation.give_up(why)
                self._leave(row)
        with self._lock:
            waiting, self._waiting = self._waiting, collections.deque()
            late = [(pending, pending._late()) for pending in waiting]
            free = [row for row, pending in enumerate(self._rows) if pending is None] if self.admits else []
            begin = [pending for pending, why in late if why is None]
            self._waiting.extend(begin[len(free) :])
        for pending, why in late:
            if why is not None:
                pending._conversation.give_up(why)
                pending._finish()
        for row, pending in zip(free, begin, strict=False):
            try:
                pending._begin(self.library.view(pending._namespaces))
            except QuestionError as error:
                pending._fail(error)  # the bank lost a namespace meanwhile
            else:
                self._rows[row] = pending

    def _leave(self, row: int) -> None:
        self._rows[row], pending = None, self._rows[row]
        pending._finish()

    def _turns(self) -> None:
        """Tokens that are to be computed in one go: of new questions, texts that were read, the end of retrieval."""
        done: set[int] = set()
        while True:
            kinds: dict[tuple[bool, bool], list[int]] = {}
            for row, pending in enumerate(self._rows):
                if pending is not None and row not in done and not pending._conversation.decoding:
                    talk = pending._conversation
                    kinds.setdefault((talk.computed == 0, talk.reroutes), []).append(row)
            if not kinds:
                return
            (fresh, routes), rows = next(iter(kinds.items()))
            rows.sort(key=lambda row: self._length(row, fresh))
            most = self.config.prefill_rows
            batch = rows[:most] if 2 * len(rows) > most else rows[:1]
            self._turn(batch, fresh=fresh, routes=routes, why="")
            done |= {row for row in batch if self._rows[row] is None or self._rows[row]._conversation.decoding}

    def _length(self, row: int, fresh: bool) -> int:
        talk = self._rows[row]._conversation
        return len(talk.tokens) - (0 if fresh else talk.computed)

    def _turn(self, rows: list[int], *, fresh: bool, routes: bool, why: str) -> None:
        talks = [self._rows[row]._conversation for row in rows]
        if routes and not fresh and self._model.config.router_bias:
            # With scores as weights, what tokens read depends on the newest text's scores too.
            why = "the router bias weighs what earlier tokens read by scores that the newest text takes part in"
            fresh = True
        turn = batching.turn_of(
            talks,
            rows=rows,
            views=[self._rows[row]._view for row in rows],
            sampling=[self._rows[row]._config.sampling for row in rows],
            size=1 if len(rows) == 1 else self.config.prefill_rows,
            length=self.config.bucket(max(self._length(row, fresh) for row in rows)),
            head=self._head,
            nobody=self.config.slots,
            fresh=fresh,
            pad_id=self._renderer.tokenizer.pad_id,
        )
        reads = self.library.bank is not None
        written = self._take_turn(turn, fresh=fresh, routes=routes and reads)
        again: dict[str, list[int]] = {}
        for i, (row, talk) in enumerate(zip(rows, talks, strict=True)):
            if routes and reads and not fresh and not written.same[:, i].all():
                layer = self._model.config.router_layers[int(np.argmin(written.same[:, i]))]
                again.setdefault(f"router layer {layer} selects other documents than before", []).append(row)
                continue
            if routes:
                computed = int(turn.lengths[i])
                found = no_routing(computed)
                if reads:
                    top_k = self._model.config.top_k_documents
                    found = routed_of(written, i, self.library, top_k=top_k, tokens=computed, why=why)
                talk.caught_up()
                talk.begin_round(found)
            else:
                talk.caught_up()
            # A conversation that has more to add, or is over, has no use for the token.
            if talk.computed == len(talk.tokens) and talk.left:
                talk.write(int(written.token[i]))
            if talk.outcome is not None:
                self._leave(row)
        for reason, others in again.items():
            for one in others:
                self._turn([one], fresh=True, routes=True, why=reason)

    def _take_turn(self, turn: Turn, *, fresh: bool, routes: bool) -> Written:
        self._device, written = take_turn(
            self._graphdef, self._params, self._template, self._device,
            self.library.bank, self.library.visibility, turn,
            fresh=fresh, routes=routes, reported=self.config.reported_documents,
        )  # fmt: skip
        return jax.device_get(written.replace(logits=None))

    def _write_on(
        self, talks: Sequence[Conversation | None], sampling: Sequence[Sampling], *, longest: int
    ) -> np.ndarray:
        self._device, written = decode(
            self._graphdef, self._params, self._device, self.library.bank,
            batching.current_of(talks, sampling=sampling, head=self._head, candidates=self._candidates),
            columns=self._head + self.config.bucket(min(longest, self.config.context)),
            steps=self.config.decode_steps, stop_tokens=self._stops,
        )  # fmt: skip
        return np.asarray(written)

    def _decode(self) -> None:
        rows = [i for i, p in enumerate(self._rows) if p is not None and p._conversation.decoding]
        if not rows:
            return
        count = next(n for n in self._counts if n > rows[-1])
        talks = [self._rows[i]._conversation if i in rows else None for i in range(count)]
        sampling = [self._rows[i]._config.sampling if i in rows else Sampling() for i in range(count)]
        longest = max(talk.computed for talk in talks if talk) + self.config.decode_steps
        written = self._write_on(talks, sampling, longest=longest)
        for row in rows:
            talk = self._rows[row]._conversation
            for token in written[row]:
                if token < 0 or not talk.decoding:
                    break
                talk.write(int(token))
            if talk.outcome is not None:
                self._leave(row)

