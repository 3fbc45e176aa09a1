"""A model with drawn weights, a tokenizer and five documents: small enough to ask hundreds of questions about."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank import BankDocument, DocumentEncoder, encode_bank
from msa_jax.bank.quantization import quantize
from msa_jax.data import Document, Renderer, Template, Tokenizer, pack_documents
from msa_jax.errors import QuestionError
from msa_jax.inference import AskConfig, Budget, EngineConfig
from msa_jax.inference.corpus import FixedCorpus, Original, View

FEW = (4, 7)
P, ROW, CONTEXT = 4, 48, 96
TEXTS = {
    4: "the river runs north past seven towns and a mill",
    7: "the stone is grey",
    9: "東京 lies east; the cloud is high",
    12: "a cloud",
    30: "seven bridges cross the river at the mill",
}
DOCUMENTS = {number: Document(f"d{number}", f"Title {number}", text) for number, text in TEXTS.items()}
QUESTIONS = ["where does the river run", "what is grey", "how high is the cloud over 東京 and the mill", "a", "which"]
ENGINE = EngineConfig(slots=3, context=CONTEXT, lengths=(), prefill_rows=2, decode_steps=3, reported_documents=3)
BUDGET = Budget(answer_tokens=11, turn_tokens=9)
ASK = AskConfig(budget=BUDGET)


@functools.cache
def renderer(template=Template.compact):
    texts = [*TEXTS.values(), *QUESTIONS, "the answer to the question is"] * 3
    return Renderer(Tokenizer.train(texts, 380, template(id_digits=2)))


@functools.cache
def model_of(**changes):
    """Weights that are far from a tie, and seldom write special tokens, which are not shown."""
    tokenizer = renderer().tokenizer
    config = MSAConfig(**{
        **dict(
            vocab_size=tokenizer.vocab_size, hidden_size=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
            mlp_size=20, chunk_size=P, top_k_documents=2, position_offset=5, router_layers=(1, 2), tie_embeddings=False,
        ),
        **changes,
    })  # fmt: skip
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    specials = np.zeros(config.vocab_size)
    specials[[tokenizer.token_id(t) for t in tokenizer.template.special_tokens]] = 1.0

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        drawn = ("scale" in name) + rng.normal(0, 0.5, leaf.shape)
        return jnp.asarray(drawn * (1 - 0.7 * specials) if "lm_head" in name else drawn, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@functools.cache
def bank_of(kind="float", **changes):
    rendered = [renderer().render_document(document, number) for number, document in DOCUMENTS.items()]
    bank = encode_bank(model_of(**changes), pack_documents(rendered, chunk_size=P, row_len=ROW), rows_per_step=2)
    return quantize(bank) if kind == "int8" else bank


class Spaces(FixedCorpus):
    """Documents in two namespaces: "few", so few that every router layer selects all, and "rest"."""

    names = ("few", "rest")

    def __init__(self, bank):
        super().__init__(bank, DOCUMENTS)
        self.space = np.array([number not in FEW for number in DOCUMENTS], np.int32)
        self.visibility = self.visibility.replace(namespaces=jnp.asarray(self.space))

    def view(self, namespaces):
        if unknown := set(namespaces or ()) - set(self.names):
            raise QuestionError(f"no namespace {unknown}")
        return View(np.array([namespaces is None or name in namespaces for name in self.names]))

    def visible(self, view):
        """[N] bool."""
        return view.allowed[self.space]

    def find(self, number, view):
        document = self._documents.get(number)
        place = list(DOCUMENTS).index(number) if document else 0
        return Original(document, self.names[self.space[place]]) if document and self.visible(view)[place] else None


def corpus_of(kind="float", **changes):
    return Spaces(bank_of(kind, **changes))


@functools.cache
def encoder():
    return DocumentEncoder(model_of(), renderer().tokenizer, row_len=ROW, rows_per_step=2)


def stored(text, identity=None, namespace="default"):
    return BankDocument(identity or text.replace(" ", "-"), text, title=f"About {text}", namespace=namespace)
