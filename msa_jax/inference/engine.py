"""Continuous batching: questions come, take their turns together with others at other stages, and go.

Nothing here knows of threads but `submit` and what `Request` offers; `Session` runs an engine in one.
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
from msa_jax.inference.corpus import Corpus
from msa_jax.inference.interleave import Interleave
from msa_jax.inference.programs import PrefillBatch, Prefilled, decode, prefill
from msa_jax.inference.request import Listener, Request
from msa_jax.inference.settings import AskConfig, EngineConfig, Sampling
from msa_jax.inference.slots import empty_slots, settled
from msa_jax.memory import tiers
from msa_jax.model import MSATransformer

# Decoding is compiled for these numbers of slots and for all of them: few questions do not pay for empty slots.
_SLOT_COUNTS = (1, 4, 16, 64)


class Engine:
    """Answers questions about a corpus with one model.

    Attributes:
      corpus: what is asked. Between two steps its bank may be exchanged for one in which every document stays where
        it is (`LoadedBank.refresh`).
      config: shapes.
      admits: whether questions that wait may begin.
      waiting, running: how many questions there are of each.
    """

    def __init__(
        self, model: MSATransformer, renderer: Renderer, corpus: Corpus, config: EngineConfig = EngineConfig()  # noqa: B008
    ):
        self.corpus, self.config, self._renderer = corpus, config, renderer
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
        self._waiting: collections.deque[Request] = collections.deque()
        self._requests: list[Request | None] = [None] * config.slots
        self._counts = tuple(n for n in _SLOT_COUNTS if n < config.slots) + (config.slots,)
        self.renew()

    def renew(self) -> None:
        """Make slots for the corpus's bank as it is now; no question may be in progress."""
        bank = self.corpus.bank
        self._device = None  # two of it may be more than there is room for
        slots = empty_slots(
            self._model, self._template, bank, count=self.config.slots, size=self._head + self.config.context
        )
        self._device = settled(slots, (self._params, bank and bank.layout))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(request is not None for request in self._requests)

    def submit(
        self,
        question: str,
        *,
        namespaces: Sequence[str] | None = None,
        config: AskConfig = AskConfig(),  # noqa: B008
        listener: Listener | None = None,
    ) -> Request:
        """Hand a question in; from any thread.

        Args:
          namespaces: that it may read; None all, empty none.
          listener: called with every `StreamEvent`, by whoever calls `step`; it must not wait for anything.

        Raises:
          QuestionError: it is empty or too long, or there is no such namespace.
          RuntimeError: the engine is closed.
        """
        self.corpus.view(namespaces)  # whether there are such
        request = Request(question, namespaces, config, listener)
        request._interleave = Interleave(
            question,
            self._renderer,
            functools.partial(request._find, self.corpus),
            config,
            context=self.config.context,
            on_read=request._read,
            on_text=request._text,
        )
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed.")
            self._waiting.append(request)
        return request

    def close(self) -> None:
        """Give up all questions, and take no more."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = list(self._waiting), collections.deque()
        for request in [*(p for p in self._requests if p is not None), *waiting]:
            request._interleave.give_up("cancelled")
            request._finish()
        self._requests = [None] * self.config.slots

    def ask(
        self,
        questions: Iterable[str],
        *,
        namespaces: Sequence[str] | None = None,
        config: AskConfig = AskConfig(),  # noqa: B008
    ) -> Iterator[Answer]:
        """Answers to questions, in their order, with as many in progress as there are slots."""
        ahead: collections.deque[Request] = collections.deque()
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
        reads = self.corpus.bank is not None
        kinds = [(True, reads), (False, False)]
        if reads and not self._model.config.router_bias:
            kinds.append((False, True))
        sizes = sorted({1, self.config.prefill_rows})
        shapes = list(itertools.product(kinds, sizes, self.config.lengths))
        decoding = list(itertools.product(self._counts, self.config.lengths))
        with tqdm(desc="compile", total=len(shapes) + len(decoding), disable=not progress) as bar:
            for (fresh, routes), size, length in shapes:
                batch = batching.no_prefill(
                    self.corpus.view(()), size=size, length=length, head=self._head, nobody=self.config.slots
                )
                self._prefill(batch, fresh=fresh, routes=routes)
                bar.update()
            for count, length in decoding:
                self._decode_some([None] * count, [Sampling()] * count, longest=length)
                bar.update()
        jax.block_until_ready(self._device)

    def _until(self, request):
        while not request.done():
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
                self._prefill_all()
                self._decode()
        except BaseException as error:
            self.fail(error)
            raise
        return True

    def fail(self, error: BaseException) -> None:
        """End all questions, in progress and waiting, with an error."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), collections.deque()
        running = [request for request in self._requests if request is not None]
        self._requests = [None] * self.config.slots
        for request in running + waiting:
            request._fail(error)
        self.renew()  # the slots before were donated

    def _admit(self) -> None:
        """Free the slots of questions that were given up, and give free ones, the lowest first, to those that wait."""
        for slot, request in enumerate(self._requests):
            if request is not None and (why := request._late()):
                request._interleave.give_up(why)
                self._leave(slot)
        with self._lock:
            waiting, self._waiting = self._waiting, collections.deque()
            late = [(request, request._late()) for request in waiting]
            free = [slot for slot, request in enumerate(self._requests) if request is None] if self.admits else []
            begin = [request for request, why in late if why is None]
            self._waiting.extend(begin[len(free) :])
        for request, why in late:
            if why is not None:
                request._interleave.give_up(why)
                request._finish()
        for slot, request in zip(free, begin, strict=False):
            try:
                request._begin(self.corpus.view(request._namespaces))
            except QuestionError as error:
                request._fail(error)  # the bank lost a namespace meanwhile
            else:
                self._requests[slot] = request

    def _leave(self, slot: int) -> None:
        self._requests[slot], request = None, self._requests[slot]
        request._finish()

    def _prefill_all(self) -> None:
        """Tokens that are to be computed in one go: of new questions, texts that were read, the end of retrieval."""
        done: set[int] = set()
        while True:
            kinds: dict[tuple[bool, bool], list[int]] = {}
            for slot, request in enumerate(self._requests):
                if request is not None and slot not in done and not request._interleave.decoding:
                    state = request._interleave
                    kinds.setdefault((state.computed == 0, state.reroutes), []).append(slot)
            if not kinds:
                return
            (fresh, routes), slots = next(iter(kinds.items()))
            slots.sort(key=lambda slot: self._length(slot, fresh))
            most = self.config.prefill_rows
            batch = slots[:most] if 2 * len(slots) > most else slots[:1]
            self._prefill_some(batch, fresh=fresh, routes=routes, why="")
            done |= {slot for slot in batch if (r := self._requests[slot]) is None or r._interleave.decoding}

    def _length(self, slot: int, fresh: bool) -> int:
        state = self._requests[slot]._interleave
        return len(state.tokens) - (0 if fresh else state.computed)

    def _prefill_some(self, slots: list[int], *, fresh: bool, routes: bool, why: str) -> None:
        states = [self._requests[slot]._interleave for slot in slots]
        if routes and not fresh and self._model.config.router_bias:
            # With scores as weights, what tokens read depends on the newest text's scores too.
            why = "the router bias weighs what earlier tokens read by scores that the newest text takes part in"
            fresh = True
        batch = batching.prefill_batch(
            states,
            slots=slots,
            views=[self._requests[slot]._view for slot in slots],
            sampling=[self._requests[slot]._config.sampling for slot in slots],
            size=1 if len(slots) == 1 else self.config.prefill_rows,
            length=self.config.bucket(max(self._length(slot, fresh) for slot in slots)),
            head=self._head,
            nobody=self.config.slots,
            fresh=fresh,
            pad_id=self._renderer.tokenizer.pad_id,
        )
        reads = self.corpus.bank is not None
        written = self._prefill(batch, fresh=fresh, routes=routes and reads)
        again: dict[str, list[int]] = {}
        for i, (slot, state) in enumerate(zip(slots, states, strict=True)):
            if routes and reads and not fresh and not written.same[:, i].all():
                layer = self._model.config.router_layers[int(np.argmin(written.same[:, i]))]
                again.setdefault(f"router layer {layer} selects other documents than before", []).append(slot)
                continue
            if routes:
                computed = int(batch.lengths[i])
                found = batching.no_routing(computed)
                if reads:
                    k = self._model.config.top_k_documents
                    found = batching.routing_of(written, i, self.corpus, k=k, tokens=computed, why=why)
                state.caught_up()
                state.begin_round(found)
            else:
                state.caught_up()
            # A conversation that has more to add, or is over, has no use for the token.
            if state.computed == len(state.tokens) and state.left:
                state.write(int(written.token[i]))
            if state.outcome is not None:
                self._leave(slot)
        for reason, others in again.items():
            for one in others:
                self._prefill_some([one], fresh=True, routes=True, why=reason)

    def _prefill(self, batch: PrefillBatch, *, fresh: bool, routes: bool) -> Prefilled:
        self._device, written = prefill(
            self._graphdef, self._params, self._template, self._device,
            self.corpus.bank, self.corpus.visibility, batch,
            fresh=fresh, routes=routes, reported=self.config.reported_documents,
        )  # fmt: skip
        return jax.device_get(written.replace(logits=None))

    def _decode_some(
        self, states: Sequence[Interleave | None], sampling: Sequence[Sampling], *, longest: int
    ) -> np.ndarray:
        self._device, written = decode(
            self._graphdef, self._params, self._device, self.corpus.bank,
            batching.decode_batch(states, sampling=sampling, head=self._head, candidates=self._candidates),
            columns=self._head + self.config.bucket(min(longest, self.config.context)),
            steps=self.config.decode_steps, stop_tokens=self._stops,
        )  # fmt: skip
        return np.asarray(written)

    def _decode(self) -> None:
        slots = [i for i, p in enumerate(self._requests) if p is not None and p._interleave.decoding]
        if not slots:
            return
        count = next(n for n in self._counts if n > slots[-1])
        states = [self._requests[i]._interleave if i in slots else None for i in range(count)]
        sampling = [self._requests[i]._config.sampling if i in slots else Sampling() for i in range(count)]
        longest = max(state.computed for state in states if state) + self.config.decode_steps
        written = self._decode_some(states, sampling, longest=longest)
        for slot in slots:
            state = self._requests[slot]._interleave
            for token in written[slot]:
                if token < 0 or not state.decoding:
                    break
                state.write(int(token))
            if state.outcome is not None:
                self._leave(slot)

