"""Memory Interleave: what is computed next for one question, given what the model wrote (paper section 3.5).

A state machine that computes nothing. The question is asked; then, by mode, the model names documents and their texts
are appended, round by round; or those that the router ranks first are; or none. Retrieval ends, the question is
repeated, the model answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from msa_jax.data.batch import ROUTING
from msa_jax.data.samples import Renderer
from msa_jax.errors import QuestionError
from msa_jax.inference.answer import Citation, Event, Outcome, Round, Routing
from msa_jax.inference.corpus import Original
from msa_jax.inference.reply import Reply
from msa_jax.inference.settings import AskConfig


class Interleave:
    """The growing context of one question.

    Attributes:
      tokens, routing: the context without the template prefix, and which of its tokens route.
      computed: how many of `tokens`, from the first on, are computed as they stand.
      reroutes: the tokens to come begin a round: they route, with the question's.
      left: how many tokens the model may write behind those to come.
      outcome: None until it is over.
      citations, rounds: as in `Answer`.
      score: of the best document in the first round, the mean over router layers.
      reply: the answer.
      prompt_tokens, completion_tokens: put into the context, and written by the model.
    """

    def __init__(
        self,
        question: str,
        renderer: Renderer,
        find: Callable[[int], Original | None],
        config: AskConfig,
        *,
        context: int,
        on_read: Callable[[Citation], None],
        on_text: Callable[[str], None],
    ):
        """Begin.

        Args:
          find: the document of a number, if the question may see it; called once there was a routing.
          context: tokens at most.
          on_read, on_text: called with each document that is read and with each piece of the answer.

        Raises:
          QuestionError: it is empty, or there is no room for an answer to it.
        """
        if not question.strip():
            raise QuestionError("the question is empty.")
        self.question, self._renderer, self._find = question, renderer, find
        self._mode, self._budget, self._abstain_below = config.mode, config.budget, config.abstain_below
        self._given = config.given_documents
        self._most = min(len(self._given) or config.router_documents, config.budget.documents)
        self._on_read = on_read
        tokenizer = renderer.tokenizer
        self._reference_end, self._end_of_retrieve, self._end = (
            tokenizer.token_id(getattr(tokenizer.template, name))
            for name in ("reference_end", "end_of_retrieve", "end")
        )
        tokens, roles = renderer.prompt(question)
        self.tokens, self.routing = tokens, [role == ROUTING for role in roles]
        self.computed, self.reroutes, self.left = 0, True, 0
        self.outcome: Outcome | None = None
        self.citations: list[Citation] = []
        self.rounds: list[Round] = []
        self.score: float | None = None
        self.reply, self._stop_tokens = Reply(tokenizer, config.stop, on_text), config.stop_tokens
        self.prompt_tokens, self.completion_tokens = len(tokens), 0
        self._answering = False
        self._turn: list[int] = []
        self._written = ""  # ... and in this round, as text
        self._events: list[Event] = []
        self._routed: Routing | None = None
        self._newest = slice(0, 0)  # the texts that route beside the question
        self._retrievals = 0
        closing = renderer.end_of_retrieve() + renderer.restated(question)
        self._names = self._mode in ("generate", "constrained")
        self._naming = self._budget.turn_tokens if self._names else 0
        self._free = context - len(closing) - self._budget.answer_tokens  # for all that comes before the closing
        if len(tokens) + self._naming > self._free:
            needed = context + len(tokens) + self._naming - self._free
            raise QuestionError(
                f"the question and its answer need {needed} tokens and the context has {context}: shorten the question "
                f"({len(tokens)} tokens), lower answer_tokens ({self._budget.answer_tokens}) or raise the engine's "
                "context."
            )
        if self._names:
            self.left = self._naming
        elif self._mode == "latent":
            self._close()

    @property
    def decoding(self) -> bool:
        """The model is writing: one token is to be computed, which it wrote last."""
        return bool(self._turn)

    @property
    def written(self) -> list[int]:
        """What the model has written in this turn."""
        return self._turn

    @property
    def candidates(self) -> list[list[int]] | None:
        """Tokens of the numbers that it may write, in mode "constrained" while it names documents; else None."""
        if self._mode != "constrained" or self._answering or self._routed is None:
            return None
        read = {citation.number for citation in self.citations}
        return [self._renderer.tokenizer.number_ids(n) for n in self._routed.selected if n not in read]

    @property
    def first_round(self) -> bool:
        """Nothing but the question routes yet."""
        return not self._retrievals

    def begin_round(self, routed: Routing) -> None:
        """A routing was done: what it found."""
        self._end_round()
        self._routed = routed
        if self.rounds:
            return
        self.score = best = next(iter(routed.ranking.values()), None)
        if self._abstain_below is not None and (best is None or best < self._abstain_below):
            self._over("not_in_memory")
        elif self._mode == "router":
            # One that was deleted since it was routed to is no document any more.
            originals = ((number, self._find(number)) for number in self._given or routed.ranking)
            chosen = ((number, original) for number, original in originals if original is not None)
            for number, original in itertools.islice(chosen, self._most):
                if not self._read(number, original, reference=True):
                    break
            self._close()

    def caught_up(self) -> None:
        """All tokens are computed."""
        self.computed, self.reroutes = len(self.tokens), False

    def write(self, token: int) -> None:
        """The model wrote a token."""
        self.computed = len(self.tokens)
        self.tokens.append(token)
        self.routing.append(False)
        self._turn.append(token)
        self.left -= 1
        self.completion_tokens += 1
        ended = token in (self._reference_end, self._end_of_retrieve, self._end)
        if self._answering:
            whole = token == self._end or token in self._stop_tokens
            self.reply.write([] if ended or whole else [token])
            if ended or whole or self.reply.stopped or not self.left:
                self._over("answered" if whole or self.reply.stopped else "cut")
        elif ended or not self.left:
            turn, self._turn, self.left = self._turn, [], 0
            self._written += self._renderer.tokenizer.decode(turn)
            self._end_turn(turn)

    def give_up(self, outcome: Outcome) -> None:
        """End it now, with what there is."""
        if self.outcome is None:
            self._over(outcome)

    def _end_turn(self, turn: list[int]) -> None:
        """The model has named documents, or ended retrieval, or written neither."""
        before = len(self.tokens) - len(turn)
        if turn[-1] == self._end_of_retrieve:
            if not self.citations:
                self._tell("none_named")
            self._close(ended=True)
            return
        named = self._renderer.tokenizer.parse_numbers(turn) if turn[-1] == self._reference_end else []
        if not named:
            self._tell("malformed")
        newest = self._read_all(named, before)
        if newest is None:
            # Nothing that it has not read already: more rounds would repeat themselves.
            self._keep(before)
            self._close()
            return
        # From now on the newest texts route, with the question, and older ones no longer do.
        for place, value in ((self._newest, False), (newest, True)):
            self.routing[place] = [value] * (place.stop - place.start)
        self._newest, self.reroutes = newest, True
        self._retrievals += 1
        if self._retrievals >= self._budget.rounds:
            self._tell("rounds_spent")
        if self._events[-1].kind in ("rounds_spent", "documents_spent", "no_room"):
            self._close()
        elif len(self.tokens) + self._naming > self._free:
            self._tell("no_room")
            self._close()
        else:
            self.left = self._naming

    def _read_all(self, named: Sequence[int], before: int) -> slice | None:
        """Append the texts of the numbers that are new; where they are, None if there are none."""
        begin, read = len(self.tokens), {citation.number for citation in self.citations}
        for number in named:
            original = self._find(number)
            if original is None:
                self._tell("unknown", number)
            elif number in read:
                self._tell("repeated", number)
            elif len(self.citations) >= self._budget.documents:
                self._tell("documents_spent", number)
                break
            elif not self._read(number, original):
                break
            read.add(number)
        return slice(begin, len(self.tokens)) if len(self.tokens) > begin else None

    def _read(self, number: int, original: Original, *, reference: bool = False) -> bool:
        """Append a document's text, as much as there is room for; False if there is none."""
        document, renderer = original.document, self._renderer
        whole = renderer.whole_body(document)
        frame = renderer.reference(number) if reference else []
        room = self._free - len(self.tokens) - len(frame) - len(renderer.appended_body([], number))
        most = room if self._budget.document_tokens is None else min(room, self._budget.document_tokens)
        if most < 1:
            self._tell("no_room", number)
            return False
        kept = list(whole[: most if renderer.body_len is None else min(most, renderer.body_len)])
        self._add(frame + renderer.appended_body(kept, number))
        cut = len(kept) < len(whole)
        self._tell("cut" if cut else "read", number)
        citation = Citation(
            number=number,
            id=document.id,
            title=document.title,
            namespace=original.namespace,
            text=renderer.tokenizer.decode(kept).strip() if cut else document.text,
            tokens=len(kept),
            cut=cut,
            score=self._routed.ranking.get(number) if self._routed else None,
        )
        self.citations.append(citation)
        self._on_read(citation)
        return True

    def _close(self, *, ended: bool = False) -> None:
        """End retrieval, unless the model `ended` it, and repeat the question: the answer comes next."""
        end = [] if ended else self._renderer.end_of_retrieve()
        self._add(end + self._renderer.restated(self.question))
        self._answering, self.left = True, self._budget.answer_tokens

    def _tell(self, kind: str, number: int | None = None) -> None:
        self._events.append(Event(kind, number))

    def _add(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.routing += [False] * len(tokens)
        self.prompt_tokens += len(tokens)

    def _keep(self, size: int) -> None:
        """Forget all tokens behind the first `size`."""
        del self.tokens[size:], self.routing[size:]
        self.computed = min(self.computed, size)

    def _end_round(self) -> None:
        if (routed := self._routed) is not None:
            self.rounds.append(
                Round(
                    documents=routed.documents,
                    scores=routed.scores,
                    written=self._written,
                    events=tuple(self._events),
                    computed="all" if routed.why or not self.rounds else "new",
                    why=routed.why,
                    tokens=routed.tokens,
                )
            )
        self._routed, self._written, self._events = None, "", []

    def _over(self, outcome: Outcome) -> None:
        self.left = 0
        self.reply.end()
        if outcome == "not_in_memory":
            self.reply.say(self._renderer.tokenizer.template.not_found)
        self._end_round()
        self.outcome = outcome
