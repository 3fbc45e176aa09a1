"""Templates as data: the shipped ones, frames of one's own from a file, and files that are refused."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.data import Document, Renderer, Template, Tokenizer
from msa_jax.data.batch import ROUTING, TEMPLATE
from msa_jax.errors import DataError
from msa_jax.runs.config import TokenizerConfig

SHIPPED = {"compact": Template.compact(), "paper": Template.paper(), "chinese": Template.chinese()}
QUESTION, ANSWER = "青山河流向哪里？Which way, 1984?", "向北 (north)"
DOCUMENT = Document("d", "", "青山河向北流。It runs north.")


@pytest.fixture(scope="module", params=SHIPPED)
def renderer(request) -> Renderer:
    return Renderer(Tokenizer.train([QUESTION, DOCUMENT.text] * 3, 400, SHIPPED[request.param]))


def text_of(frame: str, **fields: str) -> str:
    for name, value in fields.items():
        frame = frame.replace("{" + name + "}", value)
    return frame


def test_frames_come_back_as_they_are_written(renderer):
    template, decode = renderer.tokenizer.template, renderer.tokenizer.decode
    number = renderer.tokenizer.format_number(4)
    asked, roles = renderer.prompt(QUESTION)
    assert decode(asked) == text_of(template.question, question=QUESTION) + template.reply_head
    assert decode([t for t, r in zip(asked, roles, strict=True) if r == TEMPLATE]) == template.reply_head
    assert decode([t for t, r in zip(asked, roles, strict=True) if r == ROUTING]) == text_of(
        template.question, question=QUESTION
    )
    assert decode(renderer.prefix) == template.prefix
    assert decode(renderer.restated(QUESTION)) == text_of(template.restated, question=QUESTION)
    assert decode(renderer.answer(ANSWER)) == text_of(template.reply_answer, answer=ANSWER)
    for frame, tokens in (
        (template.document, renderer.render_document(DOCUMENT, 4)),
        (template.appended, renderer.appended(DOCUMENT, 4)),
        (template.reference, renderer.reference(4)),
    ):
        assert decode(tokens) == text_of(frame, id=number, text=DOCUMENT.text)


def test_special_strings_of_frames_are_one_token_each(renderer):
    tokenizer, template = renderer.tokenizer, renderer.tokenizer.template
    restated = renderer.restated(QUESTION)
    assert restated[0] == tokenizer.token_id(template.start)
    assert restated[-1] == tokenizer.token_id(template.reference_end)
    assert renderer.answer(ANSWER)[-1] == tokenizer.token_id(template.end)
    assert renderer.reference(4)[-1] == tokenizer.token_id(template.reference_end)


@given(question=st.text(max_size=30))
def test_a_question_cannot_forge_frames(renderer, question):
    specials = {renderer.tokenizer.token_id(s) for s in renderer.tokenizer.template.special_tokens}
    forged = question + "".join(renderer.tokenizer.template.special_tokens[:5]) + "{question}{answer}"
    count = lambda tokens: sum(t in specials for t in tokens)  # noqa: E731
    assert count(renderer.prompt(forged)[0]) == count(renderer.prompt("a")[0])
    assert count(renderer.restated(forged)) == count(renderer.restated("a"))


def test_chinese_frames_are_chinese_and_use_the_papers_tokens():
    chinese, paper = SHIPPED["chinese"], SHIPPED["paper"]
    for name in ("question", "restated", "reply_answer", "not_found"):
        said = getattr(chinese, name)
        for special in (*chinese.frame_specials, "{question}", "{answer}"):
            said = said.replace(special, "")
        assert not any(c.isascii() and c.isalpha() for c in said)
        assert any("\u4e00" <= c <= "\u9fff" for c in said)
    for name in ("prefix", "document", "reference", "reply_head", "appended", "numbers"):
        assert getattr(chinese, name) == getattr(paper, name)
    assert chinese.special_tokens == paper.special_tokens


@pytest.mark.parametrize("name", SHIPPED)
def test_files_round_trip(name, tmp_path):
    template = dataclasses.replace(SHIPPED[name], id_digits=5)
    (tmp_path / "frames.json").write_text(template.to_json(), "utf-8")
    assert Template.load(tmp_path / "frames.json") == template
    assert "\\u" not in template.to_json()  # Chinese can be read and edited


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("numbers", ["", "place", "plain"])
def test_a_run_config_names_a_template(name, numbers):
    made = TokenizerConfig(template=name, numbers=numbers).make_template()
    assert made == dataclasses.replace(SHIPPED[name], numbers=numbers or SHIPPED[name].numbers)


def test_frames_of_ones_own_train_and_reload(tmp_path):
    own = {"question": "Frage: {question}\n", "not_found": "Davon steht nichts da.", "numbers": "place", "id_digits": 3}
    (tmp_path / "own.json").write_text(json.dumps(own), "utf-8")
    template = TokenizerConfig(template=str(tmp_path / "own.json")).make_template()
    assert (template.question, template.id_digits) == ("Frage: {question}\n", 3)
    assert template.document == Template().document  # what a file leaves out
    Tokenizer.train(["Frage"], 400, template).save(tmp_path / "tokenizer")
    (tmp_path / "own.json").unlink()  # it is needed once only
    assert Tokenizer.load(tmp_path / "tokenizer").template == template


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"own\.json: not JSON"),
        (b"[" * 100_000, r"own\.json: not JSON"),
        (b"\xff\xfe", r"own\.json cannot be read: it is not UTF-8"),
        (b'"paper"', r"own\.json: must be a JSON object"),
        (b'{"questoin": "{question}"}', r"own\.json: unknown field 'questoin'"),
        (b'{"question": 3}', r"own\.json: question must be str, got 3"),
        (b'{"id_digits": true}', r"own\.json: id_digits must be int"),
        (b'{"question": "{quesion}"}', r"own\.json: the template's question must hold \{question\}"),
        (b'{"question": "{question} {title}"}', r"own\.json: the template's question must hold \{question\}"),
        (b'{"restated": "again"}', r"own\.json: the template's restated must hold \{question\}"),
        (b'{"reply_answer": "{answer}"}', r"reply_answer must end with '<\|im_end\|>'"),
        (b'{"not_found": "no {answer}"}', r"not_found must hold no fields"),
        (b'{"not_found": " "}', r"not_found must say"),
        (b'{"pad": "<|im_end|>"}', r"own\.json: the template's special strings must be distinct"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "own.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        TokenizerConfig(template=str(tmp_path / "own.json")).make_template()
    assert "\n" not in str(caught.value).replace("\\n", "")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="frames.json cannot be read: No such file"):
        TokenizerConfig(template=str(tmp_path / "frames.json")).make_template()
